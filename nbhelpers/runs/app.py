"""The search alone, as an application: the panel over what a run trained, and nothing else.

    panel = search_panel("default")

Nothing but the first system is opened before a question comes; the others when they are chosen.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from nbhelpers.data import catalog
from nbhelpers.errors import UserError
from nbhelpers.paths import runs_root
from nbhelpers.runs import batch
from nbhelpers.runs.start import start
from nbhelpers.systems import gallery, trained_systems
from nbhelpers.systems.search_panel import SearchPanel
from nbhelpers.systems.trained_files import NAMES, RETRIEVAL, trained_files

NOTEBOOK = "60_search"


def search_panel(profile: str = "default", data: str = "") -> SearchPanel:
    """Return the search over the test split of a profile, with every system that was trained.

    data  folder of the data set, where the profile is of a real one
    UserError where no retrieval system was trained in this profile.
    """
    values = batch.values_of(profile) | {"PROFILE": profile} | ({"DATA": data} if data else {})
    wanted = batch.declared(batch.NOTEBOOKS / f"{NOTEBOOK}.ipynb")
    with redirect_stdout(io.StringIO()):  # the header of a notebook
        run = start(NOTEBOOK, **{name: values[name] for name in wanted})
    names = [name for name in RETRIEVAL if _is_there(run.folder, name, run.parameters.seed)]
    if not names:
        raise UserError(
            f"Nothing was trained in {runs_root() / profile} yet; run `make run PROFILE={profile}`"
            " first, or name another profile."
        )
    dataset = catalog.open_dataset(values["SET"], values["DATA"], run.cache)

    def opened(name: str) -> gallery.Gallery:
        with redirect_stdout(io.StringIO()):
            system = trained_systems.trained(run.folder, name, run.parameters.seed, run.device)
            return gallery.of_run(run, dataset, system, run.parameters.k)

    first = opened(names[0])
    galleries: dict[str, Callable[[], gallery.Gallery]] = {
        NAMES[name]: partial(opened, name) for name in names
    }
    galleries[NAMES[names[0]]] = lambda: first
    return SearchPanel(galleries, example=first.example)


def _is_there(folder: Path, name: str, seed: int) -> bool:
    try:
        return bool(trained_files(folder, name, seed))
    except UserError:
        return False

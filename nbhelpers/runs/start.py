"""The first call of every notebook: check parameters, set seeds and device, name the folders."""

from __future__ import annotations

import os
import platform
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

from nbhelpers.errors import UserError
from nbhelpers.paths import notebooks_folder, runs_root
from nbhelpers.runs import at_work, parameters
from nbhelpers.towers import public_weights

T = TypeVar("T")
# Where a notebook has no such parameter.
COMMON = {"PROFILE": "default", "SET": "scenes", "DATA": "", "SEED": 0, "DEVICE": "auto"}
# not among a record's settings
ELSEWHERE = ("profile", "set", "seed", "device", "data", "workers", "checkpoint", "weights")


@dataclass(frozen=True)
class Run:
    """One run of one notebook.

    notebook    its name, e.g. "20_pir"
    parameters  the notebook's parameters as attributes in lower case: run.parameters.seed
    device      torch's name of the one device of this run: "cpu", "cuda" or "mps"
    runs        the folder of all runs; `cache` is shared by all profiles, the other folders are the
                profile's
    """

    notebook: str
    parameters: SimpleNamespace
    device: str
    runs: Path

    @property
    def folder(self) -> Path:
        """The folder of the profile."""
        return self.runs / self.parameters.profile

    @property
    def cache(self) -> Path:
        """The folder of what can be computed again."""
        return self.runs / "cache"

    @property
    def records(self) -> Path:
        """The folder of result records."""
        return self.folder / "records"

    @property
    def checkpoints(self) -> Path:
        """The folder of trained models."""
        return self.folder / "checkpoints"

    @property
    def figures(self) -> Path:
        """The folder of this notebook's figures."""
        return self.folder / "figures" / self.notebook

    def checkpoint(self, name: str, key: str) -> str:
        """Return where `load_or_train` keeps the model of this name and key, below `folder`."""
        return f"{self.checkpoints.name}/{name}-{key[:16]}/model.safetensors"

    @property
    def settings(self) -> dict[str, Any]:
        """Return the parameters that a record keeps as settings.

        Left out are those with a field of their own and those that name this machine.
        """
        return {
            name.upper(): value
            for name, value in vars(self.parameters).items()
            if name not in ELSEWHERE
        }

    @property
    def engine(self) -> dict[str, Any]:
        """Return the fields of TrainConfig that this notebook's parameters give for all systems."""
        names = ("precision", "seed", "workers", "micro_batch", "recompute", "compile")
        given = vars(self.parameters)
        return {name: given[name] for name in names if name in given}

    def expect(self, holds: bool, result: str) -> None:
        """Report a result that models usually reach and this one does not.

        A small or hard set need not reach it, so there a warning is printed, and the notebook goes
        on. On the generated set, whose results are known, it is an error: AssertionError. At paper
        size it is a warning there too: hours of training must not depend on it.
        """
        known = self.parameters.set == "scenes" and getattr(self.parameters, "size", "") != "paper"
        if not holds and known:
            raise AssertionError(f"expected, but not so: {result}")
        if not holds:
            print(f"WARNING: Expected, but not so on this set: {result}.")

    def show(self, figure, name: str) -> None:
        """Write a matplotlib figure to `figures/<name>.png` and display that file at half size."""
        from nbhelpers import figures

        path = figures.save(figure, self.figures / f"{name}.png")
        if "IPython" in sys.modules:
            from IPython import display, get_ipython

            if get_ipython() is not None:
                display.display(
                    display.Image(path.read_bytes(), width=round(72 * figure.get_figwidth()))
                )

    def progress(self, items: Iterable[T], unit: str) -> Iterable[T]:
        """Return the items, with a bar while they are gone through.

        There is none where CI or TQDM_DISABLE is set, as for notebooks that run without a browser.
        """
        from tqdm.auto import tqdm

        if os.environ.get("CI") or os.environ.get("TQDM_DISABLE"):
            return items
        return tqdm(items, unit=unit, disable=False)

    def write_record(
        self, config, ranks: dict[str, np.ndarray] | None = None, **fields: Any
    ) -> dict:
        """Write a record of this run, and its ranks, to `records`; return it as it is read back.

        config, fields  as of `records.new`;  ranks  as of `records.write`
        """
        from nbhelpers.results import records

        values = self.parameters
        record = records.new(
            config,
            notebook=self.notebook,
            profile=values.profile,
            set=values.set,
            seed=values.seed,
            device=self.device,
            settings=self.settings,
            **fields,
        )
        return records.read_one(records.write(self.records, record, ranks))


def start(notebook: str, **overrides: Any) -> Run:
    """Checks the parameters, seeds python, numpy and torch, chooses the device and prints a header.

    The values are the global variables of the caller, which is the notebook, for the names in its
    cell of parameters; `overrides` count before them, and the rest has the defaults of that cell.

    Raises UserError with one sentence for each wrong value and each unknown name.
    """
    path = notebooks_folder() / f"{notebook}.ipynb"
    caller = sys._getframe(1).f_globals
    # a module has other things by such names
    is_notebook = caller.get("__name__", "__main__") == "__main__"
    given: dict[str, Any] = COMMON | parameters.of_notebook(
        path, caller if is_notebook else {}, overrides
    )
    public_weights.use(given.get("WEIGHTS", {}))
    device, threads = _prepare_torch(given["SEED"], given["DEVICE"])
    _check_precision(given.get("PRECISION", "fp32"), device)
    _encode_in(given.get("EVAL_PRECISION", "fp32"))
    if is_notebook:
        at_work.until_the_end(f"notebook {notebook}")
    random.seed(given["SEED"])
    np.random.seed(given["SEED"])
    values = SimpleNamespace(**{name.lower(): value for name, value in given.items()})
    print(f"{notebook} · profile {values.profile} · seed {values.seed}")
    print(f"data set: {values.set} ({_origin(values.set)})")
    print(
        f"device: {device}, {threads} thread{'s' * (threads > 1)}, {platform.system()}"
        f" {platform.machine()}"
    )
    print(
        f"python {platform.python_version()}, "
        + ", ".join(
            f"{name} {version(name)}" for name in ("nbhelpers", "torch", "transformers", "timm")
        )
    )
    return Run(notebook, values, device, runs_root())


def _origin(name: str) -> str:
    from nbhelpers.data import catalog

    if name == "scenes":
        return "generated by this project, not comparable with a paper"
    return "real" if name in catalog.KNOWN else "your own"


def _check_precision(precision: str, device: str) -> None:
    from nbhelpers.training import device as devices

    devices.check_precision(precision, devices.resolve(device))


def _encode_in(precision: str) -> None:
    from nbhelpers.training import device as devices

    devices.encode_in(precision)


def _prepare_torch(seed: int, device: str) -> tuple[str, int]:
    """Seeds torch and returns (device, threads); imported here, as batch.py needs no torch."""
    import cv2
    import torch

    from nbhelpers.training import device as devices

    wish = os.environ.get("NBHELPERS_THREADS") or str(torch.get_num_threads())
    if not wish.isdecimal() or int(wish) < 1:
        raise UserError(f"NBHELPERS_THREADS is '{wish}'; it must be a whole number of at least 1.")
    threads = min(int(wish), os.cpu_count() or 1)
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    torch.manual_seed(seed)
    return str(devices.use(device)), threads

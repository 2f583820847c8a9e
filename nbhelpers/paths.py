"""Find the repository and the folder of runs."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

from nbhelpers.errors import UserError


def repository_root() -> Path:
    """Return the folder above this package that holds the project's pyproject.toml.

    UserError if there is none.
    """
    for folder in Path(__file__).resolve().parents:
        project = folder / "pyproject.toml"
        if project.is_file() and _project_name(project) == "nbhelpers":
            return folder
    raise UserError(
        "nbhelpers stands outside its repository: install it with `pip install -e .` in a clone."
    )


def notebooks_folder() -> Path:
    """Return the folder of the notebooks. UserError outside the repository."""
    return repository_root() / "notebooks"


def _project_name(project: Path) -> str:
    return tomllib.loads(project.read_text()).get("project", {}).get("name", "")


def runs_root() -> Path:
    """Return the folder of runs: NBHELPERS_RUNS, else runs/ in the repository.

    UserError if NBHELPERS_RUNS is a relative path.
    """
    named = os.environ.get("NBHELPERS_RUNS", "")
    if named and not Path(named).is_absolute():
        raise UserError(
            f"NBHELPERS_RUNS is '{named}', but must be absolute: notebooks run elsewhere."
        )
    return Path(named) if named else repository_root() / "runs"

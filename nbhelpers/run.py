"""The first call of every notebook: checks its parameters, sets seeds and device, says where things go."""
from __future__ import annotations

import os
import platform
import random
import re
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from nbhelpers.errors import UserError

KINDS = {
    "PROFILE": str, "SET": str, "DATA": str, "SIZE": str, "DEVICE": str, "CHECKPOINT": str, "PRIOR": str,
    "SEED": int, "EPOCHS": int, "BATCH_SIZE": int, "WORKERS": int, "VIEWS": int, "LR": float, "FALSE_TEXTS": int, "K": int,
    "IMAGES": int, "TRIED": int,
}
ELSEWHERE = ("profile", "set", "seed", "device", "data", "workers", "checkpoint")  # not among a record's settings
KINDS_BY_END = {"_EPOCHS": int, "_BATCH": int, "_ACCUMULATE": int, "_LR": float}  # of one system: CFITR_EPOCHS, ...
CHOICES = {"SIZE": ("tiny", "compact", "paper"), "DEVICE": ("auto", "cpu", "cuda", "mps")}
LOWEST = {"SEED": 0, "EPOCHS": 1, "BATCH_SIZE": 1, "WORKERS": 0, "VIEWS": 0, "CFITR_BATCH": 2, "FALSE_TEXTS": 1, "K": 10,
          "IMAGES": 2, "TRIED": 0}


def repository_root() -> Path:
    """The folder above this package that holds the project's pyproject.toml. UserError if there is none."""
    for folder in Path(__file__).resolve().parents:
        project = folder / "pyproject.toml"
        if project.is_file():
            if tomllib.loads(project.read_text()).get("project", {}).get("name") == "nbhelpers":
                return folder
    raise UserError("nbhelpers stands outside its repository: install it with `pip install -e .` in a clone.")


def runs_root() -> Path:
    """Where runs are kept: NBHELPERS_RUNS, else runs/ in the repository, wherever one is working."""
    named = os.environ.get("NBHELPERS_RUNS", "")
    if named and not Path(named).is_absolute():
        raise UserError(f"NBHELPERS_RUNS is '{named}', but must be absolute: notebooks run elsewhere.")
    return Path(named) if named else repository_root() / "runs"


@dataclass(frozen=True)
class Run:
    """One run of one notebook.

    notebook    its name, e.g. "20_pir"
    parameters  the notebook's parameters as attributes in lower case: run.parameters.seed
    device      torch's name of the one device of this run: "cpu", "cuda" or "mps"
    runs        the folder of all runs; `cache` is shared by all profiles, the other folders are the profile's
    """

    notebook: str
    parameters: SimpleNamespace
    device: str
    runs: Path

    @property
    def folder(self) -> Path:
        return self.runs / self.parameters.profile

    @property
    def cache(self) -> Path:
        return self.runs / "cache"

    @property
    def records(self) -> Path:
        return self.folder / "records"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.folder / "figures" / self.notebook

    def checkpoint(self, name: str, key: str) -> str:
        """Where `training.load_or_train` keeps the model of this name and key, below `folder`; records say it."""
        return f"{self.checkpoints.name}/{name}-{key[:16]}/model.safetensors"

    @property
    def settings(self) -> dict[str, Any]:
        """The notebook's parameters that a record keeps: all but its own fields, and what names this machine."""
        return {name.upper(): value for name, value in vars(self.parameters).items() if name not in ELSEWHERE}

    def show(self, figure, name: str) -> None:
        """Writes a matplotlib figure to `figures/<name>.png` and displays that very file, at half size."""
        from nbhelpers import figures
        path = figures.save(figure, self.figures / f"{name}.png")
        if "IPython" in sys.modules:
            from IPython import display, get_ipython
            if get_ipython() is not None:
                display.display(display.Image(path.read_bytes(), width=round(72 * figure.get_figwidth())))

    def write_record(self, config, ranks: dict[str, np.ndarray], **fields: Any) -> Path:
        """Writes a result record and its ranks to `records`; config, ranks and fields as in records.py."""
        from nbhelpers import records
        values = self.parameters
        record = records.new(config, notebook=self.notebook, profile=values.profile, set=values.set,
                             seed=values.seed, device=self.device, settings=self.settings, **fields)
        return records.write(self.records, record, ranks)


def start(notebook: str, **parameters: Any) -> Run:
    """Checks the parameters, seeds python, numpy and torch, chooses the device and prints a header.

    Raises UserError, one sentence, on a parameter of the wrong type or outside its range.
    """
    parameters = {"PROFILE": "default", "SET": "scenes", "DATA": "", "SEED": 0, "DEVICE": "auto"} | parameters
    for name, value in parameters.items():
        _check_type(name, value)
    _check_values(parameters)
    device, threads = _prepare_torch(parameters["SEED"], parameters["DEVICE"])
    random.seed(parameters["SEED"])
    np.random.seed(parameters["SEED"])
    values = SimpleNamespace(**{name.lower(): value for name, value in parameters.items()})
    print(f"{notebook} · profile {values.profile} · seed {values.seed}")
    print(f"data set: {values.set} ({_origin(values.set)})")
    print(f"device: {device}, {threads} thread{'s' * (threads > 1)}, {platform.system()} {platform.machine()}")
    print(f"python {platform.python_version()}, "
          + ", ".join(f"{name} {version(name)}" for name in ("nbhelpers", "torch", "transformers", "timm")))
    return Run(notebook, values, device, runs_root())


def _origin(name: str) -> str:
    from nbhelpers.data import catalog
    if name == "scenes":
        return "generated by this project, not comparable with a paper"
    return "real" if name in catalog.KNOWN else "your own"


def _check_type(name: str, value: Any) -> None:
    wanted = KINDS.get(name) or _kind_by_end(name)
    if name != name.upper():
        raise UserError(f"The parameter {name} must be written in capitals: {name.upper()}.")
    if wanted is None or type(value) is wanted or (wanted is float and type(value) is int):
        return
    advice = " (YAML takes 1e-4 for text; write 1.0e-4)" if wanted is float and isinstance(value, str) else ""
    raise UserError(f"{name} is {value!r}, a {type(value).__name__}, but must be {wanted.__name__}{advice}.")


def _kind_by_end(name: str) -> type | None:
    return next((kind for end, kind in KINDS_BY_END.items() if name.endswith(end)), None)


def _check_values(parameters: dict[str, Any]) -> None:
    from nbhelpers.data import catalog
    name, known = parameters["SET"], ["scenes", *catalog.KNOWN]
    if not parameters["DATA"] and name not in known:
        raise UserError(f"SET is '{name}'; choose one of {', '.join(known)}, or name with DATA the folder of a set of your own.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise UserError(f"SET is '{name}'; name a set of your own with small letters, digits, '_' and '-' only.")
    for name, allowed in CHOICES.items():
        if name in parameters and parameters[name] not in allowed:
            raise UserError(f"{name} is '{parameters[name]}'; choose one of {', '.join(allowed)}.")
    lowest_of = LOWEST | {name: 1 for name in parameters if _kind_by_end(name) is int and name not in LOWEST}
    for name, lowest in lowest_of.items():
        if parameters.get(name, lowest) < lowest:
            raise UserError(f"{name} is {parameters[name]}; it must be at least {lowest}.")
    if parameters["SEED"] >= 2**32:
        raise UserError(f"SEED is {parameters['SEED']}; it must be below 2**32.")
    profile = parameters["PROFILE"]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", profile) or profile == "cache":
        raise UserError(f"PROFILE is '{profile}'; take letters, digits, '_' and '-' only, and not 'cache'.")
    if parameters["SET"] != "scenes" and not parameters["DATA"]:
        raise UserError(f"SET {parameters['SET']} needs DATA, the folder that holds its images and captions.")
    if parameters["DATA"] and not Path(parameters["DATA"]).is_dir():
        raise UserError(f"DATA is '{parameters['DATA']}', not a folder; give that of images and captions.")


def _prepare_torch(seed: int, device: str) -> tuple[str, int]:
    """Seeds torch and returns (device, threads); imported here, as batch.py needs no torch."""
    import torch

    from nbhelpers import device as devices
    wish = os.environ.get("NBHELPERS_THREADS") or str(torch.get_num_threads())
    if not wish.isdecimal() or int(wish) < 1:
        raise UserError(f"NBHELPERS_THREADS is '{wish}'; it must be a whole number of at least 1.")
    threads = min(int(wish), os.cpu_count() or 1)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    return str(devices.use(device)), threads

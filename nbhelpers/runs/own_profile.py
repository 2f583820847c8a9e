"""A profile for a data set of your own: the default parameters, made to fit its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nbhelpers.data import catalog, check, layouts
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.paths import notebooks_folder
from nbhelpers.runs import batch

LEAST_STEPS = 8  # of an epoch: with fewer, batches become smaller, down to LEAST_BATCH pairs
LEAST_BATCH = 8


def fitting(table: CaptionTable) -> tuple[dict[str, Any], list[str]]:
    """Return the values that a set needs beside the defaults, and what no value mends.

    Sentences of the second list say what is missing, such as training images.
    """
    defaults = batch.values_of("default")
    values: dict[str, Any] = {}
    if check.no_scene_prior(table):
        values["SIZE"] = "tiny"
    for name, pairs in check.training_pairs(table.split("train"), defaults["CAPTIONS"]).items():
        wanted = min(defaults[name], max(LEAST_BATCH, pairs // LEAST_STEPS), pairs)
        if wanted != defaults[name] and wanted > 1:
            values[name] = wanted
    return values, check.too_small(table, defaults | values)


def write(name: str, data: str) -> tuple[Path, dict[str, Any], list[str]]:
    """Write notebooks/profiles/<name>.yaml for the set `name` in the folder `data`.

    Returns its path, its values, and what no value mends. UserError for a set that is not there,
    one of the catalogue, and a profile that exists.
    """
    if name in catalog.KNOWN or name == "scenes":
        raise UserError(f"{name} is a known set; a profile of your own is for a set of your own.")
    captions, _ = catalog.find(name, data)
    table = layouts.read(captions)
    values, left = fitting(table)
    path = notebooks_folder() / "profiles" / f"{name}.yaml"
    if path.exists():
        raise UserError(f"{path} exists; change it by hand, or delete it first.")
    content = {"PROFILE": name, "SET": name, **values}
    with atomic_write(path) as temporary:
        temporary.write_text(
            f"# Written by `python -m nbhelpers data profile` for {len(table)} images.\n"
            "# All other values are the defaults of the notebooks.\n"
            + yaml.safe_dump(content, sort_keys=False)
        )
    return path, content, left

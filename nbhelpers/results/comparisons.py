"""Compare recorded runs with their controls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from nbhelpers.errors import UserError
from nbhelpers.metrics.recall import Recall
from nbhelpers.metrics.significance import Runs, holm, paired_test
from nbhelpers.results import records
from nbhelpers.results.controls import key_of


def read_runs(
    folder: Path | str, names: Mapping[tuple[str, str], str], fingerprint: str = ""
) -> tuple[Runs, np.ndarray]:
    """(runs, owner) of the records in a folder, of every seed, in the order of `names`.

    names        (notebook, variant) of a record -> the name it is to have; other records are left
                 out
    fingerprint  of the data; "" for that of the records if all have the same
    UserError if there is none, or if they speak of several test splits.
    """
    found: dict[tuple[str, str], dict[int, Recall]] = {}
    owners, seen = [], set()
    for record in records.read(folder):
        key = key_of(record)
        if key in names and record["data_fingerprint"] == (
            fingerprint or record["data_fingerprint"]
        ):
            seen.add(record["data_fingerprint"])
            run, owner = records.read_recall(record.path)
            found.setdefault(key, {})[record["seed"]] = run
            owners.append(owner)
    if not owners:
        raise UserError(
            f"{folder} has no record of {', '.join(names.values())} on these data; run their"
            " notebooks first."
        )
    if len(seen) > 1 or any(not np.array_equal(owner, owners[0]) for owner in owners):
        raise UserError(
            f"The records in {folder} speak of different test splits; name the fingerprint of one."
        )
    return {names[key]: found[key] for key in names if key in found}, owners[0]


def against_controls(
    runs: Runs,
    controls: Mapping[str, str],
    owner: np.ndarray,
    metric: str = "mR",
    level: float = 0.05,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare each system with its own control, one row a system.

    Columns: control, seeds, difference in points, its 95 % interval (low, high), p corrected by
    Holm for the rows, and whether p is below the level (`real`).

    controls  system -> its control; a pair of which a run is missing is left out
    """
    pairs = {
        name: control for name, control in controls.items() if name in runs and control in runs
    }
    rows = {
        name: (
            {"control": control} | paired_test(runs[name], runs[control], owner, metric, seed=seed)
        )
        for name, control in pairs.items()
    }
    columns = ["control", "seeds", "difference", "low", "high", "p"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    table["p"] = holm(list(table.p))
    return table.assign(real=table.p < level)


def control_sentences(table: pd.DataFrame, metric: str = "mR") -> list[str]:
    """One statement for each row of `against_controls`."""
    said = []
    for name, row in table.iterrows():
        points = (
            f"{row.difference:+.1f} points of {metric}, {row.low:+.1f} to {row.high:+.1f}, p ="
            f" {row.p:.2g}"
        )
        if not row.real:
            said.append(f"{name} and its control, {row.control}, cannot be told apart ({points}).")
        else:
            better = "better" if row.difference > 0 else "worse"
            said.append(f"{name} is {better} than its control, {row.control} ({points}).")
    return said

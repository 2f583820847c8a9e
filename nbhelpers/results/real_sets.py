"""What a notebook's system reached on real images, read from the records in data/results."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from nbhelpers.paths import repository_root
from nbhelpers.results import leaderboard
from nbhelpers.results.exports import read

SETS = ("ucm", "rsicd")
LINES = tuple(leaderboard.BOUNDS[name] for name in ("class_only", "chance"))
COLUMNS = ("mR", "95 % interval", "over its control", "BLEU-4", "METEOR", "CIDEr")


def rows(notebook: str, folder: Path | None = None) -> pd.DataFrame:
    """Return the rows that a notebook's runs have on real sets, as text.

    Indexed by set and system; the columns are those of the leaderboard that compare. Below the
    systems of a retrieval set stand two rows that no run made: "class only" knows the scene class
    of each image and caption, and nothing else; "chance" guesses.

    notebook  that wrote the records, e.g. "20_pir" or "50_score_captions"
    folder    data/results, unless another one is named

    UserError without records.
    """
    folder = folder or repository_root() / "data/results"
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name in SETS:
        for board in leaderboard.boards(read([folder / name])):
            found |= {(name, label): row for label, row in _of_board(board, notebook).items()}
    table = pd.DataFrame.from_dict(found, "index").rename_axis(["set", "system"])
    return table.loc[:, (table != "").any()]


def _of_board(board: leaderboard.Board, notebook: str) -> dict[str, dict[str, str]]:
    """Name -> columns of the rows that a notebook wrote, and below any of these, of `LINES`."""
    chosen, lines = {}, {}
    for row, files in zip(board.shown.to_dict("records"), board.files, strict=True):
        shown = {title: row[title] for title in COLUMNS if title in row}
        shown["seeds"] = str(len(files) or "")
        if files and files[0].name.startswith(f"{notebook}-"):
            chosen[row["system"]] = shown
        elif row["system"] in LINES:
            lines[row["system"]] = shown
    return chosen and chosen | lines

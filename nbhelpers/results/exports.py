"""Write the leaderboard's tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable
from pathlib import Path

from nbhelpers.results import records
from nbhelpers.results.leaderboard import Board

LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def markdown(
    boards: Iterable[Board],
    folder: Path | str | None = None,
    level: int = 3,
    columns: Container[str] | None = None,
) -> str:
    """The tables as Markdown, all columns or those named.

    Where it is to lie in a `folder`, each seed is a link to its record.
    """
    parts = []
    for board in boards:
        shown = board.shown[
            [title for title in board.shown if columns is None or title in columns]
        ].copy()
        if folder is not None and "seeds" in shown:
            shown["seeds"] = [
                _links(seeds, files, Path(folder))
                for seeds, files in zip(shown.seeds, board.files, strict=True)
            ]
        cells = [
            [cell.replace("|", "\\|") for cell in row]
            for row in [list(shown.columns), *shown.values.tolist()]
        ]
        cells.insert(1, ["---" for _ in shown])
        parts += [
            f"{'#' * level} {board.heading}",
            "\n".join(f"| {' | '.join(row)} |" for row in cells),
            "\n".join(f"- {note}" for note in board.notes),
        ]
    return "\n\n".join(parts) + "\n"


def csv(board: Board, folder: Path | str = ".") -> str:
    """Return all columns of each row, to six decimals, with the paths of its records.

    Paths start from `folder`.
    """
    rows = board.rows.dropna(axis=1, how="all").round(6)
    if any(board.files):
        rows = rows.assign(
            records=[" ".join(_places(files, Path(folder))) for files in board.files]
        )
    return rows.to_csv(lineterminator="\n")


def latex(boards: Iterable[Board]) -> str:
    """Return the tables for `input` in a paper that loads booktabs and graphicx.

    Comments tell what would make them too wide to read: the record of each seed, and what it
    started from.
    """
    parts = ["% needs \\usepackage{booktabs,graphicx}"]
    for board in boards:
        shown = board.shown.drop(columns=["seeds", "started from"], errors="ignore")
        rows = [
            " & ".join(map(escaped, row)) + r" \\"
            for row in [list(shown.columns), *shown.values.tolist()]
        ]
        began = ["" for _ in shown.index]
        if "started from" in board.shown:
            began = list(board.shown["started from"])
        named = [
            f"% {' '.join(name.split())}:"
            f" {' '.join(path.name for path in files)}{f' from {first}' if first else ''}"
            for name, first, files in zip(shown.index, began, board.files, strict=True)
            if files
        ]
        parts.append(
            "\n".join(
                [
                    r"\begin{table*}",
                    r"\centering",
                    rf"\caption{{{escaped(board.heading)}. {escaped(' '.join(board.notes))}}}",
                    rf"\label{{tab:{re.sub(r'[^A-Za-z0-9-]', '-', board.stem)}}}",
                    r"\resizebox{\linewidth}{!}{%",
                    rf"\begin{{tabular}}{{l{'r' * (shown.shape[1] - 1)}}}",
                    r"\toprule",
                    rows[0],
                    r"\midrule",
                    *rows[1:],
                    r"\bottomrule",
                    r"\end{tabular}}",
                    r"\end{table*}",
                    *named,
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def escaped(cell: str) -> str:
    """Return a cell's text with LaTeX's special characters escaped."""
    return "".join(LATEX.get(letter, letter) for letter in cell)


def read(folders: Iterable[Path | str]) -> list[records.Record]:
    """The records of both kinds in `folders`."""
    return [records.read_one(path) for path in records.paths(folders)]


def _links(seeds: str, files: tuple[Path, ...], folder: Path) -> str:
    return " ".join(
        f"[{seed}]({place})"
        for seed, place in zip(seeds.split(), _places(files, folder), strict=True)
    )


def _places(files: tuple[Path, ...], folder: Path) -> list[str]:
    return [Path(os.path.relpath(path, folder)).as_posix() for path in files]

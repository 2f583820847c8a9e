"""Write the tables and cards of result records as files, and renew those of the README."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.results import cards, leaderboard
from nbhelpers.results.exports import csv, latex, markdown, read

MARKS = re.compile(
    r"(<!-- records: (?P<folder>\S+) -->\n)(?P<between>.*?)(<!-- end of records -->)", re.S
)
IN_README = {
    "system",
    "mR",
    "95 % interval",
    "alike",
    "over its control",
    "mR, released rule",
    "BLEU-4",
    "METEOR",
    "CIDEr",
    "trained / all parameters",
    "seeds",
}


def write(folders: Iterable[Path | str], out: Path | str) -> list[Path]:
    """Write the leaderboard and a card for each paper; return the paths.

    The records in `folders` become leaderboard.md, leaderboard.tex, one CSV for each table, and the
    cards, all in `out`.
    """
    out, found = Path(out), read(folders)
    boards = leaderboard.boards(found)
    files = {
        "leaderboard.md": f"# Leaderboard\n\n{markdown(boards, out, 2)}",
        "leaderboard.tex": latex(boards),
    }
    files |= {f"{board.stem}.csv": csv(board, out) for board in boards}
    files |= {
        f"cards/{name}.md": card for name, card in cards.cards(found, boards, out / "cards").items()
    }
    for name, content in files.items():
        _write(out / name, content)
    return [out / name for name in files]


def _write(path: Path, content: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(content, "utf-8")


def readme(path: Path | str) -> bool:
    """Renew the tables that a file shows between its marks; return whether it changed.

    The marks are `<!-- records: FOLDER -->` and `<!-- end of records -->`; FOLDER is relative to
    the file. Wide columns are left out. UserError without such marks.
    """
    path = Path(path)
    before = path.read_text("utf-8")
    after = renewed(before, path.parent)
    if after != before:
        _write(path, after)
    return after != before


def renewed(content: str, folder: Path) -> str:
    """`content` of a file in `folder` with the tables between its marks made anew."""
    if not MARKS.search(content):
        raise UserError(
            "There are no marks to write between; put `<!-- records: data/results/ucm -->` and, on"
            " a line below, `<!-- end of records -->` where the tables belong."
        )

    def tables(found: re.Match) -> str:
        boards = leaderboard.boards(read([folder / found["folder"]]))
        return f"{found[1]}\n{markdown(boards, folder, 4, IN_README)}\n{found[4]}"

    return MARKS.sub(tables, content)

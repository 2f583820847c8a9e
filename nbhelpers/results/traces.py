"""Numbers in the sentences of a page, traced to the records that they come from.

Behind a number, a number with its spread, or an interval stands a comment, which readers of the
page do not see:

    PIR reaches 51.6 ± 0.3<!-- ucm | PIR | mR --> on UCM.

It names a folder of data/results, and a row and a column of the leaderboard of its records.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nbhelpers.errors import UserError
from nbhelpers.results import leaderboard
from nbhelpers.results.exports import read

NUMBER = r"[+-]?\d+(?:\.\d+)?"
TRACE = re.compile(
    rf"(?P<said>{NUMBER}(?: (?:±|to) {NUMBER})?)"
    r"<!-- (?P<folder>[^|>]+) \| (?P<row>[^|>]+) \| (?P<column>[^|>]+?) -->"
)


Cells = dict[tuple[str, str], tuple[str, tuple[Path, ...]]]


@dataclass(frozen=True)
class Trace:
    """A number of a page and the cell of a leaderboard that it comes from.

    page     the file
    line     of the page, from 1
    said     as the sentence has it, e.g. "51.6 ± 0.3"
    cell     the text of the cell, e.g. "+2.9 [+0.9, +4.8]"
    records  the files that the row is made of
    """

    page: Path
    line: int
    said: str
    row: str
    column: str
    cell: str
    records: tuple[Path, ...]

    def __str__(self) -> str:
        files = ", ".join(path.name for path in self.records)
        where = f"{self.page.parent.name}/{self.page.name}:{self.line}"
        return f"{where}  {self.said} = {self.row}, {self.column}: {self.cell}  ({files})"

    @property
    def holds(self) -> bool:
        """Whether the cell has each number of the sentence, to the digit.

        A number without a sign is a size: "7.6 behind" for -7.6.
        """
        there = set(re.findall(NUMBER, self.cell))
        there |= {number.lstrip("+-") for number in there}
        return set(re.findall(NUMBER, self.said)) <= there


def traces(page: Path, results: Path) -> list[Trace]:
    """Return the traced numbers of a page, in order.

    results  the folder that holds the folders of records

    UserError where a comment names no folder, row or column that exists.
    """
    return list(_found(page, cache(lambda folder: _cells(results / folder))))


def _found(page: Path, cells: Callable[[str], Cells]) -> Iterator[Trace]:
    content = page.read_text("utf-8")
    for found in TRACE.finditer(content):
        line = content.count("\n", 0, found.start()) + 1
        rows = cells(found["folder"])
        if (found["row"], found["column"]) not in rows:
            raise UserError(
                f"{page}, line {line}: no leaderboard of {found['folder']} has the row"
                f" {found['row']!r} and the column {found['column']!r};"
                " `python -m nbhelpers records table` prints them."
            )
        cell, files = rows[found["row"], found["column"]]
        yield Trace(page, line, found["said"], found["row"], found["column"], cell, files)


def _cells(folder: Path) -> Cells:
    """(row, column) -> text and record files, over the leaderboards of a folder of records.

    Published rows are left out.
    """
    found: Cells = {}
    for board in leaderboard.boards(read([folder])):
        rows = board.shown.to_dict("records") if any(board.files) else []
        for row, files in zip(rows, board.files, strict=False):
            found |= {(row["system"], column): (text, files) for column, text in row.items()}
    return found

"""Say how two splits of one set differ, such as a published one and that of a paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError

NOWHERE = "no split"  # of an image that a table lacks


def moves(one: CaptionTable, other: CaptionTable) -> Counter[tuple[str, str]]:
    """Count images by (their split in `one`, their split in `other`).

    Images are the same if their file names are, folders and endings aside. An image that is in one
    table alone has the split NOWHERE in the other. UserError if no image is in both, or a table has
    two of one name.
    """
    first, second = _by_name(one), _by_name(other)
    if not first.keys() & second.keys():
        raise UserError(
            f"{one.name} and {other.name} have no file name in common; compare two splits of one"
            " set."
        )
    names = sorted(first.keys() | second.keys())
    return Counter((first.get(name, NOWHERE), second.get(name, NOWHERE)) for name in names)


def sentence(counts: Mapping[tuple[str, str], int]) -> str:
    """Say which images move, and whether results on test can be compared."""
    moved = [
        f"{count:,} from {old} to {new}"
        for (old, new), count in sorted(counts.items(), key=lambda item: -item[1])
        if old != new
    ]
    what = f"Images that move: {', '.join(moved)}." if moved else "No image moves."
    same = counts.get(("test", "test"), 0)
    if not any("test" in pair and pair[0] != pair[1] for pair in counts):
        return f"{what} Test is the same, {same:,} images, so only training differs."
    return (
        f"{what} Test differs: {same:,} images are in both. Results on one and on the other are not"
        " comparable."
    )


def of_rows(pairs: Iterable[tuple[str | None, str | None]]) -> Counter[tuple[str, str]]:
    """Count as `moves` does, from the two splits that each image of one file has."""
    return Counter((old or NOWHERE, new or NOWHERE) for old, new in pairs)


def _by_name(table: CaptionTable) -> dict[str, str]:
    names = [PurePosixPath(file).stem for file in table.images.file]
    found = dict(zip(names, table.images.split, strict=True))
    if len(found) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(
            f"{table.name} has several images called {twice}, so splits cannot be compared by file"
            " names; give names that differ."
        )
    return found

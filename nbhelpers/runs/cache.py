"""What runs keep in `runs/cache` to be faster: shown by kind, and cleared.

All of it can be made again.

Nothing is cleared while a run is busy. Other entries of that folder, and links, are left alone.
"""

from __future__ import annotations

import fnmatch
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nbhelpers.errors import UserError
from nbhelpers.files import temporary_name
from nbhelpers.runs.at_work import at_work

KINDS = {  # kind -> names of its folders, what it holds
    "images": ("images-*", "decoded images"),
    "features": ("features-*", "features of frozen towers, vectors of any model"),
    "nearest": ("nearest-*", "lists of large searches"),
    "sets": ("scenes_b-*", "generated sets that stand-ins learn from"),
    "weights": ("smollm2-*", "weights unfolded from packages"),
    "unfinished": (".*", "left by a run that was killed"),
}
OTHER = "other"  # what is no cache
DAY = 24 * 3600


@dataclass(frozen=True)
class Entry:
    """One folder of the cache: kind, size in bytes, last use of a file in it (Unix seconds)."""

    path: Path
    kind: str
    size: int
    used: float


def entries(runs: Path) -> list[Entry]:
    """Return the folders of the cache below the folder of runs.

    Most file systems note at most once a day that a file was read.
    """
    folder = runs / "cache"
    return [_entry(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []


def _entry(path: Path) -> Entry:
    cached = path.is_dir() and not path.is_symlink()
    kind = next(
        (
            kind
            for kind, (name, _) in KINDS.items()
            if cached and fnmatch.fnmatchcase(path.name, name)
        ),
        OTHER,
    )
    if cached and path.with_name(f".{path.name}.lock").exists():
        kind = "unfinished"
    # to list a folder counts as reading it
    found = [file for file in path.rglob("*") if not file.is_dir()] if cached else []
    files = [file.lstat() for file in found or [path]]
    return Entry(
        path,
        kind,
        sum(512 * file.st_blocks for file in files),
        max(max(f.st_atime, f.st_mtime) for f in files),
    )


def table(found: Iterable[Entry]) -> str:
    """Kind, number, megabytes and last use, to be read."""
    found = list(found)
    lines = [f"{'kind':12}{'folders':>8}{'MB':>10}  last used"]
    for kind, what in [
        *((kind, what) for kind, (_, what) in KINDS.items()),
        (OTHER, "no cache, never cleared"),
    ]:
        if own := [entry for entry in found if entry.kind == kind]:
            used = datetime.fromtimestamp(max(entry.used for entry in own))
            lines.append(
                f"{kind:12}{len(own):8}{sum(entry.size for entry in own) / 1e6:10.1f} "
                f" {used:%Y-%m-%d %H:%M}  {what}"
            )
    return "\n".join(
        [*lines, f"{'together':12}{len(found):8}{sum(entry.size for entry in found) / 1e6:10.1f}"]
    )


def clear(runs: Path, kinds: Iterable[str] | None = None, days: float = 0.0) -> list[Entry]:
    """Remove folders of some kinds (all for None) not used for so many days; return them.

    What looks unfinished may be in the making on another machine, and stays for a day. UserError
    for an unknown kind, negative days, and while a command or a notebook is busy; then nothing is
    removed.
    """
    chosen = set(kinds or KINDS)
    if unknown := chosen - KINDS.keys():
        raise UserError(f"The cache has no kind '{min(unknown)}'; choose among {', '.join(KINDS)}.")
    if not days >= 0:
        raise UserError(f"The age is {days} days; give a number of at least 0.")
    with at_work(runs, "cache clear", alone=True):
        now = time.time()
        old = [
            entry
            for entry in entries(runs)
            if entry.kind in chosen
            and now - entry.used >= DAY * max(days, entry.kind == "unfinished")
        ]
        for entry in old:
            _remove(entry.path)
    return old


def _remove(path: Path) -> None:
    """First under a hidden name, so that no reader meets half a folder."""
    try:
        gone = temporary_name(path)
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise UserError(
            f"{path} was not removed ({error.strerror}); make sure that you own it."
        ) from error


def cleared(removed: list[Entry]) -> str:
    """One line on what `clear` removed."""
    return f"Removed {len(removed)} folders of {sum(entry.size for entry in removed) / 1e6:.1f} MB."

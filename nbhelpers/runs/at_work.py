"""Know which commands work in a folder of runs, so that none takes away what another one reads.

Each command has a file in `runs/.at_work` and holds a lock on it. The lock ends with its process.
A run gives its pid to the notebooks that it starts; they end when it dies.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write, take

STARTED_BY = "NBHELPERS_STARTED_BY"  # environment variable: the run that a process belongs to
LOOK_EVERY = 1.0  # seconds between two looks for that run
ENDING = 5.0  # seconds that what a dead run started may take to end


@dataclass(frozen=True)
class Work:
    """One command at work.

    what     the command, for messages
    profile  the profile whose folder it has for itself; "": none
    alone    whether nothing else may work in the folder of runs
    run      pid and start of the run that it belongs to, as `process_name` writes them
    host     the machine, and `since` when it began
    """

    what: str
    profile: str
    alone: bool
    run: str
    host: str
    since: str

    def excludes(self, other: Work) -> bool:
        """Whether the two may not work at the same time."""
        if self.run == other.run:
            return False
        return self.alone or other.alone or (self.profile != "" and self.profile == other.profile)

    def __str__(self) -> str:
        host = "" if self.host == platform.node() else f" on {self.host}"
        return f"{self.what} (process {self.run.split('-')[0]}{host}, since {self.since})"


@contextmanager
def at_work(runs: Path, what: str, profile: str = "", alone: bool = False) -> Iterator[None]:
    """Note this process as at work in the folder of runs until the end of the block.

    UserError, and nothing is begun, if another command works there that excludes it; the sentence
    names the command, its process and since when it works.
    """
    run = os.environ.get(STARTED_BY) or process_name(os.getpid())
    since = datetime.now().strftime("%H:%M on %d %B")
    mine = Work(what, profile, alone, run, platform.node(), since)
    folder = runs / ".at_work"
    lock = _enter(folder, mine)
    try:
        yield
    finally:
        with _one_at_a_time(folder):
            _remove(lock)


def _enter(folder: Path, mine: Work) -> FileLock:
    """Return the lock of this process, taken when nothing excludes it."""
    patience = time.monotonic() + ENDING
    while True:
        with _one_at_a_time(folder):
            busy = [work for work in others(folder) if mine.excludes(work)]
            if not busy:
                return _write(folder, mine)
        if time.monotonic() > patience or not all(_has_died(work) for work in busy):
            raise UserError(
                f"{busy[0]} is busy in {folder.parent}, so {mine.what} was not begun; "
                "wait for its end, or end it."
            )
        time.sleep(LOOK_EVERY / 4)


def others(folder: Path) -> list[Work]:
    """Return what works now; remove what dead processes left. Call it in `_one_at_a_time`."""
    found = []
    for path in sorted(folder.glob("*.lock")):
        lock = FileLock(path)
        if not take(lock, 0):
            found.append(_read(path.with_suffix(".json")))
            continue
        _remove(lock)
    return found


def _remove(lock: FileLock) -> None:
    path = Path(lock.lock_file)
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    lock.release()


def _read(path: Path) -> Work:
    try:
        return Work(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return Work("another command", "", True, f"{path.stem}-0", platform.node(), "unknown")


def _write(folder: Path, mine: Work) -> FileLock:
    path = folder / f"{os.getpid()}-{threading.get_ident()}.lock"
    lock = FileLock(path)
    take(lock)
    with atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(asdict(mine)))
    return lock


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "register")
    take(lock)
    try:
        yield
    finally:
        lock.release()


# processes


def process_name(pid: int) -> str:
    """Return pid and start of a process: a later process may get its pid, but not its start."""
    return f"{pid}-{psutil.Process(pid).create_time():.2f}"


def lives(name: str) -> bool:
    """Whether the process of this `process_name` still works on this machine."""
    pid, began = name.split("-")
    try:
        process = psutil.Process(int(pid))
        # the start is reckoned from the clock, which may be set
        same = abs(process.create_time() - float(began)) < 60
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _has_died(work: Work) -> bool:
    return work.host == platform.node() and not lives(work.run)


def end_with_the_run() -> None:
    """End this process and all that it started as soon as the run that started it has died.

    Without STARTED_BY in the environment nothing happens.
    """
    run = os.environ.get(STARTED_BY, "")
    if run:
        threading.Thread(target=_watch, args=(run,), daemon=True, name="watch").start()


def _watch(run: str) -> None:
    while lives(run):
        time.sleep(LOOK_EVERY)
    for child in psutil.Process().children(recursive=True):
        _kill(child)
    os._exit(1)


def end_abandoned(folder: Path) -> int:
    """End processes of Snakemake that a dead run left in the folder of a profile; their number."""
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = 0
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "snakemake" in words and str(folder) in words and process.pid not in mine:
            _kill(process)
            found += 1
    return found


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.Error):  # it has just ended
        process.kill()

"""Know which commands work in a folder of runs, so that none takes away what another one reads.

Each command has a file in `runs/.at_work` and holds a lock on it. The lock ends with its process.
A run gives its pid to the notebooks that it starts; they end when it dies.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write, remove_abandoned, take
from nbhelpers.paths import runs_root

STARTED_BY = "NBHELPERS_STARTED_BY"  # environment variable: the run that a process belongs to
LOOK_EVERY = 1.0  # seconds between two looks for that run
ENDING = 5.0  # seconds that what a dead run started may take to end
_held: dict[tuple[Path, str], FileLock] = {}  # what `until_the_end` noted


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
    names the command, its process and since when it works. Temporary files of processes that were
    killed are removed, which a line on stderr says.
    """
    lock = _enter(runs, _work(what, profile, alone))
    try:
        yield
    finally:
        with _one_at_a_time(runs / ".at_work"):
            _remove(lock)


def until_the_end(what: str) -> None:
    """Note this process as at work in the folder of runs until it ends.

    For notebooks, of which no cell is the last. UserError as of `at_work`.
    """
    runs = runs_root()
    if (runs, what) not in _held:
        _held[runs, what] = _enter(runs, _work(what))
        atexit.register(_remove, _held[runs, what])


def _work(what: str, profile: str = "", alone: bool = False) -> Work:
    run = os.environ.get(STARTED_BY) or process_name(os.getpid())
    since = datetime.now().strftime("%H:%M on %d %B")
    return Work(what, profile, alone, run, platform.node(), since)


def _enter(runs: Path, mine: Work) -> FileLock:
    """Return the lock of this process, taken when nothing excludes it."""
    patience = time.monotonic() + ENDING
    while True:
        with _one_at_a_time(runs / ".at_work"):
            busy = [work for work in _others(runs) if mine.excludes(work)]
            if not busy:
                return _write(runs / ".at_work", mine)
        if time.monotonic() > patience or not all(_has_died(work) for work in busy):
            raise UserError(
                f"{busy[0]} is busy in {runs}, so {mine.what} was not begun; "
                "wait for its end, or end it."
            )
        time.sleep(LOOK_EVERY / 4)


def _others(runs: Path) -> list[Work]:
    """Return what works now; remove what dead processes left. Call it in `_one_at_a_time`."""
    found, dead = [], []
    for path in sorted((runs / ".at_work").glob("*.lock")):
        lock = FileLock(path)
        if take(lock, 0):
            dead.append(lock)
        else:
            found.append(_read(path.with_suffix(".json")))
    for lock in dead:
        _remove(lock)
    if dead and (removed := remove_abandoned(runs)):
        print(
            f"A command that was killed had left {removed} temporary files in {runs}; "
            "they were removed.",
            file=sys.stderr,
        )
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
    path = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.lock"
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
    with suppress(psutil.Error):
        process = psutil.Process(int(pid))
        # the start is reckoned from the clock, which may be set
        return abs(process.create_time() - float(began)) < 60 and _works(process)
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
    children = psutil.Process().children(recursive=True)
    for child in children:
        _kill(child)
    psutil.wait_procs(children, ENDING)  # before the lock is free: the next run clears their files
    os._exit(1)


def call(command: Sequence[str], **options: Any) -> int:
    """Run a command and return its exit code; if this process is told to end, all of it ends first.

    It has a session of its own: Ctrl-C reaches this process alone, which then ends the others.
    options  those of subprocess.Popen
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return process.wait()
    except BaseException:
        _end_family(process.pid)
        remove_abandoned(runs_root())
        raise


def _end_family(pid: int) -> None:
    """End a process and all that it started, and wait for their end."""
    family = []
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for member in family:
        _kill(member)
    patience = time.monotonic() + ENDING
    while any(map(_works, family)) and time.monotonic() < patience:
        time.sleep(0.02)


def _works(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


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

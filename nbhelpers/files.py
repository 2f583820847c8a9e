"""Write files and folders whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nbhelpers.errors import UserError, of_system, reason


def given(path: Path | str) -> Path:
    """Return a path that a user gave, with `~` replaced, whether or not something is there.

    UserError for a device or a pipe, which may never end, and for what the system refuses.
    """
    try:
        found = Path(path).expanduser()
        mode = found.stat().st_mode
        if stat.S_ISDIR(mode):
            os.scandir(found).close()  # a folder that may not be listed would look empty
    except FileNotFoundError:
        return found
    except OSError as error:
        raise of_system(error, path) from error
    except (ValueError, RuntimeError) as error:  # null bytes; the home of nobody
        raise UserError(f"{path!r} is no path ({error}); check it.") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(
            f"{path} is a device or a pipe, not a file or a folder; copy what it gives into a file "
            "and name that."
        )
    return found


def read_json(path: Path | str, mend: str) -> Any:
    """Return what a JSON file holds.

    mend  how to mend the file, the end of the sentence. UserError for what is no JSON.
    """
    try:
        return json.loads(given(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise of_system(error, path) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON ({reason(error)}); {mend}.") from error


@contextmanager
def atomic_write(path: Path | str):
    """Yield a temporary Path beside `path` and move it to `path` on success.

    Any exception removes it. UserError if the disk is full or the file may not be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise of_system(error, path) from error
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise of_system(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str):
    """Yield a temporary folder beside `path` and move it to `path` on success.

    If another process finished `path` first, its folder stays and this one is removed. Otherwise
    as `atomic_write`.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path)))
        os.chmod(temporary, 0o755)
    except OSError as error:
        raise of_system(error, path) from error
    try:
        yield temporary
        if not path.exists():
            try:
                os.rename(temporary, path)
            except OSError:
                if not path.exists():
                    raise
    except OSError as error:
        raise of_system(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _prefix(path: Path) -> str:
    """Return how a temporary file beside `path` begins: with this process and this machine."""
    return f".{path.name}.{os.getpid()}-{_host()}-"


def temporary_name(path: Path) -> Path:
    """Return a hidden path beside `path` that `remove_abandoned` removes after a kill."""
    return path.with_name(f"{_prefix(path)}{uuid.uuid4().hex[:8]}")


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def remove_abandoned(folder: Path) -> int:
    """Remove temporary files and folders whose process on this machine is dead; their number."""
    found = [path for path in folder.rglob(".*") if _is_abandoned(path)]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(found)


def _is_abandoned(path: Path) -> bool:
    import psutil

    named = re.search(rf"\.(\d+)-{_host()}-\w{{8}}", path.name)
    if named is None:
        return False
    try:
        writer = psutil.Process(int(named[1]))
        dead = writer.status() == psutil.STATUS_ZOMBIE
        return dead or writer.create_time() > path.lstat().st_mtime + 60
    except psutil.Error:
        return True
    except OSError:  # it has just gone
        return False


def take(lock: FileLock, seconds: float = -1) -> bool:
    """Acquire the lock within these seconds (-1: no limit) and return whether that succeeded.

    UserError if the lock file may not be written.
    """
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    except OSError as error:
        raise of_system(error, lock.lock_file) from error
    return True


@contextmanager
def one_writer(path: Path):
    """Let one process at a time write to `path`; others wait.

    A lock beside it is released when its holder ends or dies.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    take(lock)
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()

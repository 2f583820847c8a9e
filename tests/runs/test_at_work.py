"""Who works in a folder of runs, what excludes what, and what a dead process leaves.

As a script this file is a process that works there until it is killed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from nbhelpers.data.archives import open_images
from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_folder, atomic_write, remove_abandoned, temporary_name
from nbhelpers.runs import at_work
from nbhelpers.runs.cache import clear
from nbhelpers.runs.commands import main

FUZZ = os.environ.get("NBHELPERS_FUZZ")  # many more kills
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def process(*words: str, **environment: str) -> Iterator[subprocess.Popen]:
    """This file as a script; it says a line when it has begun."""
    started = subprocess.Popen(
        [sys.executable, __file__, *words],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        text=True,
    )
    try:
        assert started.stdout.readline()
        yield started
    finally:
        started.kill()
        started.communicate()


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if ".at_work" not in path.parts)


def test_a_second_run_of_a_profile_says_who_is_busy_and_since_when(tmp_path):
    with process("work", str(tmp_path), "make run of profile mine", "mine") as other:
        sentence = (
            rf"make run of profile mine \(process {other.pid}, since \d\d:\d\d on \d\d \w+\) is "
            rf"busy in {tmp_path}, so make run of profile mine was not begun; wait .* or end it\."
        )
        with (
            pytest.raises(UserError, match=sentence),
            at_work.at_work(tmp_path, "make run of profile mine", "mine"),
        ):
            pass
        with at_work.at_work(tmp_path, "make run of profile other", "other"):
            pass
        with at_work.at_work(tmp_path, "train of pir"):
            pass
        other.terminate()  # the advice
        other.wait()
        with at_work.at_work(tmp_path, "make run of profile mine", "mine"):
            pass


@pytest.mark.parametrize("what", ["train of pir", "data prepare of ucm", "make run of profile x"])
def test_nothing_is_cleared_while_a_command_works(what, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path))
    (tmp_path / "cache/features-1").mkdir(parents=True)
    (tmp_path / "cache/features-1/rows.npy").write_text("rows")
    before = kept(tmp_path)
    with process("work", str(tmp_path), what, "") as other:
        assert main(["cache", "clear"]) == 1
        out, err = capsys.readouterr()
        assert out == "" and f"{what} (process {other.pid}" in err and err.count("\n") == 1
        assert kept(tmp_path) == before
    assert main(["cache", "clear"]) == 0
    assert kept(tmp_path) == ["cache"]


def test_while_the_cache_is_cleared_nothing_begins(tmp_path):
    with (
        at_work.at_work(tmp_path, "cache clear", alone=True),
        process("begin", str(tmp_path)) as other,
    ):
        assert other.wait(30) == 1
    with process("begin", str(tmp_path)) as other:
        assert other.wait(30) == 0


def test_the_lock_of_a_killed_process_is_free_at_once_and_its_files_go(tmp_path):
    with process("work", str(tmp_path), "train of pir", "mine") as other:
        other.kill()
        other.wait()
        began = time.monotonic()
        with at_work.at_work(tmp_path, "cache clear", alone=True):
            names = sorted(path.suffix for path in (tmp_path / ".at_work").iterdir())
        assert names == ["", ".json", ".lock"], "its own, and the register"
        assert time.monotonic() - began < at_work.ENDING
    assert [path.name for path in (tmp_path / ".at_work").iterdir()] == ["register"]


def test_notebooks_of_one_run_work_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv(at_work.STARTED_BY, at_work.process_name(os.getpid()))
    with (
        at_work.at_work(tmp_path, "make run", "mine"),
        process("work", str(tmp_path), "notebook 20_pir", "mine"),
        process("work", str(tmp_path), "notebook 21_pir_clip", "mine"),
    ):
        assert len(list((tmp_path / ".at_work").glob("*.json"))) == 3


def test_a_notebook_is_at_work_until_its_process_ends(tmp_path):
    code = (
        "import nbhelpers; nbhelpers.start('20_pir'); nbhelpers.start('20_pir'); "
        "print('begun', flush=True); input()"
    )
    notebook = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NBHELPERS_RUNS": str(tmp_path)},
    )
    while notebook.stdout.readline() not in ("begun\n", ""):
        pass
    (note,) = (tmp_path / ".at_work").glob("*.json")
    with pytest.raises(UserError, match=rf"notebook 20_pir \(process {notebook.pid}, since .* end"):
        clear(tmp_path)
    notebook.communicate("\n")  # the advice
    assert notebook.returncode == 0 and not note.exists()
    assert clear(tmp_path) == []


def test_work_within_work_of_one_process_is_no_conflict(tmp_path):
    with (
        at_work.at_work(tmp_path, "make run", "mine"),
        at_work.at_work(tmp_path, "train of pir", "mine"),
        at_work.at_work(tmp_path, "cache clear", alone=True),
    ):
        assert len(list((tmp_path / ".at_work").glob("*.json"))) == 3
    assert [path.name for path in (tmp_path / ".at_work").iterdir()] == ["register"]


def test_the_next_command_removes_what_a_killed_one_left_and_says_so(tmp_path, capsys):
    with process("work", str(tmp_path), "train of pir", "") as other:
        other.kill()
        other.wait()
    left = tmp_path / f"cache/{temporary_name(Path('rows.npy')).name}"
    left = left.with_name(left.name.replace(f".{os.getpid()}-", f".{other.pid}-"))
    left.mkdir(parents=True)
    with at_work.at_work(tmp_path, "cache clear", alone=True):
        assert kept(tmp_path) == ["cache"]
    said = f"A command that was killed had left 1 temporary files in {tmp_path}; they were removed."
    assert capsys.readouterr() == ("", f"{said}\n")


def test_a_process_ends_with_its_run_and_with_all_it_started(tmp_path):
    """The run is another process here; its notebook starts a process that sleeps."""
    with process("sleep") as run:
        started_by = {at_work.STARTED_BY: at_work.process_name(run.pid)}
        with process("notebook", **started_by) as notebook:
            (child,) = psutil.Process(notebook.pid).children()
            run.kill()
            run.wait()
            assert notebook.wait(30) == 1
            psutil.wait_procs([child], 30)
            assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_name_outlives_no_process(tmp_path):
    mine = at_work.process_name(os.getpid())
    assert at_work.lives(mine)
    pid, began = mine.split("-")
    assert not at_work.lives(f"{pid}-{float(began) - 3600}"), "another process had the number"
    with process("sleep") as other:
        name = at_work.process_name(other.pid)
        assert at_work.lives(name)
    assert not at_work.lives(name)


# temporary files


def test_what_a_dead_process_left_is_removed_and_nothing_else(tmp_path):
    with process("write", str(tmp_path / "deep")) as other:
        left = [path for path in (tmp_path / "deep").iterdir() if path.name.startswith(".")]
        assert len(left) == 2 and remove_abandoned(tmp_path) == 0, "it still writes"
        other.kill()
        other.wait()
    (tmp_path / ".gitignore").touch()
    with atomic_write(tmp_path / "mine.json") as temporary, atomic_folder(tmp_path / "all"):
        assert remove_abandoned(tmp_path) == 2
        temporary.write_text("whole")
    assert kept(tmp_path) == [".gitignore", "all", "deep", "mine.json"]


@pytest.mark.parametrize("number", range(20 if FUZZ else 3))
def test_a_file_is_whole_whenever_its_writer_is_killed(number, tmp_path):
    path = tmp_path / "record.json"
    with process("rewrite", str(path)) as writer:
        time.sleep(random.Random(number).uniform(0.01, 0.3))
        writer.kill()
        writer.wait()
        words = path.read_text().split()
        assert len(words) == 50_000 and len(set(words)) == 1
    remove_abandoned(tmp_path)
    assert kept(tmp_path) == ["record.json"]


IMAGES, SIDE = 60, 300


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A folder of images of noise."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def decoded(images: Path, runs: Path) -> bytes:
    """All pixels of the images, from the cache or decoded into it, as commands do that."""
    names = [f"{number}.png" for number in range(IMAGES)]
    with at_work.at_work(runs, "data prepare"):
        pixels = DecodedCache.build(open_images(images), names, runs / "cache")
    return b"".join(pixels[row].tobytes() for row in pixels.rows(names))


@pytest.mark.parametrize("number", range(20 if FUZZ else 3))
def test_images_are_decoded_right_after_a_killed_decoding(number, photographs, tmp_path):
    """The command that comes next removes what was left."""
    with process("decode", str(photographs), str(tmp_path / "runs")) as other:
        time.sleep(random.Random(number).uniform(0.01, 1.0))
        other.kill()
        other.wait()
    whole = decoded(photographs, tmp_path / "whole")
    assert decoded(photographs, tmp_path / "runs") == whole
    assert not [name for name in kept(tmp_path) if name.startswith(".")]


# ending


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_ended_clears_up_and_says_one_line(number, code, tmp_path):
    # a folder that is read for long: data prepare generates its set first
    environment = os.environ | {"NBHELPERS_RUNS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, "-m", "nbhelpers", "data", "prepare", "--set", "scenes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # the shell of a test in the background has taken it from its processes
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob(".at_work/*.json")):
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.05)
    started.send_signal(number)
    _, error = started.communicate(timeout=60)
    assert (started.returncode, error.count("\n")) == (code, 1), error
    assert [path.name for path in (tmp_path / ".at_work").iterdir()] == ["register"]


def _work(folder: str, what: str, profile: str) -> None:
    with at_work.at_work(Path(folder), what, profile):
        print("begun", flush=True)
        time.sleep(600)


def _begin(folder: str) -> None:
    print("begun", flush=True)
    try:
        with at_work.at_work(Path(folder), "train of pir"):
            pass
    except UserError:
        sys.exit(1)


def _notebook() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    at_work.end_with_the_run()
    print(child.pid, flush=True)
    time.sleep(600)


def _write(folder: str) -> None:
    with atomic_write(Path(folder) / "one.json"), atomic_folder(Path(folder) / "two"):
        print("begun", flush=True)
        time.sleep(600)


def _rewrite(path: str) -> None:
    for number in range(10**6):
        with atomic_write(path) as temporary:
            temporary.write_text(f"{number} " * 50_000)
        if number == 0:
            print("begun", flush=True)


def _decode(images: str, runs: str) -> None:
    print("begun", flush=True)
    decoded(Path(images), Path(runs))
    time.sleep(600)


def _sleep() -> None:
    print("begun", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    {
        "work": _work,
        "begin": _begin,
        "notebook": _notebook,
        "write": _write,
        "rewrite": _rewrite,
        "decode": _decode,
        "sleep": _sleep,
    }[name](*words)

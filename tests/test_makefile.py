"""`make`: its targets, what it hands to the commands, and what `make clean` deletes."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
DELETED = (".venv", "data/scenes", "runs/default/checkpoints", "runs/cache")
KEPT = ("runs/ucm/checkpoints", "data/results")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the Makefile and what `make clean` deletes or keeps."""
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "constraints.txt").touch()
    for name in (*DELETED, *KEPT):
        (tmp_path / name).mkdir(parents=True)
    for name in ("NBHELPERS_RUNS", "YES", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def make(folder, *words, stdin=subprocess.DEVNULL):
    return subprocess.run(
        ["make", *words], cwd=folder, stdin=stdin, capture_output=True, text=True, timeout=60
    )


def left(folder):
    return {name for name in (*DELETED, *KEPT) if (folder / name).exists()}


def test_make_alone_lists_every_target_and_changes_nothing(clone):
    done = make(clone)
    assert done.returncode == 0 and done.stderr == ""
    (targets,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE.read_text(), re.M)
    listed = re.findall(r"^make (\w+) ", done.stdout, re.M)
    assert sorted(["help", *listed]) == sorted(targets.split())
    assert left(clone) == {*DELETED, *KEPT}


def test_the_setup_says_each_step(clone):
    done = make(clone, "-n", "setup")
    assert done.returncode == 0 and "--quiet" not in done.stdout
    assert re.findall(r"Step (\d) of 3", done.stdout) == ["1", "2", "3"]


def test_clean_without_a_terminal_refuses(clone):
    done = make(clone, "clean")
    assert done.returncode != 0 and "make clean YES=1" in done.stderr
    assert left(clone) == {*DELETED, *KEPT}


def test_clean_does_not_ask_if_it_is_told_so(clone):
    assert make(clone, "clean", "YES=1").returncode == 0
    assert left(clone) == set(KEPT)


@pytest.mark.parametrize("answer, expected", [("y", KEPT), ("", (*DELETED, *KEPT))])
def test_clean_asks_in_a_terminal(clone, answer, expected):
    ours, theirs = os.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        done = make(clone, "clean", stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert "all trainings in runs/default?" in done.stdout
    assert left(clone) == set(expected)
    assert (done.returncode == 0) == (answer == "y")


@pytest.mark.parametrize("target", ["run", "check"])
def test_other_variables_are_parameters_of_the_notebooks(clone, target):
    done = make(clone, "-n", target, "PRIOR=imagenet", "WEIGHTS={swin_t: /a b}")
    assert done.returncode == 0
    assert '--set "PRIOR=$PRIOR"' in done.stdout and '--set "WEIGHTS=$WEIGHTS"' in done.stdout
    assert "--set" not in make(clone, "-n", target, "PROFILE=ucm", "UPTO=20").stdout


def test_the_values_reach_the_command_as_they_are(clone):
    program = clone / ".venv/bin/python"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\n')
    program.chmod(0o755)
    (clone / ".venv/installed").touch()
    done = make(clone, "run", "PRIOR=imagenet", "WEIGHTS={swin_t: /a b}")
    words = done.stdout.splitlines()
    assert {"<PRIOR=imagenet>", "<WEIGHTS={swin_t: /a b}>"} < set(words)


def test_the_lab_shows_the_whole_repository_and_opens_the_first_notebook(clone):
    """Links of the notebooks to READMEs, data/ and runs/ lie below the root of the server."""
    said = make(clone, "-n", "lab").stdout
    root = re.search(r"jupyter lab .*--ServerApp\.root_dir=(\S+)", said)
    opened = re.search(r"--LabApp\.default_url=/lab/tree/(\S+)", said)
    assert root and opened and (MAKEFILE.parent / root[1] / opened[1]).is_file()
    assert (clone / root[1]).resolve() == clone


def test_a_target_that_reads_no_variable_refuses_it(clone):
    done = make(clone, "lint", "PRIOR=imagenet")
    assert done.returncode != 0 and "make lint has no variable PRIOR; only make run" in done.stderr
    assert make(clone, "-n", "run", "PRIOR=imagenet").returncode == 0


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1), (2, 2)])
def test_make_test_runs_both_parts_and_fails_if_one_fails(clone, codes):
    (clone / ".venv/installed").touch()
    python = clone / "bin/python"
    python.parent.mkdir()
    python.write_text(
        f"""#!/bin/sh
echo "$CI $NBHELPERS_THREADS $*"
test -d "$NBHELPERS_RUNS" || exit 99
case "$*" in *test_chain.py) exit {codes[0]};; *) exit {codes[1]};; esac
"""
    )
    python.chmod(0o755)
    done = make(clone, "test", "BIN=bin")
    assert (done.returncode != 0) == any(codes)
    chain, rest = done.stdout.splitlines()
    assert chain == "true 2 -m pytest tests/runs/test_chain.py"
    assert rest.startswith("true 1 -m pytest -n 2 ") and "--ignore=tests/runs/test_chain.py" in rest

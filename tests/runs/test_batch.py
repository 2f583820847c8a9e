"""The batch checks profiles first, reports a failure in one line, and repeats no notebook."""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from nbhelpers import paths
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.runs import batch, freshness, stored_notebooks

PACKAGE = freshness.package
COMMON = 'PROFILE: str = "default"  # profile\nSEED: int = 0  # seed\nDATA: str = ""  # folder'


def write_notebook(folder: Path, name: str, *code: str, parameters: str = "") -> Path:
    """A tiny notebook of the chain, as long as its parameters and the given cells."""
    cells = [new_code_cell(f"{COMMON}\n{parameters}".strip(), metadata={"tags": ["parameters"]})]
    notebook = new_notebook(cells=cells + [new_code_cell(text) for text in code])
    notebook.metadata.kernelspec = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def notebooks(tmp_path, monkeypatch) -> Path:
    """A folder with a notebook for every step of the chain, and a run root of its own."""
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "notebooks"
    (folder / "profiles").mkdir(parents=True)
    for step in batch.CHAIN:
        extra = "EPOCHS: int = 2  # passes\nLR: float = 1e-3  # rate\nTURNS: bool = True  # order"
        write_notebook(
            folder, step.name, "print(SEED)", parameters=extra if step.name == "20_pir" else ""
        )
    return folder


def profile(notebooks: Path, text: str) -> None:
    (notebooks / "profiles" / "mine.yaml").write_text(text)


# what is refused before anything runs


def test_every_notebook_gets_what_it_knows(notebooks, tmp_path):
    profile(notebooks, "PROFILE: mine\nEPOCHS: 5\nLR: 1\nSEED: 9\n")
    given = batch.check_profile("mine", {"SEED": 3, "DATA": str(tmp_path)}, notebooks)
    common = {"PROFILE": "mine", "SEED": 3, "DATA": str(tmp_path)}
    assert given["20_pir"] == common | {"EPOCHS": 5, "LR": 1}
    assert given["90_leaderboard"] == common


def test_the_default_profile_is_what_the_notebooks_say(notebooks):
    given = batch.check_profile("default", {"SEED": 0}, notebooks)
    assert given["20_pir"] == {"PROFILE": "default", "SEED": 0}


def test_all_problems_of_a_profile_come_in_one_message(notebooks):
    profile(notebooks, "PROFILE: mine\nEPOCH: 5\nLR: 1e-4\nTURNS: 1\nEPOCHS: true\n")
    with pytest.raises(UserError) as caught:
        batch.check_profile("mine", {"SEED": 0}, notebooks)
    message = str(caught.value)
    assert "There is no parameter 'EPOCH' in any notebook (did you mean EPOCHS?)." in message
    assert "LR is '1e-4', of type str, but must be float (write `LR = 0.0001` in a cell" in message
    assert "TURNS is 1, of type int, but must be bool." in message
    assert "EPOCHS is True, of type bool, but must be int." in message
    assert "\n" not in message


def test_what_a_step_of_the_call_lacks_is_refused(notebooks):
    write_notebook(notebooks, "20_pir", parameters='CHECKPOINT: str = ""  # file')
    profile(notebooks, "PROFILE: mine\nCHECKPOINT: nowhere.pt\n")
    with pytest.raises(UserError, match="CHECKPOINT is 'nowhere.pt', but there is no such file"):
        batch.check_profile("mine", {}, notebooks)
    before = batch.check_profile("mine", {}, notebooks, batch.select("12"))
    assert before["20_pir"]["CHECKPOINT"] == "nowhere.pt"
    (notebooks / "nowhere.pt").touch()
    assert batch.check_profile("mine", {}, notebooks), "beside the notebooks, where they run"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("PROFILE: other\n", "PROFILE must be 'mine'"),
        ("- 1\n", "must hold lines of the form NAME: value"),
        ("EPOCHS: [1\n", "is not YAML"),
        (f"EPOCHS: {'1' * 5000}\n", "is not YAML"),
        (f"EPOCHS: {'[' * 5000}\n", "is not YAML"),
        (
            "PROFILE: mine\nEPOCHS: 1\nSEED: 2\nEPOCHS: 3\n",
            "gives EPOCHS more than once; keep one line",
        ),
        ("", "must hold lines"),
    ],
)
def test_broken_profile_files_are_refused(notebooks, text, sentence):
    profile(notebooks, text)
    with pytest.raises(UserError, match=sentence):
        batch.check_profile("mine", {}, notebooks)


def test_an_unknown_profile_lists_the_known_ones(notebooks):
    profile(notebooks, "PROFILE: mine\n")
    with pytest.raises(UserError, match="no profile 'ucmm'.*default, mine"):
        batch.run_chain("ucmm", notebooks=notebooks)


def test_refusals_leave_nothing_behind(notebooks, tmp_path):
    profile(notebooks, "PROFILE: mine\nEPOCH: 5\n")
    nowhere = str(tmp_path / "none")
    for wrong, sentence in [
        ({"profile": "mine"}, "EPOCH"),
        ({"data": nowhere}, "not a folder"),
        ({"seeds": [1, 0, 1]}, "seeds are 1 0 1; name each once"),
        ({"seeds": [-1]}, "at least 0"),
        ({"upto": "77"}, "names no notebooks"),
        ({"upto": "1"}, "names 3 notebooks"),
    ]:
        with pytest.raises(UserError, match=sentence):
            batch.run_chain(**wrong, notebooks=notebooks)
    assert not (tmp_path / "runs").exists()


def test_a_missing_notebook_is_named(notebooks):
    (notebooks / "20_pir.ipynb").unlink()
    with pytest.raises(UserError, match="lacks 20_pir.ipynb"):
        batch.check_profile("default", {}, notebooks)


def test_upto_takes_the_beginning_of_a_name():
    assert [step.name for step in batch.select("11")] == [
        "00_start_here",
        "10_prepare_data",
        "11_audit_data",
    ]
    assert batch.select("") == batch.CHAIN


def test_a_profile_may_run_one_notebook_alone(notebooks):
    profile(notebooks, "PROFILE: mine\nONLY: 33_ideas\n")
    assert batch.only_of("mine", notebooks) == "33_ideas" and batch.only_of("default") == ""
    assert "ONLY" not in batch.read_profile("mine", notebooks)
    assert [step.name for step in batch.select(only="33_ideas")] == ["33_ideas"]
    assert batch.run_chain("mine", notebooks=notebooks) == 0
    finished = sorted((batch.runs_root() / "mine" / "finished").iterdir())
    assert [path.name for path in finished] == ["33_ideas-seed0.json"]


@pytest.mark.parametrize(("upto", "only"), [("33", "33_ideas"), ("", "20_pir"), ("", "nothing")])
def test_a_notebook_alone_reads_no_other_one(upto, only):
    with pytest.raises(UserError, match=f"runs {only} alone; give no UPTO"):
        batch.select(upto, only)


def test_the_chain_reads_only_what_ran_before():
    seen = set()
    for step in batch.CHAIN:
        assert set(step.reads) <= seen, f"{step.name} reads what comes later"
        seen.add(step.name)


@pytest.mark.parametrize(
    ("given", "upto", "reads"),
    [
        ({"SIZE": "tiny"}, "", ("10_prepare_data", "12_starting_weights")),
        ({}, "", ("10_prepare_data",)),
        ({"SIZE": "paper"}, "23", None),
    ],
)
def test_bita_waits_for_the_starting_weights_of_the_others_only_to_share_stand_ins(
    given, upto, reads
):
    plan = batch.Plan("", "", 0, upto, {"24_bita": given}, {})
    assert {step.name: step.reads for step in plan.steps()}.get("24_bita") == reads
    assert [step.name for step in plan.steps()] == [step.name for step in batch.select(upto)]


# one notebook


def test_a_failing_notebook_is_told_in_a_line_and_kept_with_its_error(tmp_path):
    notebook = write_notebook(
        tmp_path, "20_pir", "x = 1", "raise ValueError('first line\\nsecond line')"
    )
    with pytest.raises(UserError) as caught:
        batch.execute(notebook, tmp_path / "out" / "20_pir.ipynb", {"SEED": 1})
    assert str(caught.value).startswith(
        "20_pir failed in cell [4]: ValueError: first line (executed copy: "
    )
    assert "\n" not in str(caught.value)
    kept = nbformat.read(tmp_path / "out" / "20_pir.unfinished.ipynb", as_version=4)
    assert (
        "second line" in json.dumps(kept.cells) and not (tmp_path / "out" / "20_pir.ipynb").exists()
    )


def test_a_long_notebook_says_which_cell_it_is_at(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch, "PROGRESS_EVERY", 0.2)
    notebook = write_notebook(tmp_path, "20_pir", "import time; time.sleep(1)", "print('done')")
    batch.execute(notebook, tmp_path / "out.ipynb", {"SEED": 1})
    lines = capsys.readouterr().out.splitlines()
    assert "20_pir: cell 3 of 4" in lines, "parameters, papermill's own, and the two"
    assert set(lines) <= {f"20_pir: cell {number} of 4" for number in range(5)}


def test_a_quick_notebook_says_nothing(tmp_path, capsys):
    batch.execute(write_notebook(tmp_path, "20_pir", "1"), tmp_path / "out.ipynb", {"SEED": 1})
    assert capsys.readouterr().out == ""


def test_a_killed_kernel_is_told_in_a_line(tmp_path):
    notebook = write_notebook(tmp_path, "20_pir", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="20_pir stopped: .*too little memory"):
        batch.execute(notebook, tmp_path / "out.ipynb", {})
    assert (tmp_path / "out.unfinished.ipynb").is_file()


def test_a_notebook_without_its_record_has_not_finished(notebooks, tmp_path):
    given = {"20_pir": {}, "24_bita": {}}
    plan = batch.Plan(str(tmp_path / "out"), str(notebooks), 0, "", given, {"20_pir": {}})
    (old := tmp_path / "out" / plan.record("20_pir")).parent.mkdir(parents=True)
    old.write_text("of an earlier run")
    with pytest.raises(UserError, match="did not write its record"):
        batch.run_step(plan, "20_pir")
    assert not (tmp_path / "out" / plan.finished("20_pir")).exists()


# the chain


def test_make_hands_its_variables_on(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "python").chmod(0o755)
    call = [
        "make",
        "-s",
        "-o",
        "setup",
        "run",
        f"BIN={tmp_path}",
        "DATA=two words",
        "PROFILE=ucm",
        "UPTO=20",
    ]
    done = subprocess.run(call, cwd=paths.repository_root(), capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "-m",
        "nbhelpers",
        "run",
        "--profile",
        "ucm",
        "--data",
        "two words",
        "--upto",
        "20",
    ]
    several = subprocess.run(
        [*call, "SEEDS=0 1 2", "JOBS=3"],
        cwd=paths.repository_root(),
        capture_output=True,
        text=True,
    )
    assert several.stdout.splitlines()[-8:] == [
        "--upto",
        "20",
        "--seeds",
        "0",
        "1",
        "2",
        "--jobs",
        "3",
    ]
    mistaken = subprocess.run(
        [*call, "SEED=1"], cwd=paths.repository_root(), capture_output=True, text=True
    )
    assert mistaken.returncode and mistaken.stdout == "" and 'give SEEDS="1"' in mistaken.stderr


@pytest.mark.parametrize(
    "upto, left_out",
    [
        ("12", {}),
        ("20", {"CLIP": "", "VILT": ""}),
        ("21", {"VILT": ""}),
        ("22", {"VILT": ""}),
        ("23", {}),
        ("", {}),
    ],
)
def test_only_what_a_system_of_the_call_reads_is_pretrained(upto, left_out):
    profile = batch.check_profile("ucm", {}, steps=())
    given = batch.spared(profile, batch.select(upto))
    assert given == profile | {"12_starting_weights": profile["12_starting_weights"] | left_out}


CALL = "sys.exit(batch.run_chain(**json.loads(sys.argv[2])))"


def start(notebooks: Path, upto: str, call: str = CALL, **options) -> subprocess.Popen:
    """A call of the chain; a file stands in for the sources of the package."""
    (source := notebooks / "source.py").touch()
    code = (
        "import functools, sys, json; from pathlib import Path; "
        "from nbhelpers.runs import batch, commands, freshness; "
        f"freshness.sources = lambda: [Path({str(source)!r})]; "
        "batch.run_chain = functools.partial(batch.run_chain, notebooks=Path(sys.argv[1])); "
        f"{call}"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(notebooks),
        json.dumps({"upto": upto, "jobs": 1} | options),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=paths.repository_root(),
        preexec_fn=hear_interrupts,
    )


def hear_interrupts() -> None:
    """Give a process SIGINT, which the shell of a test in the background has taken from it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(notebooks: Path, upto: str, **options) -> list[str]:
    """The notebooks that one call executed to their end."""
    process = start(notebooks, upto, **options)
    output, run.errors = process.communicate()
    run.code = process.returncode
    return re.findall(r"^(\w+) finished in", output, re.M)


def test_snakemake_runs_what_is_due_in_order_and_nothing_twice(notebooks, tmp_path):
    assert run(notebooks, "10") == ["00_start_here", "10_prepare_data"]
    assert (
        not (notebooks / ".snakemake").exists() and (tmp_path / "runs/default/.snakemake").exists()
    )
    assert run(notebooks, "10") == [] and run.code == 0
    write_notebook(notebooks, "10_prepare_data", "print('changed')")
    assert run(notebooks, "10") == ["10_prepare_data"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_notebook_has_its_share_of_the_cores(notebooks, tmp_path, jobs):
    """Not the one thread that Snakemake gives where nothing is said; and two that do not wait for
    each other meet.
    """
    if (cores := len(os.sched_getaffinity(0))) < jobs:
        pytest.skip("one core alone")
    (seen := tmp_path / "seen").mkdir()
    (records := tmp_path / "runs/default/records").mkdir(parents=True)
    for name, others in {"12_starting_weights": 0, "20_pir": jobs, "21_pir_clip": jobs}.items():
        write_notebook(
            notebooks,
            name,
            f"import os, pathlib, time; seen = pathlib.Path({str(seen)!r})",
            f"(seen / '{name}').write_text(os.environ['OMP_NUM_THREADS']); until = time.monotonic()"
            " + 60",
            f"assert os.environ.items() >= {batch.KEEP_MEMORY}.items()",
            f"while len(list(seen.iterdir())) < 1 + {others} and time.monotonic() < until:"
            " time.sleep(0.1)",
            f"(pathlib.Path({str(records)!r}) / f'{name}-seed{{SEED}}.json').touch(); assert"
            " time.monotonic() < until",
        )
    steps, given = batch.select("21"), batch.check_profile("default", {}, notebooks)
    made_of = batch.ingredients(given, steps, notebooks)
    plan = batch.Plan(str(records.parent), str(notebooks), 0, "21", given, made_of)
    assert batch._snakemake(plan.with_due(), jobs) == 0
    assert {path.name: int(path.read_text()) for path in seen.iterdir()} == {
        "12_starting_weights": cores,
        "20_pir": max(1, cores // jobs),
        "21_pir_clip": max(1, cores // jobs),
    }


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the variables are glibc's")
def test_memory_that_was_freed_stays_with_a_notebook():
    code = (
        "import resource; faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "b'x' * 10**8; before = faults(); b'x' * 10**8; print(faults() - before)"
    )
    kept, returned = (
        int(
            subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, check=True
            ).stdout
        )
        for environment in (batch.KEEP_MEMORY, {})
    )
    assert kept < 100 and returned > 1000


def test_small_models_run_two_at_a_time_unless_told_otherwise(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path))
    monkeypatch.setattr(freshness, "package", lambda: "the package")
    monkeypatch.setattr(batch, "_snakemake", lambda plan, jobs: seen.append(jobs) or 1)
    for options in ({}, {"jobs": 1}, {"profile": "paper_ucm"}, {"profile": "paper_ucm", "jobs": 3}):
        assert batch.run_chain(upto="00", data=str(tmp_path), **options) == 1
    assert seen == [2, 1, 1, 3]


@pytest.mark.parametrize("jobs", [0, 10**6])
def test_jobs_have_bounds(notebooks, jobs):
    with pytest.raises(UserError, match=f"JOBS is {jobs}; let 1 to 64 notebooks run at a time"):
        batch.run_chain(notebooks=notebooks, jobs=jobs)


@pytest.fixture
def chain(notebooks, tmp_path, monkeypatch):
    """Calls of the chain that give the notebooks they executed, without kernels and Snakemake.

    `acts` says what a notebook does beside writing a record: name -> function of folder and values.
    """
    acts, ran = {}, []

    def execute(notebook, executed, values):
        folder, name = executed.parent.parent, notebook.stem
        record = folder / f"records/{name}-seed{values['SEED']}.json"
        with atomic_write(record) as temporary:
            temporary.write_text(f"the record of {name}")
        acts.get(name, lambda folder, values: None)(folder, values)
        ran.append(name)
        return 1.0

    def call(upto, **options):
        ran.clear()
        call.code = batch.run_chain(upto=upto, notebooks=notebooks, **options)
        return list(ran)

    monkeypatch.setattr(batch, "execute", execute)

    def in_order(plan, jobs):
        for name in plan.due:
            batch.run_step(plan, name)
        return 0

    monkeypatch.setattr(batch, "_snakemake", in_order)
    monkeypatch.setattr(batch, "_print_summary", lambda plans, steps: None)
    monkeypatch.setattr(freshness, "package", lambda: "the package")
    call.acts, call.folder = acts, tmp_path / "runs/default"
    return call


def test_three_calls_in_a_row_execute_no_notebook_twice(chain, notebooks):
    names = [step.name for step in batch.CHAIN]
    assert [chain("", data=str(notebooks)) for _ in range(3)] == [names, [], []]
    assert chain("", seeds=[1], data=str(notebooks)) == names


def test_a_changed_package_runs_again_and_a_date_or_a_comment_does_not(
    chain, notebooks, monkeypatch
):
    monkeypatch.setattr(freshness, "package", PACKAGE)
    (source := notebooks / "source.py").write_text("x = 1")
    monkeypatch.setattr(freshness, "sources", lambda: [source])
    assert chain("00") == ["00_start_here"]
    for path in [*notebooks.glob("*.ipynb"), source]:
        os.utime(path)
    source.write_text('"""A docstring."""\nx = 1  # a comment')
    write_notebook(notebooks, "00_start_here", "print( SEED )  # a comment")
    assert chain("00") == []
    source.write_text("x = 2")
    assert chain("00") == ["00_start_here"]


def test_a_notebook_runs_again_after_those_that_it_reads(chain, notebooks):
    chain("")
    write_notebook(notebooks, "31_errors_and_significance", "2")
    assert chain("") == ["31_errors_and_significance"]
    write_notebook(notebooks, "24_bita", "2")
    assert chain("24") == ["24_bita"]
    assert chain("") == [
        "40_attention_and_belief",
        "50_score_captions",
        "60_search",
        "90_leaderboard",
    ]
    write_notebook(notebooks, "10_prepare_data", "2")
    apart = {"00_start_here", "33_ideas"}  # they read nothing of 10
    assert chain("") == [step.name for step in batch.CHAIN if step.name not in apart]


def test_changed_data_runs_again_whatever_its_size_and_date(chain, notebooks, tmp_path):
    (data := tmp_path / "data").mkdir()
    (captions := data / "dataset_town.json").write_text("one")
    write_notebook(notebooks, "10_prepare_data", parameters='SET: str = "town"  # set')
    assert chain("10", data=str(data)) == ["00_start_here", "10_prepare_data"]
    before = captions.stat()
    captions.write_text("two")
    os.utime(captions, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert chain("10", data=str(data)) == ["10_prepare_data"]
    (data / "notes.txt").touch()
    (data / "dataset_village.json").touch()
    assert chain("10", data=str(data)) == []
    assert chain("11", data=str(data)) == ["11_audit_data"]
    (data / "dataset_village.json").write_text("changed")
    assert chain("11", data=str(data)) == ["11_audit_data"], "it compares with other sets"


def test_a_longer_call_adds_what_it_needs_and_runs_no_more(chain, notebooks):
    """12_starting_weights pre-trains a ViLT only for 23; the start of 20 to 22 stays the same."""
    weights = "12_starting_weights"
    lines = (
        'CLIP: str = "c"  # file',
        'VILT: str = "v"  # file',
        'PRETRAIN_SETS: list = ["scenes"]  # sets',
    )
    write_notebook(notebooks, weights, parameters="\n".join(lines))

    def write_starts(folder, values):
        clip, vilt = values.get("CLIP", "c"), values.get("VILT", "v")
        for system, start in {
            "pir": "p",
            "pir_clip": clip,
            "pe_rsitr": clip,
            "cfitr": vilt,
        }.items():
            path = folder / f"starting/{system}-seed0.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(start) if start else None

    chain.acts[weights] = write_starts
    assert chain("20")[2:] == ["11_audit_data", weights, "20_pir"]
    assert not (chain.folder / "starting/pir_clip-seed0.json").exists()
    assert chain("22") == [weights, "21_pir_clip", "22_pe_rsitr"]
    assert chain("24") == [weights, "23_cfitr", "24_bita"]
    assert [chain(upto) for upto in ("24", "22", "20")] == [[], [], []], "all is there"
    (start := chain.folder / "starting/cfitr-seed0.json").write_text("of another run")
    assert chain("24") == [weights], "it writes its starts again, and they are the same"
    start.unlink()
    assert chain("24") == [weights], "what is gone comes back"


def test_a_record_of_another_run_is_made_again(chain):
    chain("20")
    record = chain.folder / "records/20_pir-seed0.json"
    record.write_text("written in JupyterLab, with other values")
    assert chain("20") == ["20_pir"] and record.read_text() == "the record of 20_pir"


def test_without_seeds_the_profile_s_counts(chain, notebooks):
    profile(notebooks, "PROFILE: mine\nSEED: 7\n")
    assert chain("00", profile="mine") == ["00_start_here"]
    finished = [path.name for path in (chain.folder.parent / "mine/finished").iterdir()]
    assert finished == ["00_start_here-seed7.json"]
    assert batch.profile_seed("mine", notebooks) == 7
    assert batch.profile_seed("of_jupyter", notebooks) == 0, "a folder of runs without a profile"
    profile(notebooks, "PROFILE: mine\nSEED: [7]\n")
    with pytest.raises(UserError, match="SEED is \\[7\\], of type list, but must be int"):
        chain("00", profile="mine")


def test_what_was_finished_stays_until_its_replacement_is_complete(notebooks, tmp_path):
    """Record, note and executed notebook of 20_pir, which fails when it runs again."""
    folder, step = (
        tmp_path / "runs/default",
        [step for step in batch.CHAIN if step.name == "20_pir"],
    )
    record = folder / "records/20_pir-seed0.json"
    finishes = (
        f"from nbhelpers.files import atomic_write\nwith atomic_write({str(record)!r}) as path:"
        " path.touch()"
    )

    def run_again(*cells):
        write_notebook(notebooks, "20_pir", *cells)
        given = {"20_pir": {"SEED": 0}, "24_bita": {}}
        made_of = batch.ingredients(given, step, notebooks)
        batch.run_step(batch.Plan(str(folder), str(notebooks), 0, "", given, made_of), "20_pir")

    run_again(finishes)
    kept = {path: path.read_bytes() for path in folder.rglob("20_pir*")}
    assert {path.parent.name for path in kept} == {"records", "finished", "notebooks"}
    with pytest.raises(UserError, match="division by zero"):
        run_again("1 / 0", finishes)
    assert {path: path.read_bytes() for path in kept} == kept
    run_again("2", finishes)
    assert set(folder.rglob("20_pir*")) == kept.keys(), "the unfinished copy took its place"


def test_a_failure_stops_the_chain_with_one_line(notebooks, tmp_path):
    write_notebook(notebooks, "10_prepare_data", "1 / 0")
    assert run(notebooks, "11", seeds=[4]) == ["00_start_here"]
    assert run.code == 1
    assert re.fullmatch(
        r"10_prepare_data failed in cell \[3\]: ZeroDivisionError: .*\n", run.errors
    )
    kept = [path.name for path in (tmp_path / "runs/default/notebooks").iterdir()]
    assert sorted(kept) == ["00_start_here-seed4.ipynb", "10_prepare_data-seed4.unfinished.ipynb"]


@pytest.mark.parametrize("whole_group", [True, False])
def test_a_killed_run_is_taken_up_again(notebooks, tmp_path, whole_group):
    """Killed with all its processes, or alone: what it started then ends by itself."""
    assert run(notebooks, "00") == ["00_start_here"]
    finished = tmp_path / "runs/default/finished/00_start_here-seed0.json"
    flag, before = tmp_path / "flag", finished.read_bytes()
    wait = f"import os, pathlib, time; flag = pathlib.Path({str(flag)!r})"
    write_notebook(
        notebooks,
        "00_start_here",
        wait,
        "flag.exists() or (flag.write_text(str(os.getpid())), time.sleep(600))",
    )
    process = start(notebooks, "00")
    while not (flag.exists() and flag.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    kill = os.killpg if whole_group else os.kill
    kill(process.pid, signal.SIGKILL)
    process.wait()
    assert finished.read_bytes() == before, "what was finished stays"
    assert run(notebooks, "00") == ["00_start_here"] and run.code == 0
    kernel = int(flag.read_text())
    assert not psutil.pid_exists(kernel) or not is_at_work(psutil.Process(kernel))
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGINT, False, 130), (signal.SIGTERM, False, 143)],
)
def test_a_run_that_is_ended_says_one_line_and_nothing_goes_on(
    notebooks, tmp_path, number, whole_group, code
):
    """By Ctrl-C, which all processes get; or by a signal for the command alone."""
    flag = tmp_path / "flag"
    write_notebook(
        notebooks,
        "00_start_here",
        f"import os, time\nopen({str(flag)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)",
    )
    process = start(notebooks, "00", call="sys.exit(commands.main(['run', '--upto', '00']))")
    while not (flag.exists() and flag.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    began = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.count("\n")) == (code, 1), error
    assert int(flag.read_text()) in [child.pid for child in began]
    assert not [child for child in began if is_at_work(child)]


def is_at_work(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # init has not noticed yet
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", range(20 if os.environ.get("NBHELPERS_FUZZ") else 3))
def test_a_run_killed_at_any_moment_is_taken_up_with_the_same_results(notebooks, tmp_path, number):
    lines = (
        "from nbhelpers.files import atomic_write",
        "from nbhelpers.paths import runs_root",
        "import random, time",
        "random.seed(SEED)",
        "with atomic_write(runs_root() / 'default/drawn.json') as path, path.open('a') as file:",
        "    for part in range(40):",
        "        file.write(f'{random.random()} ')",
        "        file.flush()",
        "        time.sleep(0.05)",
    )
    write_notebook(notebooks, "00_start_here", "\n".join(lines))
    process = start(notebooks, "00")
    time.sleep(random.Random(number).uniform(0.5, 8))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run(notebooks, "00")
    assert run.code == 0, run.errors
    draws, runs = random.Random(0), tmp_path / "runs"
    wanted = "".join(f"{draws.random()} " for _ in range(40))
    assert (runs / "default/drawn.json").read_text() == wanted
    left = [path for path in runs.rglob(".*") if path.suffix in (".json", ".ipynb")]
    assert not left and not list(runs.glob("default/**/*.unfinished.ipynb"))


def test_two_runs_do_not_meet_in_one_profile(notebooks, tmp_path):
    flag = tmp_path / "flag"
    write_notebook(
        notebooks, "00_start_here", f"open({str(flag)!r}, 'w')\nimport time; time.sleep(60)"
    )
    process = start(notebooks, "00")
    while not flag.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    try:
        with pytest.raises(UserError, match=rf"make run of profile default .process {process.pid}"):
            batch.run_chain(notebooks=notebooks)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_summary_warns_of_time_over_budget(notebooks, tmp_path, capsys):
    plan = batch.Plan(str(tmp_path / "default"), str(notebooks), 0, "", {}, {})
    (tmp_path / "default" / "finished").mkdir(parents=True)
    for name, seconds in [("00_start_here", 3.2), ("10_prepare_data", 99)]:
        (tmp_path / "default" / plan.finished(name)).write_text(json.dumps({"seconds": seconds}))
    batch._print_summary([plan], batch.CHAIN[:2])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["00_start_here"].split() == ["00_start_here", "3", "20"]
    assert lines["10_prepare_data"].split() == ["10_prepare_data", "99", "90", "over", "budget"]
    assert lines["together"].split() == ["together", "102"]
    assert lines["figures"].endswith("default/figures")


def test_several_seeds_run_one_after_the_other_and_stop_at_a_failure(notebooks, tmp_path):
    write_notebook(notebooks, "10_prepare_data", "assert SEED != 2")
    assert (
        run(notebooks, "10", seeds=[5, 1]) == ["00_start_here", "10_prepare_data"] * 2
        and run.code == 0
    )
    kept = sorted(path.name for path in (tmp_path / "runs/default/finished").iterdir())
    assert kept == [
        f"{name}-seed{seed}.json"
        for name in ("00_start_here", "10_prepare_data")
        for seed in (1, 5)
    ]
    assert run(notebooks, "10", seeds=[1, 2, 3]) == ["00_start_here"] and run.code == 1
    assert (
        run.errors.startswith("10_prepare_data failed in cell [3]: AssertionError")
        and run.errors.count("\n") == 1
    )


def test_the_slurm_profile_says_what_snakemake_knows():
    from snakemake.cli import get_argument_parser

    options = {
        option.lstrip("-")
        for action in get_argument_parser()._actions
        for option in action.option_strings
    }
    given = yaml.safe_load((batch.NOTEBOOKS / "slurm" / "config.yaml").read_text())
    assert (
        set(given) <= options
        and given["executor"] == "slurm"
        and given["jobs"] >= len(batch.RETRIEVAL_NOTEBOOKS)
    )


def test_a_profile_of_snakemake_is_heard(notebooks, tmp_path, monkeypatch):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/config.yaml").write_text("executor: nowhere\n")
    monkeypatch.setenv("SNAKEMAKE_PROFILE", str(tmp_path / "cluster"))
    assert run(notebooks, "00") == [] and run.code == 1
    assert run.errors.count("\n") == 1 and "snakemake.log says why" in run.errors
    assert "nowhere" in (tmp_path / "runs/default/snakemake.log").read_text()


# one training outside Jupyter


def training_notebook(notebooks: Path, *cells: tuple[str, bool]) -> None:
    path = write_notebook(notebooks, "20_pir", *(text for text, _ in cells))
    notebook = nbformat.read(path, as_version=4)
    for cell, (_, trains) in zip(notebook.cells[1:], cells, strict=False):
        cell.metadata.tags = ["train"] * trains
    nbformat.write(notebook, path)


def test_training_runs_the_marked_cells_with_the_values_of_the_profile(notebooks, tmp_path, capsys):
    profile(notebooks, "PROFILE: mine\n")
    training_notebook(
        notebooks,
        ("import types; from pathlib import Path", True),
        ("1 / 0", False),
        (f"run = types.SimpleNamespace(folder=Path({str(tmp_path)!r}) / PROFILE)", True),
        ("files = {'pir': f'pir-seed{SEED}'}; print(DATA)", True),
    )
    assert batch.train("pir", "mine", str(tmp_path), 3, notebooks) == [tmp_path / "mine/pir-seed3"]
    assert capsys.readouterr().out == f"{tmp_path}\nThe model is {tmp_path / 'mine/pir-seed3'}.\n"


def test_a_training_that_cannot_be(notebooks):
    write_notebook(notebooks, "20_pir", parameters='CHECKPOINT: str = ""  # file')
    profile(notebooks, "PROFILE: mine\nCHECKPOINT: a.pt\n")
    for arguments, words in (
        (("clip",), "no system 'clip'; choose one of pir, pir_clip, pe_rsitr, cfitr, bita"),
        (("pir", "mine"), "gives CHECKPOINT, so there is nothing to train"),
        (("pir", "default", "nowhere"), "DATA is 'nowhere', which is not a folder"),
    ):
        with pytest.raises(UserError, match=words):
            batch.train(*arguments, notebooks=notebooks)


# the stored form


def noise(height: int) -> str:
    """A PNG of noise, 300 pixels wide, as notebooks hold it."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, 300, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PICTURE = noise(1)


def executed_notebook() -> nbformat.NotebookNode:
    """A notebook as a front end leaves it: image, widget, timings, random ids."""
    image = new_output(
        "display_data",
        {"image/png": PICTURE, "image/jpeg": "AA==", "text/plain": "<Figure>"},
        metadata={"width": 3, "image/png": {"width": 5}},
    )
    widget = new_output(
        "display_data",
        {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "HBox()"},
    )
    text = "12.5 s for 2100 images, 12.5 images/s"
    cells = [
        new_markdown_cell("# T"),
        new_code_cell(
            "1",
            execution_count=1,
            outputs=[image, widget],
            metadata={"execution": {"iopub.status.busy": "2026"}, "tags": ["x"]},
        ),
        new_code_cell("2", execution_count=2, outputs=[new_output("stream", text=text)]),
        new_code_cell(
            "3",
            execution_count=3,
            metadata={"tags": ["nbval-ignore-output"]},
            outputs=[
                new_output("stream", text=text),
                new_output("stream", name="stderr", text="bar"),
            ],
        ),
    ]
    notebook = new_notebook(cells=cells)
    notebook.metadata.update(
        {"widgets": {"a": 1}, "language_info": {"name": "python", "version": "3.11.7"}}
    )
    return notebook


def test_the_stored_form_keeps_text_and_pictures_and_drops_the_rest():
    before = executed_notebook()
    _, first, second, third = stored_notebooks.stored_form(before).cells
    assert [output.data for output in first.outputs] == [
        {"image/png": PICTURE, "text/plain": "<Figure>"},
        {"text/plain": "HBox()"},
    ]
    assert first.metadata == {"tags": ["x"]}
    assert first.outputs[0].metadata == {"image/png": {"width": 5}}
    assert (
        second.outputs[0].text == "12.5 s for 2100 images, 12.5 images/s"
        and second.execution_count == 2
    )
    assert [output.text for output in third.outputs] == ["_ s for 2100 images, _ images/s"]
    assert [cell.id for cell in stored_notebooks.stored_form(before).cells] == ["0", "1", "2", "3"]
    assert stored_notebooks.stored_form(before).metadata == {"language_info": {"name": "python"}}
    assert before.cells[1].outputs[0].data["image/png"], "the given notebook is left alone"


def test_the_stored_form_is_its_own_stored_form():
    once = stored_notebooks.stored_form(executed_notebook())
    assert stored_notebooks.stored_form(once) == once


def test_pictures_become_small_enough_for_the_file_and_equal_bytes_each_time():
    before = executed_notebook()
    large = noise(400)
    for _ in range(15):
        before.cells[1].outputs.append(new_output("display_data", {"image/png": large}))
    once, again = (stored_notebooks.stored_form(before) for _ in range(2))
    assert nbformat.writes(once) == nbformat.writes(again)
    assert len(nbformat.writes(once)) < stored_notebooks.FILE_LIMIT < 15 * len(large)
    sizes = [
        len(base64.b64decode(output.data["image/png"])) for output in once.cells[1].outputs[2:]
    ]
    assert max(sizes) <= stored_notebooks.PICTURE_LIMITS[0] and min(sizes) > 1000
    assert stored_notebooks.stored_form(once) == once


def test_copies_of_a_run_are_stored_if_they_are_of_these_cells(tmp_path):
    path = write_notebook(tmp_path, "00_a", "print(1)", "SEED")
    before = path.read_bytes()
    run = tmp_path / "runs/default"
    (run / "finished").mkdir(parents=True)
    note = run / "finished/00_a-seed0.json"
    with pytest.raises(UserError, match="holds no finished 00_a"):
        stored_notebooks.store([], tmp_path, run)
    note.write_text(json.dumps({"made_of": stored_notebooks.stamp(path, freshness.package())}))
    batch.execute(path, run / "notebooks/00_a-seed0.ipynb", {"SEED": 3})  # one more cell
    stored_notebooks.store([], tmp_path, run)
    assert stored_notebooks.verify([], tmp_path) == []
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.source for cell in cells] == [
        cell.source for cell in nbformat.reads(before, as_version=4).cells
    ]
    assert cells[-1].outputs[0].data["text/plain"] == "3"
    assert stored_notebooks.moved_on(tmp_path) == []
    path.write_text(path.read_text().replace("print(1)", "print(2)"))
    assert stored_notebooks.moved_on(tmp_path) == ["00_a"]
    with pytest.raises(UserError, match="00_a.ipynb or the package changed"):
        stored_notebooks.store([], tmp_path, run)


def test_store_executes_and_verify_accepts(tmp_path):
    path = write_notebook(
        tmp_path, "00_a", "import os; print(os.path.basename(os.getcwd()))", "SEED + 1"
    )
    other = write_notebook(tmp_path, "10_b", "print(1)")
    assert "00_a.ipynb was not executed from top to bottom" in stored_notebooks.verify(
        notebooks=tmp_path
    )
    stored_notebooks.store(["00"], tmp_path)
    assert stored_notebooks.verify(["00"], tmp_path) == []
    cells = nbformat.read(path, as_version=4).cells
    assert cells[1].outputs[0].text == f"{tmp_path.name}\n", (
        "it runs in its own folder, as nbval does"
    )
    assert cells[2].outputs[0].data["text/plain"] == "1"
    assert nbformat.read(other, as_version=4).cells[1].execution_count is None


def test_a_failing_notebook_is_not_stored(tmp_path):
    path = write_notebook(tmp_path, "00_a", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(UserError, match="00_a.ipynb was not stored: ZeroDivisionError"):
        stored_notebooks.store([], tmp_path)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="no notebook 77"):
        stored_notebooks.store(["77"], tmp_path)


def added(*args, **fields):
    return lambda nb: nb.cells[2].outputs.append(new_output(*args, **fields))


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (
            lambda nb: nb.cells[2].update(execution_count=None),
            "was not executed from top to bottom",
        ),
        (lambda nb: nb.cells[2].update(execution_count=7), "was not executed from top to bottom"),
        (added("error", ename="E", evalue="", traceback=[]), "holds an error"),
        (added("stream", name="stderr", text="w"), "holds output to stderr"),
        (added("stream", text=str(paths.repository_root())), "names a folder"),
        (lambda nb: nb.cells[0].update(source="x" * 160_000), "has more than 150 kB of text"),
        (lambda nb: nb.cells[0].update(id="random"), "is not stripped"),
        (
            lambda nb: nb.cells[1].outputs[0].data.update({"image/jpeg": "AA=="}),
            "is not stripped",
        ),
        (
            added("display_data", {"text/plain": "<IPython.core.display.Image object>"}),
            "lacks a picture",
        ),
    ],
)
def test_verify_names_what_is_wrong(tmp_path, spoil, problem):
    notebook = stored_notebooks.stored_form(executed_notebook())
    (tmp_path / "00_a.ipynb").write_text(nbformat.writes(notebook) + "\n")
    assert stored_notebooks.verify(notebooks=tmp_path) == []
    spoil(notebook)
    (tmp_path / "00_a.ipynb").write_text(nbformat.writes(notebook) + "\n")
    found = stored_notebooks.verify(notebooks=tmp_path)
    assert len(found) == 1 and found[0].startswith(f"00_a.ipynb {problem}")


def test_a_profile_builds_on_another_one(notebooks):
    folder = notebooks / "profiles"
    (folder / "base.yaml").write_text("PROFILE: base\nSEED: 3\nEPOCHS: 4\n")
    (folder / "mine.yaml").write_text("PROFILE: mine\nBASE: base\nEPOCHS: 5\n")
    wanted = {"PROFILE": "mine", "SEED": 3, "EPOCHS": 5}
    assert batch.read_profile("mine", notebooks) == wanted
    (folder / "base.yaml").write_text("PROFILE: base\nBASE: mine\n")
    with pytest.raises(UserError, match="'base' is the BASE of 'mine', so it cannot have one"):
        batch.read_profile("mine", notebooks)
    (folder / "base.yaml").unlink()
    with pytest.raises(UserError, match="There is no profile 'base'"):
        batch.read_profile("mine", notebooks)

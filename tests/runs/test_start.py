"""run.start checks parameters, seeds, names folders; Run.show and Run.write_record write where they
say.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from nbhelpers import figures, paths
from nbhelpers.errors import UserError
from nbhelpers.runs import parameters, start


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))


def test_the_root_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (paths.repository_root() / "pyproject.toml").is_file()
    assert paths.runs_root() == tmp_path / "runs"
    monkeypatch.delenv("NBHELPERS_RUNS")
    assert paths.runs_root() == paths.repository_root() / "runs"


def test_a_relative_run_root_is_refused(monkeypatch):
    monkeypatch.setenv("NBHELPERS_RUNS", "runs")
    with pytest.raises(UserError, match="must be absolute"):
        paths.runs_root()


def test_folders_follow_the_profile(tmp_path):
    started = start.start("20_pir", PROFILE="mine", SEED=3, SIZE="tiny", LR=1e-4)
    assert started.parameters.size == "tiny" and started.parameters.lr == 1e-4
    assert started.folder == tmp_path / "runs" / "mine"
    assert started.cache == tmp_path / "runs" / "cache"
    assert started.records == started.folder / "records"
    assert started.checkpoints == started.folder / "checkpoints"
    assert started.figures == started.folder / "figures" / "20_pir"


def test_a_notebook_in_jupyterlab_takes_a_profile_without_a_file(tmp_path):
    """To experiment beside the results of `default`, a name in the cell of parameters is enough."""
    notebook = {"PROFILE": "mine", "EPOCHS": 1}
    exec("import nbhelpers\nrun = nbhelpers.start('20_pir')", notebook)
    assert notebook["run"].folder == tmp_path / "runs" / "mine"
    assert notebook["run"].parameters.epochs == 1
    assert not (paths.repository_root() / "notebooks/profiles/mine.yaml").exists()


def test_equal_seeds_give_equal_numbers():
    def drawn(seed):
        start.start("20_pir", SEED=seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first, second, other = drawn(1), drawn(1), drawn(2)
    assert first == second
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_the_header_says_what_runs_and_names_no_folder(tmp_path, capsys):
    start.start("20_pir")
    header = capsys.readouterr().out
    assert "20_pir · profile default · seed 0" in header
    assert "scenes (generated" in header and f"torch {torch.__version__.split('+')[0]}" in header
    assert str(tmp_path) not in header
    start.start("20_pir", SET="ucm", DATA=str(tmp_path))
    start.start("20_pir", SET="our-town_2", DATA=str(tmp_path))
    out = capsys.readouterr().out
    assert "ucm (real)" in out and "our-town_2 (your own)" in out


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"SEED": "0"}, "SEED is '0', of type str, but must be int \\(write `SEED = 0` in a cell"),
        ({"SEED": True}, "SEED is True, of type bool, but must be int"),
        ({"SEED": -1}, "SEED is -1; it must be at least 0"),
        ({"SEED": 2**32}, "SEED is 4294967296; it must be below 4294967296"),
        ({"SET": "rsicdd"}, "SET is 'rsicdd'; choose one of scenes,.*rsicd"),
        (
            {"SET": "Our town", "DATA": "/"},
            "SET is 'Our town'; name a set of your own with small letters",
        ),
        ({"SIZE": "big"}, "SIZE is 'big'; choose 'tiny', 'compact' or 'paper'"),
        ({"DEVICE": "tpu"}, "DEVICE is 'tpu'"),
        ({"EPOCHS": 0}, "EPOCHS is 0; it must be at least 1"),
        ({"EPOCHS": 1.5}, "EPOCHS is 1.5, of type float, but must be int"),
        ({"PROFILE": "../mine"}, "PROFILE is '../mine'"),
        ({"PROFILE": "cache"}, "not 'cache'"),
        ({"SET": "ucm"}, "SET ucm needs DATA"),
        ({"SET": "ucm", "DATA": "/no/such/folder"}, "DATA is '/no/such/folder', not a folder"),
        (
            {"CHECKPOINT": "/no/such/file"},
            "CHECKPOINT is '/no/such/file', but there is no such file",
        ),
        ({"seed": 1}, "no parameter 'seed' in 20_pir \\(did you mean SEED"),
        ({"BEAMS": 5}, "no parameter 'BEAMS' in 20_pir\\."),
    ],
)
def test_wrong_parameters_are_refused_in_a_sentence(wrong, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        start.start("20_pir", **wrong)
    assert "\n" not in str(caught.value)


def test_every_wrong_value_has_its_sentence():
    wrong = {
        "ABLATIONS": "false",
        "TURNS": "no",
        "CAPTIONS": "2",
        "BEAMS": "five",
        "PRECISION": "FP16",
        "LR": float("nan"),
        "PRETRAIN": -1,
        "SHARDS": None,
    }
    with pytest.raises(UserError) as caught:
        start.start("20_pir", **wrong)
    found = str(caught.value).removeprefix("20_pir was not started. ")
    for name in wrong:
        assert re.search(rf"(^|\. )({name} is|There is no parameter '{name}')", found), name


def test_the_values_are_those_of_the_calling_notebook():
    notebook = {"SEED": 3, "EPOCHS": 7, "CLAIMS": {}}
    exec("import nbhelpers\nrun = nbhelpers.start('20_pir', EPOCHS=9)", notebook)
    found = vars(notebook["run"].parameters)
    declared = parameters.declared(paths.repository_root() / "notebooks/20_pir.ipynb")
    given = found["seed"], found["epochs"], found["batch_size"]
    assert given == (3, 9, declared["BATCH_SIZE"]), "variable, override, default"
    assert {name.upper() for name in found} == set(declared)
    notebook["SEED"] = "three"
    with pytest.raises(UserError, match="SEED is 'three'"):
        exec("nbhelpers.start('20_pir')", notebook)


def test_a_notebook_without_a_seed_starts_with_zero():
    started = start.start("11_audit_data")
    assert started.parameters.seed == 0 and started.settings == {}


def test_half_precision_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(start, "_prepare_torch", lambda seed, device: ("cpu", 1))
    with pytest.raises(UserError, match="precision 'fp16' needs a CUDA GPU"):
        start.start("20_pir", PRECISION="fp16")


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start.start("20_pir", DEVICE="auto").device == "cpu"
    with pytest.raises(UserError, match="no CUDA device"):
        start.start("20_pir", DEVICE="cuda")


def test_threads_follow_the_environment(monkeypatch):
    before, of_cv2 = torch.get_num_threads(), cv2.getNumThreads()
    try:
        monkeypatch.setenv("NBHELPERS_THREADS", "1")
        start.start("20_pir")
        assert torch.get_num_threads() == cv2.getNumThreads() == 1
        monkeypatch.setenv("NBHELPERS_THREADS", "100000")
        start.start("20_pir")
        assert torch.get_num_threads() == cv2.getNumThreads() == os.cpu_count()
    finally:
        torch.set_num_threads(before)
        cv2.setNumThreads(of_cv2)
    monkeypatch.setenv("NBHELPERS_THREADS", "two")
    with pytest.raises(UserError, match="NBHELPERS_THREADS is 'two'"):
        start.start("20_pir")


def test_show_writes_the_figure_and_shows_that_file(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.get_ipython", lambda: object())
    monkeypatch.setattr("IPython.display.display", shown.append)
    started = start.start("20_pir")
    figure = figures.ablation_bars(pd.DataFrame({"variant": ["a"], "value": [1.0]}))
    started.show(figure, "ablation")
    assert shown[0].data == (started.figures / "ablation.png").read_bytes()


def test_a_bar_is_shown_where_somebody_looks(monkeypatch, capsys):
    started = start.start("20_pir")
    capsys.readouterr()
    for name, value, shown in (("CI", "1", False), ("TQDM_DISABLE", "1", False), ("X", "", True)):
        for variable in ("CI", "TQDM_DISABLE"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv(name, value)
        assert list(started.progress([1, 2, 3], "image")) == [1, 2, 3]
        assert ("3/3" in capsys.readouterr().err) == shown


def test_a_record_carries_what_the_run_knows(monkeypatch):
    from nbhelpers.results import records

    monkeypatch.setattr(records, "write", lambda folder, record, ranks: record | {"folder": folder})
    monkeypatch.setattr(records, "read_one", lambda written: written)
    started = start.start("20_pir", SEED=5, EPOCHS=3, WORKERS=1, TRIED=2)
    written = started.write_record(
        {"epochs": 1}, {}, system="PIR", data_fingerprint="0" * 64, seconds=1.0
    )
    assert written["folder"] == started.records
    assert (
        written["notebook"],
        written["profile"],
        written["set"],
        written["seed"],
        written["device"],
    ) == ("20_pir", "default", "scenes", 5, started.device)
    assert written["system"] == "PIR" and written["config"] == {"epochs": 1}
    assert written["settings"].items() >= {"EPOCHS": 3, "TRIED": 2, "LR": 0.001}.items()
    assert not {"WORKERS", "DATA", "DEVICE"} & set(written["settings"]), "nothing of this machine"


def test_importing_the_room_loads_no_torch():
    code = (
        "import sys, nbhelpers.runs.start, nbhelpers.runs.batch; sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(start.__file__).parents[1]).returncode
        == 0
    )

"""The profile paper_ucm to its end, on narrow and shallow networks: what `make rehearse` does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import rehearse
import yaml

from nbhelpers.results import records
from nbhelpers.runs import batch
from nbhelpers.towers import public_weights

PUBLIC = ("swin_t", "bert_base", "resnet50_aid", "clip_vit_b32", "clip_rn50", "vilt_mlm_itm")
PUBLIC += ("clip_vit_l14", "opt_2.7b")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    assert rehearse.rehearse("cut", folder) == 0
    return folder


@pytest.fixture(scope="module")
def folder(home) -> Path:
    return home / "runs" / rehearse.PROFILE


def test_every_notebook_of_a_paper_profile_runs_to_its_end(home):
    logs = [home / "logs" / f"{step.name}.log" for step in batch.CHAIN]
    assert all("s of the processor" in log.read_text() for log in logs)


def test_all_systems_are_trained_from_the_public_files(home, folder):
    kinds = ("retrieval", "captions")
    found = chain.from_iterable(records.read(folder / "records", kind) for kind in kinds)
    systems = {record["system"] for record in found}
    assert systems >= {"PIR", "PIR-CLIP", "PE-RSITR", "CFITR", "BITA"}
    files = {
        tower["path"]
        for start in (folder / "starting").glob("*.json")
        for tower in json.loads(start.read_text())["towers"].values()
    }
    assert all(Path(file).is_relative_to(home / "weights") for file in files)
    there = {public_weights.locate(name, home / "weights")[0] for name in PUBLIC}
    assert {str(path) for path in there} == files


def test_two_processes_train_what_the_notebook_finds(home, folder, tmp_path):
    notebooks, runs = tmp_path / "notebooks", tmp_path / "runs"
    shutil.copytree(rehearse.ROOT / "notebooks", notebooks)
    with open(notebooks / "profiles" / f"{rehearse.PROFILE}.yaml", "a") as profile:
        yaml.safe_dump(rehearse.GIVEN, profile)
    shutil.copytree(folder / "starting", runs / rehearse.PROFILE / "starting")
    (runs / "cache").symlink_to(home / "runs/cache")
    environment = rehearse.environment("cut", home) | {"NBHELPERS_RUNS": str(runs)}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "NBHELPERS_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    train = [str(rehearse.HERE / "train_pir.py"), str(home / "data"), str(notebooks)]
    done = subprocess.run(
        [sys.executable, *torchrun, *train],
        cwd=rehearse.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name = records.read_one(folder / "records/20_pir-seed0.json")["checkpoint"]
    assert (runs / rehearse.PROFILE / name).is_file()


def test_an_unknown_size_is_refused(capsys):
    assert rehearse.main("small") == 1
    assert "choose full or cut" in capsys.readouterr().err

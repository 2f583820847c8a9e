"""The whole chain in the default profile, once, as `make run` runs it; then what it left behind."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

from nbhelpers.__main__ import main
from nbhelpers.data import layouts
from nbhelpers.metrics import audit, caption_scores
from nbhelpers.paths import repository_root
from nbhelpers.results import records
from nbhelpers.runs import batch
from nbhelpers.systems import trained_systems

pytestmark = pytest.mark.skipif(
    not os.environ.get("NBHELPERS_RUNS"),
    reason="runs in the folder named by NBHELPERS_RUNS, as `make test` sets it",
)


@pytest.fixture
def folder(chain) -> Path:
    return Path(os.environ["NBHELPERS_RUNS"]) / "default"


def test_every_notebook_runs_to_its_end(chain, folder):
    for step in batch.CHAIN:
        executed = nbformat.read(folder / "notebooks" / f"{step.name}-seed0.ipynb", as_version=4)
        code = [cell for cell in executed.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in code), step.name
        assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
        assert re.search(rf"^{step.name} +\d+ +{step.budget}", chain.stdout, re.M), (
            "no seconds beside budget"
        )


SYSTEMS = {
    "20_pir": "PIR",
    "21_pir_clip": "PIR-CLIP",
    "22_pe_rsitr": "PE-RSITR",
    "23_cfitr": "CFITR",
}


@pytest.mark.parametrize("notebook", SYSTEMS)
def test_records_are_complete_and_better_than_chance(folder, notebook):
    found = records.read(folder / "records")
    assert {(record["profile"], record["set"]) for record in found} == {("default", "scenes")}
    (full,) = (
        record for record in found if record["notebook"] == notebook and record["variant"] == ""
    )
    assert full["system"] == SYSTEMS[notebook]
    score, chance = full["metrics"]["expectation"]["mR"], full["chance"]["mR"]
    assert score > 4 * chance
    low, high = full["intervals"]["mR"]
    assert low <= score <= high


def test_pir_knows_more_than_the_scene_class_and_others_come_near(folder):
    """What keeps the others below this line, their notebooks show in a figure."""
    test = layouts.read(Path(generated()[0])).split("test")
    line = audit.class_only(test)["mR"]
    found = {
        (record["system"], record["variant"]): record["metrics"]["expectation"]["mR"]
        for record in records.read(folder / "records")
    }
    assert found["PIR", ""] > line
    assert found["PIR-CLIP", ""] > line - 5
    assert found["CLIP", "full"] > line - 5
    assert found["PE-RSITR", ""] > line - 15


def test_adapted_systems_are_better_than_the_clip_they_start_from(folder):
    found = {
        (record["system"], record["variant"]): record["metrics"]["expectation"]["mR"]
        for record in records.read(folder / "records")
    }
    assert (
        min(found["PIR-CLIP", ""], found["PE-RSITR", ""], found["CLIP", "full"])
        > found["CLIP", "zero_shot"]
    )


def test_captions_are_scored_and_better_than_one_caption_for_all(folder):
    found = {
        (record["system"], record["variant"]): record["metrics"]
        for record in records.read(folder / "records", "captions")
    }
    written = [metrics for (system, variant), metrics in found.items() if system == "BITA"]
    assert (
        written
        and max(metrics["CIDEr"] for metrics in written)
        > found["most frequent caption", "most_frequent"]["CIDEr"]
    )


@pytest.mark.parametrize("system", trained_systems.SYSTEMS)
def test_what_a_notebook_trained_is_found_and_used(folder, system):
    found = trained_systems.trained(folder, system)
    assert found.checkpoint.is_relative_to(folder / "checkpoints")
    picture = np.zeros((64, 64, 3), np.uint8)
    if system == "bita":
        assert found.caption([picture])[0]
    else:
        assert found.encode_images([picture]).shape == found.encode_texts(["a pond"]).shape


def generated() -> tuple[str, str]:
    """Captions and images of the set that the chain generated."""
    captions = repository_root() / "data/scenes/dataset_scenes.json"
    return str(captions), str(captions.parent / "images")


@pytest.mark.parametrize("system", trained_systems.RETRIEVAL)
def test_eval_gives_what_the_notebook_recorded(folder, system, tmp_path, one_thread):
    captions, images = generated()
    assert (
        main(
            [
                "eval",
                "--system",
                system,
                "--captions",
                captions,
                "--images",
                images,
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    recorded = records.read_one(
        folder / f"records/{trained_systems.NOTEBOOK_OF[system]}-seed0.json"
    )
    (written,) = records.read(tmp_path)
    assert (
        written["metrics"] == recorded["metrics"]
        and written["data_fingerprint"] == recorded["data_fingerprint"]
    )
    assert written["notes"] in recorded["notes"]


def test_caption_and_score_give_what_the_notebooks_recorded(folder, tmp_path, one_thread):
    captions, images = generated()
    said = tmp_path / "said.json"
    assert main(["caption", "--captions", captions, "--images", images, "--out", str(said)]) == 0
    found = caption_scores.read_captions(said)
    assert found == caption_scores.read_captions(folder / "captions/24_bita-seed0.json")
    (recorded,) = (
        record
        for record in records.read(folder / "records", "captions")
        if record["variant"] == "bita"
    )
    scores = caption_scores.score_captions(found, caption_scores.read_references(captions))
    assert scores.corpus == pytest.approx(recorded["metrics"])


def test_the_leaderboard_is_printed(chain):
    assert "PIR" in chain.stdout and "scenes, test split" in chain.stdout


def test_figures_are_written(chain, folder):
    written = list((folder / "figures").rglob("*.png"))
    assert {path.parent.name for path in written} >= {
        "10_prepare_data",
        "20_pir",
        "21_pir_clip",
        "22_pe_rsitr",
        "23_cfitr",
        "24_bita",
        "25_two_stage_search",
        "30_evaluate_retrieval",
        "31_errors_and_significance",
        "32_bring_your_model",
        "40_attention_and_belief",
        "50_score_captions",
        "60_search",
    }
    assert all(path.stat().st_size < 8_000_000 for path in written)


def test_a_second_call_runs_nothing_again(chain, make_run):
    again = make_run()
    assert again.returncode == 0
    assert "finished in" not in again.stdout

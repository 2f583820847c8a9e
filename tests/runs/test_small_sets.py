"""The notebooks on small and odd sets: a result or a sentence, whatever the size of a split."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_models import random_start, small_clip, write_open_clip

from nbhelpers import figures
from nbhelpers.data import catalog, check
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.metrics import audit, caption_scores, recall, significance
from nbhelpers.runs import batch
from nbhelpers.runs.start import Run
from nbhelpers.systems import map_checks, mistakes, trained_systems

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 210)}
PARTS = {"20_pir": ("", "frozen"), "22_pe_rsitr": ("", "full"), "23_cfitr": ("",)}
SYSTEMS = {"20_pir": "PIR", "22_pe_rsitr": "PE-RSITR", "23_cfitr": "CFITR"}
SETS = {
    "sixty": ((42, 6, 12), 5, True),
    "one_image": ((18, 1, 1), 5, True),
    "one_caption": ((8, 2, 3), 1, False),
}  # images of each split, captions, classes in names
# Cells of 30 and 31 that compute the same for every set, in seconds.
SAME = (
    "large_owner =",
    "p-values 0.005",
    "rng, wrong =",
    "real = {name:",
    "added = (",
    "for name, folder in real.items():",
)


def write_set(folder: Path, name: str, layout: str = "json") -> None:
    """Squares of three colours as a set of SETS in a user's folder."""
    counts, captions, classes = SETS[name]
    (folder / f"{name}_images").mkdir(parents=True)
    rng, images = np.random.default_rng(0), []
    for number, split in enumerate(np.repeat(["train", "val", "test"], counts)):
        colour = list(COLOURS)[number % 3]
        file = f"{colour}_{number}.png" if classes else f"{number}.png"
        pixels = np.array(COLOURS[colour]) + rng.integers(-25, 26, size=(48, 48, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}_images" / file)
        texts = [f"A {colour} field.", *(f"Field {number} has {k} trees." for k in range(4))]
        images.append(
            {
                "filename": file,
                "split": str(split),
                "sentences": [{"raw": text} for text in texts[:captions]],
            }
        )
    if layout == "csv":
        rows = [
            {"image": image["filename"], "caption": one["raw"], "split": image["split"]}
            for image in images
            for one in image["sentences"]
        ]
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    else:
        (folder / f"dataset_{name}.json").write_text(json.dumps({"images": images}))


def execute(notebook: str, leave_out: tuple[str, ...] = (), **values) -> dict:
    """The names that the cells of a notebook leave, run as plain Python with these parameters."""
    names = {"__name__": "__main__"}
    book = nbformat.read(batch.NOTEBOOKS / f"{notebook}.ipynb", as_version=4)
    for number, cell in enumerate(book.cells):
        if cell.cell_type != "code" or cell.source.startswith(leave_out):
            continue
        exec(compile(cell.source, f"{notebook}[{number}]", "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names |= values
    return names


def similarity_of(table: CaptionTable, noise: float) -> np.ndarray:
    """Scores (images, captions) that are right where the noise allows it; equal for equal texts."""
    text = pd.factorize(table.captions.text)[0]
    drawn = np.random.default_rng(7).random((len(table), text.max() + 1))
    return mistakes.same_sentence(table, "exact") + noise * drawn[:, text]


def write_records(name: str, data: catalog.DataSet, runs: Path, variants: dict) -> None:
    table, run = data.table.split("test"), SimpleNamespace(seed=0, profile="default", set=name)
    for notebook, kinds in variants.items():
        one = Run(notebook, run, "cpu", runs)
        for noise, variant in zip((1.0, 3.0), kinds, strict=False):  # a main run may stand alone
            scores, owner = similarity_of(table, noise), table.owner()
            rules = {rule: recall.evaluate(scores, owner, ties=rule) for rule in recall.TIES}
            found = rules["expectation"]
            one.write_record(
                {"width": 1},
                found.arrays() | {"owner": owner},
                system=SYSTEMS[notebook],
                variant=variant,
                data_fingerprint=table.fingerprint(),
                seconds=1.0,
                parameters={"all": 1, "trainable": 1},
                protocol={"split": "test", "ties": "expectation", "selected_on": "val"},
                metrics={rule: result.metrics for rule, result in rules.items()},
                intervals=recall.bootstrap(found, owner),
                ceiling=audit.ceilings(table),
                chance=recall.chance(owner),
            )


@pytest.fixture
def small(tmp_path, monkeypatch, request):
    """(name, parameters) of a set in a user's folder; the notebooks' runs stand beside it."""
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(Run, "show", lambda self, figure, name: None)  # drawn, but not written
    write_set(tmp_path, request.param)
    return {"SET": request.param, "DATA": str(tmp_path)}


every_set = pytest.mark.parametrize("small", SETS, indirect=True)


@every_set
def test_the_audit_reads_every_set(small):
    execute("11_audit_data", **small)


@pytest.mark.parametrize("small", ["one_caption"], indirect=True)
def test_the_data_notebook_reads_images_with_one_caption_and_no_class(small):
    execute("10_prepare_data", **small)


@every_set
def test_the_evaluation_reads_records_of_every_set(small, tmp_path, monkeypatch, capsys):
    data = catalog.open_dataset(small["SET"], tmp_path, tmp_path / "runs/cache")
    write_records(small["SET"], data, tmp_path / "runs", PARTS)
    execute("30_evaluate_retrieval", SAME, **small)

    pretend_trained(monkeypatch, data, "pir", "cfitr")
    execute("31_errors_and_significance", SAME, **small)
    execute("90_leaderboard", **small)


@every_set
def test_a_model_of_ones_own_is_evaluated_on_every_set(small, tmp_path):
    starting = tmp_path / "runs/default/starting"
    starting.mkdir(parents=True)
    random_start(starting)
    mine = str(write_open_clip(tmp_path / "mine", small_clip()))
    names = execute("32_bring_your_model", MODEL=mine, DEVICE="cpu", **small)
    assert set(names["doors"]) == {"this project", "open_clip", "Hugging Face", ".npy"}
    assert mine in names["lines"]


def pretend_trained(monkeypatch, data: catalog.DataSet, *names: str) -> None:
    """Lets these systems be there, with the scores of their records, and no other."""

    def trained(folder: Path, name: str, *_) -> str:
        if name not in names:
            raise UserError(f"{name} was not trained")
        return name

    scores = similarity_of(data.table.split("test"), 1.0)
    monkeypatch.setattr(trained_systems, "trained", trained)
    monkeypatch.setattr(mistakes, "scores", lambda *_, **__: mistakes.Scores(scores, scores))


def test_one_system_alone_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(Run, "show", lambda self, figure, name: None)
    write_set(tmp_path, "one_image")
    small = {"SET": "one_image", "DATA": str(tmp_path)}
    data = catalog.open_dataset("one_image", tmp_path, tmp_path / "runs/cache")
    write_records("one_image", data, tmp_path / "runs", {"20_pir": ("",)})
    execute("30_evaluate_retrieval", SAME, **small)
    pretend_trained(monkeypatch, data, "pir")
    execute("31_errors_and_significance", SAME, **small)


def test_a_set_of_a_csv_is_read_like_one_of_json(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(Run, "show", lambda self, figure, name: None)
    write_set(tmp_path, "one_image", "csv")
    found = execute("10_prepare_data", SET="one_image", DATA=str(tmp_path))
    assert list(found["table"].counts().images) == [18, 1, 1]


# expected, but not so


def test_a_result_that_a_small_set_does_not_reach_is_said_and_stops_the_generated_set(capsys):
    small, scenes = (
        Run("x", SimpleNamespace(set=name), "cpu", Path()) for name in ("mine", "scenes")
    )
    small.expect(True, "it learns")
    assert capsys.readouterr().out == ""
    small.expect(False, "it learns")
    assert capsys.readouterr().out == "WARNING: Expected, but not so on this set: it learns.\n"
    with pytest.raises(AssertionError, match="it learns"):
        scenes.expect(False, "it learns")


def test_at_paper_size_a_result_that_is_not_reached_warns_on_every_set_and_goes_on(capsys):
    Run("x", SimpleNamespace(set="scenes", size="paper"), "cpu", Path()).expect(False, "it learns")
    assert capsys.readouterr().out.startswith("WARNING: Expected, but not so")


# too small to train


def table_of(*captions: int, shared: bool = False) -> CaptionTable:
    """Training images with so many captions each."""
    images = pd.DataFrame({"image_id": [f"i{n}" for n in range(len(captions))]})
    images = images.assign(file=images.image_id + ".png", split="train", scene="field")
    rows = [
        {"image_id": f"i{n}", "text": f"text {k}" if shared else f"text {n} {k}"}
        for n, count in enumerate(captions)
        for k in range(count)
    ]
    return CaptionTable("mine", images, pd.DataFrame(rows))


def test_a_batch_that_the_training_pairs_do_not_fill_is_said_with_the_size_that_they_do():
    values = batch.values_of("default") | {"SIZE": "tiny"}
    said = check.too_small(table_of(*[5] * 6), values)
    assert [one.split()[0] for one in said] == [
        "BATCH_SIZE",
        "PIR_CLIP_BATCH",
        "PE_RSITR_BATCH",
        "CFITR_BATCH",
        "CAPTION_BATCH",
    ]
    mended = values | {one.split()[0]: int(one.rstrip(".").split()[-1]) for one in said}
    assert check.too_small(table_of(*[5] * 6), mended) == []


def test_pairs_are_counted_as_each_system_trains_on_them():
    values = batch.values_of("default") | {
        "SIZE": "tiny",
        "BATCH_SIZE": 8,
        "PIR_CLIP_BATCH": 8,
        "PE_RSITR_BATCH": 8,
        "CFITR_BATCH": 8,
        "CAPTION_BATCH": 8,
    }
    assert check.too_small(table_of(4, 4), values) == []
    (said,) = check.too_small(table_of(4, 4), values | {"CAPTIONS": 1})
    assert said.startswith("CAPTION_BATCH is 8, but there are 2 training pairs")
    assert "23_cfitr finds no false one" in check.too_small(table_of(4, 4, shared=True), values)[-1]
    alone = check.too_small(table_of(1), values)
    assert "add training images or captions" in alone[0]


def test_a_set_with_one_scene_class_is_told_before_the_prior_is_fitted():
    values = batch.values_of("default") | {
        "SIZE": "tiny",
        "BATCH_SIZE": 8,
        "PIR_CLIP_BATCH": 8,
        "PE_RSITR_BATCH": 8,
        "CFITR_BATCH": 8,
        "CAPTION_BATCH": 8,
    }
    table = table_of(*[2] * 12)
    (said,) = check.too_small(table, values | {"SIZE": "compact"})
    assert "one scene class" in said and "SIZE=tiny" in said
    assert check.too_small(table, values | {"SIZE": "tiny"}) == []
    two = CaptionTable("mine", table.images.assign(scene=["a", "b"] * 6), table.captions)
    assert check.too_small(two, values | {"SIZE": "compact"}) == []


def test_values_of_a_profile_are_its_own_over_the_defaults():
    assert batch.values_of("ucm")["BATCH_SIZE"] == 128
    assert batch.values_of("ucm")["CFITR_BATCH"] == 8 < batch.values_of("default")["CFITR_BATCH"]
    assert batch.values_of("ucm")["BEAMS"] == batch.values_of("default")["BEAMS"]
    assert batch.values_of("of_my_own") == batch.values_of("default")


@pytest.mark.parametrize("images", [2, 3, 5, 40])
def test_holding_out_leaves_images_on_both_sides(images):
    held = catalog.hold_out(table_of(*[1] * images)).images.split.value_counts()
    assert held["val"] >= 1 and held["train"] >= 1
    assert catalog.hold_out(table_of(*[1] * images), 1e-9).images.split.eq("val").sum() == 1
    assert catalog.hold_out(table_of(*[1] * images), 1.0).images.split.eq("train").sum() == 1
    assert list(catalog.hold_out(table_of(1)).images.split) == ["train"]


# measures and figures of one item


def test_measures_of_one_image():
    owner = np.zeros(3, int)
    found = recall.evaluate(np.array([[0.1, 0.2, 0.3]]), owner)
    assert recall.bootstrap(found, owner)["mR"] == (100, 100)
    test = recall.paired_test(found, found, owner)["mR"]
    assert (test["difference"], test["p"]) == (0, 1)
    groups = significance.groups({"one": {0: found}}, owner)
    assert list(groups.table["group"]) == ["a"] and groups.sentences() == []
    assert np.isnan(mistakes.rank_correlation(np.ones(3), np.arange(3), owner)).all()
    assert mistakes.hubness(np.ones(4))["skewness"] == 0
    assert mistakes.rank_correlation(np.arange(3), np.arange(3), owner)[0] == pytest.approx(1)


def test_scores_of_one_caption():
    scores = caption_scores.score_captions({"a": "a field"}, {"a": ["a field"]}, ["Bleu", "CIDEr"])
    low, high = caption_scores.bootstrap(scores)["Bleu_1"]
    assert low == high == pytest.approx(1) and scores.corpus["CIDEr"] == 0
    rows = [{"system": "x", "metric": "CIDEr", "value": 0.0, "low": 0.0, "high": 0.0}]
    assert figures.score_bars(pd.DataFrame(rows)).axes[0].get_xlim()[1] == 1


def test_objects_found_in_one_image():
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    found = map_checks.objects_found({"even": [np.ones((2, 2))]}, [mask]).loc["even"]
    assert found.share == pytest.approx(0.5) and found.verdict == "no"


PICTURE = np.zeros((48, 48, 3), np.uint8)


@pytest.mark.parametrize("count", [0, 1])
def test_sheets_of_no_and_one_item_are_drawn(count):
    pictures, texts = [PICTURE] * count, ["a"] * count
    drawn = {
        "sheet": figures.contact_sheet(pictures, texts),
        "misses": figures.miss_sheet(texts, pictures, pictures, texts),
        "beside": figures.captions_beside_images(pictures, [["a"]] * count),
    }
    shown = {name: sum(axes.get_visible() for axes in one.axes) for name, one in drawn.items()}
    assert shown == {"sheet": count, "misses": count, "beside": 2 * count}


def test_curves_of_one_item_are_drawn():
    (line,) = figures.recall_curve({"PIR": np.array([50.0])}).axes[0].lines
    assert line.get_marker() == "o"
    distances = figures.code_distances({"x": (np.array([3]), np.array([]))}, 8)
    assert len(distances.axes[0].patches) == 1
    bars = pd.DataFrame({"variant": ["a"], "value": [0.0], "low": [0.0], "high": [0.0]})
    assert figures.ablation_bars(bars).axes[0].get_xlim()[1] == 1

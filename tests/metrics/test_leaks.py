"""Leaks between any two sets: equal and similar images, repeated captions, recalls without them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nbhelpers.data.archives import open_images
from nbhelpers.data.layouts import read
from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.errors import UserError
from nbhelpers.metrics import leaks, recall
from nbhelpers.metrics.leaks import Pictures
from nbhelpers.results import records
from nbhelpers.runs.commands import main


def scene(seed: int) -> Image.Image:
    """A picture of large coloured spots, as unlike any other as two places are."""
    spots = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize((96, 96), Image.Resampling.BICUBIC)


def write_set(folder: Path, name: str, images: dict[str, Image.Image], captions: dict) -> None:
    (folder / f"{name}_images").mkdir(parents=True)
    lines = ["image,caption,split"]
    for file, picture in images.items():
        picture.save(folder / f"{name}_images" / file, quality=30)
        lines += [f"{file},{text},{captions['split']}" for text in captions[file]]
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Training pictures 0 to 11, and test pictures of which 0 is equal and 1 recompressed."""
    folder = tmp_path_factory.mktemp("sets")
    learnt = {f"train_{n}.png": scene(n) for n in range(12)}
    texts = {file: [f"place number {n}"] for n, file in enumerate(learnt)}
    write_set(folder, "web", learnt, texts | {"split": "train"})
    asked = {"test_0.png": scene(0), "test_1.jpg": scene(1)}
    asked |= {f"test_{n}.png": scene(100 + n) for n in range(2, 6)}
    said = {file: [f"a view of {n}", f"sight {n}"] for n, file in enumerate(asked)}
    said["test_5.png"][0] = "Place  number 3"
    write_set(folder, "own", asked, said | {"split": "test"})
    return folder


def pictures(folder: Path, name: str, tmp_path: Path) -> tuple:
    table = read(folder / f"{name}.csv")
    store = open_images(folder / f"{name}_images")
    return table, Pictures.of(table, DecodedCache.build(store, list(table.images.file), tmp_path))


def test_equal_and_similar_images_and_repeated_captions_are_found(folder, tmp_path):
    own, ours = pictures(folder, "own", tmp_path)
    web, theirs = pictures(folder, "web", tmp_path)
    found = leaks.find(own, ours, theirs, web)
    assert [Path(name).stem for name in found.pairs.image] == ["test_0", "test_1"]
    assert [Path(name).stem for name in found.pairs.other] == ["train_0", "train_1"]
    assert list(found.pairs.equal) == [True, False] and found.pairs.distance[0] == 0
    assert list(found.images) == [True, True, False, False, False, False]
    assert list(np.flatnonzero(found.said)) == [5] and found.captions.sum() == 1
    assert list(found.counts().found) == [1, 2, 1, 1]
    assert not leaks.find(own, ours, theirs, web, how="exact").captions.any()
    assert not len(leaks.find(own, None, None, web).pairs)
    with pytest.raises(UserError, match="choose 0 to 20 of 64"):
        leaks.find(own, ours, theirs, web, within=40)


def test_many_images_give_the_pairs_of_a_loop(monkeypatch):
    monkeypatch.setattr(leaks, "ROWS_AT_ONCE", 7)
    random = np.random.default_rng(0)
    ours, theirs = (random.integers(0, 256, n).astype(np.uint64) for n in (30, 40))
    table = read_table(30)
    sides = [Pictures([f"{n}" for n in range(len(h))], h) for h in (ours, theirs)]
    pairs = leaks.find(table, *sides, None, within=1).pairs
    right = {
        (str(i), str(j))
        for i, a in enumerate(ours)
        for j, b in enumerate(theirs)
        if int(a ^ b).bit_count() <= 1
    }
    assert set(zip(pairs.image, pairs.other, strict=True)) == right and len(right) > 10


def read_table(count: int):
    import pandas as pd

    from nbhelpers.data.table import CaptionTable

    ids = [f"{n}" for n in range(count)]
    images = pd.DataFrame({"image_id": ids, "file": ids, "split": "test", "scene": ids})
    captions = pd.DataFrame(
        {"image_id": ids + ids, "text": [f"text {n}" for n in range(2 * count)]}
    )
    return CaptionTable("made", images, captions)


def test_recalls_are_those_of_the_queries_that_are_kept():
    table, names = read_table(6), [f"{n}" for n in range(6)]
    scores = np.random.default_rng(1).random((6, 12))
    result = recall.evaluate(scores, table.owner())
    hashes = np.array([0, 2**20 - 1, 2**40, 2**50 - 1, 2**60 - 1, 2**64 - 1], np.uint64)
    train = Pictures(["x", "y"], hashes[[1, 4]])
    found = leaks.find(table, Pictures(names, hashes), train, None, within=0)
    assert list(np.flatnonzero(found.images)) == [1, 4]
    rows = found.recalls(result, table.owner())
    kept = [0, 2, 3, 5]
    asked = [n for n, owner in enumerate(table.owner()) if owner in kept]
    clean = rows.loc["without leaked images"]
    assert clean["i2t_R@1"] == pytest.approx(100 * result.i2t_hits[kept, 0].mean())
    assert clean["t2i_R@5"] == pytest.approx(100 * result.t2i_hits[asked, 1].mean())
    assert clean["images"] == 4 and rows.loc["leaked images alone", "images"] == 2
    assert rows.loc["all", "mR"] == pytest.approx(result.metrics["mR"])
    assert clean["mR low"] <= clean["mR"] <= clean["mR high"]
    with pytest.raises(UserError, match="ranks are of other captions"):
        found.recalls(result, table.owner()[::-1])


def audit(folder: Path, *words: str) -> list[str]:
    own = ["--test", str(folder / "own.csv"), "--test-images", str(folder / "own_images")]
    return ["data", "audit", *own, *words]


def test_the_command_compares_two_sets_or_a_list_of_hashes(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path))
    web = ["--train", str(folder / "web.csv"), "--train-images", str(folder / "web_images")]
    listed = str(tmp_path / "hashes.txt")
    assert main(audit(folder, *web, "--write-hashes", listed, "--json")) == 0
    whole = json.loads(capsys.readouterr().out)
    assert [row["found"] for row in whole["counts"]] == [1, 2, 1, 1]
    assert main(audit(folder, "--train-hashes", listed, "--json")) == 0
    by_hash = json.loads(capsys.readouterr().out)
    assert [row["found"] for row in by_hash["counts"]] == [0, 2, 0, 0]
    assert [p["other"] for p in by_hash["pairs"]] == [p["other"] for p in whole["pairs"]]
    named = ["data", "audit", "--data", str(folder), "--test", "own", "--train", "web", "--json"]
    assert main(named) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == whole["counts"]
    assert main(audit(folder, "--train", str(folder / "web.csv"))) == 0
    assert "captions that stand there" in capsys.readouterr().out


def a_record(folder: Path, out: Path) -> str:
    """A record of a system that ranks the test images of the set `own` at random."""
    owner = read(folder / "own.csv").owner()
    scores = np.random.default_rng(2).random((6, len(owner)))
    result = recall.evaluate(scores, owner)
    rules = {rule: recall.evaluate(scores, owner, ties=rule).metrics for rule in recall.TIES}
    made = records.new(
        config={},
        notebook="eval",
        system="PIR",
        profile="eval",
        set="own",
        data_fingerprint="a" * 64,
        seed=0,
        seconds=1.0,
        parameters={"all": 1, "trainable": 1},
        metrics=rules,
        protocol={"split": "test", "ties": "expectation", "selected_on": "val"},
        intervals=recall.bootstrap(result, owner, samples=50),
        chance=recall.chance(owner),
        weights=[{"name": "w", "source": "file", "sha256": "b" * 64, "kind": "file"}],
    )
    return str(records.write(out, made, result.arrays() | {"owner": owner}))


def test_a_record_is_read_with_and_without_the_leaked_queries(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path))
    record = a_record(folder, tmp_path / "records")
    web = ["--train", str(folder / "web.csv"), "--train-images", str(folder / "web_images")]
    assert main(audit(folder, *web, "--record", record, "--json")) == 0
    rows = json.loads(capsys.readouterr().out)["recalls"]
    assert {row["queries"]: row["images"] for row in rows} == {
        "all": 6,
        "without leaked images": 4,
        "without leaked images and captions": 3,
        "leaked images alone": 2,
    }
    assert main(audit(folder, *web, "--record", record)) == 0
    assert "without leaked images and captions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give --train, --train-hashes, or both"),
        (["--train", "/no/such.csv"], "/no/such.csv does not exist; give --train a caption file"),
        (["--train", "web.csv", "--write-hashes", "out.txt"], "give --train-images"),
        (["--train-hashes", "web.csv"], "Line 1 of web.csv begins with no hash"),
        (["--train-hashes", "empty.txt"], "holds no hash"),
        (["--train-hashes", "h.txt", "--train-images", "web_images"], "Give one of"),
    ],
)
def test_what_cannot_be_audited_is_one_sentence(folder, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path))
    monkeypatch.chdir(folder)
    (folder / "empty.txt").write_text(leaks.HEADER + "\n")
    (folder / "h.txt").write_text("0" * 16 + "\tone\n")
    assert main(audit(folder, *words)) == 1
    assert says in capsys.readouterr().err

"""`score --model` adds CLIPScore by any model to the scores of captions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from coloured_set import coloured

from nbhelpers.data.archives import open_images
from nbhelpers.metrics import clip_score
from nbhelpers.runs.commands import main

# images become their mean colour, sentences the colour that they name
MODEL = """
import numpy as np
COLOURS = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1]}
def encoders():
    def images(pictures):
        return [np.asarray(one).mean((0, 1)) for one in pictures]
    def texts(texts):
        assert all(text.startswith("A photo depicts") for text in texts)
        return [next((c for name, c in COLOURS.items() if name in t), [1, 1, 1]) for t in texts]
    return images, texts
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    data = coloured(folder / "set")
    table = data.table.split("test")
    lines = [f"{file},{text},test" for file, text in rows(table)]
    (folder / "own.csv").write_text("\n".join(["image,caption,split", *lines]) + "\n")
    (folder / "colour_model.py").write_text(MODEL)
    said = {one: f"a {one.split('_')[0]} place" for one in table.images.image_id}
    said["red_test0"], said["blue_test0"] = "a green place", ""
    (folder / "said.json").write_text(json.dumps({"captions": said}))
    truth = {i: list(t) for i, t in table.captions.groupby("image_id").text}
    (folder / "truth.json").write_text(json.dumps({"references": truth}))
    return folder


def rows(table):
    file_of = dict(zip(table.images.image_id, table.images.file, strict=True))
    return [(file_of[i], t) for i, t in table.captions.itertuples(index=False)]


@pytest.mark.parametrize("references", ["own.csv", "truth.json"])
def test_the_command_adds_both_scores(folder, monkeypatch, tmp_path, capsys, references):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path))
    words = ["score", "--captions", "said.json", "--references", references, "--metrics", "CIDEr"]
    words += ["--model", "colour_model:encoders", "--images", "set/images", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    store = open_images(folder / "set" / "images")
    said = json.loads((folder / "said.json").read_text())["captions"]
    axes = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1], "grey": [1, 1, 1]}
    right = []
    for one, text in said.items():
        colour = store.read(f"{one}.png").mean((0, 1))
        named = np.array(axes[text.split()[1]]) if text else np.zeros(3)
        size = np.linalg.norm(colour) * max(np.linalg.norm(named), 1)
        right.append(clip_score.WEIGHT * colour @ named / size)
    assert found["scores"]["CLIPScore"]["value"] == pytest.approx(np.mean(right), rel=1e-5)
    whole = found["scores"]["RefCLIPScore"]
    assert 0 < whole["low"] < whole["value"] < whole["high"] < 2 * 2.5 / 3.5
    assert any("CLIPScore is that of colour_model:encoders" in note for note in found["notes"])
    assert found["degenerate"] == 1


def test_what_clip_score_needs_is_said(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path))
    words = ["score", "--captions", "said.json", "--references", "own.csv", "--metrics", "CIDEr"]
    assert main([*words, "--model", "colour_model:encoders"]) == 1
    assert "needs both --model and --images" in capsys.readouterr().err
    (tmp_path / "others").mkdir()
    store = open_images(folder / "set" / "images")
    name = next(name for name in store.names if "train" in name)
    (tmp_path / "others" / name).write_bytes(store.encoded(name))
    words += ["--model", "colour_model:encoders", "--images", str(tmp_path / "others")]
    assert main(words) == 1
    assert "12 images cannot be used" in capsys.readouterr().err
    assert main([*words, "--references", "truth.json"]) == 1
    assert "12 of 12 captions are of images that --images does not hold" in capsys.readouterr().err

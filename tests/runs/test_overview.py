"""The tables of 00_start_here."""

from __future__ import annotations

import re

from nbhelpers.runs import batch, overview
from nbhelpers.towers import public_weights


def test_every_notebook_has_its_question_and_a_link():
    assert list(overview.QUESTIONS) == [step.name for step in batch.CHAIN]
    linked = re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\)", overview.notebooks(), re.M)
    assert linked == list(overview.QUESTIONS)


def test_weights_are_here_to_be_fetched_or_to_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv(public_weights.FOLDER, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = tmp_path / "vgg.safetensors"
    place.touch()
    monkeypatch.setitem(public_weights._given, "vgg19_bn", str(place))
    monkeypatch.setattr(public_weights, "_on_hub", lambda known, download: None)
    names = ["vgg19_bn", "efficientnet_lite0", "swin_t", "resnet50_aid"]
    rows = overview.weights({"a test": names}).splitlines()[2:]
    states = [row.split(" | ")[-1] for row in rows]
    assert states[0].startswith("🟢 here, in the folder or file that you named")
    assert states[1].startswith("🟢 here, package ")
    assert states[2].startswith("🟡 not here: ") and states[3].startswith("🔴 not here: ")
    assert overview.missing(names) == ["swin_t", "resnet50_aid"]


def test_the_default_profile_has_the_values_of_the_cells_and_comes_first():
    found = overview.profiles()
    assert found.index[0] == "default" and tuple(found.loc["default"]) == ("scenes", "compact")
    own = found.index.str.startswith("paper_")
    assert list(own) == sorted(own) and "paper" not in found.index


def test_the_machine_names_its_device_and_packages():
    said = overview.machine("cpu")
    assert "| device | cpu |" in said and all(f"| {name} |" in said for name in overview.PACKAGES)

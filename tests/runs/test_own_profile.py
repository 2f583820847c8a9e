"""A set of one's own: what is too small is said at once, and a profile that fits is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from nbhelpers.__main__ import main
from nbhelpers.data import catalog, check, layouts
from nbhelpers.paths import notebooks_folder
from nbhelpers.runs import batch, own_profile

RNG = np.random.default_rng(0)


def own_set(folder: Path, images: int, classes: int = 0) -> Path:
    """A CSV of two captions an image, and pictures with a space in their names."""
    (folder / "town_images").mkdir(parents=True)
    lines = ["image,caption" + (",class" if classes else "")]
    for number in range(images):
        name = f"photo {number}.jpg"
        pixels = RNG.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "town_images" / name)
        kind = f",kind{number % classes}" if classes else ""
        lines += [f"{name},place {number} seen from {side}{kind}" for side in ("above", "far")]
    (folder / "town.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def profiles(tmp_path, monkeypatch) -> Path:
    """A copy of the notebooks, so that no profile is written into the repository."""
    copy = tmp_path / "notebooks"
    shutil.copytree(notebooks_folder(), copy, ignore=shutil.ignore_patterns("town.yaml"))
    monkeypatch.setattr(own_profile, "notebooks_folder", lambda: copy)
    return copy / "profiles"


def test_check_says_all_that_is_too_small_and_the_command_that_helps(tmp_path, capsys):
    folder = own_set(tmp_path, 20)
    arguments = ["data", "check", "--captions", f"{folder}/town.csv"]
    assert main([*arguments, "--images", f"{folder}/town_images"]) == 0
    said = capsys.readouterr().out
    assert "BATCH_SIZE is" in said and "PIR_CLIP_BATCH is" in said
    assert "one scene class" in said or "no scene class" in said
    assert "column or field 'class'" in said
    assert "data profile --set NAME --data FOLDER" in said


@pytest.mark.parametrize("images, classes, size", [(40, 0, "tiny"), (60, 2, "compact")])
def test_the_written_profile_fits_the_set(tmp_path, profiles, capsys, images, classes, size):
    folder = own_set(tmp_path / "data", images, classes)
    assert main(["data", "profile", "--set", "town", "--data", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"Next: make run PROFILE=town DATA={folder}" in said
    written = yaml.safe_load((profiles / "town.yaml").read_text())
    values = batch.values_of("town", profiles.parent)
    assert values["SET"] == written["SET"] == "town" and values["SIZE"] == size
    table = layouts.read(catalog.find("town", str(folder))[0])
    assert check.too_small(table, values) == []
    given = batch.check_profile("town", {"DATA": str(folder)}, profiles.parent)
    assert given["20_pir"]["BATCH_SIZE"] <= 2 * images


def test_what_no_profile_mends_is_said(tmp_path, profiles, capsys):
    folder = own_set(tmp_path / "data", 3)
    code = main(["data", "profile", "--set", "town", "--data", str(folder)])
    said = capsys.readouterr()
    assert code == 0 and "note: " in said.out


@pytest.mark.parametrize(
    "name, words", [("ucm", "is a known set"), ("scenes", "is a known set"), ("city", "city")]
)
def test_a_profile_is_for_a_set_of_ones_own_that_is_there(tmp_path, profiles, capsys, name, words):
    folder = own_set(tmp_path / "data", 20)
    assert main(["data", "profile", "--set", name, "--data", str(folder)]) == 1
    assert words in capsys.readouterr().err
    assert not (profiles / "city.yaml").exists()


def test_a_profile_is_not_written_over(tmp_path, profiles, capsys):
    folder = own_set(tmp_path / "data", 20)
    arguments = ["data", "profile", "--set", "town", "--data", str(folder)]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert "exists; change it by hand, or delete it first" in capsys.readouterr().err

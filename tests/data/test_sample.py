"""The sample of real images is complete, small, of known origin and the project's own in words."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nbhelpers.data import catalog, layouts, sample
from nbhelpers.data.check import check
from nbhelpers.errors import UserError

FOLDER = sample.sample_folder()
LISTED = json.loads(sample.caption_file().read_text(encoding="utf-8"))["images"]
CAPTIONS = [sentence["raw"] for row in LISTED for sentence in row["sentences"]]


def known_caption_files() -> list[Path]:
    named = os.environ.get("NBHELPERS_TEST_DATA", "")
    return sorted(Path(named).glob("dataset_*.json")) if named else []


def plain(caption: str) -> str:
    """Lower-case a caption; drop its full stop and doubled spaces."""
    return " ".join(caption.lower().rstrip(" .").split())


def test_it_has_three_test_images_of_each_class_and_no_other_file():
    assert Counter(row["class"] for row in LISTED) == dict.fromkeys(catalog.UCM_CLASSES, 3)
    assert {row["split"] for row in LISTED} == {"test"}
    names = {row["filename"] for row in LISTED}
    assert len(names) == 63
    assert {path.name for path in FOLDER.iterdir()} == names | {
        "README.md",
        sample.caption_file().name,
    }


def test_names_agree_with_those_of_ucm_captions():
    for row in LISTED:
        number = int(row["ucm_captions_file"].removesuffix(".tif"))
        index = number % 100 if row["class"] == "agricultural" else (number - 1) % 100
        assert row["filename"] == f"{row['class']}_{index:02d}.jpg"
        assert catalog.UCM_CLASSES[(number - 1) // 100] == row["class"]


def test_all_images_are_small_jpegs_of_256_pixels():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_200_000
    for row in LISTED:
        with Image.open(FOLDER / row["filename"]) as image:
            found = (image.format, image.mode, image.size, len(image.getexif()))
            assert found == ("JPEG", "RGB", (256, 256), 0), row["filename"]


def test_each_image_has_two_short_captions_that_no_other_image_has():
    assert {len(row["sentences"]) for row in LISTED} == {2}
    assert len({plain(caption) for caption in CAPTIONS}) == 126
    for caption in CAPTIONS:
        assert caption.isascii() and caption == plain(caption), caption
        assert 6 <= len(caption.split()) <= 16, caption


def test_no_caption_is_one_of_a_known_set():
    files = known_caption_files()
    if not files:
        pytest.skip("NBHELPERS_TEST_DATA names no folder of real data")
    for file in files:
        theirs = {plain(text) for text in layouts.scan(file).table.captions.text}
        assert not theirs & {plain(text) for text in CAPTIONS}, file.name


def test_it_opens_as_any_set(tmp_path):
    opened = sample.open_sample(tmp_path)
    assert opened.table.counts().to_dict("index") == {"test": {"images": 63, "captions": 126}}
    assert opened.known is None
    assert list(opened.table.images.scene) == [row["class"] for row in LISTED]
    row = opened.table.images.file.tolist().index("beach_90.jpg")
    pixels = opened.pixels[row]
    assert pixels.shape == (256, 256, 3) and pixels.dtype == np.uint8
    red, green, _ = pixels[:, 200:].mean(axis=(0, 1))
    assert green > red + 50  # the water at its right edge
    assert opened.table.captions.text.tolist() == CAPTIONS


def test_data_check_misses_the_training_split_alone():
    report = check(sample.caption_file(), FOLDER)
    (problem,) = report.problems
    assert "no image in split 'train'" in problem and report.facts["known_set"] is None
    lines = "\n".join(report.lines)
    assert "63 of 63 found and read" in lines and "126 of 126 captions distinct" in lines


def test_the_readme_names_source_and_licence():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("UC Merced", "USGS", "public domain", "Yang", "2010", "CC0", "no benchmark"):
        assert word in readme, word


def test_git_takes_the_sample_and_nothing_else_of_the_data():
    paths = [FOLDER / "beach_90.jpg", FOLDER / "README.md", FOLDER.parent / "UCM_images.zip"]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *map(str, paths)],
        cwd=FOLDER,
        capture_output=True,
        text=True,
    )
    if done.returncode == 128:
        pytest.skip("this is no clone of the repository")
    assert done.stdout.split() == [str(paths[2])]


def put_ucm(folder: Path, split: str) -> Path:
    """Write a folder like UCM-Captions with the sample's images alone, of one colour each."""
    (folder / "ucm_images").mkdir(parents=True)
    images = []
    for shade, row in enumerate(LISTED):
        name = row["ucm_captions_file"]
        images.append({"filename": name, "split": split, "sentences": [{"raw": "a place"}]})
        colour = (4 * shade, 90, 200)
        Image.new("RGB", (250, 256), colour).save(folder / "ucm_images" / name)
    (folder / "dataset_ucm.json").write_text(json.dumps({"images": images, "dataset": "ucm"}))
    return folder


def test_write_makes_the_same_files_from_a_folder_of_ucm_captions(tmp_path):
    source = put_ucm(tmp_path / "source", "test")
    first, second = (sample.write(tmp_path / name, source) for name in ("first", "second"))
    assert [path.name for path in first] == [row["filename"] for row in LISTED]
    for shade, (one, other) in enumerate(zip(first, second, strict=True)):
        assert one.read_bytes() == other.read_bytes()
        pixels = np.asarray(Image.open(one)).astype(int)
        assert pixels.shape == (256, 256, 3)
        assert np.abs(pixels - (4 * shade, 90, 200)).max() <= 3


def test_write_refuses_images_that_are_not_in_the_test_split(tmp_path):
    source = put_ucm(tmp_path / "source", "train")
    with pytest.raises(UserError, match="not in the test split"):
        sample.write(tmp_path / "out", source)


@pytest.mark.realdata
def test_write_makes_the_committed_images(tmp_path):
    written = sample.write(tmp_path, os.environ["NBHELPERS_TEST_DATA"])
    for path in written:
        ours = np.asarray(Image.open(FOLDER / path.name)).astype(int)
        again = np.asarray(Image.open(path)).astype(int)
        assert np.abs(ours - again).mean() < 1, path.name

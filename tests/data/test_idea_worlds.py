"""The worlds that are made for one idea: what they change, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nbhelpers.data import ideas
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.scenes import generate
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError


class Pixels:
    """Stands for the cache of decoded images: image k has the value k everywhere."""

    def __init__(self, files: list[str]):
        self.files = files

    def resized(self, size: int) -> np.ndarray:
        values = np.arange(len(self.files), dtype=np.uint8)[:, None, None, None]
        return np.broadcast_to(values, (len(self.files), size, size, 3))

    def rows(self, files) -> np.ndarray:
        return np.array([self.files.index(file) for file in files])


@pytest.fixture
def data() -> DataSet:
    """Twenty images of each of three classes that look alike, and of one other; two captions."""
    rows = []
    for scene in ("desert", "meadow", "school", "port"):
        for number in range(20):
            spec = generate.SceneSpec(scene, number)
            rows.append((f"{len(rows)}", f"{spec.name}.png", spec.split, scene))
    images = pd.DataFrame(rows, columns=["image_id", "file", "split", "scene"])
    captions = [
        (image.image_id, f"{k} trees are in the {image.scene} .")
        for image in images.itertuples()
        for k in ("two", "green")
    ]
    table = CaptionTable("scenes", images, pd.DataFrame(captions, columns=["image_id", "text"]))
    return DataSet(table, Pixels(list(images.file)), None, [])


def test_clutter_shows_the_scene_once_and_other_images_around(data):
    entries = list(ideas._cluttered(data, 1))
    assert [entry.split for entry in entries] == list(data.table.images.split)
    split = data.table.images.split.to_numpy()
    for row in (0, 41):
        pixels = entries[row].pixels
        own = (pixels == row).all(axis=2)
        y, x = np.nonzero(own)
        assert own.sum() == ideas.INSET**2 and np.ptp(y) + 1 == np.ptp(x) + 1 == ideas.INSET
        assert y.min() % ideas.PIECE == x.min() % ideas.PIECE == 0
        assert {split[value] for value in np.unique(pixels)} == {split[row]}
        assert entries[row].captions == list(data.table.captions.text[2 * row : 2 * row + 2])
    again = list(ideas._cluttered(data, 1))
    assert all((a.pixels == b.pixels).all() for a, b in zip(entries, again, strict=True))


def test_smooth_clutter_shows_no_other_image(data):
    pixels = next(ideas._cluttered(data, 2)).pixels
    assert pixels.shape == (224, 224, 3) and pixels.dtype == np.uint8
    assert (pixels == 0).all(axis=2).sum() == ideas.INSET**2 and len(np.unique(pixels)) > 20


def test_a_world_is_drawn_once_and_opened_again(data, tmp_path):
    small = ideas.replace(
        data, table=CaptionTable("few", data.table.images[:3], data.table.captions[:6])
    )
    first = ideas.cluttered(small, tmp_path, 2)
    assert first.table.name == "clutter2" and len(first.table) == 3
    assert list(first.table.captions.text) == list(small.table.captions.text)
    (folder,) = tmp_path.glob("world-clutter2-*")
    before = (folder / "scenes" / "dataset_scenes.json").stat().st_mtime_ns
    again = ideas.cluttered(small, tmp_path, 2)
    assert (folder / "scenes" / "dataset_scenes.json").stat().st_mtime_ns == before
    assert again.pixels.key == first.pixels.key


def test_distractor_words_stand_among_the_caption_in_its_order(data):
    told = ideas.wordy(data).table.captions.text
    for own, text in zip(data.table.captions.text, told, strict=True):
        words = own.rstrip(" .").split()
        assert len(text.split()) == 2 * len(words)
        assert [word for word in text.split() if word not in ideas.OFFICE] == words
    assert ideas.wordy(data).pixels is data.pixels


def test_a_distractor_caption_is_of_another_class_of_the_split_and_marked(data):
    told = ideas.wordy(data, 2).table
    scene = data.table.images.set_index("image_id").scene
    for own, row in zip(data.table.captions.itertuples(), told.captions.itertuples(), strict=True):
        quoted = row.text.split("not shown: ")[1].split("; shown")[0]
        assert f"shown: {own.text.rstrip(' .')}" in row.text
        assert scene[own.image_id] not in quoted


def test_classes_that_look_alike_are_split_anew(data):
    table = ideas.look_alikes(data).table
    assert set(table.images.scene) == {"desert", "meadow", "school"}
    counts = table.images.groupby(["scene", "split"]).size().unstack()
    assert (counts[["train", "val", "test"]] == [10, 2, 8]).all(axis=None)
    assert len(table.captions) == 2 * len(table.images)


def test_no_caption_of_the_second_version_names_its_class(data):
    texts = ideas.look_alikes(data, 2).table.captions.text
    assert not texts.str.contains("desert|meadow|school").any()
    assert texts.iloc[0] == "two trees are in the place ."
    assert ideas.unnamed("the bare land is dry", "bareland") == "the place is dry"
    assert ideas.unnamed("many ponds", "pond") == "many place"


def test_few_pairs_leave_validation_and_test_alone(data):
    few, counts = ideas.few_pairs(data, images=2, captions=1).table, data.table.counts()
    assert few.counts().loc["train"].tolist() == [8, 8]
    assert (few.counts().loc[["val", "test"]] == counts.loc[["val", "test"]]).all(axis=None)


def test_the_large_gallery_is_the_test_split(data):
    counts = ideas.large_gallery(data).table.counts()
    assert counts.images.tolist() == [16, 8, 56]
    assert counts.captions.tolist() == [32, 16, 56]


@pytest.mark.parametrize("world", [ideas.wordy, ideas.look_alikes])
def test_there_are_two_versions_at_most(data, world):
    with pytest.raises(UserError, match="no version 3 of this world; take 1 or 2"):
        world(data, 3)
    world(data, 2)

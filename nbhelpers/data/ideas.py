"""Worlds that are made for one idea of a paper: variants of the generated set.

Each world has the difficulty that an idea was invented for, and more of it than a real set has. So
a result here says whether the idea works as meant, never how good a system is. The images and
captions of `generate` stay as they are; a world adds others. The same seed gives the same world on
every machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from nbhelpers.code_identity import code_digest
from nbhelpers.data import catalog
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.scenes import generate, scene_captions
from nbhelpers.data.scenes.drawing import SIDE, fractal, tint
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_folder

PIECE = 32  # pixels of a piece of clutter, and of the field of one image token
INSET = 128  # side of the scene within the clutter, in pixels: 4 x 4 of the 7 x 7 tokens
ALIKE = (
    "bareland", "desert", "meadow", "farmland", "denseresidential", "mediumresidential",
    "sparseresidential", "commercial", "center", "school",
)  # fmt: skip
# fmt: off
OFFICE = (
    "archive", "sheet", "number", "copy", "index", "folder", "ticket", "stamp", "office", "desk",
    "signed", "checked", "printed", "monday", "tuesday", "friday", "march", "june", "october",
    "entry", "serial", "register", "clerk", "page", "column", "reference", "volume", "ledger",
    "drawer", "received", "issued", "approved", "revised", "duplicate", "draft",
)
# fmt: on


class Entry(NamedTuple):
    """An image of a world before it is written: name without suffix, split, pixels, captions."""

    name: str
    split: str
    pixels: np.ndarray
    captions: list[str]


def plain(cache: Path) -> DataSet:
    """Return the generated set as it is: 600 images of 30 classes."""
    return catalog.open_dataset("scenes", "", cache)


# ---- images with clutter
def cluttered(data: DataSet, cache: Path, version: int = 1) -> DataSet:
    """Return the set with each scene made smaller and put somewhere on clutter.

    The captions speak of the scene alone: of the 7 x 7 places that an image token can have, 16 show
    it and 33 show clutter. Version 1: each piece of clutter comes from another image of the same
    split. Version 2: clutter is smooth noise in colours of the scenes' world.
    """
    _check_version(version)
    return _opened(f"clutter{version}", cache, partial(_cluttered, data, version))


def _cluttered(data: DataSet, version: int) -> Iterator[Entry]:
    pixels = data.pixels.resized(SIDE)[data.pixels.rows(data.table.images.file)]
    texts = _captions_of(data.table)
    for row, image in enumerate(data.table.images.itertuples(index=False)):
        rng = _stream(1, row)
        if version == 1:
            fellows = np.flatnonzero((data.table.images.split == image.split).to_numpy())
            background = mosaic(pixels[rng.choice(fellows[fellows != row], 49)], rng)
        else:
            background = tint(rng.integers(60, 190, 3), fractal(rng, 64)).astype(np.uint8)
        shown = put_into(background, pixels[row], rng)
        name = Path(image.file).stem
        yield Entry(name, image.split, shown, texts[image.image_id])


def mosaic(sources: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (224, 224, 3) uint8: a piece of each of 49 images (49, 224, 224, 3), in rows."""
    count = SIDE // PIECE
    corners = rng.integers(0, SIDE - PIECE + 1, (count * count, 2))
    pieces = [
        source[y : y + PIECE, x : x + PIECE]
        for source, (y, x) in zip(sources, corners.tolist(), strict=True)
    ]
    rows = [np.concatenate(pieces[k : k + count], axis=1) for k in range(0, len(pieces), count)]
    return np.concatenate(rows)


def put_into(background: np.ndarray, scene: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the background (224, 224, 3) with the scene, INSET pixels wide, at a random place."""
    small = np.asarray(Image.fromarray(scene).resize((INSET, INSET), Image.Resampling.BICUBIC))
    y, x = (PIECE * rng.integers(0, (SIDE - INSET) // PIECE + 1, 2)).tolist()
    shown = background.copy()
    shown[y : y + INSET, x : x + INSET] = small
    return shown


# ---- captions with distractors
def wordy(data: DataSet, version: int = 1) -> DataSet:
    """Return the set with captions that say more than the image shows.

    Version 1: each caption gets as many words of an office as it has itself, among its own words.
    Version 2: before or behind each caption stands one of another class of the same split, and
    says so: "not shown: ...;".
    """
    _check_version(version)
    table = data.table
    images = table.images.set_index("image_id")
    split = images.split.loc[table.captions.image_id].to_numpy()
    scene = images.scene.loc[table.captions.image_id].to_numpy()
    texts = table.captions.text.to_numpy()
    told = []
    for row, text in enumerate(texts):
        rng = _stream(2, row)
        if version == 1:
            told.append(among(text, rng))
            continue
        others = np.flatnonzero((split == split[row]) & (scene != scene[row]))
        told.append(beside(text, str(texts[rng.choice(others)]), rng))
    captions = table.captions.assign(text=told)
    return replace(data, table=CaptionTable(f"wordy{version}", table.images, captions))


def among(text: str, rng: np.random.Generator) -> str:
    """Return the words of `text` in their order, as many office words among them."""
    words = text.rstrip(" .").split()
    places = np.sort(rng.permutation(2 * len(words))[: len(words)])
    said = rng.choice(OFFICE, 2 * len(words)).astype(object)
    said[places] = words
    return " ".join(said)


def beside(text: str, other: str, rng: np.random.Generator) -> str:
    """Return `text` with another caption, marked as not shown, before or behind it."""
    own, quoted = text.rstrip(" ."), f"not shown: {other.rstrip(' .')}"
    return f"{quoted}; shown: {own}" if rng.integers(2) else f"shown: {own}; {quoted}"


# ---- few classes that look alike
def look_alikes(data: DataSet, version: int = 1) -> DataSet:
    """Return the ten classes of the generated set that look alike most, 20 images each.

    Of each class, ten images are for training, two for validation and eight for the test. Version
    1 has the captions of `generate`. In version 2 no caption names its class: "place" stands for
    the name.
    """
    _check_version(version)
    table = data.table
    images = _parted(table.images[table.images.scene.isin(ALIKE)], 10, 2)
    captions = table.captions[table.captions.image_id.isin(images.image_id)]
    if version == 2:
        scene = images.set_index("image_id").scene.loc[captions.image_id]
        told = [unnamed(text, kind) for text, kind in zip(captions.text, scene, strict=True)]
        captions = captions.assign(text=told)
    return replace(data, table=CaptionTable(f"alike{version}", images, captions))


def _parted(images: pd.DataFrame, train: int, val: int) -> pd.DataFrame:
    """Return images with new splits: of each class so many for training and validation."""
    place = images.groupby("scene").cumcount()
    split = np.select([place < train, place < train + val], ["train", "val"], "test")
    return images.assign(split=split)


def unnamed(text: str, scene: str) -> str:
    """Return a caption with "place" where it names its class."""
    name = scene_captions.NAMES[scene]
    for said in (scene_captions.plural(name), name, name.removeprefix("piece of ")):
        text = text.replace(said, "place")
    return text


# ---- few training pairs
def few_pairs(data: DataSet, images: int = 2, captions: int = 1) -> DataSet:
    """Return the set with so many training images of each class, and captions of each of them.

    The other splits keep theirs.
    """
    table = data.table
    trained = table.images.split == "train"
    place = table.images[trained].groupby("scene").cumcount()
    kept = table.images.drop(place.index[place >= images])
    told = table.captions[table.captions.image_id.isin(kept.image_id)]
    train_ids = kept.image_id[kept.split == "train"]
    spare = told.image_id.isin(train_ids) & (told.groupby("image_id").cumcount() >= captions)
    return replace(data, table=CaptionTable("few", kept, told[~spare]))


# ---- a large gallery
def large_gallery(data: DataSet) -> DataSet:
    """Return the generated set with other splits: 420 of its 600 images are the test split.

    Four images of each class are for training, and two for validation. A test image has its first
    caption alone.
    """
    images, captions = _parted(data.table.images, 4, 2), data.table.captions
    tested = captions.image_id.isin(images.image_id[images.split == "test"])
    spare = tested & (captions.groupby("image_id").cumcount() > 0)
    return replace(data, table=CaptionTable("gallery", images, captions[~spare]))


# ---- shared
def _stream(purpose: int, *numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([purpose, *numbers])))


def _check_version(version: int) -> None:
    if version not in (1, 2):
        raise UserError(f"There is no version {version} of this world; take 1 or 2.")


def _captions_of(table: CaptionTable) -> dict[str, list[str]]:
    return table.captions.groupby("image_id").text.agg(list).to_dict()


def _opened(name: str, cache: Path, entries: Callable[[], Iterable[Entry]]) -> DataSet:
    """Return the world of that name, drawn into the cache at the first call."""
    code = code_digest(generate, _write, mosaic, put_into)[:8]
    folder = Path(cache) / f"world-{name}-{code}"
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            _write(temporary / "scenes", entries())
    found = catalog.open_dataset("scenes", folder, cache)
    return replace(found, table=replace(found.table, name=name))


def _write(folder: Path, entries: Iterable[Entry]) -> None:
    """Write images and a caption file in the layout of Karpathy's splits."""
    (folder / "images").mkdir(parents=True)
    listed = []
    for number, entry in enumerate(entries):
        file = f"{entry.name}.png"
        Image.fromarray(entry.pixels).save(folder / "images" / file, compress_level=1)
        sentences = [{"raw": text, "imgid": number} for text in entry.captions]
        listed.append(
            {"filename": file, "imgid": number, "split": entry.split, "sentences": sentences}
        )
    text = json.dumps({"dataset": "scenes", "images": listed}, indent=1)
    (folder / "dataset_scenes.json").write_text(text, encoding="utf-8")

"""A data set of plain coloured squares that is made in a moment, for tests of what comes after the
data.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from nbhelpers.data.archives import open_images
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import Tokenizer, train_tokenizer

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 180, 40),
    "blue": (30, 40, 210),
    "grey": (120, 120, 120),
}
SPLITS = {"train": 6, "val": 2, "test": 3}  # images of each colour
SHADES = ("dark", "pale", "wide", "long", "small", "old")


def coloured(folder: Path, name: str = "colours") -> DataSet:
    """44 images of 40 px in four classes; two captions each, one of them shared by the class."""
    rng, images, captions = np.random.default_rng(0), [], []
    (folder / "images").mkdir(parents=True)
    for split, count in SPLITS.items():
        for colour, rgb in COLOURS.items():
            for number in range(count):
                image_id = f"{colour}_{split}{number}"
                pixels = np.array(rgb) + rng.integers(-25, 26, size=(40, 40, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                    folder / "images" / f"{image_id}.png"
                )
                images.append(
                    {
                        "image_id": image_id,
                        "file": f"{image_id}.png",
                        "split": split,
                        "scene": colour,
                    }
                )
                captions += [
                    {"image_id": image_id, "text": f"A {colour} field."},
                    {
                        "image_id": image_id,
                        "text": f"A {SHADES[number]} {colour} place with {number} trees.",
                    },
                ]
    table = CaptionTable(name, pd.DataFrame(images), pd.DataFrame(captions))
    store = open_images(folder / "images")
    return DataSet(
        table, DecodedCache.build(store, list(table.images.file), folder / "cache"), None, []
    )


def words(data: DataSet, folder: Path, fixed: bool = True) -> Tokenizer:
    """A tokenizer of the training captions; 12 ids at most."""
    return Tokenizer(
        train_tokenizer(list(data.table.split("train").captions.text), folder / "tokenizer.json"),
        12,
        fixed,
    )

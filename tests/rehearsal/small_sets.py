"""UCM, RSICD and NWPU-Captions in their published layouts, with a dozen real pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from nbhelpers.data.catalog import DataSet, open_dataset
from nbhelpers.paths import repository_root

COUNTS = {"train": 12, "val": 6, "test": 6}
CAPTIONS = 5  # of each image, as published


def write(folder: Path, data: str, cache: Path) -> list[str]:
    """Write the three sets and return their captions.

    data   folder that holds UCM-Captions; "" takes the sample of this repository, whose two
           captions of an image are repeated
    cache  folder of decoded pictures
    """
    sample = repository_root() / "data/sample"
    found = open_dataset("ucm", data, cache) if data else open_dataset("sample", sample, cache)
    images = _chosen(found)
    _ucm(images, folder)
    _rsicd(images, folder)
    _nwpu(images, folder)
    return [text for image in images for text in image["texts"]]


def _chosen(data: DataSet) -> list[dict]:
    """Images of each split, evenly spread; of a set with a test split alone, of that one."""
    texts = data.table.captions.groupby("image_id").text.apply(list)
    whole = set(data.table.images.split) >= set(COUNTS)
    spread = np.linspace(0, len(data.table) - 1, sum(COUNTS.values())).astype(int)
    chosen = []
    for split, count in COUNTS.items():
        rows, spread = spread[:count], spread[count:]
        if whole:
            own = np.flatnonzero(data.table.images.split == split)
            rows = own[np.linspace(0, len(own) - 1, count).astype(int)]
        for row in rows:
            image = data.table.images.iloc[row]
            said = (texts[image.image_id] * CAPTIONS)[:CAPTIONS]
            pixels = data.pixels[data.pixels.rows([image.file])[0]]
            chosen.append({"split": split, "class": image.scene, "texts": said, "pixels": pixels})
    return chosen


def _picture(image: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image["pixels"]).save(path)


def _karpathy(images: list[dict], names: list[str], path: Path) -> None:
    rows = [
        {
            "filename": name,
            "split": image["split"],
            "class": image["class"],
            "sentences": [{"raw": text} for text in image["texts"]],
        }
        for name, image in zip(names, images, strict=True)
    ]
    path.write_text(json.dumps({"images": rows, "dataset": path.stem}))


def _ucm(images: list[dict], folder: Path) -> None:
    names = [f"{number}.tif" for number in range(1, len(images) + 1)]
    for name, image in zip(names, images, strict=True):
        _picture(image, folder / "UCM_images" / name)
    _karpathy(images, names, folder / "dataset_ucm.json")


def _rsicd(images: list[dict], folder: Path) -> None:
    names = [f"{image['class']}_{number}.jpg" for number, image in enumerate(images, 1)]
    for name, image in zip(names, images, strict=True):
        _picture(image, folder / "RSICD_images" / name)
    _karpathy(images, names, folder / "dataset_rsicd.json")


def _nwpu(images: list[dict], folder: Path) -> None:
    content: dict[str, list] = {}
    for number, image in enumerate(images, 1):
        name = f"{image['class']}_{number:03}.jpg"
        _picture(image, folder / "NWPU_images" / image["class"] / name)
        raw = {f"raw_{place}": text for place, text in enumerate(image["texts"][1:], 1)}
        row = {"filename": name, "imgid": number, "split": image["split"]}
        content.setdefault(image["class"], []).append(row | {"raw": image["texts"][0]} | raw)
    (folder / "dataset_nwpu.json").write_text(json.dumps(content))

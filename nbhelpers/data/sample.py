"""The sample in `data/sample/`: 63 real aerial images with captions written for this project.

The images are three of each class of UC Merced Land Use (Yang and Newsam 2010), public domain
(USGS), all from the test split of UCM-Captions. `dataset_sample.json` names them and holds their
captions. `write` makes the image files anew from a folder that holds UCM-Captions.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from PIL import Image

from nbhelpers.data import catalog, layouts
from nbhelpers.data.archives import open_images
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.images import resize
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write, read_json
from nbhelpers.paths import repository_root

NAME = "sample"
SIDE = 256  # pixels
QUALITY = 81  # of all JPEG files; the highest with which they take less than 1.1 MB together


def sample_folder() -> Path:
    """Return the folder of the sample. UserError outside the repository."""
    return repository_root() / "data" / NAME


def caption_file() -> Path:
    """Return the path of the sample's captions. UserError outside the repository."""
    return sample_folder() / f"dataset_{NAME}.json"


def open_sample(cache_folder: Path | str | None = None) -> DataSet:
    """Open the sample as `catalog.open_dataset` opens any set: its table, and its pixels.

    All 63 images are in the split test, and row i of `table.images` has the pixels `pixels[i]`,
    (256, 256, 3) uint8. `cache_folder` keeps the decoded images (default: as `open_dataset`).
    """
    return catalog.open_dataset(NAME, sample_folder(), cache_folder)


def write(folder: Path | str, data_folder: Path | str) -> list[Path]:
    """Write the sample's images into `folder` and return their paths.

    data_folder  holds UCM-Captions, as `DATA` in data/README.md

    The same source files give the same pixels each time. UserError if UCM-Captions is not there, or
    if an image of the sample is missing in it or is not in its test split.
    """
    captions, pictures = catalog.find("ucm", data_folder)
    images = layouts.scan(captions).table.images
    stems = images.file.map(lambda file: PurePosixPath(file).stem)
    split_of = dict(zip(stems, images.split, strict=True))
    store = open_images(pictures)
    listed = read_json(caption_file(), "restore it from the repository")["images"]
    written = []
    for row in listed:
        source = row["ucm_captions_file"]
        if split_of.get(PurePosixPath(source).stem) != "test":
            raise UserError(
                f"{source} is not in the test split of {captions}; name the folder of the "
                "published UCM-Captions."
            )
        image = Image.fromarray(resize(store.read(source), SIDE))
        with atomic_write(Path(folder) / row["filename"]) as path:
            image.save(path, "JPEG", quality=QUALITY, optimize=True, progressive=True)
        written.append(Path(folder) / row["filename"])
    return written

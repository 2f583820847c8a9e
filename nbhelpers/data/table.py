"""CaptionTable: the one form of images and captions in this package."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pandas as pd

from nbhelpers.errors import UserError

SPLITS = ("train", "val", "test")
IMAGE_COLUMNS = ["image_id", "file", "split", "scene"]
CAPTION_COLUMNS = ["image_id", "text"]


def safe_file_name(name: str) -> bool:
    """Whether a name is a relative POSIX path that stays below its folder."""
    path = PurePosixPath(name)
    plain = bool(name) and "\0" not in name and "\\" not in name and ":" not in name.split("/")[0]
    return plain and not path.is_absolute() and ".." not in path.parts


@dataclass(frozen=True, eq=False)
class CaptionTable:
    """Hold images and their captions as plain columns.

    name      of the data set, e.g. "ucm"
    images    one row per image: image_id (str, unique), file (relative POSIX path as listed),
              split, scene
    captions  one row per caption, in file order: image_id, text

    UserError for repeated or unknown ids, unknown splits and file names that leave their folder.
    """

    name: str
    images: pd.DataFrame
    captions: pd.DataFrame

    def __post_init__(self):
        images = self.images[IMAGE_COLUMNS].reset_index(drop=True)
        captions = self.captions[CAPTION_COLUMNS].reset_index(drop=True)
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "captions", captions)
        repeated = images.image_id[images.image_id.duplicated()]
        if len(repeated):
            raise UserError(
                f"{self.name}: {len(repeated)} image ids occur twice (first: {repeated.iloc[0]}); "
                "give every image an id of its own."
            )
        unknown = set(captions.image_id) - set(images.image_id)
        if unknown:
            raise UserError(
                f"{self.name}: {len(unknown)} captions name an image that is not listed "
                f"(first: {sorted(unknown)[0]}); list the image or drop the caption."
            )
        wrong = sorted(set(images.split) - set(SPLITS))
        if wrong:
            raise UserError(
                f"{self.name}: unknown split '{wrong[0]}'; the splits are {', '.join(SPLITS)}."
            )
        unsafe = [name for name in images.file if not safe_file_name(name)]
        if unsafe:
            raise UserError(
                f"{self.name}: {len(unsafe)} file names leave the image folder (first:"
                f" {unsafe[0]!r}); list relative names without '..'."
            )

    def __len__(self) -> int:
        return len(self.images)

    def split(self, *names: str) -> CaptionTable:
        """Take the images of the named splits with their captions, order kept.

        UserError if a split is empty.
        """
        for name in names:
            if name not in set(self.images.split):
                raise UserError(
                    f"{self.name} has no image in split '{name}'; it has "
                    f"{', '.join(sorted(set(self.images.split))) or 'none'}."
                )
        images = self.images[self.images.split.isin(names)]
        return CaptionTable(
            self.name, images, self.captions[self.captions.image_id.isin(set(images.image_id))]
        )

    def refuse_bare(self) -> None:
        """Raise UserError if an image has no caption."""
        bare = self.images.image_id[~self.images.image_id.isin(self.captions.image_id)]
        if len(bare):
            raise UserError(
                f"{len(bare)} of the images have no captions (first: {bare.iloc[0]}); drop them."
            )

    def owner(self) -> np.ndarray:
        """Return for each caption the row of its image in `images`: (M,) int64."""
        return pd.Index(self.images.image_id).get_indexer(self.captions.image_id).astype(np.int64)

    def counts(self) -> pd.DataFrame:
        """Count images and captions of each split, in the order train, val, test."""
        split_of = self.captions.image_id.map(self.images.set_index("image_id").split)
        counts = pd.DataFrame(
            {"images": self.images.split.value_counts(), "captions": split_of.value_counts()}
        )
        return counts.reindex([s for s in SPLITS if s in counts.index]).fillna(0).astype(int)

    def content(self) -> str:
        """Hash all that a training sees of the table: sha256, hex.

        It covers the images (id, file, split, scene) and the captions in their order.
        """
        rows = [part.astype(str).to_numpy().tolist() for part in (self.images, self.captions)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Hash the sorted (id, split, captions), by which records name their data: sha256, hex.

        Order and scenes do not count.
        """
        split_of = dict(zip(self.images.image_id, self.images.split, strict=True))
        rows = sorted(
            f"{i}\t{split_of[i]}\t{t}"
            for i, t in zip(self.captions.image_id, self.captions.text, strict=True)
        )
        rows += sorted(f"{i}\t{s}" for i, s in split_of.items())
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

"""Find what of a test split stands in training data: equal and similar images, repeated captions.

Images are compared by their decoded pixels and by the perceptual hashes of `audit.image_hashes`, so
the training images of others can be given as a list of hashes, without the images.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write, given
from nbhelpers.metrics import audit, recall
from nbhelpers.metrics.recall import Recall

WITHIN = 6  # bits of 64 in which the hashes of one scene may differ
EDGE = 64  # pixels; the hashes are of images resized to it
HEADER = "# perceptual hashes of nbhelpers: 16 hex digits, a tab, the name of the image"
ROWS_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of a set as an audit compares them.

    names (N,)  how they are called;  hashes (N,) uint64, perceptual
    digests     (N,) equal for equal pixels; empty where only hashes are known
    """

    names: list[str]
    hashes: np.ndarray
    digests: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, table: CaptionTable, pixels: DecodedCache) -> Pictures:
        """Return the images of a table, whose pixels are decoded."""
        rows = pixels.rows(table.images.file)
        hashes = audit.image_hashes(pixels.resized(EDGE))[rows]
        return cls(list(table.images.image_id), hashes, [pixels.digests[row] for row in rows])

    @classmethod
    def read(cls, path: Path | str) -> Pictures:
        """Read the file of `write`; UserError for a line without a hash, and for an empty file."""
        names, numbers = [], []
        try:
            lines = given(path).read_text(encoding="utf-8").splitlines()
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no list of hashes ({error}); name a text file.") from error
        for number, line in enumerate(lines, 1):
            value, _, name = line.partition("\t")
            if not line.strip() or line.startswith("#"):
                continue
            if not re.fullmatch("[0-9a-fA-F]{16}", value.strip()):
                raise UserError(
                    f"Line {number} of {path} begins with no hash of 16 hex digits; write lists of"
                    " hashes by --write-hashes."
                )
            names.append(name or f"line {number}")
            numbers.append(int(value, 16))
        if not names:
            raise UserError(f"{path} holds no hash; write it by --write-hashes.")
        return cls(names, np.array(numbers, np.uint64))

    def write(self, path: Path | str) -> Path:
        """Write the hashes and the names as text, one image a line."""
        lines = [
            f"{value:016x}\t{name}" for value, name in zip(self.hashes, self.names, strict=True)
        ]
        with atomic_write(path) as temporary:
            temporary.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
        return Path(path)


@dataclass(frozen=True, eq=False)
class Leaks:
    """What `find` found of the test table.

    pairs     image, other (in the training data), distance in bits, equal (pixel by pixel, where
              pixels are known); nearest first
    captions  (M,) bool: the caption stands in the training data, too
    """

    table: CaptionTable
    pairs: pd.DataFrame
    captions: np.ndarray

    @property
    def images(self) -> np.ndarray:
        """Which images have an equal or similar one in the training data: (N,) bool."""
        return self.table.images.image_id.isin(set(self.pairs.image)).to_numpy()

    @property
    def said(self) -> np.ndarray:
        """Which images have a caption that stands in the training data: (N,) bool."""
        own = set(self.table.captions.image_id[self.captions])
        return self.table.images.image_id.isin(own).to_numpy()

    def counts(self) -> pd.DataFrame:
        """Return one row each for equal images, similar images, and repeated captions.

        Columns: found, of, percent.
        """
        equal = self.pairs.image[self.pairs.equal].nunique()
        found = {
            "images, equal": (equal, len(self.table)),
            "images, equal or similar": (int(self.images.sum()), len(self.table)),
            "captions that stand there": (int(self.captions.sum()), len(self.captions)),
            "images with such a caption": (int(self.said.sum()), len(self.table)),
        }
        frame = pd.DataFrame.from_dict(found, orient="index", columns=["found", "of"])
        return frame.assign(percent=100 * frame.found / frame.of)

    def recalls(self, result: Recall, owner: np.ndarray) -> pd.DataFrame:
        """Return recalls in percent with and without the leaked queries; the gallery stays whole.

        owner (M,) as for `recall.evaluate`. Columns: images, the recalls, mR and its 95 % interval
        over images. UserError if the result is of another split.
        """
        if not np.array_equal(owner, self.table.owner()):
            raise UserError(
                f"The ranks are of other captions than those of {self.table.name}; name the"
                " captions and the split that they were computed on."
            )
        kinds = {
            "all": np.ones(len(self.table), bool),
            "without leaked images": ~self.images,
            "without leaked images and captions": ~(self.images | self.said),
            "leaked images alone": self.images,
        }
        rows = {name: _row(result, owner, kept) for name, kept in kinds.items() if kept.any()}
        return pd.DataFrame.from_dict(rows, orient="index")


def find(
    table: CaptionTable,
    pictures: Pictures | None,
    train: Pictures | None,
    source: CaptionTable | None,
    within: int = WITHIN,
    how: str = "spaces",
) -> Leaks:
    """Compare a test table with training data: images with `train`, captions with `source`.

    What is None on one side is not compared.
    within  bits of 64 in which the hashes of similar images may differ
    how     what captions are compared by, in `audit.NORMALISE`
    """
    if not 0 <= within <= 20:
        raise UserError(f"The hashes are to differ in {within} bits; choose 0 to 20 of 64.")
    found = np.zeros(len(table.captions), bool)
    if source is not None:
        found = audit.repeated_in(table, source, how)
    pairs = _no_pairs()
    if pictures is not None and train is not None:
        pairs = _pairs(pictures, train, within)
    return Leaks(table, pairs, found)


def _row(result: Recall, owner: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Return the recalls of the queries of the kept images (N,) bool."""
    asked = kept[owner]
    part = Recall(
        result.ties,
        result.ks,
        result.i2t_ranks[kept],
        result.t2i_ranks[asked],
        result.i2t_hits[kept],
        result.t2i_hits[asked],
    )
    place = np.cumsum(kept) - 1
    low, high = recall.bootstrap(part, place[owner[asked]])["mR"]
    metrics = {name: value for name, value in part.metrics.items() if "median" not in name}
    return {"images": int(kept.sum())} | metrics | {"mR low": low, "mR high": high}


def _pairs(pictures: Pictures, train: Pictures, within: int) -> pd.DataFrame:
    """Return the pairs within so many bits, nearest first."""
    parts = [_no_pairs()]
    ids, others = np.array(pictures.names, object), np.array(train.names, object)
    for start in range(0, len(ids), ROWS_AT_ONCE):
        block = pictures.hashes[start : start + ROWS_AT_ONCE, None]
        distance = np.bitwise_count(block ^ train.hashes)
        first, second = np.nonzero(distance <= within)
        columns = {
            "image": ids[first + start],
            "other": others[second],
            "distance": distance[first, second].astype(int),
            "equal": _equal(pictures, train, first + start, second),
        }
        parts.append(pd.DataFrame(columns))
    pairs = pd.concat(parts[1:] or parts)
    return pairs.sort_values(["distance", "equal"], ascending=[True, False], ignore_index=True)


def _equal(
    pictures: Pictures, train: Pictures, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """Tell which pairs have equal pixels; none where one side gives hashes alone."""
    if not (pictures.digests and train.digests):
        return np.zeros(len(first), bool)
    ours, theirs = np.array(pictures.digests, object), np.array(train.digests, object)
    return (ours[first] == theirs[second]).astype(bool)


def _no_pairs() -> pd.DataFrame:
    columns = {"image": object, "other": object, "distance": int, "equal": bool}
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in columns.items()})

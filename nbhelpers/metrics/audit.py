"""Find repeated captions and images, leakage, and the ceilings they put on recall.

Whether two captions are the same depends on what is ignored, so every figure names its
normalisation:

exact   the text as it stands
spaces  lower case, white space collapsed
words   as `spaces`, and every punctuation mark is a space
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product

import numpy as np
import pandas as pd
from scipy.fft import dctn

from nbhelpers.data.table import SPLITS, CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.metrics.recall import evaluate, hit_probability

NORMALISE: dict[str, Callable[[str], str]] = {
    "exact": str,
    "spaces": lambda text: " ".join(text.lower().split()),
    "words": lambda text: " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split()),
}


def captions(table: CaptionTable, how: str = "spaces") -> pd.DataFrame:
    """One row per split: how often captions repeat, and the `ceilings` that follow, in percent.

    images, captions, empty (captions without a word), distinct; repeating: images that repeat a
    caption among their own, and their percentage; shared: distinct captions that several images
    have.
    """
    rows = {}
    for split in _splits(table):
        part = table.split(split)
        texts, owner = _texts(part, how), part.owner()
        pairs = pd.DataFrame({"text": texts, "image": owner})
        repeating = pairs[pairs.duplicated()].image.nunique()
        rows[split] = {
            "images": len(part),
            "captions": len(texts),
            "empty": int((texts.str.strip() == "").sum()),
            "distinct": texts.nunique(),
            "repeating": repeating,
            "repeating %": 100 * repeating / len(part),
            "shared": int((pairs.drop_duplicates().text.value_counts() > 1).sum()),
        } | ceilings(part, how)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("split")


def class_only(table: CaptionTable) -> dict[str, float]:
    """Return R@K and mR, in percent, of a model that knows the scene class and nothing else.

    It gives all images and captions of a class one score; ties count by expectation. Images without
    a class count as one class.
    """
    scene = table.images.scene.where(table.images.scene != table.images.file, "unknown")
    kind, owner = pd.factorize(scene)[0], table.owner()
    return evaluate((kind[:, None] == kind[owner]).astype(np.int8), owner).metrics


def ceilings(
    table: CaptionTable, how: str = "spaces", ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """Return the highest R@K and mR, in percent, that a model can reach.

    The model reads captions normalised by `how`.
    Equal captions get equal scores. As queries (t2i) they rank the images alike: best is to put
    first those that have the caption most often. As the gallery (i2t) they tie: an image's best
    caption is hit with the probability of the expectation rule. All of `table` counts as one
    gallery: pass one split.
    """
    pairs = pd.DataFrame({"text": _texts(table, how), "image": table.owner()})
    counts = pairs.value_counts(sort=True).reset_index(name="own")  # most frequent first
    by_text = counts.groupby("text", sort=False).own
    rank, tied = by_text.cumcount(), by_text.transform("sum")
    hits = pd.DataFrame(hit_probability(0, tied.to_numpy(), counts.own.to_numpy(), ks))
    i2t = hits.groupby(counts.image).max()
    found = {f"i2t_R@{k}": float(100 * i2t[column].mean()) for column, k in enumerate(ks)}
    found |= {f"t2i_R@{k}": float(100 * counts.own[rank < k].sum() / counts.own.sum()) for k in ks}
    return found | {"mR": float(np.mean(list(found.values())))}


def leakage(table: CaptionTable, *others: CaptionTable, how: str = "spaces") -> pd.DataFrame:
    """How many captions of one split stand, equal by `how`, in the splits that a model learns from.

    Rows (captions of, found in): val against train, test against train and against train and val
    together, and test against the same splits of each other table. Columns: captions, found,
    percent, images (with at least one such caption) and their percentage. Empty captions are never
    found.
    """
    learnt = product((table, *others), (("train",), ("train", "val")))
    compared = [
        ("val", table, ("train",)),
        *(("test", source, splits) for source, splits in learnt),
    ]
    rows = [
        _found(table, asked, source, splits, how)
        for asked, source, splits in compared
        if asked in _splits(table) and set(splits) <= set(_splits(source))
    ]
    columns = ["captions of", "found in", "captions", "found", "percent", "images", "images %"]
    return pd.DataFrame(rows, columns=columns).set_index(columns[:2])


def repeated_in(table: CaptionTable, source: CaptionTable, how: str = "spaces") -> np.ndarray:
    """(M,) bool: whether each caption of `table` stands, equal by `how`, in `source`.

    Empty captions never do.
    """
    texts = _texts(table, how)
    return (texts.isin(set(_texts(source, how))) & (texts.str.strip() != "")).to_numpy()


def image_hashes(pixels: np.ndarray, batch: int = 64) -> np.ndarray:
    """Pixels (N, S, S, 3) uint8, S at least 32 -> (N,) uint64 perceptual hashes.

    The lowest 8x8 frequencies of the grey 32x32 thumbnail, a bit each: above their median or not. A
    scene taken twice, recompressed or recoloured differs in few bits; flipped, turned or shifted,
    in many.
    """
    if pixels.ndim != 4 or pixels.shape[3] != 3 or min(pixels.shape[1:3]) < 32:
        raise UserError(
            f"The pixels have shape {pixels.shape}; "
            "give (images, size, size, 3), the size 32 or more."
        )
    hashes = [
        _hash(np.asarray(pixels[start : start + batch])) for start in range(0, len(pixels), batch)
    ]
    return np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)


def near_duplicates(table: CaptionTable, hashes: np.ndarray, within: int = 6) -> pd.DataFrame:
    """Return the pairs of images whose hashes differ in at most `within` bits.

    hashes (N,) are in the order of `table.images`.
    Columns: image, split, other, other_split, distance; nearest first. Look at the pairs, too.
    """
    if len(hashes) != len(table):
        raise UserError(
            f"{len(hashes)} hashes were given for the {len(table)} images of {table.name}."
        )
    found = []
    for start in range(0, len(hashes), 512):
        distance = np.bitwise_count(hashes[start : start + 512, None] ^ hashes)
        first, second = np.nonzero(distance <= within)
        later = second > first + start
        first, second = first[later], second[later]
        found.append(np.stack([first + start, second, distance[first, second]], axis=1))
    first, second, distance = np.concatenate(found).T if found else np.zeros((3, 0), int)
    ids, split = table.images.image_id.to_numpy(), table.images.split.to_numpy()
    pairs = pd.DataFrame(
        {
            "image": ids[first],
            "split": split[first],
            "other": ids[second],
            "other_split": split[second],
            "distance": distance,
        }
    )
    return pairs.sort_values("distance", kind="stable", ignore_index=True)


def _splits(table: CaptionTable) -> list[str]:
    return [split for split in SPLITS if split in set(table.images.split)]


def _texts(table: CaptionTable, how: str) -> pd.Series:
    if how not in NORMALISE:
        raise UserError(f"Unknown normalisation '{how}'; choose one of {', '.join(NORMALISE)}.")
    if not len(table.captions):
        raise UserError(f"{table.name} has no captions to audit.")
    return table.captions.text.map(NORMALISE[how])


def _found(
    table: CaptionTable, asked: str, source: CaptionTable, splits: tuple[str, ...], how: str
) -> dict:
    part = table.split(asked)
    texts, found = part.captions.text, repeated_in(part, source.split(*splits), how)
    images = part.captions.image_id[found].nunique()
    return {
        "captions of": f"{table.name} {asked}",
        "found in": f"{source.name} {'+'.join(splits)}",
        "captions": len(texts),
        "found": int(found.sum()),
        "percent": 100 * float(found.mean()),
        "images": images,
        "images %": 100 * images / len(part),
    }


def _hash(pixels: np.ndarray) -> np.ndarray:
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    for axis in (1, 2):  # the mean over 32 stripes, first rows, then columns
        edges = np.linspace(0, grey.shape[axis], 33).round().astype(int)
        widths = np.diff(edges).reshape([-1 if a == axis else 1 for a in range(3)])
        grey = np.add.reduceat(grey, edges[:-1], axis=axis) / widths
    low = dctn(grey, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(grey), 64).round(6)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False  # mean brightness tells nothing
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]

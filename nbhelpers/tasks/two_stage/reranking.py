"""The second stage: the remaining layers read an image and a text together.

N images, M texts, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nbhelpers.code_identity import code_digest
from nbhelpers.data.array_store import ArrayStore
from nbhelpers.data.distinct import distinct
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.keys import key_digest
from nbhelpers.papers.dual_encoder import unpadded
from nbhelpers.training.device import encoding, encoding_on

PAIRS = 128  # pairs that pass the fine stage at once


@torch.inference_mode()
def pair_scores(
    model: nn.Module,
    images,
    image_rows: np.ndarray,
    texts,
    text_rows: np.ndarray,
    batch: int = PAIRS,
) -> np.ndarray:
    """Return single-stream scores (P,) float32 of pairs of rows of `images` and `texts`.

    Each is an ArrayStore or encoded queries.
    Equal pairs are read once. Texts of like length are read together, with no more padding than
    they need. UserError if a score is NaN or infinite.
    """
    device, scores = next(model.parameters()).device, []

    def taken(values, rows):
        part = (
            values[torch.from_numpy(rows)]
            if isinstance(values, Tensor)
            else torch.from_numpy(values[rows])
        )
        return part.to(device)

    image_rows, text_rows = _first_equal(images)[image_rows], _first_equal(texts)[text_rows]
    pairs = image_rows * (text_rows.max() + 1) + text_rows
    _, first, pair = np.unique(pairs, return_index=True, return_inverse=True)
    image_rows, text_rows = image_rows[first], text_rows[first]
    masks = taken(texts["mask"], text_rows)
    order = np.argsort(masks.sum(1).cpu().numpy(), kind="stable")
    for some in np.split(order, range(batch, len(order), batch)):
        text = unpadded(taken(texts["states"], text_rows[some]).float(), masks[some].long())
        with encoding_on(device):
            some_scores = model.score_pairs(
                taken(images["states"], image_rows[some]).float(), *text
            )
        scores.append(some_scores.float().cpu().numpy())
    found = np.concatenate(scores)[np.argsort(order)]
    if not np.isfinite(found).all():
        raise UserError("The single stream gave NaN or infinite scores; look for a diverged model.")
    return found[pair]


def _first_equal(items: ArrayStore | Mapping[str, Any]) -> np.ndarray:
    """Return for each row the first row that is known to be equal."""
    return items.same if isinstance(items, ArrayStore) else np.arange(len(items["states"]))


def fine_scores(
    model: nn.Module,
    images: ArrayStore,
    texts: ArrayStore,
    wanted: np.ndarray | None = None,
    batch: int = PAIRS,
    kept: Path | None = None,
) -> np.ndarray:
    """Return scores (N,M) float32 of all pairs, or of those `wanted` (N,M), else -inf.

    Equal pairs are read once.
    kept  the folder of these stores, as opened from there: scores found before are taken from a
          file in it, of these rows and of the code that scores them alone, and new ones are added
          there
    UserError if that file is damaged.
    """
    wanted = np.ones((len(images), len(texts)), dtype=bool) if wanted is None else wanted
    (first_image, row), (first_text, column) = (
        distinct(images.same.tolist()),
        distinct(texts.same.tolist()),
    )
    asked = np.zeros((len(first_image), len(first_text)), dtype=bool)
    pairs = np.nonzero(wanted)
    asked[row[pairs[0]], column[pairs[1]]] = True
    path = None if kept is None else kept / _scores_name(model, images, texts)
    scores = (
        np.full(asked.shape, -np.inf, dtype=np.float32)
        if path is None
        else _kept_scores(path, asked.shape)
    )
    missing = asked & ~np.isfinite(scores)
    if missing.any():
        image_rows, text_rows = np.nonzero(missing)
        rows = first_image[image_rows], first_text[text_rows]
        scores[missing] = pair_scores(model, images, rows[0], texts, rows[1], batch)
        if path:
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.save(file, scores)
    return np.where(wanted, scores[np.ix_(row, column)], -np.inf)


def _scores_name(model: nn.Module, images: ArrayStore, texts: ArrayStore) -> str:
    """The name of the file of fine scores: it changes with the stored rows and with the code."""
    code = code_digest(pair_scores, type(model))
    decides = [images.manifest, texts.manifest, code]
    decides += [] if encoding() == "fp32" else [encoding()]
    return f"fine-{key_digest(*decides)[:16]}.npy"


def _kept_scores(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The scores that a file holds, -inf where it has none."""
    if not path.exists():
        return np.full(shape, -np.inf, dtype=np.float32)
    try:
        return np.load(path).reshape(shape)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it, and the scores are computed again."
        ) from error

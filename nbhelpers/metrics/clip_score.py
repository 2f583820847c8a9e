"""Compute CLIPScore and RefCLIPScore from embeddings.

Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", EMNLP 2021,
section 3.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nbhelpers.errors import UserError
from nbhelpers.metrics.caption_scores import CaptionScores

WEIGHT = 2.5  # of the cosine
PROMPT = "A photo depicts {}"  # with which the paper reads captions and references
NAMES = ("CLIPScore", "RefCLIPScore")


def clip_score(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """Return CLIPScore (N,): 2.5 times the cosine of image and caption, at least 0.

    images, captions (N,D) unit rows.
    """
    return WEIGHT * np.maximum((images * captions).sum(1, dtype=float), 0)


def ref_clip_score(
    scores: np.ndarray, captions: np.ndarray, references: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    """Return RefCLIPScore (N,): the harmonic mean of CLIPScore and the nearest reference's cosine.

    scores (N,) of `clip_score`; captions (N,D) and references (R,D) unit rows; owner (R,) the
    caption's row of each reference. 0 where one of the two is 0. UserError for a caption without a
    reference.
    """
    lonely = np.setdiff1d(np.arange(len(captions)), owner)
    if len(lonely):
        raise UserError(
            f"{len(lonely)} captions have no reference (first: row {lonely[0]}); give each one."
        )
    nearest = np.zeros(len(captions))
    np.maximum.at(nearest, owner, (references * captions[owner]).sum(1, dtype=float))
    total = scores + nearest
    return np.divide(2 * scores * nearest, total, out=np.zeros_like(total), where=total > 0)


def beside(scores: CaptionScores, found: dict[str, np.ndarray]) -> CaptionScores:
    """Add scores (N,) of each image to those of a scorer, by name; `bootstrap` takes them, too."""
    columns = {name: values[:, None] for name, values in found.items()}
    means = {name: float(values.mean()) for name, values in found.items()}
    return replace(
        scores,
        corpus=scores.corpus | means,
        per_image=scores.per_image.assign(**found),
        counts=tuple(one | columns for one in scores.counts),
    )

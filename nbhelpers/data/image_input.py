"""Say how an image tower wants its pixels."""

from __future__ import annotations

from dataclasses import dataclass

from nbhelpers.data.augment import CLIP_MEAN, CLIP_STD


@dataclass(frozen=True)
class ImageInput:
    """What an image tower wants to be fed: edge length in pixels and the normalisation of [0, 1]
    values.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

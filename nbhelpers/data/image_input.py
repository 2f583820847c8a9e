"""The image size and normalisation that an image tower expects."""

from __future__ import annotations

from dataclasses import dataclass

from nbhelpers.data.augment import CLIP_MEAN, CLIP_STD


@dataclass(frozen=True)
class ImageInput:
    """Describe the input of an image tower.

    size       edge length in pixels
    mean, std  of the normalisation of values in [0, 1], for red, green and blue
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

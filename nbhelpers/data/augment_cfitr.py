"""CFITR's RandAugment, that of ViLT: two of fourteen operations, with Pillow's results.

Its released code draws them with replacement, at level 9 of 30, for the image as it is stored,
before it is resized. Geometric operations go in a random direction, take the nearest pixel and fill
with black. Source: the released code of CFITR (transforms `pixelbert_randaug`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

LEVEL = 0.3  # 9 of 30
FACTOR = 0.1 + 1.8 * LEVEL  # of the four enhancements, between 0.1 and 1.9
DEGREES = 30 * LEVEL
THRESHOLD = 256 * LEVEL
PARTS = 1 << 16  # of a pixel, in which Pillow counts positions

# What is added to the identity matrix (x' = m0 x + m1 y + m2, y' = m3 x + m4 y + m5)
MOVES: dict[str, tuple[float, ...]] = {
    "ShearX": (0, 0.3 * LEVEL, 0, 0, 0, 0),
    "ShearY": (0, 0, 0, 0.3 * LEVEL, 0, 0),
    "TranslateX": (0, 0, 100 * LEVEL, 0, 0, 0),
    "TranslateY": (0, 0, 0, 0, 0, 100 * LEVEL),
}
IDENTITY = (1, 0, 0, 0, 1, 0)


def _table(values: np.ndarray) -> np.ndarray:
    """256 levels, cut to 0..255 and rounded down."""
    return np.asarray(values, np.float32).clip(0, 255).astype(np.uint8)


EVERY = np.arange(256, dtype=np.float32)
_sum = (EVERY + int(110 * LEVEL)).clip(0, 255)
TABLES = {
    "Posterize": _table(np.arange(256) & 0b10000000),  # one bit is left
    "Solarize": _table(np.where(EVERY < THRESHOLD, EVERY, 255 - EVERY)),
    "SolarizeAdd": _table(np.where(_sum < 128, _sum, 255 - _sum)),
    "Brightness": _table(EVERY * np.float32(FACTOR)),
}
BY_PILLOW: dict[str, Callable[[Image.Image], Image.Image]] = {
    "AutoContrast": ImageOps.autocontrast,
    "Equalize": ImageOps.equalize,
    "Color": lambda image: ImageEnhance.Color(image).enhance(FACTOR),
    "Sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(FACTOR),
}
NAMES = ("Rotate", "Contrast", *MOVES, *TABLES, *BY_PILLOW)


def apply(name: str, image: np.ndarray, sign: int) -> np.ndarray:
    """Return (H, W, 3) uint8 under one of the NAMES.

    sign  1 or -1, the direction of a geometric operation; the others do not read it
    """
    if name in TABLES:
        return cv2.LUT(image, TABLES[name])
    if name in BY_PILLOW:
        return np.asarray(BY_PILLOW[name](Image.fromarray(image)))
    if name == "Contrast":
        return lower_contrast(image)
    matrix = _rotation(image.shape[0], image.shape[1], sign * DEGREES)
    if name in MOVES:
        matrix = tuple(one + sign * by for one, by in zip(IDENTITY, MOVES[name], strict=True))
    return moved(image, matrix)


def rand_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw two operations with replacement, and apply both."""
    for number in rng.integers(len(NAMES), size=2):
        image = apply(NAMES[number], image, 1 if rng.random() < 0.5 else -1)
    return image


def lower_contrast(image: np.ndarray) -> np.ndarray:
    """Move all values towards the mean of the grey image."""
    grey = np.asarray(Image.fromarray(image).convert("L"))
    mean = np.float32(int(grey.mean() + 0.5))
    return cv2.LUT(image, _table(mean + np.float32(FACTOR) * (EVERY - mean)))


def moved(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """Return the image under an affine map from the result to the source."""
    columns, rows = _nearest(*image.shape[:2], matrix)
    return cv2.remap(image, columns, rows, cv2.INTER_NEAREST, borderValue=(0, 0, 0))


def _rotation(height: int, width: int, degrees: float) -> tuple[float, ...]:
    """The map that turns an image counter-clockwise about its centre."""
    angle = -math.radians(degrees)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


@lru_cache(32)  # ten for each size of images
def _nearest(height: int, width: int, matrix: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows (H, W) of the pixels that an affine map takes, -1 outside.

    Positions are rounded as Pillow rounds them.
    """
    m = np.array(matrix)
    m[2] += m[0] / 2 + m[1] / 2
    m[5] += m[3] / 2 + m[4] / 2
    fixed = np.floor(m * PARTS + 0.5).astype(np.int64)
    row, column = np.mgrid[:height, :width]
    x = (fixed[0] * column + fixed[1] * row + fixed[2]) // PARTS
    y = (fixed[3] * column + fixed[4] * row + fixed[5]) // PARTS
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = (np.where(inside, place, -1).astype(np.float32) for place in (x, y))
    return cv2.convertMaps(x, y, cv2.CV_16SC2, nninterpolation=True)

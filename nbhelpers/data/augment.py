"""Transform uint8 images for training and testing as the retrieval papers do, and normalise."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nbhelpers.data import augment_cfitr, images
from nbhelpers.errors import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GREY = (128, 128, 128)  # what geometric operations fill with


# Operations of RandAugment. Each maps an image (H, W, 3) uint8 to another of that shape.
def identity(image):
    """Return the image unchanged."""
    return image


def auto_contrast(image):
    """Stretch each channel to 0..255 (Pillow's)."""
    return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))


def auto_contrast_released(image):
    """Stretch each channel as PIR's released code does.

    That code negates an unsigned minimum, so a channel without a 0 becomes 255 everywhere.
    """
    stretched = auto_contrast(image).copy()
    for channel, plane in enumerate(cv2.split(image)):
        low, high, *_ = cv2.minMaxLoc(plane)
        if 0 < low < high:
            stretched[..., channel] = 255
    return stretched


def equalize(image):
    """Flatten the histogram of each channel (Pillow's)."""
    return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def brightness(image, factor):
    """Multiply all values by `factor`."""
    levels = np.arange(256, dtype=np.float32) * np.float32(factor)
    return cv2.LUT(image, levels.clip(0, 255).astype(np.uint8))


def _sharpened(image, factor):
    """Move the inner pixels, float32, away from their 3x3 mean (weight 5 in the centre)."""
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = cv2.filter2D(image, -1, kernel / 13)[1:-1, 1:-1].astype(np.float32)
    return smooth + np.float32(factor) * (image[1:-1, 1:-1] - smooth)


def sharpness(image, factor):
    """Sharpen the inner pixels; border pixels stay as they are."""
    sharp = image.copy()
    sharp[1:-1, 1:-1] = _sharpened(image, factor).clip(0, 255)
    return sharp


def sharpness_released(image, factor):
    """Sharpen as PIR's released code does, which does not clip.

    Values below 0 or above 255 wrap round, by way of int32, so that every CPU wraps alike.
    """
    sharp = image.copy()
    sharp[1:-1, 1:-1] = _sharpened(image, factor).astype(np.int32)
    return sharp


def _warp(image, matrix, fill):
    height, width = image.shape[:2]
    return cv2.warpAffine(image, np.float32(matrix), (width, height), borderValue=fill)  # bilinear


def shear_x(image, factor, fill=GREY):
    """Shift each row by `factor` times its number."""
    return _warp(image, [[1, factor, 0], [0, 1, 0]], fill)


def shear_y(image, factor, fill=GREY):
    """Shift each column by `factor` times its number."""
    return _warp(image, [[1, 0, 0], [factor, 1, 0]], fill)


def translate_x(image, offset, fill=GREY):
    """Shift the image to the right by `offset` pixels."""
    return _warp(image, [[1, 0, -offset], [0, 1, 0]], fill)


def translate_y(image, offset, fill=GREY):
    """Shift the image up by `offset` pixels."""
    return _warp(image, [[1, 0, 0], [0, 1, -offset]], fill)


def rotate(image, degrees, fill=GREY):
    """Rotate counter-clockwise about the centre."""
    height, width = image.shape[:2]
    return _warp(image, cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1), fill)


OPS: dict[str, Callable[..., np.ndarray]] = {
    "Identity": identity,
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
}
RELEASED_OPS = {**OPS, "AutoContrast": auto_contrast_released, "Sharpness": sharpness_released}
MAGNITUDE = {"Brightness": 1.36, "Sharpness": 1.36}  # 0.7 * 1.8 + 0.1: level 7 of 10
SIGNED = {"ShearX": 0.21, "ShearY": 0.21, "TranslateX": 7.0, "TranslateY": 7.0, "Rotate": 21.0}


def rand_augment(image: np.ndarray, rng: np.random.Generator, ops: dict = OPS) -> np.ndarray:
    """Draw two operations with replacement and apply each with probability 0.5.

    Strengths are those of level 7 of 10; geometric operations go in a random direction.
    """
    names = list(ops)
    for number in rng.integers(len(names), size=2):
        name = names[number]
        if rng.random() < 0.5:
            arguments = [MAGNITUDE[name]] if name in MAGNITUDE else []
            if name in SIGNED:
                arguments = [SIGNED[name] if rng.random() < 0.5 else -SIGNED[name]]
            image = ops[name](image, *arguments)
    return image


@cache
def _torchvision_policy():
    from torchvision.transforms import v2

    return v2.RandAugment(num_ops=2, magnitude=7, num_magnitude_bins=11)


def torchvision_rand_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply torchvision's RandAugment with draws from `rng`.

    Its own draws come from torch's global generator, which the threads of a loader share, so images
    would depend on the number of workers.
    """
    policy, pixels = _torchvision_policy(), torch.from_numpy(image.copy()).permute(2, 0, 1)
    space = policy._AUGMENTATION_SPACE
    for number in rng.integers(len(space), size=policy.num_ops):
        name = list(space)[number]
        magnitudes_of, signed = space[name]
        magnitudes = magnitudes_of(policy.num_magnitude_bins, *image.shape[:2])
        magnitude = 0.0 if magnitudes is None else float(magnitudes[policy.magnitude])
        if signed and rng.random() < 0.5:
            magnitude = -magnitude
        pixels = policy._apply_image_or_video_transform(
            pixels, name, magnitude, interpolation=policy.interpolation, fill=policy._fill
        )
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


RAND_AUGMENT: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "fixed": rand_augment,
    "released": partial(rand_augment, ops=RELEASED_OPS),
    "torchvision": torchvision_rand_augment,
    "cfitr": augment_cfitr.rand_augment,
}
BEFORE_RESIZING = ("cfitr",)  # of these; the others see images of the final size


def random_crop(
    height: int, width: int, scale, ratio, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a crop as torchvision's RandomResizedCrop does: (top, left, height, width).

    Its share of the area is uniform in `scale`, its log aspect ratio uniform in `ratio`. After ten
    draws that do not fit, take the largest central crop within `ratio`.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class TrainTransform:
    """Make augmented views: crop, resize to size x size (bicubic), flip, turn, RandAugment.

    randaugment  "fixed" (AutoContrast as Pillow's, Sharpness clipped), "released" (the authors'
                 code, where both wrap round in uint8), "torchvision" (its own set of operations),
                 "cfitr" (those of CFITR's release, before the image is resized), or None
    scale        smallest and largest share of the image area that a crop has; its aspect ratio is
                 drawn in 3/4..4/3
    flip         probability of the horizontal flip
    turn         True: also rotate by 0 to 3 quarter turns; not in the papers (an aerial image has
                 no "up")
    """

    size: int
    randaugment: str | None = "fixed"
    scale: tuple[float, float] = (0.5, 1.0)
    flip: float = 0.5
    turn: bool = False

    def __post_init__(self):
        names = (*RAND_AUGMENT, None)
        if self.randaugment not in names:
            raise UserError(
                f"There is no randaugment '{self.randaugment}'; take one of "
                f"{', '.join(map(str, names))}."
            )

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augment (H, W, 3) uint8 to (size, size, 3) uint8; equal `rng` give equal views."""
        full_height, full_width = image.shape[:2]
        ratio = (3 / 4, 4 / 3)
        top, left, height, width = random_crop(full_height, full_width, self.scale, ratio, rng)
        image = image[top : top + height, left : left + width]
        if self.randaugment in BEFORE_RESIZING:
            image = RAND_AUGMENT[self.randaugment](image, rng)
        image = images.resize(image, self.size)
        if rng.random() < self.flip:
            image = cv2.flip(image, 1)
        if self.turn:
            image = np.ascontiguousarray(np.rot90(image, int(rng.integers(4))))
        if self.randaugment is None or self.randaugment in BEFORE_RESIZING:
            return image
        return RAND_AUGMENT[self.randaugment](image, rng)


@dataclass(frozen=True)
class TestTransform:
    """Resize to exactly size x size (Pillow's bicubic); the aspect ratio is not kept."""

    __test__ = False  # not a test for pytest to collect
    size: int

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Resize (H, W, 3) uint8 to (size, size, 3) uint8; `rng` is not used."""
        return images.resize(image, self.size)


class Normalizer:
    """Turn pixels (B, 3, H, W) uint8 into float32, on their device: (value / 255 - mean) / std.

    The values equal those of torchvision's ToTensor and Normalize exactly. On a CUDA GPU the
    channels come last in memory, where its convolutions are fastest.
    """

    def __init__(self, mean=CLIP_MEAN, std=CLIP_STD):
        # 255 is a tensor: by a number, a GPU would divide with its rounded reciprocal
        self._numbers = torch.tensor([(255.0,) * 3, mean, std])[:, :, None, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the normalised pixels."""
        last = pixels.device.type == "cuda"
        order = torch.channels_last if last else torch.contiguous_format
        white, mean, std = self._numbers.to(pixels.device, non_blocking=True)
        values = pixels.to(torch.float32, memory_format=order)
        return values.div_(white).sub_(mean).div_(std)


def threads(workers: int | str, count: int) -> int:
    """Return in how many threads to prepare `count` images.

    workers  a number, or "auto": as many as there are cores but one, which feeds the model
    """
    if workers == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = (cores or 1) - 1
    return max(1, min(int(workers), count))


def _in_threads(function: Callable[[int], None], count: int, workers: int | str) -> None:
    """Call function(0) to function(count - 1) in at most `workers` threads, a part for each."""

    def call(part: np.ndarray) -> None:
        for index in part:
            function(index)

    parts = np.array_split(np.arange(count), threads(workers, count))
    if len(parts) == 1:
        return call(parts[0])
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(call, parts))


def as_bytes(
    view: Callable[[int], np.ndarray], count: int, size: int, workers: int | str = 1
) -> Tensor:
    """Put view(0) to view(count - 1) into one batch (B, 3, S, S) uint8, channels last in memory.

    A `Normalizer` turns it into float32 on the device, so that a quarter of the bytes travels.
    """
    out = np.empty((count, size, size, 3), np.uint8)

    def put(number: int) -> None:
        out[number] = view(number)

    _in_threads(put, count, workers)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def normalize(batch: np.ndarray, mean=CLIP_MEAN, std=CLIP_STD) -> Tensor:
    """Normalise a batch (B, S, S, 3) uint8 to a tensor (B, 3, S, S) float32."""
    pixels = torch.from_numpy(np.require(batch, requirements="W"))
    return Normalizer(mean, std)(pixels.permute(0, 3, 1, 2))

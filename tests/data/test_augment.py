"""Train and test transforms against Pillow and torchvision.

(Reference values: test_reference.py.)
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision import transforms
from torchvision.transforms import v2

from nbhelpers.data import augment, augment_cfitr
from nbhelpers.data.augment import TestTransform, TrainTransform
from nbhelpers.errors import UserError

BICUBIC = transforms.InterpolationMode.BICUBIC


def picture(height, width, seed=0):
    """Smooth, so that geometry can be told; every value occurs."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("shape", [(256, 256), (300, 200), (100, 90), (64, 64)])
def test_the_test_transform_equals_torchvision_on_pillow(shape):
    image = picture(*shape)
    expected = transforms.Resize((64, 64), BICUBIC)(Image.fromarray(image))
    np.testing.assert_array_equal(TestTransform(64)(image), np.asarray(expected))


@pytest.mark.parametrize("shape", [(256, 256), (90, 140)])
def test_crop_and_flip_equal_torchvision_on_pillow(shape):
    image, plain = picture(*shape), TrainTransform(64, randaugment=None)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        top, left, height, width = augment.random_crop(*shape, (0.5, 1.0), (3 / 4, 4 / 3), rng)
        box = top, left, height, width
        expected = transforms.functional.resized_crop(
            Image.fromarray(image), *box, (64, 64), BICUBIC
        )
        expected = ImageOps.mirror(expected) if rng.random() < 0.5 else expected
        np.testing.assert_array_equal(
            plain(image, np.random.default_rng(seed)), np.asarray(expected)
        )


@pytest.mark.parametrize("shape", [(256, 256), (200, 260), (30, 300)])
def test_crops_are_drawn_as_torchvision_draws_them(shape):
    """Area share and place have equal distributions (the last shape never fits: the fall-back)."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    scale, ratio = (0.5, 1.0), (3 / 4, 4 / 3)
    canvas = torch.zeros(3, *shape)
    ours = np.array([augment.random_crop(*shape, scale, ratio, rng) for _ in range(4000)])
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(canvas, scale, ratio) for _ in range(4000)]
    )
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= shape).all()
    quantiles = [
        np.quantile(
            np.column_stack([drawn, drawn[:, 2] * drawn[:, 3] / np.prod(shape) * 100]),
            [0.05, 0.25, 0.5, 0.75, 0.95],
            axis=0,
        )
        for drawn in (ours, theirs)
    ]
    np.testing.assert_allclose(*quantiles, atol=4)


def test_area_and_flip_follow_their_options():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32] = 255  # the left half is white
    draws = [np.random.default_rng(seed) for seed in range(400)]
    whole = [TrainTransform(64, None, scale=(0.95, 1.0))(image, rng) for rng in draws]
    share = np.mean([flipped[32, 10, 0] < 128 for flipped in whole])
    assert 0.42 < share < 0.58
    assert all(
        TrainTransform(64, None, (0.95, 1.0), flip=0)(image, rng)[32, 10, 0] == 255 for rng in draws
    )
    assert all(
        TrainTransform(64, None, (0.95, 1.0), flip=1)(image, rng)[32, 10, 0] == 0 for rng in draws
    )


@pytest.mark.parametrize("randaugment", augment.RAND_AUGMENT)
def test_equal_generators_give_equal_images_and_leave_the_source_alone(randaugment):
    image = picture(80, 80)
    image.setflags(write=False)
    before, transform = image.copy(), TrainTransform(48, randaugment)
    torch_state = torch.random.get_rng_state()
    first, second = (
        [transform(image, np.random.default_rng([5, i])) for i in range(40)] for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(image, before)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert all(found.shape == (48, 48, 3) and found.dtype == np.uint8 for found in first)
    assert len({found.tobytes() for found in first}) > 30


def test_a_turn_shows_the_picture_in_one_of_eight_ways_each_as_often():
    plain, turning = (
        TrainTransform(64, randaugment=None, scale=(1, 1), turn=turn) for turn in (False, True)
    )
    image = picture(64, 64)
    whole = plain(image, np.random.default_rng(0))
    ways = [np.rot90(one, k) for one in (whole, whole[:, ::-1]) for k in range(4)]
    counts = [0] * 8
    for seed in range(400):
        found = turning(image, np.random.default_rng(seed))
        assert found.flags.c_contiguous
        counts[[np.array_equal(found, way) for way in ways].index(True)] += 1
    assert min(counts) > 25 and sum(counts) == 400


def test_randaugment_draws_two_operations_with_replacement_each_applied_half_the_time():
    calls = []

    def recorder(name):
        return lambda image, *arguments: calls.append((name, *arguments)) or image

    ops, rng = {name: recorder(name) for name in augment.OPS}, np.random.default_rng(0)
    for _ in range(10_000):
        augment.rand_augment(None, rng, ops)
    counts = {name: sum(call[0] == name for call in calls) for name in ops}
    assert all(930 < count < 1070 for count in counts.values()), counts  # 10,000 * 2 * 0.5 / 10
    drawn = {name: {call[1:] for call in calls if call[0] == name} for name in ops}
    signed = {"ShearX": 0.21, "ShearY": 0.21, "TranslateX": 7.0, "TranslateY": 7.0, "Rotate": 21.0}
    assert drawn == {
        "Identity": {()},
        "AutoContrast": {()},
        "Equalize": {()},
        "Brightness": {(1.36,)},
        "Sharpness": {(1.36,)},
        **{name: {(size,), (-size,)} for name, size in signed.items()},
    }
    upward = np.mean([call[1] > 0 for call in calls if call[0] in signed])
    assert 0.47 < upward < 0.53


class Draws:
    """What torchvision draws from torch's generator, drawn from ours in its place."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.operations = self.rng.integers(14, size=2).tolist()
        self.taken = []

    def randint(self, count, size):
        assert (count, size) == (14, ())
        self.taken.append(self.operations[len(self.taken)])
        return torch.tensor(self.taken[-1])

    def rand(self, size):
        return torch.tensor(self.rng.random(), dtype=torch.float64)


def test_torchvisions_randaugment_is_its_own_for_equal_draws(monkeypatch):
    image, seen = picture(40, 50), set()
    policy = v2.RandAugment(num_ops=2, magnitude=7, num_magnitude_bins=11)
    for seed in range(120):
        found = augment.torchvision_rand_augment(image, np.random.default_rng(seed))
        draws = Draws(seed)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", draws.randint)
            patch.setattr(torch, "rand", draws.rand)
            expected = policy(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(found, expected)
        seen |= set(draws.taken)
    assert seen == set(range(14))


def test_auto_contrast_and_equalize_equal_pillow_and_flat_images_stay():
    image = picture(40, 43) // 2 + 20
    for name, function in (
        ("AutoContrast", ImageOps.autocontrast),
        ("Equalize", ImageOps.equalize),
    ):
        np.testing.assert_array_equal(
            augment.OPS[name](image), np.asarray(function(Image.fromarray(image)))
        )
    flat = np.full((9, 9, 3), 77, np.uint8)
    for ops in (augment.OPS, augment.RELEASED_OPS):
        for name in ("AutoContrast", "Equalize", "Sharpness"):
            np.testing.assert_array_equal(ops[name](flat, *[1.36] * (name == "Sharpness")), flat)


def test_released_operations_wrap_only_where_the_fixed_ones_saturate():
    image = picture(40, 43)
    image = np.where(np.indices(image.shape)[1] < 20, image, 255 - image // 4).astype(np.uint8)
    raised = np.dstack(
        [image[..., 0] // 2 + 30, image[..., 1] - image[..., 1].min(), image[..., 2] // 2 + 1]
    )
    wrapped, fixed = (
        augment.RELEASED_OPS["AutoContrast"](raised),
        augment.OPS["AutoContrast"](raised),
    )
    assert (wrapped[..., [0, 2]] == 255).all()
    np.testing.assert_array_equal(wrapped[..., 1], fixed[..., 1])
    wrapped, fixed = (
        augment.RELEASED_OPS["Sharpness"](image, 1.36),
        augment.OPS["Sharpness"](image, 1.36),
    )
    other = wrapped != fixed
    assert other.any() and np.isin(fixed[other], [0, 255]).all()


@pytest.mark.parametrize(
    "mean, std", [(augment.CLIP_MEAN, augment.CLIP_STD), ((0.5,) * 3, (0.5,) * 3)]
)
def test_normalize_equals_torchvision_bit_for_bit(mean, std):
    batch = np.stack([picture(32, 32, seed) for seed in range(3)])
    batch[0, :16, :16] = np.arange(256).reshape(16, 16, 1)  # every value
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    found = augment.normalize(batch, mean, std)
    assert found.is_contiguous() and found.dtype == torch.float32
    assert torch.equal(found, torch.stack([plain(Image.fromarray(image)) for image in batch]))


def test_an_unknown_randaugment_is_refused():
    with pytest.raises(
        UserError, match="no randaugment 'official'; take one of fixed, released, torch"
    ):
        TrainTransform(224, "official")


def by_pillow(name: str, image: Image.Image, sign: int) -> Image.Image:
    """CFITR's operations at level 9 of 30, in the words of Pillow."""
    if name == "SolarizeAdd":
        brighter = Image.fromarray(np.clip(np.array(image, int) + 33, 0, 255).astype(np.uint8))
        return ImageOps.solarize(brighter, 128)
    if name == "Rotate":
        return image.rotate(9 * sign)
    of_levels = {"Posterize": (ImageOps.posterize, 1), "Solarize": (ImageOps.solarize, 76.8)}
    if name in of_levels:
        operation, level = of_levels[name]
        return operation(image, level)
    if name in ("AutoContrast", "Equalize"):
        return getattr(ImageOps, name.lower())(image)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(0.64)
    matrix = {
        "ShearX": (1, 0.09 * sign, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, 0.09 * sign, 1, 0),
        "TranslateX": (1, 0, 30 * sign, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, 30 * sign),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


@pytest.mark.parametrize("name", augment_cfitr.NAMES)
@pytest.mark.parametrize("shape", [(256, 256), (224, 224), (61, 40)])
def test_cfitrs_operations_equal_pillows_to_the_bit(name, shape):
    image = picture(*shape) // 2 + 40  # of a range that AutoContrast can widen
    for sign in (1, -1):
        found = augment_cfitr.apply(name, image, sign)
        assert np.array_equal(found, by_pillow(name, Image.fromarray(image), sign))
        assert not np.array_equal(found, image)


def test_cfitrs_randaugment_applies_two_operations_before_the_image_is_resized(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        augment_cfitr,
        "apply",
        lambda name, image, sign: drawn.append((name, image.shape[0], sign)) or image,
    )
    plain = TrainTransform(48, "cfitr", scale=(1.0, 1.0), flip=0.0)
    for seed in range(300):
        plain(picture(64, 64), np.random.default_rng(seed))
    names, heights, signs = zip(*drawn, strict=True)
    assert len(drawn) == 600 and set(names) == set(augment_cfitr.NAMES) and len(set(names)) == 14
    assert set(heights) == {64} and set(signs) == {1, -1}


@pytest.mark.parametrize("mean, std", [(augment.CLIP_MEAN, augment.CLIP_STD), ((0.5,) * 3,) * 2])
def test_every_byte_normalises_as_its_formula_says(mean, std):
    levels = torch.arange(256, dtype=torch.float32)
    found = augment.Normalizer(mean, std)(torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256))
    for channel in range(3):
        expected = (levels / 255 - torch.tensor(mean[channel])) / torch.tensor(std[channel])
        assert torch.equal(found[0, channel, 0], expected)


def test_a_batch_of_bytes_has_its_channels_last_in_memory():
    views = [picture(16, 16, seed) for seed in range(5)]
    batch = augment.as_bytes(views.__getitem__, 5, 16, "auto")
    assert batch.shape == (5, 3, 16, 16) and batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment.Normalizer()(batch), augment.normalize(np.stack(views)))


@pytest.mark.parametrize(
    "cores, count, threads", [(8, 100, 7), (8, 3, 3), (2, 100, 1), (1, 100, 1), (8, 0, 1)]
)
def test_auto_takes_all_cores_but_one(monkeypatch, cores, count, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(cores), raising=False)
    assert augment.threads("auto", count) == threads
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert augment.threads("auto", count) == threads

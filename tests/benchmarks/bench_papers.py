"""The papers' steps against the same steps from plain parts: attention written out with its
softmax, one parameter at a time in the optimiser, a copy of the tokens in CLIP's blocks, and
torchvision's RandAugment. Printed are ratios of the plain time to ours; above 1 ours is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from thread_seconds import best
from torch import Tensor, nn

from nbhelpers.data import augment, augment_cfitr
from nbhelpers.papers import ift, pe_rsitr
from nbhelpers.papers.pe_rsitr import PERSITR, PERSITRConfig
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig

PAIRS = 4
pytestmark = pytest.mark.usefixtures("one_thread")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "PIR": lambda: PIR(PIRConfig.paper()),
    "PIR-CLIP": lambda: PIRCLIP(PIRCLIPConfig.paper()),
    "PE-RSITR": lambda: PERSITR(PERSITRConfig.paper()),
}


def batch() -> dict[str, Tensor]:
    row = torch.arange(PAIRS)
    return {
        "pixels": torch.randn(PAIRS, 3, 224, 224),
        "image_index": row,
        "scene": row // 2,
        "ids": torch.randint(5, 400, (PAIRS, 47)),
        "mask": torch.ones(PAIRS, 47, dtype=torch.long),
    }


def plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """softmax(q k' / sqrt(d)) v, each matrix in memory."""
    logits = q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(q.shape[-1]))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return F.dropout(logits.softmax(-1), dropout_p, training=dropout_p > 0) @ v


@contextmanager
def plain() -> Iterator[None]:
    """Attention written out, and no fast path of torch's own."""
    kept, fast = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
    F.scaled_dot_product_attention = plain_attention
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = kept
        torch.backends.mha.set_fastpath_enabled(fast)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_forward_and_optimiser(name):
    model, here = MODELS[name]().train(), batch()
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        model.loss(here)["loss"].backward()

    def forward() -> None:
        with torch.no_grad():
            model.loss(here)

    ours = best(step), best(forward)
    with torch.autocast("cpu", torch.bfloat16):
        half = best(step)
    with plain():
        theirs = best(step), best(forward)
    updates = [
        best(torch.optim.AdamW(trained, lr=1e-6, **options).step)
        for options in ({"foreach": False}, {"fused": True})
    ]
    print(
        f"{name}: step {theirs[0] / ours[0]:.2f} (ours in bf16 {theirs[0] / half:.2f}), forward"
        f" {theirs[1] / ours[1]:.2f}, optimiser {updates[0] / updates[1]:.2f}"
    )
    assert updates[1] < updates[0]


def test_the_image_tower_of_pe_rsitr_in_evaluation(monkeypatch):
    model, pixels = PERSITR(PERSITRConfig.paper()).eval(), torch.randn(16, 3, 224, 224)
    with torch.inference_mode():
        ours = best(lambda: model.encode_images(pixels))
        monkeypatch.setattr(
            pe_rsitr, "tokens_first", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)
        )
        copied = best(lambda: model.encode_images(pixels))
    print(f"PE-RSITR, images in evaluation: with a copy of the tokens {copied / ours:.2f}")
    assert ours < copied


def test_the_fourier_transform_against_that_of_one_axis_after_the_other():
    x = torch.randn(32, 32, 768)
    ours = best(lambda: ift.fourier_mix(x))
    theirs = best(lambda: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real)
    print(f"Fourier layer: {theirs / ours:.2f}")


def test_randaugment_of_cfitr_against_torchvisions():
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    took = []
    for kind in (augment.torchvision_rand_augment, augment_cfitr.rand_augment):

        def images(kind=kind) -> None:
            rng = np.random.default_rng(1)
            for _ in range(200):
                kind(image, rng)

        took.append(best(images))
    print(f"RandAugment: {1000 * took[1] / 200:.2f} ms an image, {took[0] / took[1]:.1f}")
    assert took[1] < took[0]

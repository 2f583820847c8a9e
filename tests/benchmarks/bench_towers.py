"""What it costs a CPU to see many images at once: EfficientNet-Lite0 as `image_tokens` runs it, against one pass of the batch."""
from __future__ import annotations

import time

import pytest
import torch

from nbhelpers import backbones


def seconds(tower, pixels: torch.Tensor) -> float:
    """Of this thread, kernel included, for the whole batch; the best of three."""
    took = []
    for _ in range(3):
        began = time.thread_time()
        backbones.image_tokens(tower, pixels)
        took.append(time.thread_time() - began)
    return min(took)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_few_images_at_once_against_the_batch(monkeypatch, bf16):
    tower, pixels = backbones.vision_tower("efficientnet_lite0").eval(), torch.randn(128, 3, 224, 224)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            few = seconds(tower, pixels)
            monkeypatch.setattr(backbones, "FEW", len(pixels))
            batch = seconds(tower, pixels)
    finally:
        torch.set_num_threads(threads)
    print(f"{'bf16' if bf16 else 'fp32'}: {1000 * few / len(pixels):.0f} ms an image, in one batch {1000 * batch / len(pixels):.0f}, {few / batch:.2f} of it")
    assert few < batch

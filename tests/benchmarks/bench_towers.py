"""What it costs a CPU to see many images at once: EfficientNet-Lite0 as `image_tokens` runs it, against one pass of the batch."""
from __future__ import annotations

import pytest
import torch
from thread_seconds import best

from nbhelpers import backbones


@pytest.mark.parametrize("bf16", [False, True])
def test_a_few_images_at_once_against_the_batch(monkeypatch, one_thread, bf16):
    tower, pixels = backbones.vision_tower("efficientnet_lite0").eval(), torch.randn(128, 3, 224, 224)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        few = best(lambda: backbones.image_tokens(tower, pixels))
        monkeypatch.setattr(backbones, "FEW", len(pixels))
        batch = best(lambda: backbones.image_tokens(tower, pixels))
    print(f"{'bf16' if bf16 else 'fp32'}: {1000 * few / len(pixels):.0f} ms an image, in one batch {1000 * batch / len(pixels):.0f}, {few / batch:.2f} of it")
    assert few < batch

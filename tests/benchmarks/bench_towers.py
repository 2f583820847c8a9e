"""What it costs a CPU to see many images at once: EfficientNet-Lite0 as `image_tokens` runs it,
against one pass of the batch; and what memory costs that goes back to the system and comes anew,
which `make run` spares its notebooks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from thread_seconds import best

from nbhelpers.runs import batch
from nbhelpers.towers import backbones


@pytest.mark.parametrize("bf16", [False, True])
def test_a_few_images_at_once_against_the_batch(monkeypatch, one_thread, bf16):
    tower, pixels = (
        backbones.vision_tower("efficientnet_lite0").eval(),
        torch.randn(128, 3, 224, 224),
    )
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        few = best(lambda: backbones.image_tokens(tower, pixels))
        monkeypatch.setattr(backbones, "FEW", len(pixels))
        batch = best(lambda: backbones.image_tokens(tower, pixels))
    print(
        f"{'bf16' if bf16 else 'fp32'}: {1000 * few / len(pixels):.0f} ms an image, in one batch"
        f" {1000 * batch / len(pixels):.0f}, {few / batch:.2f} of it"
    )
    assert few < batch


@pytest.mark.parametrize("bf16", [False, True])
def test_memory_that_stays_against_memory_that_goes_back(bf16):
    code = (
        "import torch; from thread_seconds import best; from nbhelpers.towers import backbones;"
        " torch.set_num_threads(1)\ntower, pixels ="
        " backbones.vision_tower('efficientnet_lite0').eval(), torch.randn(128, 3, 224, 224)\nwith"
        f" torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled={bf16}):\n   "
        " print(best(lambda: backbones.image_tokens(tower, pixels)))"
    )
    kept, returned = (
        float(
            subprocess.run(
                [sys.executable, "-c", code],
                cwd=Path(__file__).parent,
                env=os.environ | added,
                capture_output=True,
                check=True,
            ).stdout
        )
        for added in (batch.KEEP_MEMORY, {})
    )
    print(
        f"{'bf16' if bf16 else 'fp32'}: {1000 * kept / 128:.0f} ms an image, with memory from the"
        f" system {1000 * returned / 128:.0f}, {kept / returned:.2f} of it"
    )
    assert kept < returned

"""What bf16 attention of a CPU costs in training: plain products, as the training loop takes them,
against the fused kernel.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from thread_seconds import best
from torch.nn.attention import SDPBackend, sdpa_kernel

# B, heads, N, D
SHAPES = {
    "smollm2": (32, 9, 34, 64),
    "minilm": (128, 12, 30, 32),
    "pir": (128, 8, 50, 64),
    "vilt": (64, 6, 80, 64),
}


def pass_of(shape: tuple[int, ...], kernel: SDPBackend) -> float:
    """Seconds of a pass forward and backward."""
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.ones(shape[0], 1, shape[2], shape[2], dtype=torch.bool)
    with sdpa_kernel(kernel):
        return best(
            lambda: torch.autograd.grad(
                F.scaled_dot_product_attention(q, k, v, mask).sum(), (q, k, v)
            )
        )


@pytest.mark.parametrize("name", SHAPES)
def test_plain_products_against_the_fused_kernel(name, one_thread):
    plain, fused = (
        pass_of(SHAPES[name], kernel) for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)
    )
    print(
        f"{name}: plain {1000 * plain:.0f} ms, fused {1000 * fused:.0f} ms, {plain / fused:.2f}"
        " of it"
    )
    assert plain < fused

"""What bf16 attention of a CPU costs in training: plain products, as the training loop takes them, against the fused kernel."""
from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = {"smollm2": (32, 9, 34, 64), "minilm": (128, 12, 30, 32), "pir": (128, 8, 50, 64), "vilt": (64, 6, 80, 64)}  # B, heads, N, D


def pass_of(shape: tuple[int, ...], kernel: SDPBackend) -> float:
    """Seconds of this thread's work, forward and backward, the best of three."""
    took = []
    for _ in range(3):
        q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        mask = torch.ones(shape[0], 1, shape[2], shape[2], dtype=torch.bool)
        began = time.thread_time()
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(q, k, v, mask).sum().backward()
        took.append(time.thread_time() - began)
    return min(took)


@pytest.mark.parametrize("name", SHAPES)
def test_plain_products_against_the_fused_kernel(name):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plain, fused = (pass_of(SHAPES[name], kernel) for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION))
    finally:
        torch.set_num_threads(threads)
    print(f"{name}: plain {1000 * plain:.0f} ms, fused {1000 * fused:.0f} ms, {plain / fused:.2f} of it")
    assert plain < fused

"""What a training step at paper size keeps in memory, counted on a CPU with random weights.

One graph of few pairs is counted and taken in proportion. A step needs the weights, a gradient and
two moments of each trained one (float32), and what the graph keeps. In micro-batches only the graph
of one micro-batch exists at a time. What kernels need for themselves is not counted.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kept_bytes import kept_bytes
from torch import nn

from nbhelpers.papers.bita import Aligner, BITAConfig, Captioner
from nbhelpers.papers.pe_rsitr import PERSITR, PERSITRConfig
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.towers import backbones
from nbhelpers.training.memory import recompute_blocks

PAIRS, MICRO = 2, 32
GB = 1e9


def opt(layers: int) -> nn.Module:
    """OPT-2.7B with fewer layers, in bf16."""
    model, config, settings = backbones.LANGUAGE["opt_2.7b"][0]
    return model._from_config(
        config(**settings | {"num_hidden_layers": layers}), dtype=torch.bfloat16
    )


# system -> model, batch size of the release, length of captions
SYSTEMS = {
    "PIR": (lambda: PIR(PIRConfig.paper()), 256, 47),
    "PIR-CLIP": (lambda: PIRCLIP(PIRCLIPConfig.paper()), 512, 77),
    "PE-RSITR": (lambda: PERSITR(PERSITRConfig.paper()), 16, 77),
    "BITA, stage 1": (lambda: Aligner(BITAConfig.paper()), 192, 32),
}


def batch(pairs: int, length: int) -> dict[str, torch.Tensor]:
    row = torch.arange(pairs)
    return {
        "pixels": torch.randn(pairs, 3, 224, 224),
        "image_index": row,
        "scene": row // 2,
        "row": row,
        "ids": torch.randint(5, 400, (pairs, length)),
        "mask": torch.ones(pairs, length, dtype=torch.long),
    }


def kept(model: nn.Module, length: int, half: bool) -> np.ndarray:
    """Bytes that the graph keeps for any batch (16-bit copies of weights), and for each pair."""

    def of(pairs: dict) -> int:
        def loss() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return model.loss(pairs)["loss"]

        return kept_bytes(model, loss)

    few, more = of(batch(PAIRS, length)), of(batch(2 * PAIRS, length))
    return np.array([2 * few - more, (more - few) / PAIRS])


def weights(model: nn.Module) -> float:
    """Bytes of weights, gradients and the optimiser's moments."""
    own = sum(p.numel() * p.itemsize for p in model.parameters())
    return own + sum(12 * p.numel() for p in model.parameters() if p.requires_grad)


def measured(model: nn.Module, length: int) -> list[np.ndarray]:
    """What the graph keeps: fp32 and bf16; the same with blocks computed twice."""
    plain = [kept(model.train(), length, half) for half in (False, True)]
    recompute_blocks(model)
    return plain + [kept(model, length, half) for half in (False, True)]


def table(name: str, fixed: float, size: int, found: list[np.ndarray], micro: bool) -> None:
    print(f"\n{name}, batch of {size}: {fixed / GB:.1f} GB of weights and optimiser")
    for pairs in [size, min(MICRO, size)] if micro else [size]:
        needed = [(fixed + any_batch + pairs * pair) / GB for any_batch, pair in found]
        print(
            f"  {pairs} pairs in a graph: {needed[0]:.1f} GB in fp32, {needed[1]:.1f} in bf16; "
            f"blocks computed twice {needed[2]:.1f} and {needed[3]:.1f}"
        )


@pytest.mark.parametrize("name", SYSTEMS)
def test_memory_of_a_step(name, one_thread):
    make, size, length = SYSTEMS[name]
    model = make()
    found = measured(model, length)
    table(name, weights(model), size, found, hasattr(model, "rows"))
    assert found[2][1] <= found[0][1]


def through_opt(layers: int) -> tuple[float, list[np.ndarray]]:
    """Weights of stage 2, and what its graph keeps, with a decoder of a few layers."""
    model = Captioner(BITAConfig.paper(), decoder=opt(layers))
    return weights(model), measured(model, 32)


def test_memory_of_a_step_through_opt(one_thread):
    """From decoders of one and two layers to the 32 of OPT-2.7B."""
    one, kept_by_one = through_opt(1)
    two, kept_by_two = through_opt(2)
    found = [b + 30 * (b - a) for a, b in zip(kept_by_one, kept_by_two, strict=True)]
    table("BITA, stages 2 and 3", two + 30 * (two - one), 192, found, micro=False)
    assert found[2][1] < found[0][1]

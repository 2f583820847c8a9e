"""Keep less for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nbhelpers.errors import UserError

# Classes of repeated blocks: of BERT, OPT, Swin, ViT, CLIP, MiniLM's BERT and BITA's transformer
BLOCKS = (
    "BertLayer",
    "OPTDecoderLayer",
    "SwinTransformerBlock",
    "ResidualAttentionBlock",
    "Block",
    "Layer",
    "LlamaDecoderLayer",
)


def recompute_blocks(model: nn.Module) -> int:
    """Let each transformer block of `model` keep its input only; return the number of blocks.

    The backward pass computes the rest once more, with the same draws of dropout, so the gradients
    stay. It works for frozen blocks too, through which gradients pass. UserError if the model has
    no such block. Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost",
    arXiv 1604.06174.
    """
    blocks = [part for part in model.modules() if type(part).__name__ in BLOCKS]
    if not blocks:
        raise UserError(
            f"{type(model).__name__} has no transformer blocks that can be computed again; set "
            "recompute to False."
        )
    for block in blocks:
        block.forward = partial(_recomputed, type(block).forward.__get__(block))
    return len(blocks)


def _recomputed(forward: Callable, *inputs, **options):
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)

"""Count what a computation keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def kept_bytes(model: nn.Module, compute: Callable[[], Tensor]) -> int:
    """Return the bytes that `compute` keeps for its backward pass, weights and buffers left out.

    compute  gives a scalar tensor with a graph, such as a loss
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, int] = {}
    alive = []  # a freed storage could give its address to another one

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive.append(compute())
    return sum(kept.values())

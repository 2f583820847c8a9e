"""Digests for keys of checkpoints and caches, from plain values, dataclasses and tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def key_digest(*parts: object) -> str:
    """Return the sha256 (hex) of JSON values and dataclasses.

    A dataclass counts with the name of its class and all its fields. If it has a method
    `decisive`, as TrainConfig has, the value of that method replaces the fields. TypeError for
    any other object.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: object) -> object:
    if not dataclasses.is_dataclass(value):
        raise TypeError(f"A key cannot hold a {type(value).__name__}.")
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return [type(value).__name__, value.decisive() if hasattr(value, "decisive") else fields]


def modules_digest(parts: Iterable[nn.Module]) -> str:
    """Return the sha256 (hex) of the layers of modules, their plain settings and tensors."""
    found = hashlib.sha256()
    for part in parts:
        for name, layer in part.named_modules():
            settings = {key: value for key, value in vars(layer).items() if _is_setting(key, value)}
            found.update(repr((name, type(layer).__name__, sorted(settings.items()))).encode())
        found.update(tensors_digest(part.state_dict()).encode())
    return found.hexdigest()


def tensors_digest(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) of tensors on any device: names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, value in state.items():
        found.update(repr((name, value.dtype, tuple(value.shape))).encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _is_setting(name: str, value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_setting(name, part) for part in value)
    return (
        name != "training"
        and not name.startswith("_")
        and isinstance(value, (bool, int, float, str))
    )

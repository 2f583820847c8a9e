"""Check a configuration that came with a file before a model is built from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from nbhelpers.errors import UserError, reason

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)

# The largest whole number of a field; no published model comes near it.
LARGEST = 2**15
LIMITS = {
    "vocab_size": 10**6,
    "decoder_vocab": 10**6,
    **dict.fromkeys(("cycle_num", "instru_num", "layers", "split", "tuned_stages"), 128),
}
DEEPEST = 1024  # layers of a tower
LONGEST_TEXT = 500  # characters of a field
BESIDE = 2**28  # bytes that a model may have more than four times the weights in its file


def config_of(kind: type[Config], system: str, fields: Any) -> Config:
    """Return the configuration, of the dataclass `kind`, that a checkpoint of `system` holds.

    UserError if it has other fields, or values of another type or out of any use.
    """
    lacking = f"The checkpoint does not say which {system} it is"
    if not isinstance(fields, Mapping):
        raise UserError(f"{lacking} (a {type(fields).__name__}, no fields); give another one.")
    if wrong := [_sentence(name, value) for name, value in fields.items() if _wild(name, value)]:
        raise UserError(f"The checkpoint of {system} was refused: {'; '.join(wrong)}.")
    try:
        config = kind(**fields)
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f"{lacking} ({reason(error)}); give another one.") from error
    for name, hint in get_type_hints(kind).items():
        if name in fields and not _is(hint, fields[name]):
            raise UserError(f"{lacking} ({_sentence(name, fields[name])}); give another one.")
    return config


def _is(hint: Any, value: Any) -> bool:
    """Whether a value is of the type that a field states."""
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _wild(name: str, value: Any) -> bool:
    """Whether a value is out of any use for a field of this name."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return not 0 <= value <= LIMITS.get(name, LARGEST)
    if isinstance(value, float):
        share = "dropout" in name or "smoothing" in name
        return not (math.isfinite(value) and 0 <= value < (1 if share else 1e6))
    return isinstance(value, str) and len(value) > LONGEST_TEXT


def _sentence(name: str, value: Any) -> str:
    return f"its {name} is {str(value)[:40]}"


def check_depth(config: Any, where: object) -> None:
    """Raise a UserError if a nested configuration names more layers than any model has."""
    if not isinstance(config, Mapping):
        return
    for name, value in config.items():
        check_depth(value, where)
        if "layers" in str(name) and isinstance(value, int) and value > DEEPEST:
            raise UserError(f"{where} asks for {str(value)[:40]} {name}; get it again.")


def built(make: Callable[[Config], Model], config: Config, state: Mapping[str, Tensor]) -> Model:
    """Return the model of a configuration, if the weights beside it are about as large.

    A small file could else ask for terabytes. Frozen parts do not count: their sizes belong to
    their names. UserError, and nothing is built, if the trained parts have more than four times the
    bytes of `state`.
    """
    with torch.device("meta"):
        shadow = make(config)
    described = sum(4 * p.numel() for p in shadow.parameters() if p.requires_grad)
    there = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    if described > 4 * there + BESIDE:
        raise UserError(
            f"The configuration in the file describes {described / 1e9:.1f} GB of weights, but the "
            f"file holds {there / 1e9:.1f} GB; do not use it."
        )
    return make(config)

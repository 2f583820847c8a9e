"""Describe a network of two encoders, and an unknown name of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from PIL import Image
from torch import Tensor, nn

from nbhelpers.errors import UserError

FORMS = "open_clip's NAME,TAG or NAME=FILE, a model folder, hf-hub:OWNER/NAME, or module:function"
Tokens = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Encoders:
    """A network of two encoders and what they are fed.

    module      the network, in eval mode
    pixels      an image -> (3,S,S) float32, resized and normalised
    tokens      N sentences -> {name: (N,L)}
    image_rows  pixels (N,3,S,S) -> (N,D)
    text_rows   tokens -> (N,D)
    settings    what decides pixels and tokens, as JSON values
    """

    module: nn.Module
    pixels: Callable[[Image.Image], Tensor]
    tokens: Callable[[list[str]], Tokens]
    image_rows: Callable[[Tensor], Tensor]
    text_rows: Callable[[Tokens], Tensor]
    settings: dict[str, Any]


def unknown(name: str, known: Sequence[str], how: str = FORMS) -> UserError:
    """Return the error for an unknown name, with the nearest known ones."""
    near = get_close_matches(name.partition(",")[0], known, 3, 0.5)
    nearest = f" Did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"There is no model '{name}'; write {how}.{nearest}")

"""Towers that are not trained: their features are computed once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, eq=False)
class FrozenTowers:
    """A model of frozen towers, and the folder that caches their features.

    views  of each training image that are cached: draws of the training transform; 0: the image
           under the test transform
    """

    model: Any
    cache: Path | None
    views: int = 0

    @classmethod
    def of(cls, model: Any, cache: Path | None, views: int = 0) -> FrozenTowers | None:
        """Return those of a model, or None if its configuration trains the towers."""
        return cls(model, cache, views) if model.config.freeze_towers else None

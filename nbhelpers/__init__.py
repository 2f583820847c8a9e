"""Five remote-sensing image-text systems, reproduced. The names here are what the notebooks call.

Importing the package loads neither torch nor transformers: each name loads its room when it is first used.
"""
from __future__ import annotations

from importlib import import_module

_ROOMS = {"start": "run", "open_dataset": "data.catalog", "load": "systems", "score_captions": "captioning"}


def __getattr__(name: str):
    if name in _ROOMS:
        return getattr(import_module(f"nbhelpers.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'nbhelpers' has no attribute '{name}'")

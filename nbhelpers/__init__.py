"""Five remote-sensing image-text systems, reproduced. The names here are what the notebooks call.

Importing the package loads neither torch nor transformers: each name loads its room when it is
first used.
"""

from __future__ import annotations

from importlib import import_module

_ROOMS = {
    "start": "runs.start",
    "open_dataset": "data.catalog",
    "load": "systems.trained_systems",
    "trained": "systems.trained_systems",
    "score_captions": "metrics.caption_scores",
}


def __getattr__(name: str):
    if name in _ROOMS:
        return getattr(import_module(f"nbhelpers.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'nbhelpers' has no attribute '{name}'")

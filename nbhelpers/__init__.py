"""Five remote-sensing image-text systems, reproduced. The names here are what the notebooks call."""
from __future__ import annotations

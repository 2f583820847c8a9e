"""Names of weight files, read without torch."""

from __future__ import annotations

FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # in this order of preference
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")

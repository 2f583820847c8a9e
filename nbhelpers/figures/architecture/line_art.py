"""A figure of few colours, written as a PNG with a palette: a third of the bytes."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from nbhelpers.figures import style

INK, PALE, LIGHT, HATCH = "#222222", "#EFEFEF", "#D6EAF8", "#C9C9C9"
# (two colours, steps between them), as the edges of letters and lines on a ground have
BLENDS = (
    (INK, "white", 8),
    (INK, style.ORANGE, 5),
    (INK, LIGHT, 5),
    (INK, PALE, 4),
    (style.BLUE, "white", 3),
    (HATCH, "white", 2),
    (style.GREY, "white", 2),
)


class LineArt(Figure):
    """A figure drawn in the colours of BLENDS alone."""

    def savefig(self, fname: Any, *, transparent: bool | None = None, **kwargs: Any) -> None:
        """Write a PNG with a palette; the arguments are those of matplotlib's `savefig`."""
        full = io.BytesIO()
        super().savefig(full, transparent=transparent, **(kwargs | {"format": "png"}))
        with Image.open(full) as image:
            few = image.convert("RGB").quantize(palette=_palette(), dither=Image.Dither.NONE)
            few.save(fname, format="PNG", optimize=True, dpi=image.info["dpi"])


@functools.cache
def _palette() -> Image.Image:
    colours = [np.linspace(to_rgb(ink), to_rgb(ground), steps + 1) for ink, ground, steps in BLENDS]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.rint(255 * np.concatenate(colours)).astype(np.uint8).tobytes())
    return palette

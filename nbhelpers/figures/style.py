"""The style of every plot, its file form, and the parts that several plots share.

Colours are those of Okabe and Ito (Color Universal Design, 2008), made for every common colour
blindness; right and wrong, kept and dropped also differ in line style. Fonts stay readable at half
size.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from nbhelpers.files import atomic_write

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F"
COLOURS = [BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, GREY]
DIRECTIONS = {"i2t": "image→text", "t2i": "text→image"}
METRICS = ["i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mR"]
DPI = 150
SIZE, SMALL = 13, 11
DASHES = ("-", "--", "-.", ":")
LINE = 0.19  # inches that a line of small text takes
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": SIZE,
    "axes.titlesize": SIZE,
    "axes.labelsize": SIZE,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "lines.linewidth": 2,
    "figure.facecolor": "white",
    "text.parse_math": False,
}


def styled(plot):
    """Draw a plot with STYLE and fix its layout, which would change a little when redrawn.

    The caller's own style is left alone.
    """

    @functools.wraps(plot)
    def draw(*args, **options) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = plot(*args, **options)
            figure.draw_without_rendering()
        figure.set_layout_engine("none")
        return figure

    return draw


def save(figure: Figure, path: Path | str) -> Path:
    """Write a PNG of 150 dpi and return its path; equal figures give equal bytes.

    Every colour is kept: those of a map are those of its bar.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return Path(path)


# share of the width and number of colours, from the best on
REDUCTIONS = (
    (1.0, 256), (1.0, 128), (0.8, 128), (0.65, 128), (0.65, 64), (0.5, 128), (0.5, 64), (0.45, 64),
    (0.4, 64), (0.35, 64), (0.3, 48), (0.25, 32), (0.2, 32),
)  # fmt: skip


def reduced(png: bytes, limit: int) -> bytes:
    """Return a PNG of at most `limit` bytes if that can be done, for the stored notebooks.

    It is as wide, and has as many colours, as fits; they are chosen for this picture. Equal
    pictures give equal bytes. A picture that is small enough comes back as it is.
    """
    smaller = png
    for smaller in reductions(png):
        if len(smaller) <= limit:
            break
    return smaller


def reductions(png: bytes) -> Iterator[bytes]:
    """Yield a PNG as it is, then with fewer and fewer pixels and colours."""
    yield png
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for share, colours in REDUCTIONS:
        size = round(image.width * share), round(image.height * share)
        smaller = image.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        smaller.quantize(colours, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        yield buffer.getvalue()


def keep(source: Path | str, target: Path | str, limit: int = 120_000) -> Path:
    """Copy a PNG to a place in the repository, reduced to at most `limit` bytes."""
    with atomic_write(target) as temporary:
        temporary.write_bytes(reduced(Path(source).read_bytes(), limit))
    print(target)
    return Path(target)


def wrap(text: str, inches: float, size: float = SMALL, lines: int = 3) -> str:
    """Break `text` to a width in inches at a font size, with an ellipsis after `lines` lines."""
    width = max(6, int(inches * 72 / (0.53 * size)))
    return "\n".join(textwrap.wrap(str(text), width, max_lines=lines, placeholder=" …"))


def new(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def widen_margins(figure: Figure, inches: float) -> None:
    """Keep more room on both sides: wide labels are a little larger in the file's dpi."""
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(w_pad=inches)


def draw_image(axes, image: np.ndarray, colour: str | None = None, dashed: bool = False) -> None:
    """Draw an image without ticks, in a coloured frame if a colour is given."""
    axes.imshow(image, interpolation="lanczos" if image.shape[0] > 64 else "nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=colour is not None, color=colour, linewidth=4)
        spine.set_linestyle((0, (2, 1)) if dashed else "-")


def bare(axes) -> None:
    """Remove the ticks, the grid and the frame."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def row_of_panels(figure: Figure, count: int, **options) -> np.ndarray:
    """Return `count` axes beside each other: (count,) array."""
    return figure.subplots(1, count, squeeze=False, **options).ravel()


def sheet(figure: Figure, rows: int, columns: int, used: int) -> np.ndarray:
    """Return the first `used` axes of a grid, row by row; the others are hidden."""
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[used:]:
        axes.set_visible(False)
    return grid[:used]


def named_rows(axes, names: Sequence[str]) -> None:
    """Name rows 0, 1, ... from top to bottom, without horizontal grid lines."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def legend_above(axes, columns: int) -> None:
    """Draw the legend above the axes."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, columnspacing=1.2
    )


def whiskers(axes, x: np.ndarray, part: pd.DataFrame, horizontal: bool = False) -> None:
    """Draw the intervals low..high about value, if the table has them."""
    if {"low", "high"} <= set(part):
        spread = np.abs(np.array([part.value - part.low, part.high - part.value], float))
        where, along = ((part.value, x), "xerr") if horizontal else ((x, part.value), "yerr")
        axes.errorbar(
            *where, **{along: spread}, fmt="none", ecolor="black", capsize=3, elinewidth=1.3
        )


def stacked_bars(axes, table, colours: Sequence[str], thickness: float, **look) -> None:
    """Draw a horizontal bar for each row of a table, the first on top.

    Each bar is stacked from the table's columns; the legend names them.
    """
    left, y = np.zeros(len(table)), np.arange(len(table))
    for (name, values), colour in zip(table.items(), colours, strict=False):
        axes.barh(y, values, thickness, left=left, color=colour, label=name, **look)
        left += values.to_numpy(float)
    named_rows(axes, [wrap(name, 2.4, lines=1) for name in table.index])


def line_count(texts: Sequence[str]) -> float:
    """Return how many lines a list of texts takes, with half a line between two texts."""
    return sum(text.count("\n") + 1.5 for text in texts)


def text_list(axes, texts: Sequence[str], colours: Sequence[str] | None = None) -> None:
    """Draw texts below each other, spread over the height by their numbers of lines."""
    axes.set_axis_off()
    step = 1 / max(line_count(texts), 8)
    top = 0.5 + 0.5 * step * line_count(texts)
    for row, text in enumerate(texts):
        axes.text(
            0,
            top,
            text,
            va="top",
            fontsize=SMALL,
            color=colours[row] if colours else "black",
            transform=axes.transAxes,
        )
        top -= step * line_count([text])

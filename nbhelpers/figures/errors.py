"""What systems get wrong: classes, hubs, general captions, plausible misses, the worst queries.

Also which differences between systems are real.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nbhelpers.figures.style import (
    BLUE,
    COLOURS,
    DASHES,
    GREEN,
    GREY,
    RED,
    draw_image,
    legend_above,
    new,
    row_of_panels,
    sheet,
    stacked_bars,
    styled,
    widen_margins,
    wrap,
)

MARKERS = "osD^vP*X"


@styled
def class_recalls(table: pd.DataFrame, label: str = "mR (%)") -> Figure:
    """Draw one row per scene class, one marker per system (column); a grey line spans them."""
    figure = new(8, 1.4 + 0.27 * len(table))
    axes, y = figure.subplots(), np.arange(len(table))
    axes.hlines(y, table.min(axis=1), table.max(axis=1), color="#BBBBBB", linewidth=1.5)
    for (name, values), colour, marker in zip(table.items(), COLOURS, MARKERS, strict=False):
        axes.plot(values, y, marker, color=colour, label=name, markersize=7)
    axes.set_yticks(y, [wrap(name, 2.2, lines=1) for name in table.index])
    axes.set(xlabel=label, ylim=(len(table) - 0.5, -0.5))
    axes.margins(x=0.03)
    legend_above(axes, 4)
    return figure


@styled
def confusion(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the percent of a class's queries (row) whose first item is of a class (column).

    panels  title -> square table of classes
    """
    size = max(len(table) for table in panels.values())
    figure = new(2.9 + 0.22 * size * len(panels), 2.5 + 0.22 * size)
    grid = row_of_panels(figure, len(panels), sharey=True)
    for axes, (title, table) in zip(grid, panels.items(), strict=True):
        drawn = axes.imshow(table, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(len(table)), table.columns, rotation=90, fontsize=9)
        axes.set_yticks(range(len(table)), table.index, fontsize=9)
        axes.set(title=title, xlabel="class found first")
        axes.grid(False)
    grid[0].set_ylabel("class asked for")
    figure.colorbar(drawn, ax=grid, label="% of the queries", shrink=0.7, pad=0.02)
    return figure


@styled
def hub_curves(panels: Mapping[str, Mapping[str, np.ndarray]], k: int = 10) -> Figure:
    """Draw how unequally items appear among the first k.

    panels  title -> curve -> appearances (G,) of G items; a curve named "chance" is grey
    Items are sorted from the most frequent to the rarest; 1 is the mean.
    """
    figure = new(5 * len(panels), 4)
    grid = row_of_panels(figure, len(panels))
    for axes, (title, curves) in zip(grid, panels.items(), strict=True):
        named = [name for name in curves if name != "chance"]
        for (name, counts), style in zip(curves.items(), cycle(DASHES), strict=False):
            colour = GREY if name == "chance" else COLOURS[named.index(name) % len(COLOURS)]
            place = 100 * (np.arange(len(counts)) + 0.5) / len(counts)
            axes.plot(place, np.sort(counts)[::-1] / counts.mean(), style, color=colour, label=name)
        axes.set(
            xlabel="items, the most frequent first (%)",
            ylabel=f"times among the first {k},\nas a multiple of the mean",
            ylim=(0, None),
        )
        axes.set_title(title, pad=42)
        legend_above(axes, 3)
    return figure


@styled
def generic_ranks(table: pd.DataFrame, counts: Sequence[int]) -> Figure:
    """Draw the median rank of the right image for captions that fit more and more images.

    table   one row per bin, one column per system
    counts  captions in each bin
    """
    figure = new(8, 4.2)
    axes, x = figure.subplots(), np.arange(len(table))
    for (name, values), colour, marker in zip(table.items(), COLOURS, MARKERS, strict=False):
        axes.plot(x, values, f"{marker}-", color=colour, label=name)
    axes.set_xticks(
        x, [f"{name}\n({count} captions)" for name, count in zip(table.index, counts, strict=True)]
    )
    axes.set(
        xlabel="images whose captions hold all telling words", ylabel="median place", ylim=(0, None)
    )
    axes.margins(x=0.06)
    legend_above(axes, 4)
    return figure


@styled
def first_place_bars(table: pd.DataFrame) -> Figure:
    """Draw what is ranked first, in percent of the queries, as stacked bars.

    table  one row per bar, one column per part; the first part is right
    """
    figure = new(10, 1.8 + 0.42 * len(table))
    axes = figure.subplots()
    shades = [
        GREEN,
        *matplotlib.colormaps["Blues_r"](np.linspace(0.15, 0.65, table.shape[1] - 2)),
        "#DDDDDD",
    ]
    stacked_bars(axes, table, shades, 0.72, edgecolor="white")
    axes.set(xlabel="% of the queries", xlim=(0, 100))
    legend_above(axes, 3)
    widen_margins(figure, 0.1)
    return figure


@styled
def paired_differences(table: pd.DataFrame, metric: str = "mR") -> Figure:
    """Draw differences of pairs with their intervals.

    table  one row per pair: difference, low, high and real; markers are hollow where not real
    """
    figure = new(8.5, 1.5 + 0.36 * len(table))
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    for real, colour, face, name in (
        (True, BLUE, BLUE, "real"),
        (False, GREY, "white", "cannot be told apart"),
    ):
        rows = np.flatnonzero(table.real.to_numpy() == real)
        part = table.iloc[rows]
        spread = np.array([part.difference - part.low, part.high - part.difference])
        axes.errorbar(
            part.difference,
            rows,
            xerr=spread,
            fmt="o",
            color=colour,
            markerfacecolor=face,
            markersize=8,
            capsize=4,
            linewidth=1.5,
            label=name,
        )
    axes.set_yticks(range(len(table)), [wrap(name, 3.4, lines=1) for name in table.index])
    axes.set(
        xlabel=f"difference in {metric} (points) with its 95 % interval",
        ylim=(len(table) - 0.5, -0.5),
    )
    legend_above(axes, 2)
    widen_margins(figure, 0.1)
    return figure


@styled
def miss_sheet(
    sentences: Sequence[str],
    own: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    notes: Sequence[str],
    columns: int = 5,
) -> Figure:
    """Draw queries that went wrong: the sentence, and below it two images and a note.

    The sentence's own image has a green frame, the one ranked first a dashed red frame.
    """
    rows = max(1, -(-len(sentences) // columns))
    figure = new(2.1 * columns, 1.75 * rows)
    grid = sheet(figure, rows, columns, len(sentences))
    for axes, sentence, right, wrong, note in zip(grid, sentences, own, found, notes, strict=True):
        draw_image(axes, right)
        axes.images[0].set_extent((0, 1, 0, 1))
        axes.imshow(
            wrong, extent=(1.06, 2.06, 0, 1), interpolation=axes.images[0].get_interpolation()
        )
        for start, colour, style in ((0, GREEN, "-"), (1.06, RED, (0, (2, 1)))):
            axes.add_patch(
                Rectangle(
                    (start, 0), 1, 1, fill=False, edgecolor=colour, linewidth=3, linestyle=style
                )
            )
        axes.set(xlim=(-0.02, 2.08), ylim=(-0.02, 1.02))
        axes.set_title(wrap(sentence.rstrip(" ."), 1.95, 8, 3), fontsize=8, pad=3)
        axes.set_xlabel(wrap(note, 1.95, 8, 1), fontsize=8, labelpad=2)
    return figure

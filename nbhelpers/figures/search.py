"""Search in two stages: ranked lists, hash codes, the trade-off, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nbhelpers.figures.style import (
    BLUE,
    COLOURS,
    DASHES,
    DIRECTIONS,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SIZE,
    SKY,
    SMALL,
    draw_image,
    legend_above,
    new,
    row_of_panels,
    styled,
    wrap,
)


@styled
def two_lists(
    query: str, lists: Mapping[str, tuple[Sequence[np.ndarray], Sequence[str], Sequence[bool]]]
) -> Figure:
    """Draw several rankings of images for one text, one row each.

    lists  name -> (images, a note for each, whether it is right); right images have a full green
           frame, others a dashed red one
    """
    columns = max(len(images) for images, _, _ in lists.values())
    figure = new(1.75 * columns, 0.6 + 2.05 * len(lists))
    figure.suptitle(wrap(f"“{query}”", 1.75 * columns, SIZE, 2), fontsize=SIZE)
    grid = figure.subplots(len(lists), columns, squeeze=False)
    for row, (name, (images, notes, right)) in zip(grid, lists.items(), strict=True):
        for place, (axes, image, note, hit) in enumerate(
            zip(row, images, notes, right, strict=False)
        ):
            draw_image(axes, image, GREEN if hit else RED, dashed=not hit)
            axes.set_title(f"{place + 1}.  {note} {'✓' if hit else '✗'}", fontsize=SMALL, pad=4)
        row[0].set_ylabel(wrap(name, 1.9), fontsize=SMALL)
    return figure


@styled
def code_distances(panels: Mapping[str, tuple[np.ndarray, np.ndarray]], bits: int) -> Figure:
    """Draw how many bits differ between the codes of an image and a text, as shares of pairs.

    panels  title -> (distances of pairs that belong together, distances of the others)
    """
    figure = new(5 * len(panels), 3.8)
    edges = np.linspace(0, bits, min(bits, 32) + 1) - 0.5
    grid = row_of_panels(figure, len(panels), sharey=True)
    for axes, (title, pairs) in zip(grid, panels.items(), strict=True):
        for values, name, colour, style in zip(
            pairs, ("true", "false"), (GREEN, RED), ("-", "--"), strict=True
        ):
            if not len(values):  # one image has no false pair
                continue
            share = 100 * np.histogram(values, edges)[0] / len(values)
            axes.stairs(
                share,
                edges,
                label=f"{name}: mean {np.mean(values):.1f}",
                color=colour,
                linestyle=style,
                linewidth=2,
            )
        axes.set(xlabel=f"bits that differ, of {bits}", ylabel="pairs (%)")
        axes.set_title(title, pad=24)
        legend_above(axes, 2)
    return figure


@styled
def tradeoff(
    points: pd.DataFrame, levels: Mapping[str, float], metric: str = "mR", chosen: int | None = None
) -> Figure:
    """Draw recall and the milliseconds of a query over the number of candidates.

    points  one row for each number of candidates: k, the recall in percent, i2t_total_ms and
            t2i_total_ms
    levels  name -> recall that has no number of candidates: the coarse stage alone, the exhaustive
            search
    chosen  a number of candidates, marked in both panels
    """
    figure = new(10, 4)
    left, right = figure.subplots(1, 2)
    if chosen is not None:
        for axes in (left, right):
            axes.axvline(chosen, color=SKY, linewidth=6, alpha=0.5, zorder=0)
        left.plot([], [], color=SKY, linewidth=6, alpha=0.5, label=f"K = {chosen}")
    left.plot(points.k, points[metric], "o-", label="two stages")
    for (name, level), colour, style in zip(
        levels.items(), [ORANGE, GREEN, GREY], DASHES[1:], strict=False
    ):
        left.axhline(level, color=colour, linestyle=style, label=name)
    left.margins(y=0.08)  # a level is no edge of the panel
    left.set(xlabel="candidates K", ylabel=f"{metric} (%)")
    for direction, style, colour in (("i2t", "o-", BLUE), ("t2i", "s--", RED)):
        right.plot(
            points.k,
            points[f"{direction}_total_ms"],
            style,
            color=colour,
            label=DIRECTIONS[direction],
        )
    right.set(xlabel="candidates K", ylabel="ms for one query", ylim=(0, None))
    legend_above(left, 2)
    legend_above(right, 2)
    return figure


@styled
def gallery_times(times: pd.DataFrame, measured: pd.DataFrame) -> Figure:
    """Draw milliseconds of a query over the size of the gallery, on logarithmic axes.

    times     a row for each size (its index), a column for each way to search
    measured  the same with booleans; a calculated time is hollow and dashed
    """
    figure = new(8, 4.4)
    axes = figure.subplots()
    for name, colour, marker in zip(times, COLOURS, "osD^vP*", strict=False):
        known = measured[name].to_numpy()
        axes.plot(times.index[known], times[name][known], f"{marker}-", color=colour, label=name)
        if not known.all():
            beyond = np.flatnonzero(~known)
            tail = times[name].iloc[max(beyond[0] - 1, 0) :]
            axes.plot(tail.index, tail, "--", color=colour, linewidth=1.3)
            axes.plot(
                times.index[~known],
                times[name][~known],
                marker,
                color=colour,
                markerfacecolor="white",
            )
    axes.set(xscale="log", yscale="log", xlabel="items in the gallery", ylabel="ms for one query")
    axes.set_xticks(times.index, [f"{size:,}" for size in times.index])
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure

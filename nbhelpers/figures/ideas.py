"""An idea with and without, on a world that is made for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nbhelpers.figures.style import (
    BLUE,
    GREY,
    ORANGE,
    SMALL,
    draw_image,
    named_rows,
    new,
    styled,
    widen_margins,
    wrap,
)

COLOURS = (GREY, BLUE, ORANGE)  # without, with, a further arm


@styled
def with_and_without(
    examples: Sequence[tuple[np.ndarray, str]],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    differences: Mapping[str, Mapping[str, float]],
) -> Figure:
    """Draw examples of a world, the mR of each arm, and the differences with their intervals.

    examples     images and captions
    scores       world -> arm -> mR of each seed: a dot a seed, and a line at their mean
    differences  world -> difference, low and high, in points: with less without
    """
    rows: list[tuple[str, str, Sequence[float]]] = []
    colours: dict[str, str] = {}
    for world, arms in scores.items():
        rows += [(world, arm, values) for arm, values in arms.items()]
        colours |= dict(zip(arms, COLOURS, strict=False))
    figure = new(10, 3.0 + 0.5 * len(rows))
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.2, 0.8 + 0.5 * len(rows)])
    above, below = parts
    for axes, (image, text) in zip(
        above.subplots(1, len(examples), squeeze=False).ravel(), examples, strict=True
    ):
        draw_image(axes, image)
        axes.set_xlabel(wrap(text, 9.6 / len(examples), lines=3), fontsize=SMALL)
    left, right = below.subplots(1, 2, width_ratios=[3, 2])
    for row, (_, arm, values) in enumerate(rows):
        left.plot(values, [row] * len(values), "o", color=colours[arm], alpha=0.7)
        left.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=colours[arm])
    several = len(scores) > 1
    names = [f"{arm} ({world})" if several else arm for world, arm, _ in rows]
    named_rows(left, [wrap(name, 2.7, lines=2) for name in names])
    left.set_xlabel("test mR (%), a dot a seed")
    for row, one in enumerate(differences.values()):
        real = one["low"] > 0 or one["high"] < 0
        spread = [[one["difference"] - one["low"]], [one["high"] - one["difference"]]]
        right.errorbar(
            one["difference"],
            row,
            xerr=spread,
            fmt="o",
            color=BLUE if real else GREY,
            markerfacecolor=BLUE if real else "white",
            markersize=8,
            capsize=4,
        )
    right.axvline(0, color="black", linewidth=1)
    named_rows(right, list(differences) if several else [""])
    right.tick_params(axis="y", length=0)
    right.set_xlabel("with less without (points),\n95 % interval")
    widen_margins(figure, 0.1)
    return figure

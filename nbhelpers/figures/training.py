"""Curves of training, and ablation steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nbhelpers.figures.style import (
    BLUE,
    DASHES,
    GREEN,
    GREY,
    RED,
    SMALL,
    legend_above,
    new,
    row_of_panels,
    styled,
    whiskers,
    wrap,
)


@styled
def loss_curves(
    history: pd.DataFrame,
    terms: Sequence[str] = ("loss",),
    validation: str = "val_mR",
    x: str = "epoch",
) -> Figure:
    """Draw loss terms over `x`, and beside them the validation score with its best.

    history  as training writes it: epoch, loss, loss terms, val_mR; without the validation column
             there is one panel
    """
    shown = validation in history and history[validation].notna().any()
    figure = new(10 if shown else 6.5, 4)
    panels = row_of_panels(figure, 2 if shown else 1)
    for term, style in zip(terms, cycle(DASHES), strict=False):
        # one point is no line
        panels[0].plot(
            history[x], history[term], style, marker="o" if len(history) == 1 else None, label=term
        )
    panels[0].set(xlabel=x, ylabel="training loss")
    _whole(panels[0])
    legend_above(panels[0], 3)
    if shown:
        scores = history[[x, validation]].dropna()
        best = scores.loc[scores[validation].idxmax()]
        panels[1].plot(scores[x], scores[validation], "o-", color=GREEN, markersize=5)
        panels[1].plot(
            best[x],
            best[validation],
            "*",
            color=RED,
            markersize=15,
            label=f"best: {best[validation]:.1f}",
        )
        panels[1].set(xlabel=x, ylabel=f"validation {validation.removeprefix('val_')} (%)")
        _whole(panels[1])
        legend_above(panels[1], 1)
    return figure


def _whole(axes: Axes, most: int | Literal["auto"] = "auto") -> None:
    """Use whole numbers on the x axis, also for one point, where matplotlib wants two ticks."""
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


@styled
def stage_curves(histories: Mapping[str, pd.DataFrame], validation: str = "val_CIDEr") -> Figure:
    """Draw the training loss of stages that follow each other, each on its own scale.

    The last panel has the validation score of the last stage.
    """
    shown = [(name, history, "loss", BLUE, "training loss") for name, history in histories.items()]
    name, last = list(histories.items())[-1]
    if validation in last:
        shown.append(
            (name, last, validation, GREEN, f"validation {validation.removeprefix('val_')} x 100")
        )
    figure = new(3.1 * len(shown), 3.4)
    panels = row_of_panels(figure, len(shown))
    for axes, (name, history, column, colour, label) in zip(panels, shown, strict=True):
        axes.plot(history.epoch, history[column], "o-", color=colour, markersize=5)
        axes.set(title=name, xlabel="epoch", ylabel=label)
        _whole(axes, 4)
    return figure


@styled
def ablation_bars(
    table: pd.DataFrame, metric: str = "mR", marks: Mapping[str, float] | None = None
) -> Figure:
    """Draw one bar per row; the first is the reference.

    table  variant, value and, where known, low and high
    marks  name -> value of what the bars are compared with, as dotted lines
    """
    figure = new(8, 1.3 + 0.55 * len(table))
    axes, y = figure.subplots(), np.arange(len(table))
    axes.barh(y, table.value, 0.65, color=[GREY] + [BLUE] * (len(table) - 1))
    whiskers(axes, y, table, horizontal=True)
    ends = table.high if "high" in table else table.value
    for row, (end, value) in enumerate(zip(ends, table.value, strict=True)):
        axes.annotate(
            f"{value:.1f}",
            (end, row),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
        )
    axes.axvline(table.value.iloc[0], color=GREY, linestyle="--", linewidth=1)
    for name, value in (marks or {}).items():
        axes.axvline(value, color=RED, linestyle=":", label=f"{name}: {value:.1f}")
    if marks:
        legend_above(axes, 1)
    axes.set_yticks(y, [wrap(name, 2.6, lines=2) for name in table.variant])
    axes.set(xlabel=f"{metric} (%)", xlim=(0, 1.12 * max(ends) or 1))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure

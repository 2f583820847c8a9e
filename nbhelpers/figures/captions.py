"""Scores of generated captions."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nbhelpers.figures.style import COLOURS, SMALL, new, row_of_panels, styled, whiskers, wrap


@styled
def score_bars(table: pd.DataFrame, line: str = "") -> Figure:
    """Draw caption scores times 100, one panel for each metric and one bar for each system.

    table  one row per system and metric: system, metric, value, and the ends low and high of its
           interval, all fractions
    line   the system that is drawn as a line with its interval as a band, such as the human one
    """
    systems = [name for name in dict.fromkeys(table.system) if name != line]
    metrics = list(dict.fromkeys(table.metric))
    figure = new(11, 1.7 + 0.42 * len(systems))
    panels = row_of_panels(figure, len(metrics), sharey=True)
    for axes, metric in zip(panels, metrics, strict=True):
        part = table[table.metric == metric].set_index("system")[["value", "low", "high"]] * 100
        bars, y = part.reindex(systems), np.arange(len(systems))
        axes.barh(y, bars.value, 0.65, color=[COLOURS[row % len(COLOURS)] for row in y])
        whiskers(axes, y, bars, horizontal=True)
        if line in part.index:
            axes.axvspan(part.low[line], part.high[line], color="#CCCCCC", linewidth=0, zorder=0)
            axes.axvline(part.value[line], color="black", linestyle="--", linewidth=1.5, label=line)
        axes.set_title(metric.replace("_", "-"))
        axes.set(xlim=(0, 1.08 * part.high.max() or 1), xlabel="x 100")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3, integer=True))
        axes.set_yticks(y, [wrap(name, 1.9, lines=2) for name in systems])
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    if line in set(table.system):
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right")
    return figure


@styled
def score_table(values: pd.DataFrame, label: str) -> Figure:
    """Draw numbers from 0 to 100 as a table, with darker cells for higher numbers."""
    figure = new(3.6 + 0.95 * values.shape[1], 1.1 + 0.42 * len(values))
    axes = figure.subplots()
    drawn = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values.to_numpy()):
        axes.text(
            column,
            row,
            f"{value:.0f}",
            ha="center",
            va="center",
            color="white" if value > 60 else "black",
            fontsize=SMALL,
        )
    axes.set_xticks(range(values.shape[1]), [name.replace("_", "-") for name in values])
    axes.set_yticks(range(len(values)), [wrap(name, 3.2, lines=1) for name in values.index])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes, label=label, pad=0.02)
    return figure

"""Small examples that a reader follows by hand: ties, ranking losses, one scored caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, cycle

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
    LINE,
    RED,
    SIZE,
    SMALL,
    bare,
    draw_image,
    line_count,
    new,
    row_of_panels,
    styled,
    text_list,
    wrap,
)

MARKERS = "osD^v<>P"


@styled
def tie_orders(above: int, tied: int, own: int, k: int) -> Figure:
    """Draw every order of `tied` items, `own` of them own, behind `above` better ones.

    One row for each order, the first `k` places left of a line, and a tick where one of them holds
    an own item.
    """
    orders = list(combinations(range(tied), own))
    figure = new(1.1 * (above + tied) + 2.6, 1.3 + 0.46 * len(orders))
    axes, hits = figure.subplots(), 0
    for row, places in enumerate(orders):
        for place in range(above + tied):
            name, colour = _item(place - above, places)
            axes.add_patch(Rectangle((place, row - 0.4), 0.92, 0.8, facecolor=colour, linewidth=0))
            axes.text(
                place + 0.46, row, name, ha="center", va="center", fontsize=SMALL, color="white"
            )
        hit = above + places[0] < k
        hits += hit
        mark, colour = ("✓ hit", GREEN) if hit else ("✗ miss", RED)
        axes.text(above + tied + 0.2, row, mark, va="center", color=colour, fontsize=SMALL)
    axes.axvline(k - 0.04, color="black", linestyle="--")
    axes.set(xlim=(-0.1, above + tied + 1.6), ylim=(len(orders) - 0.5, -0.5))
    bare(axes)
    axes.set_xticks(np.arange(above + tied) + 0.46, [f"{n + 1}." for n in range(above + tied)])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.set_title(
        f"{hits} of {len(orders)} orders: an own item among the first {k}",
        fontsize=SIZE,
        loc="left",
    )
    return figure


def _item(place: int, own: Sequence[int]) -> tuple[str, str]:
    """Name and colour of the item at a place of the tie; places before it are negative."""
    if place < 0:
        return "better", GREY
    return ("own", GREEN) if place in own else ("other", RED)


@styled
def ranking_terms(cosines: Mapping[str, np.ndarray], margin: float) -> Figure:
    """Draw the cosines (B,B) that each term of a ranking loss compares; equal numbers match.

    A dot marks the hardest wrong answer of a row, a triangle that of a column, where it comes
    closer to the right one than `margin`.
    """
    figure = new(4.1 * len(cosines) + 0.6, 4.7)
    panels = row_of_panels(figure, len(cosines))
    low = min(float(values.min()) for values in cosines.values())
    for axes, (name, values) in zip(panels, cosines.items(), strict=True):
        drawn = axes.imshow(values, cmap="viridis", vmin=low, vmax=1, interpolation="nearest")
        wrong = np.where(np.eye(len(values), dtype=bool), -np.inf, values)
        over_rows, over_columns = wrong.max(1), wrong.max(0)
        own = values.diagonal()
        rows, columns = margin + over_rows - own, margin + over_columns - own
        for item in range(len(values)):
            axes.add_patch(
                Rectangle((item - 0.46, item - 0.46), 0.92, 0.92, fill=False, color="white")
            )
        asking = np.flatnonzero(rows > 0)
        look = {"markeredgecolor": "white", "markersize": 9, "linestyle": "none"}
        at, label = wrong.argmax(1)[asking], "hardest wrong answer of a row"
        axes.plot(at - 0.14, asking, marker="o", color=RED, label=label, **look)
        asking = np.flatnonzero(columns > 0)
        at, label = wrong.argmax(0)[asking], "of a column, each within the margin"
        axes.plot(asking + 0.14, at, marker="^", color="black", label=label, **look)
        total = rows.clip(0).sum() + columns.clip(0).sum()
        axes.set_title(f"{name}: {total:.2f}", fontsize=SIZE)
        bare(axes)
    figure.colorbar(drawn, ax=panels.tolist(), label="cosine", pad=0.01)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@styled
def parameters_against_recall(table: pd.DataFrame, metric: str = "mR") -> Figure:
    """Draw recall over the number of trained parameters, one point per system, best named first.

    table  indexed by system: trainable, the metric, low and high (its interval) in percent; a row
           that trains nothing is a dashed line
    """
    figure = new(10, 4.4)
    axes = figure.subplots()
    looks = dict(zip(table.index, zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))
    for name, row in table.sort_values(metric, ascending=False, kind="stable").iterrows():
        colour, marker = looks[name]
        trained = f"{int(row.trainable):,} trained" if row.trainable else "nothing trained"
        label = f"{name}: {row[metric]:.1f}, {trained}"
        if row.trainable == 0:
            axes.axhspan(row.low, row.high, color=GREY, alpha=0.15, linewidth=0)
            axes.axhline(row[metric], color=GREY, linestyle="--", linewidth=1.5, label=label)
            continue
        axes.errorbar(
            row.trainable,
            row[metric],
            [[row[metric] - row.low], [row.high - row[metric]]],
            fmt=marker,
            markersize=10,
            markeredgecolor="white",
            capsize=4,
            linewidth=1.2,
            color=colour,
            label=label,
        )
    axes.set(xscale="log", xlabel="trained parameters", ylabel=f"{metric} (%)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.15)
    figure.legend(*_in_order(axes), loc="outside right center", labelspacing=1)
    return figure


def _in_order(axes) -> tuple[list, list]:
    """Handles and labels of a legend, highest value first, lines and points mixed."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda row: -_value(labels[row]))
    return [handles[row] for row in order], [labels[row] for row in order]


def _value(label: str) -> float:
    return float(label.rpartition(": ")[2].partition(",")[0])


@styled
def caption_scored(
    image: np.ndarray, caption: str, references: Sequence[str], scores: Mapping[str, float]
) -> Figure:
    """Draw an image, a caption with the references below it, and its scores times 100 as bars."""
    texts = [
        wrap(f"“{caption}”", 4.4, SMALL, 3),
        *(wrap(f"– {text}", 4.4, SMALL, 2) for text in references),
    ]
    figure = new(11, max(2.9, LINE * (line_count(texts) + 1)))
    left, middle, right = figure.subplots(1, 3, width_ratios=[2.6, 4.4, 3.4])
    draw_image(left, image)
    text_list(middle, texts, [BLUE, *("black" for _ in references)])
    names, values = list(scores), 100 * np.array(list(scores.values()))
    bars = right.barh(range(len(names)), values, 0.65, color=BLUE)
    right.bar_label(bars, fmt="%.0f", padding=3, fontsize=SMALL)
    right.set_yticks(range(len(names)), [name.replace("_", "-") for name in names])
    right.set(ylim=(len(names) - 0.5, -0.5), xticks=[], xlabel="score x 100")
    right.set_xlim(0, 1.18 * max(100, values.max()))
    right.grid(axis="y", visible=False)
    return figure


@styled
def broken_scores(curves: Mapping[str, pd.DataFrame], label: str) -> Figure:
    """Draw what is left of each score, in percent, as captions are broken step by step.

    curves  way of breaking -> one column per metric, one row per step (the index)
    label   of the steps
    """
    figure = new(3.7 * len(curves), 3.9)
    panels = row_of_panels(figure, len(curves), sharey=True)
    for axes, (way, table) in zip(panels, curves.items(), strict=True):
        styles = zip(cycle(COLOURS), cycle(DASHES), cycle(MARKERS), strict=False)
        for (name, values), (colour, dash, marker) in zip(table.items(), styles, strict=False):
            axes.plot(values, dash, color=colour, marker=marker, label=str(name).replace("_", "-"))
        axes.set_title(wrap(way, 3.4, SIZE, 2), fontsize=SIZE)
        axes.set(xlabel=label, ylim=(0, None))
        axes.locator_params(axis="x", integer=True)
    panels[0].set_ylabel("% of the unbroken score")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure

"""Retrieved images and texts, ranks and recalls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from nbhelpers.figures.style import (
    BLUE,
    COLOURS,
    DASHES,
    GREEN,
    GREY,
    LINE,
    METRICS,
    ORANGE,
    RED,
    SIZE,
    SMALL,
    bare,
    draw_image,
    legend_above,
    line_count,
    named_rows,
    new,
    row_of_panels,
    styled,
    text_list,
    whiskers,
    widen_margins,
    wrap,
)


@styled
def retrieved(
    query: str, images: Sequence[np.ndarray], scores: Sequence[float], right: Sequence[bool]
) -> Figure:
    """Draw the images ranked first for a text.

    Right ones have a full green frame, others a dashed red one.
    """
    columns = len(images)
    figure = new(max(1.75 * columns, 6), 2.7)
    figure.suptitle(wrap(f"“{query}”", max(1.75 * columns, 6), SIZE, 2), fontsize=SIZE)
    for rank, axes in enumerate(row_of_panels(figure, columns)):
        draw_image(axes, images[rank], GREEN if right[rank] else RED, dashed=not right[rank])
        mark = "✓" if right[rank] else "✗"
        axes.set_title(f"{rank + 1}.  {scores[rank]:.2f} {mark}", fontsize=SMALL, pad=4)
    return figure


@styled
def retrieved_texts(
    image: np.ndarray, captions: Sequence[str], scores: Sequence[float], right: Sequence[bool]
) -> Figure:
    """Draw an image and the captions ranked first for it; its own ones green and ticked."""
    texts = [
        wrap(f"{'✓' if hit else '✗'} {score:.2f}  {text}", 6.8, SMALL, 2)
        for text, score, hit in zip(captions, scores, right, strict=True)
    ]
    figure = new(10, max(2.9, LINE * line_count(texts)))
    left, beside = figure.subplots(1, 2, width_ratios=[2.8, 7.2])
    draw_image(left, image)
    text_list(beside, texts, [GREEN if hit else RED for hit in right])
    return figure


@styled
def shared_space(images: np.ndarray, texts: np.ndarray, kind: Sequence[str], owner) -> Figure:
    """Draw unit rows of images (N,D) and of their texts (M,D) in one plane, by t-SNE.

    kind   the scene class of each image;  owner  (M,) the image of each text
    The classes with most images are coloured, the others grey. Distances between far groups mean
    nothing in such a picture; who is neighbour to whom does.
    """
    from sklearn.manifold import TSNE

    rows = np.concatenate([images, texts])
    least = min(30, max(2, len(rows) // 4))
    plane = TSNE(metric="cosine", init="random", perplexity=least, random_state=0).fit_transform(
        rows
    )
    kinds = pd.Series(list(kind))
    figure = new(9, 5.5)
    axes = figure.subplots()
    shown = list(kinds.value_counts().index[: len(COLOURS) - 1])
    coloured = zip(shown, [each for each in COLOURS if each != GREY], strict=False)
    groups = [(kinds == name, colour, name) for name, colour in coloured]
    for own, colour, name in [*groups, (~kinds.isin(shown), "#CCCCCC", "other classes")]:
        x, y = plane[len(images) :][own.to_numpy()[owner]].T
        axes.scatter(x, y, s=12, color=colour, marker=".", zorder=2)
        x, y = plane[: len(images)][own.to_numpy()].T
        look = {"color": colour, "edgecolor": "black", "label": name, "zorder": 3}
        axes.scatter(x, y, s=70, marker="s", **look)
    bare(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="squares: images\ndots: captions")
    return figure


@styled
def similarity_matrix(similarity: np.ndarray, owner: np.ndarray | None = None) -> Figure:
    """Draw scores of N images (rows) and M texts (columns); frames mark the pairs."""
    rows, columns = similarity.shape
    figure = new(max(5.0, min(11.0, 1.8 + 5 * columns / rows)), 5)
    axes = figure.subplots()
    drawn = axes.imshow(similarity, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set(xlabel="text", ylabel="image")
    axes.locator_params(integer=True)
    axes.grid(False)
    figure.colorbar(drawn, ax=axes, label="similarity", pad=0.02)
    if owner is not None:
        width = min(2, 24 / rows)
        black = withStroke(linewidth=2 * width, foreground="black")  # white alone is lost on yellow
        for text, image in enumerate(owner):
            axes.add_patch(
                Rectangle(
                    (text - 0.46, image - 0.46),
                    0.92,
                    0.92,
                    fill=False,
                    edgecolor="white",
                    linewidth=width,
                    path_effects=[black],
                )
            )
    return figure


@styled
def recall_bars(table: pd.DataFrame) -> Figure:
    """Draw recalls of several systems side by side.

    table  one row per system and metric: system, metric (of METRICS), value, and where known low
           and high (the confidence interval, a whisker) and claimed (the published value, a
           diamond), all in percent
    """
    systems = list(dict.fromkeys(table.system))
    metrics = [metric for metric in METRICS if metric in set(table.metric)]
    figure = new(10, 4.6)
    axes, width = figure.subplots(), 0.8 / len(systems)
    for row, system in enumerate(systems):
        part = table[table.system == system].set_index("metric").reindex(metrics)
        x = np.arange(len(metrics)) + (row - (len(systems) - 1) / 2) * width
        axes.bar(x, part.value, width * 0.92, label=system, color=COLOURS[row % len(COLOURS)])
        whiskers(axes, x, part)
        if "claimed" in part and part.claimed.notna().any():
            axes.plot(
                x,
                part.claimed,
                "D",
                color="white",
                markeredgecolor="black",
                markersize=7,
                label="claimed by the paper" if row == 0 else None,
            )
    names = [
        metric.replace("i2t_", "image→text\n").replace("t2i_", "text→image\n") for metric in metrics
    ]
    axes.set_xticks(range(len(metrics)), names)
    axes.set_ylabel("%")
    axes.margins(x=0.02)
    axes.grid(axis="x", visible=False)
    legend_above(axes, 3)
    return figure


@styled
def recall_curve(hits: Mapping[str, np.ndarray], chance: np.ndarray | None = None) -> Figure:
    """Draw R@K over K for every curve: value k-1 is R@k in percent; chance is dotted."""
    figure = new(7.5, 4.4)
    axes = figure.subplots()
    for (name, curve), style in zip(hits.items(), cycle(DASHES), strict=False):
        marker = "o" if len(curve) == 1 else None  # one point is no line
        axes.plot(np.arange(1, len(curve) + 1), curve, style, marker=marker, label=name)
    if chance is not None:
        axes.plot(np.arange(1, len(chance) + 1), chance, ":", color=GREY, label="chance")
    axes.set(xlabel="K", ylabel="R@K (%)", ylim=(0, 102), xlim=(1, None))
    legend_above(axes, 3)
    return figure


@styled
def rank_histogram(ranks: Mapping[str, np.ndarray], bins: int = 20) -> Figure:
    """Draw how many queries find their first right item at which rank.

    The axis starts at 1, `ranks` start at 0.
    """
    figure = new(5 * len(ranks), 3.8)
    panels = row_of_panels(figure, len(ranks))
    for axes, (name, values), colour in zip(panels, ranks.items(), COLOURS, strict=False):
        values = np.asarray(values, float) + 1
        # ranks are whole
        edges = np.unique(np.geomspace(1, max(values.max(), 2) + 1, bins + 1).round())
        axes.hist(values, edges, color=colour, edgecolor="white")
        axes.axvline(np.median(values), color="black", linestyle="--", linewidth=1.5)
        axes.set(
            xscale="log",
            xlabel="rank of the first right item",
            ylabel="queries",
            title=f"{name}: median {np.median(values):.1f}",
        )
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.get_major_locator().set_params(integer=True)
    return figure


@styled
def bar_with_ceiling(
    values: Mapping[str, float],
    ceilings: Mapping[str, float],
    chance: Mapping[str, float] | None = None,
) -> Figure:
    """Draw measured recalls (bars), their ceilings (outlines) and chance (lines).

    A ceiling is the best recall that repeated captions allow.
    """
    names = list(values)
    figure = new(max(6.0, 1.3 * len(names)), 4.2)
    axes, x = figure.subplots(), np.arange(len(names))
    axes.bar(
        x,
        [ceilings[name] for name in names],
        0.7,
        color="#EEEEEE",
        edgecolor="black",
        linestyle="--",
        label="ceiling",
    )
    bars = axes.bar(x, list(values.values()), 0.7, color=BLUE, label="measured")
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=SMALL)
    if chance is not None:
        level = [chance[name] for name in names]
        axes.hlines(level, x - 0.35, x + 0.35, color=ORANGE, linewidth=3, label="chance")
    axes.set_xticks(x, [name.replace("_", "\n") for name in names])
    axes.set(ylabel="%", ylim=(0, 105))
    axes.grid(axis="x", visible=False)
    legend_above(axes, 3)
    return figure


@styled
def ranking(
    table: pd.DataFrame,
    levels: Mapping[str, float],
    claimed: Mapping[str, float] | None = None,
    metric: str = "mR",
) -> Figure:
    """Draw systems below each other, each a point with its interval and its group's letters.

    table    indexed by system, best first: value, low and high (its interval) in percent, group
    levels   at most three vertical lines, from low to high: chance, class only, the ceiling
    claimed  published values, hollow diamonds below the systems
    """
    claimed = claimed or {}
    names, y = [*table.index, *claimed], np.arange(len(table) + len(claimed))
    figure = new(9, 0.9 + 0.3 * len(names))
    axes = figure.subplots()
    axes.plot(table.value, y[: len(table)], "o", color=BLUE, markersize=7, label="measured")
    whiskers(axes, y[: len(table)], table, horizontal=True)
    if claimed:
        axes.plot(
            list(claimed.values()),
            y[len(table) :],
            "D",
            color="white",
            markeredgecolor="black",
            label="as published",
        )
    for (name, level), style in zip(levels.items(), (":", "-.", "--"), strict=False):
        axes.axvline(level, color=GREY, linestyle=style, label=f"{name} {level:.1f}")
    for height, group in zip(y, table.group, strict=False):
        axes.annotate(
            group,
            (1, height),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
        )
    named_rows(axes, names)
    axes.set(xlabel=f"{metric} (%)")
    legend_above(axes, 4)
    # labels on both sides, wider when saved than when laid out
    widen_margins(figure, 0.15)
    return figure

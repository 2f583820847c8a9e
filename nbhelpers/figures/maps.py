"""Maps over an image: beliefs, attention, effects of token mixing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nbhelpers.figures.style import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    SKY,
    SMALL,
    bare,
    draw_image,
    named_rows,
    new,
    row_of_panels,
    styled,
    whiskers,
    wrap,
)

FEW_TOKENS = 12  # up to these, a heat map has room for numbers


@styled
def belief_map(image: np.ndarray, belief: np.ndarray, kept: Sequence[int], grid: int = 7) -> Figure:
    """Draw the belief of a prior instruction in the tokens of an image (PIR, section 3.2).

    belief  (1 + grid*grid,) softmax weights: first the global token, then the local ones row by row
    kept    indices of the tokens that stay, into the same order
    From left to right: the image, the belief in its local tokens, that in the global token, and
    the kept tokens.
    """
    belief = np.maximum(np.asarray(belief, float), LEAST_BELIEF)
    local = belief[1:].reshape(grid, grid)
    shown = _belief_colours(belief)
    figure = new(11, 4.5)
    panels = figure.subplots(1, 4, width_ratios=[4, 4, 0.55, 4])
    box = (-0.5, grid - 0.5, grid - 0.5, -0.5)
    titles = ["image", "belief", f"kept tokens: {len(kept)} of {len(belief)}"]
    for axes, title in zip(panels[[0, 1, 3]], titles, strict=True):
        axes.imshow(image, extent=box, interpolation="lanczos")
        axes.set_title(title)
        bare(axes)
    heat = panels[1].imshow(
        local, extent=box, cmap="inferno", alpha=0.15 + 0.6 * shown(local).data, norm=shown
    )
    low, high = heat.get_clim()
    ticks = [10.0**power for power in (-4, -3, -2, -1) if low <= 10.0**power <= high]
    _scale_below(panels[1], heat, (0.05, -0.09, 0.9, 0.05), ticks, format=PLAIN)
    for index in range(grid * grid):
        _token(panels[3], index % grid, index // grid, index + 1 in set(kept))
    _global_token(
        panels[2], matplotlib.colormaps["inferno"](shown(belief[0])), belief[0], 0 in set(kept)
    )
    return figure


@styled
def sorted_beliefs(beliefs: np.ndarray, names: Sequence[str], k: int) -> Figure:
    """Draw the belief of each image's tokens, the most believed first, and the cut behind k.

    beliefs  (M,N), rows sum to one;  names  of the M images
    The colours are logarithmic. A white dot marks the rank of the global token, which is column 0.
    """
    beliefs = np.maximum(np.asarray(beliefs, float), LEAST_BELIEF)
    order = (-beliefs).argsort(axis=1, kind="stable")
    figure = new(10, 1.6 + 0.26 * len(beliefs))
    axes = figure.subplots()
    ranked = np.take_along_axis(beliefs, order, axis=1)
    heat = axes.imshow(ranked, cmap="inferno", norm=_belief_colours(beliefs), aspect="auto")
    rank_of_global = (order == 0).argmax(axis=1)
    axes.plot(rank_of_global, range(len(beliefs)), "o", color="white", mec="black", markersize=6)
    axes.axvline(k - 0.5, color=SKY, linewidth=3)
    axes.set(xlabel=f"tokens by belief; behind the line, after {k}, they are dropped")
    ticks = sorted({1, 10, 20, 30, k, beliefs.shape[1]})
    axes.set_xticks([tick - 1 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_yticks(range(len(names)), names)
    axes.grid(False)
    figure.colorbar(heat, ax=axes, label="belief", pad=0.02, format=PLAIN)
    return figure


PLAIN = FuncFormatter(lambda value, place: f"{value:g}")
LEAST_BELIEF = 1e-12  # smaller beliefs have the darkest colour


def _belief_colours(belief: np.ndarray) -> matplotlib.colors.LogNorm:
    """Colours from the largest belief down to a thousandth of an even share."""
    even = 1 / belief.shape[-1]
    return matplotlib.colors.LogNorm(even / 1000, max(belief.max(), 2 * even), clip=True)


def _scale_below(axes, heat, place: tuple[float, float, float, float], ticks, **options) -> None:
    """Draw the colour scale of a map below it; `place` is (left, bottom, width, height)."""
    below = axes.inset_axes(place)
    axes.figure.colorbar(heat, cax=below, orientation="horizontal", ticks=ticks, **options)
    below.minorticks_off()


def _token(axes, column: int, row: int, kept: bool) -> None:
    """Outline a kept token, or grey out a dropped one."""
    token = Rectangle((column - 0.46, row - 0.46), 0.92, 0.92)
    if kept:
        token.set(edgecolor=BLUE, linewidth=1.5, fill=False)
    else:
        token.set(facecolor="#EEEEEE", edgecolor="none", alpha=0.8)
    axes.add_patch(token)


def _global_token(axes, colour, value: float, kept: bool) -> None:
    axes.set(xlim=(-0.5, 0.5), ylim=(0.5, -0.5), aspect="equal")
    axes.set_axis_off()
    axes.add_patch(
        Rectangle(
            (-0.45, -0.45),
            0.9,
            0.9,
            facecolor=colour,
            edgecolor=BLUE if kept else GREY,
            linestyle="-" if kept else "--",
            linewidth=2,
        )
    )
    axes.set_title("global", fontsize=SMALL)
    axes.text(
        0,
        0.6,
        f"{value:.3f}\n{'kept' if kept else 'dropped'}",
        ha="center",
        va="top",
        fontsize=SMALL,
    )


@styled
def soft_belief_maps(image: np.ndarray, maps: Mapping[str, np.ndarray], grid: int = 7) -> Figure:
    """Draw the image, and beside it quantities of its tokens, each on its own scale (PIR-CLIP).

    maps  title -> (1 + grid*grid,), such as belief and weight: first the class token, whose value
          is in the title, then the local tokens row by row
    """
    figure = new(3.1 * (1 + len(maps)), 4)
    panels = figure.subplots(1, 1 + len(maps))
    box = (-0.5, grid - 0.5, grid - 0.5, -0.5)
    for axes, title in zip(panels, ["image", *maps], strict=True):
        axes.imshow(image, extent=box, interpolation="lanczos")
        axes.set_title(title)
        bare(axes)
    for axes, values in zip(panels[1:], maps.values(), strict=False):
        local = np.asarray(values, float)[1:].reshape(grid, grid)
        heat = axes.imshow(local, extent=box, cmap="inferno", alpha=0.75)
        _scale_below(axes, heat, (0.1, -0.09, 0.8, 0.05), MaxNLocator(3))
        axes.set_title(f"{axes.get_title()}\n(class token {values[0]:.2f})")
    return figure


@styled
def weights_by_belief(
    rows: Mapping[str, np.ndarray], image: np.ndarray | None = None, grid: int = 7
) -> Figure:
    """Draw quantities of tokens as a heat map, most believed token first (PIR-CLIP).

    rows   title -> (N,); the first row is the belief, by which the tokens are sorted. All rows
           share one scale. Token 0 is the class token, which is marked
    image  of 1 + grid*grid tokens: drawn at the left, with the most believed patches outlined and
           the last row as a map
    """
    values = np.stack([np.asarray(row, float) for row in rows.values()])
    order = np.argsort(-values[0], kind="stable")
    shown = matplotlib.colors.Normalize(0, values.max())
    if image is None:
        figure = new(8.5, 1.2 + 0.5 * len(rows))
        heat_axes = figure.subplots()
    else:
        figure = new(11.5, 3.2)
        left, middle, heat_axes = figure.subplots(1, 3, width_ratios=[2.3, 2.3, 6])
        _outlined_patches(left, image, order[:3], grid)
        _map_over(middle, image, values[-1][1:].reshape(grid, grid), shown)
        middle.set_title(list(rows)[-1])
    heat = heat_axes.imshow(values[:, order], cmap="inferno", norm=shown, aspect="auto")
    heat_axes.set_yticks(range(len(rows)), list(rows))
    _name_tokens(heat_axes, order)
    heat_axes.grid(False)
    heat_axes.spines[:].set_visible(False)
    if len(order) <= FEW_TOKENS:
        _write_values(heat_axes, values[:, order], values.max() / 2)
    figure.colorbar(heat, ax=heat_axes, pad=0.02, ticks=MaxNLocator(4))
    return figure


def _outlined_patches(axes, image: np.ndarray, best: np.ndarray, grid: int) -> None:
    """Draw an image and outline some tokens with their places; the class token has no patch."""
    axes.imshow(image, extent=(-0.5, grid - 0.5, grid - 0.5, -0.5), interpolation="lanczos")
    axes.set_title("most believed")
    for place, token in enumerate(best, 1):
        if token == 0:
            continue
        row, column = divmod(int(token) - 1, grid)
        corner = (column - 0.46, row - 0.46)
        for colour, width in (("black", 4), ("white", 2)):
            axes.add_patch(
                Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=colour, linewidth=width)
            )
        label = {"facecolor": "white", "edgecolor": "black", "pad": 1.5}
        axes.text(column, row, str(place), ha="center", va="center", fontsize=SMALL - 2, bbox=label)
    bare(axes)


def _map_over(axes, image: np.ndarray, values: np.ndarray, shown) -> None:
    """Draw a map (S, S) over a grey copy of an image."""
    box = (-0.5, len(values) - 0.5, len(values) - 0.5, -0.5)
    axes.imshow(image.mean(2), extent=box, cmap="gray", interpolation="lanczos")
    axes.imshow(values, extent=box, cmap="inferno", norm=shown, alpha=0.75)
    bare(axes)


def _name_tokens(axes, order: np.ndarray) -> None:
    """Label the columns of sorted tokens: by number if they are few, else by place."""
    if len(order) <= FEW_TOKENS:
        axes.set_xticks(range(len(order)), [f"token {token}" for token in order])
        axes.tick_params(length=0)
        return
    places = [1, *range(10, len(order) + 1, 10)]
    axes.set_xticks([place - 1 for place in places], [str(place) for place in places])
    axes.set_xlabel("place of the token, most believed first", fontsize=SMALL)
    own = int(np.flatnonzero(order == 0)[0])
    side = "left" if own < len(order) / 2 else "right"
    text = "▼ class token" if side == "left" else "class token ▼"
    axes.annotate(
        text,
        (own - 0.5 if side == "left" else own + 0.5, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha=side,
        fontsize=SMALL,
    )


def _write_values(axes, values: np.ndarray, dark: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > dark else "white"
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=SMALL, color=colour
        )


@styled
def pooled_tokens(
    image: np.ndarray, change: np.ndarray, patches: np.ndarray, words: np.ndarray
) -> Figure:
    """Draw what happens to tokens on their way to a code (CFITR).

    change   (S, S) how far LFEM moves each patch
    patches  (S, S) learned weights of the pooling over patches
    words    (L,) learned weights of the pooling over words
    """
    figure = new(11, 3.5)
    panels = figure.subplots(1, 4, width_ratios=[3, 3, 3, 4])
    limit = np.abs(patches).max()
    draw_image(panels[0], image)
    heats = [
        panels[1].imshow(change, cmap="inferno", vmin=0),
        panels[2].imshow(patches, cmap="RdBu_r", vmin=-limit, vmax=limit),
    ]
    for axes, heat in zip(panels[1:3], heats, strict=False):
        bare(axes)
        low, high = heat.get_clim()
        ticks = [low, (low + high) / 2, high]
        _scale_below(axes, heat, (0.2, -0.12, 0.6, 0.05), ticks, format="%.2g")
    for axes, title in zip(
        panels,
        ("image", "change by LFEM", "pooling weight: patch", "pooling weight: word"),
        strict=True,
    ):
        axes.set_title(title)
    panels[3].bar(np.arange(len(words)), words, color=BLUE)
    panels[3].set(xlabel="position in the caption")
    return figure


@styled
def mixing_maps(rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Draw arrays of tokens (down) by channels (across), each on its own symmetric scale.

    rows  name of a row -> its arrays (T, D), one for each of `titles`
    """
    figure = new(3.7 * len(titles), 2.75 * len(rows))
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for panels, (name, arrays) in zip(grid, rows.items(), strict=True):
        for axes, title, values in zip(panels, titles, arrays, strict=True):
            limit = max(float(np.abs(values).max()), 1e-9)
            drawn = axes.imshow(
                values,
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                aspect="auto",
                interpolation="nearest",
            )
            figure.colorbar(drawn, ax=axes, ticks=[-limit, 0, limit], format="{x:.3g}", pad=0.02)
            axes.set_title(title, fontsize=SMALL)
            axes.set_xlabel("channel", fontsize=SMALL)
            axes.grid(False)
        panels[0].set_ylabel(f"{name}\ntoken", fontsize=SMALL)
    return figure


@styled
def query_maps(image: np.ndarray, maps: np.ndarray) -> Figure:
    """Draw the attention of each query to the image in each layer.

    maps  (layers, queries, S, S) attention weights; every panel has its own scale, and its largest
          weight is in the title
    """
    layers, queries = maps.shape[:2]
    figure = new(1.35 * (queries + 1), 0.3 + 1.6 * layers)
    box = (-0.5, maps.shape[3] - 0.5, maps.shape[2] - 0.5, -0.5)
    for layer, row in enumerate(figure.subplots(layers, queries + 1, squeeze=False)):
        draw_image(row[0], image)
        row[0].set_ylabel(f"layer {layer + 1}", fontsize=SMALL)
        for query, axes in enumerate(row[1:]):
            axes.imshow(image, extent=box, interpolation="lanczos")
            axes.imshow(maps[layer, query], extent=box, cmap="inferno", alpha=0.75)
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
            above = f"query {query + 1}\n" if layer == 0 else ""
            axes.set_title(f"{above}{maps[layer, query].max():.2f}", fontsize=SMALL, pad=3)
    return figure


@styled
def map_rows(
    images: Sequence[np.ndarray],
    texts: Sequence[str],
    maps: Mapping[str, Sequence[np.ndarray]],
    masks: Sequence[np.ndarray] | None = None,
) -> Figure:
    """Draw one row per image: a text, the image, and a map (S, S) from each method.

    masks  (H, W) bool of each image, outlined in green on every panel
    Each panel has its own scale. Red supports the text, blue speaks against it; a map without
    negative values goes from white to red.
    """
    figure = new(2.2 + 1.75 * (1 + len(maps)), 0.4 + 1.85 * len(images))
    grid = figure.subplots(
        len(images), 2 + len(maps), squeeze=False, width_ratios=[1.2, 1, *(1 for _ in maps)]
    )
    for number, (row, image, text) in enumerate(zip(grid, images, texts, strict=True)):
        row[0].set_axis_off()
        row[0].text(
            0,
            0.5,
            wrap(text, 2.0, lines=7),
            va="center",
            fontsize=SMALL,
            transform=row[0].transAxes,
        )
        for axes, name in zip(row[1:], ["image", *maps], strict=False):
            if number == 0:
                axes.set_title(wrap(name, 1.6, lines=2), fontsize=SMALL)
            _over(axes, image, None if name == "image" else np.asarray(maps[name][number], float))
            if masks is not None:
                along = [(np.arange(count) + 0.5) / count for count in masks[number].shape]
                axes.contour(along[1], along[0], masks[number], [0.5], colors=GREEN, linewidths=1)
    return figure


def _over(axes, image: np.ndarray, values: np.ndarray | None) -> None:
    """Draw an image or, if there is a map, the map over a grey copy of it."""
    shown = image if values is None else image.mean(2).astype(np.uint8)
    axes.imshow(shown, extent=(0, 1, 1, 0), cmap="gray", interpolation="lanczos")
    bare(axes)
    if values is not None:
        limit = max(np.abs(values).max(), 1e-12)
        axes.imshow(
            values,
            extent=(0, 1, 1, 0),
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            alpha=0.6,
            interpolation="nearest",
        )


@styled
def class_maps(maps: Mapping[str, np.ndarray], columns: int = 8) -> Figure:
    """Draw a map (S, S) for each class, all on one scale."""
    rows = max(1, -(-len(maps) // columns))
    figure = new(1.5 * columns, 0.3 + 1.75 * rows)
    top = max(np.max(values) for values in maps.values())
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, (name, values) in zip(panels, maps.items(), strict=False):
        drawn = axes.imshow(values, cmap="inferno", vmin=0, vmax=top)
        axes.set_title(wrap(name, 1.3, 9, lines=2), fontsize=9)
    figure.colorbar(drawn, ax=panels, shrink=0.8, pad=0.01)
    return figure


@styled
def word_weights(tables: Sequence[pd.DataFrame]) -> Figure:
    """Draw the weight of each word of some sentences, darker for larger weights.

    tables  one for each sentence, with a column for each word
    """
    width = max(len(table.columns) for table in tables)
    figure = new(1.2 + 0.95 * width, sum(0.7 + 0.4 * len(table) for table in tables))
    heights = [1 + len(table) for table in tables]
    for axes, table in zip(
        figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights).ravel(),
        tables,
        strict=True,
    ):
        axes.imshow(table.to_numpy(float), cmap="Blues", vmin=0, aspect="auto")
        axes.set(xlim=(-0.5, width - 0.5), yticks=range(len(table)), yticklabels=table.index)
        axes.set_xticks(
            range(len(table.columns)),
            [wrap(word, 0.95, lines=1) for word in table.columns],
            fontsize=9,
        )
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        dark = 0.6 * table.to_numpy(float).max()
        for (y, x), value in np.ndenumerate(table.to_numpy(float)):
            axes.text(
                x,
                y,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if value > dark else "black",
            )
    return figure


@styled
def hiding_curves(panels: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Draw scores while patches are hidden (above) or shown (below) in the order of each map.

    panels  system -> method -> (2, steps+1) deletion and insertion; "random" is grey and dashed
    """
    figure = new(2.75 * len(panels), 5.6)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True)
    names = dict.fromkeys(chain.from_iterable(panels.values()))
    names.pop("random", None)
    look: dict[str, tuple] = dict(zip(names, zip(COLOURS, "osD^vP*", strict=False), strict=False))
    look["random"] = (GREY, None)
    for column, (title, curves) in zip(grid.T, panels.items(), strict=True):
        for axes, kind in zip(column, (0, 1), strict=True):
            for name, both in curves.items():
                colour, marker = look[name]
                axes.plot(
                    np.linspace(0, 100, len(both[kind])),
                    both[kind],
                    "--" if name == "random" else "-",
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=1.5,
                    label=name,
                )
            axes.locator_params(axis="y", nbins=4)
        column[0].set_title(title)
        column[1].set_xlabel("patches (%)")
    grid[0, 0].set_ylabel("score, hiding")
    grid[1, 0].set_ylabel("score, showing")
    handles: dict[str, Artist] = {}
    for axes in grid[0]:
        drawn, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles))
    return figure


@styled
def check_bars(tables: Mapping[str, pd.DataFrame], value: str, label: str) -> Figure:
    """Draw for each method a number with its interval, one panel for each system.

    A bar is filled where the number is above zero for certain.
    tables  rows are methods, with the columns `value`, low, high and verdict
    """
    figure = new(2.75 * len(tables) + 1, 1.3 + 0.34 * max(len(table) for table in tables.values()))
    names = list(dict.fromkeys(chain.from_iterable(table.index for table in tables.values())))
    grid = row_of_panels(figure, len(tables), sharey=True)
    for axes, (title, table) in zip(grid, tables.items(), strict=True):
        part = table.rename(columns={value: "value"})
        y = np.array([names.index(name) for name in part.index])
        sure = (part.verdict == "yes").to_numpy()
        axes.barh(y, part.value, 0.65, color=np.where(sure, BLUE, "white"), edgecolor=BLUE)
        whiskers(axes, y, part, horizontal=True)
        axes.axvline(0, color="black", linewidth=1)
        named_rows(axes, names)
        axes.set(title=title, xlabel=label)
        axes.locator_params(axis="x", nbins=3)
    return figure

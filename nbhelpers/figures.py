"""Every plot of the notebooks, in one style: functions of arrays and tables that return a matplotlib Figure.

Colours are those of Okabe and Ito (Color Universal Design, 2008), made for every common colour blindness;
right and wrong, kept and dropped also differ in line style. Fonts stay readable at half size.
Images are (H,W,3) uint8 throughout.
"""
from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from nbhelpers.errors import atomic_write

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F"
COLOURS = [BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, GREY]
DIRECTIONS = {"i2t": "image→text", "t2i": "text→image"}
METRICS = ["i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mR"]
DPI, LIMIT = 150, 300_000
SIZE, SMALL = 13, 11
LINE = 0.19  # inches that a line of small text takes
STYLE = {
    "font.family": "DejaVu Sans", "font.size": SIZE, "axes.titlesize": SIZE, "axes.labelsize": SIZE,
    "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "legend.frameon": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#DDDDDD", "lines.linewidth": 2,
    "figure.facecolor": "white", "text.parse_math": False,
}


def _styled(plot):
    """Draws with STYLE, the caller's own left alone, and fixes the layout, which creeps when redrawn."""
    @functools.wraps(plot)
    def draw(*args, **options) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = plot(*args, **options)
            figure.draw_without_rendering()
        figure.set_layout_engine("none")
        return figure
    return draw


def save(figure: Figure, path: Path | str) -> Path:
    """Writes a PNG, equal bytes for equal figures, at 150 dpi; where that exceeds 300 kB, as photographs do,
    it is reduced to 256 colours and then to fewer dpi until the file is small enough."""
    dpi, content = DPI, _png(figure, DPI)
    if len(content) >= LIMIT:
        content = _fewer_colours(content)
    while len(content) >= LIMIT:
        dpi = int(0.95 * dpi * (LIMIT / len(content)) ** 0.5)
        content = _fewer_colours(_png(figure, dpi))
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _fewer_colours(png: bytes) -> bytes:
    image, buffer = Image.open(io.BytesIO(png)), io.BytesIO()
    image.convert("RGB").quantize(256).save(buffer, format="PNG", optimize=True, dpi=image.info["dpi"])
    return buffer.getvalue()


def _wrap(text: str, inches: float, size: float = SMALL, lines: int = 3) -> str:
    """Breaks `text` to the width of `inches` at a font size; an ellipsis stands for what exceeds `lines`."""
    width = max(6, int(inches * 72 / (0.53 * size)))
    return "\n".join(textwrap.wrap(str(text), width, max_lines=lines, placeholder=" …"))


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _picture(axes, image: np.ndarray, colour: str | None = None, dashed: bool = False) -> None:
    """The image without ticks, in a coloured frame where a colour is given."""
    axes.imshow(image, interpolation="lanczos" if image.shape[0] > 64 else "nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=colour is not None, color=colour, linewidth=4)
        spine.set_linestyle((0, (2, 1)) if dashed else "-")


def _legend_above(axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, columnspacing=1.2)


# pictures and captions --------------------------------------------------------------------------------------

@_styled
def contact_sheet(images: Sequence[np.ndarray], titles: Sequence[str] = (), columns: int = 6) -> Figure:
    """Images in rows of `columns`, each under its title."""
    rows = -(-len(images) // columns)
    figure = _figure(1.6 * columns, (1.85 if len(titles) else 1.65) * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, image in zip(grid, images):
        _picture(axes, image)
    for axes, title in zip(grid, titles):
        axes.set_title(_wrap(title, 1.5, lines=1), fontsize=SMALL, pad=3)
    for axes in grid[len(images):]:
        axes.set_visible(False)
    return figure


@_styled
def parts_told(image: np.ndarray, masks: Sequence[np.ndarray], words: Sequence[str]) -> Figure:
    """The image, and for each mask (H, W) bool the image outlined there and pale elsewhere, under its words."""
    columns = min(4, 1 + len(masks))
    rows = -(-(1 + len(masks)) // columns)
    figure = _figure(2.6 * columns, 3.05 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    pale = 190 + image.mean(axis=2, keepdims=True).astype(np.uint8) // 5
    shown = [image, *(np.where(mask[..., None], image, pale) for mask in masks)]
    for axes, picture, text in zip(grid, shown, ["the image", *words]):
        _picture(axes, picture)
        axes.set_title(_wrap(text, 2.4, lines=2), fontsize=SMALL, pad=3)
    for axes, mask in zip(grid[1:], masks):
        axes.contour(np.asarray(mask, float), [0.5], colors=RED, linewidths=1.5)
    for axes in grid[len(shown):]:
        axes.set_visible(False)
    return figure


@_styled
def captions_beside_images(images: Sequence[np.ndarray], captions: Sequence[Sequence[str]]) -> Figure:
    """One row per image: the image, and right of it its captions."""
    wrapped = [[_wrap(text, 7.4, SMALL, 2) for text in texts] for texts in captions]
    figure = _figure(10, len(images) * max(2.3, *(LINE * _lines(texts) for texts in wrapped)))
    grid = figure.subplots(len(images), 2, squeeze=False, width_ratios=[2.2, 7.8])
    for (left, right), image, texts in zip(grid, images, wrapped):
        _picture(left, image)
        _text_list(right, texts)
    return figure


def _lines(texts: Sequence[str]) -> float:
    """Lines that a list of texts takes, with half a line between two texts."""
    return sum(text.count("\n") + 1.5 for text in texts)


def _text_list(axes, texts: Sequence[str], colours: Sequence[str] | None = None) -> None:
    """Texts below each other, spread over the height by their numbers of lines."""
    axes.set_axis_off()
    step = 1 / max(_lines(texts), 8)
    top = 0.5 + 0.5 * step * _lines(texts)
    for row, text in enumerate(texts):
        axes.text(0, top, text, va="top", fontsize=SMALL, color=colours[row] if colours else "black",
                  transform=axes.transAxes)
        top -= step * _lines([text])


@_styled
def retrieved(query: str, images: Sequence[np.ndarray], scores: Sequence[float],
              right: Sequence[bool]) -> Figure:
    """The images ranked first for a text: right ones in a full green frame, others in a dashed red one."""
    columns = len(images)
    figure = _figure(max(1.75 * columns, 6), 2.7)
    figure.suptitle(_wrap(f"“{query}”", max(1.75 * columns, 6), SIZE, 2), fontsize=SIZE)
    for rank, axes in enumerate(figure.subplots(1, columns, squeeze=False).ravel()):
        _picture(axes, images[rank], GREEN if right[rank] else RED, dashed=not right[rank])
        mark = "✓" if right[rank] else "✗"
        axes.set_title(f"{rank + 1}.  {scores[rank]:.2f} {mark}", fontsize=SMALL, pad=4)
    return figure


@_styled
def retrieved_texts(image: np.ndarray, captions: Sequence[str], scores: Sequence[float],
                    right: Sequence[bool]) -> Figure:
    """An image and the captions ranked first for it; its own ones green and ticked."""
    texts = [_wrap(f"{'✓' if hit else '✗'} {score:.2f}  {text}", 6.8, SMALL, 2)
             for text, score, hit in zip(captions, scores, right)]
    figure = _figure(10, max(2.9, LINE * _lines(texts)))
    left, beside = figure.subplots(1, 2, width_ratios=[2.8, 7.2])
    _picture(left, image)
    _text_list(beside, texts, [GREEN if hit else RED for hit in right])
    return figure


# training ---------------------------------------------------------------------------------------------------

@_styled
def loss_curves(history: pd.DataFrame, terms: Sequence[str] = ("loss",), validation: str = "val_mR",
                x: str = "epoch") -> Figure:
    """Loss terms over `x` and, where the column exists, beside them the validation figure with its best.

    history  as training writes it: epoch, loss, loss terms, val_mR
    """
    shown = validation in history and history[validation].notna().any()
    figure = _figure(10 if shown else 6.5, 4)
    panels = figure.subplots(1, 2 if shown else 1, squeeze=False).ravel()
    for term, style in zip(terms, ["-", "--", "-.", ":"] * len(terms)):
        panels[0].plot(history[x], history[term], style, label=term)
    panels[0].set(xlabel=x, ylabel="training loss")
    panels[0].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    _legend_above(panels[0], 3)
    if shown:
        scores = history[[x, validation]].dropna()
        best = scores.loc[scores[validation].idxmax()]
        panels[1].plot(scores[x], scores[validation], "o-", color=GREEN, markersize=5)
        panels[1].plot(best[x], best[validation], "*", color=RED, markersize=15,
                       label=f"best: {best[validation]:.1f}")
        panels[1].set(xlabel=x, ylabel=f"validation {validation.removeprefix('val_')} (%)")
        panels[1].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        _legend_above(panels[1], 1)
    return figure


# BITA: mixing, reading, three stages ----------------------------------------------------------------------------

@_styled
def mixing_maps(rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Arrays of tokens (down) by channels (across), each on its own symmetric scale.

    rows  what is shown in a row -> its arrays (T,D), one for each of `titles`
    """
    figure = _figure(3.7 * len(titles), 2.75 * len(rows))
    for panels, (name, arrays) in zip(figure.subplots(len(rows), len(titles), squeeze=False), rows.items()):
        for axes, title, values in zip(panels, titles, arrays):
            limit = max(float(np.abs(values).max()), 1e-9)
            drawn = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            figure.colorbar(drawn, ax=axes, ticks=[-limit, 0, limit], format="{x:.3g}", pad=0.02)
            axes.set_title(title, fontsize=SMALL)
            axes.set_xlabel("channel", fontsize=SMALL)
            axes.grid(False)
        panels[0].set_ylabel(f"{name}\ntoken", fontsize=SMALL)
    return figure


@_styled
def query_maps(image: np.ndarray, maps: np.ndarray) -> Figure:
    """What each query reads of an image in each layer.

    maps  (layers, queries, S, S) attention weights; every panel has its own scale, and its largest weight stands above
    """
    layers, queries = maps.shape[:2]
    figure = _figure(1.35 * (queries + 1), 0.3 + 1.6 * layers)
    box = (-0.5, maps.shape[3] - 0.5, maps.shape[2] - 0.5, -0.5)
    for layer, row in enumerate(figure.subplots(layers, queries + 1, squeeze=False)):
        _picture(row[0], image)
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


@_styled
def stage_curves(histories: Mapping[str, pd.DataFrame], validation: str = "val_CIDEr") -> Figure:
    """The training loss of stages that follow each other, each on its own scale, and the validation figure of the last."""
    shown = [(name, history, "loss", BLUE, "training loss") for name, history in histories.items()]
    name, last = list(histories.items())[-1]
    if validation in last:
        shown.append((name, last, validation, GREEN, f"validation {validation.removeprefix('val_')} x 100"))
    figure = _figure(3.1 * len(shown), 3.4)
    for axes, (name, history, column, colour, label) in zip(figure.subplots(1, len(shown), squeeze=False).ravel(), shown):
        axes.plot(history.epoch, history[column], "o-", color=colour, markersize=5)
        axes.set(title=name, xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
    return figure


# PIR: belief ------------------------------------------------------------------------------------------------

@_styled
def belief_map(image: np.ndarray, belief: np.ndarray, kept: Sequence[int], grid: int = 7) -> Figure:
    """Belief of a prior instruction in the tokens of an image (PIR, section 3.2).

    belief  (1 + grid*grid,) softmax weights: first the global token, then the local ones row by row
    kept    indices of the tokens that stay, into the same order
    From left to right: the image, the belief over its local tokens, that in the global token, what is kept.
    """
    belief, local = np.asarray(belief, float), np.asarray(belief, float)[1:].reshape(grid, grid)
    shown = matplotlib.colors.Normalize(0, belief.max())
    figure = _figure(11, 4.5)
    panels = figure.subplots(1, 4, width_ratios=[4, 4, 0.55, 4])
    box = (-0.5, grid - 0.5, grid - 0.5, -0.5)
    titles = ["image", "belief", f"kept tokens: {len(kept)} of {len(belief)}"]
    for axes, title in zip(panels[[0, 1, 3]], titles):
        axes.imshow(image, extent=box, interpolation="lanczos")
        axes.set(title=title, xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    heat = panels[1].imshow(local, extent=box, cmap="inferno", alpha=0.35 + 0.4 * shown(local), norm=shown)
    figure.colorbar(heat, cax=panels[1].inset_axes((0.05, -0.09, 0.9, 0.05)), orientation="horizontal",
                    ticks=matplotlib.ticker.MaxNLocator(3))
    for index in range(grid * grid):
        _token(panels[3], index % grid, index // grid, index + 1 in set(kept))
    _global_token(panels[2], matplotlib.colormaps["inferno"](shown(belief[0])), belief[0], 0 in set(kept))
    return figure


def _token(axes, column: int, row: int, kept: bool) -> None:
    """A kept token outlined, a dropped one greyed out."""
    outlined = {"edgecolor": BLUE, "linewidth": 1.5, "fill": False}
    grey = {"facecolor": "#EEEEEE", "edgecolor": "none", "alpha": 0.8}
    axes.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, **(outlined if kept else grey)))


def _global_token(axes, colour, value: float, kept: bool) -> None:
    axes.set(xlim=(-0.5, 0.5), ylim=(0.5, -0.5), aspect="equal")
    axes.set_axis_off()
    axes.add_patch(Rectangle((-0.45, -0.45), 0.9, 0.9, facecolor=colour, edgecolor=BLUE if kept else GREY,
                             linestyle="-" if kept else "--", linewidth=2))
    axes.set_title("global", fontsize=SMALL)
    axes.text(0, 0.6, f"{value:.3f}\n{'kept' if kept else 'dropped'}", ha="center", va="top", fontsize=SMALL)


@_styled
def soft_belief_maps(image: np.ndarray, maps: Mapping[str, np.ndarray], grid: int = 7) -> Figure:
    """The image, and beside it quantities of its tokens, such as belief and weight (PIR-CLIP), each on its own scale.

    maps  title -> (1 + grid*grid,): first the class token, whose value stands above, then the local ones row by row
    """
    figure = _figure(3.1 * (1 + len(maps)), 4)
    panels = figure.subplots(1, 1 + len(maps))
    box = (-0.5, grid - 0.5, grid - 0.5, -0.5)
    for axes, title in zip(panels, ["image", *maps]):
        axes.imshow(image, extent=box, interpolation="lanczos")
        axes.set(title=title, xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    for axes, values in zip(panels[1:], maps.values()):
        local = np.asarray(values, float)[1:].reshape(grid, grid)
        heat = axes.imshow(local, extent=box, cmap="inferno", alpha=0.75)
        figure.colorbar(heat, cax=axes.inset_axes((0.1, -0.09, 0.8, 0.05)), orientation="horizontal",
                        ticks=matplotlib.ticker.MaxNLocator(3))
        axes.set_title(f"{axes.get_title()}\n(class token {values[0]:.2f})")
    return figure


# CFITR: codes and two stages --------------------------------------------------------------------------------

@_styled
def code_distances(panels: Mapping[str, tuple[np.ndarray, np.ndarray]], bits: int) -> Figure:
    """Bits that differ between the codes of an image and a text, as shares of the pairs.

    panels  title -> (distances of pairs that belong together, distances of the others)
    """
    figure = _figure(5 * len(panels), 3.8)
    edges = np.linspace(0, bits, min(bits, 32) + 1) - 0.5
    for axes, (title, pairs) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True).ravel(), panels.items()):
        for values, name, colour, style in zip(pairs, ("true", "false"), (GREEN, RED), ("-", "--")):
            share = 100 * np.histogram(values, edges)[0] / len(values)
            axes.stairs(share, edges, label=f"{name}: mean {np.mean(values):.1f}", color=colour, linestyle=style, linewidth=2)
        axes.set(xlabel=f"bits that differ, of {bits}", ylabel="pairs (%)")
        axes.set_title(title, pad=24)
        _legend_above(axes, 2)
    return figure


@_styled
def pooled_tokens(image: np.ndarray, change: np.ndarray, patches: np.ndarray, words: np.ndarray) -> Figure:
    """What happens to tokens on their way to a code (CFITR).

    change   (S,S) how far LFEM moves each patch;  patches (S,S), words (L,) the learned weights of the poolings
    """
    figure = _figure(11, 3.5)
    panels = figure.subplots(1, 4, width_ratios=[3, 3, 3, 4])
    limit = np.abs(patches).max()
    _picture(panels[0], image)
    heats = [panels[1].imshow(change, cmap="inferno", vmin=0), panels[2].imshow(patches, cmap="RdBu_r", vmin=-limit, vmax=limit)]
    for axes, heat in zip(panels[1:3], heats):
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        figure.colorbar(heat, cax=axes.inset_axes((0.2, -0.12, 0.6, 0.05)), orientation="horizontal",
                        ticks=matplotlib.ticker.MaxNLocator(3))
    for axes, title in zip(panels, ("image", "change by LFEM", "pooling weight: patch", "pooling weight: word")):
        axes.set_title(title)
    panels[3].bar(np.arange(len(words)), words, color=BLUE)
    panels[3].set(xlabel="position in the caption")
    return figure


@_styled
def two_lists(query: str, lists: Mapping[str, tuple[Sequence[np.ndarray], Sequence[str], Sequence[bool]]]) -> Figure:
    """Several rankings of images for one text, one row each: name -> (images, a note under each, whether it is right); right
    ones in a full green frame, others in a dashed red one."""
    columns = max(len(images) for images, _, _ in lists.values())
    figure = _figure(1.75 * columns, 0.6 + 2.05 * len(lists))
    figure.suptitle(_wrap(f"“{query}”", 1.75 * columns, SIZE, 2), fontsize=SIZE)
    for row, (name, (images, notes, right)) in zip(figure.subplots(len(lists), columns, squeeze=False), lists.items()):
        for place, (axes, image, note, hit) in enumerate(zip(row, images, notes, right)):
            _picture(axes, image, GREEN if hit else RED, dashed=not hit)
            axes.set_title(f"{place + 1}.  {note} {'✓' if hit else '✗'}", fontsize=SMALL, pad=4)
        row[0].set_ylabel(_wrap(name, 1.9), fontsize=SMALL)
    return figure


@_styled
def tradeoff(points: pd.DataFrame, levels: Mapping[str, float], metric: str = "mR") -> Figure:
    """What candidates buy and cost: a recall and the milliseconds of a query against their number.

    points  one row for each number of candidates: k, the recall in percent, i2t_total_ms and t2i_total_ms
    levels  name -> recall that has no number of candidates: the coarse stage alone, the exhaustive search
    """
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    left.plot(points.k, points[metric], "o-", label="two stages")
    for (name, level), colour, style in zip(levels.items(), [ORANGE, GREEN, GREY], ["--", "-.", ":"]):
        left.axhline(level, color=colour, linestyle=style, label=name)
    left.set(xlabel="candidates K", ylabel=f"{metric} (%)")
    for direction, style, colour in (("i2t", "o-", BLUE), ("t2i", "s--", RED)):
        right.plot(points.k, points[f"{direction}_total_ms"], style, color=colour, label=DIRECTIONS[direction])
    right.set(xlabel="candidates K", ylabel="ms for one query", ylim=(0, None))
    _legend_above(left, 2)
    _legend_above(right, 2)
    return figure


@_styled
def gallery_times(times: pd.DataFrame, measured: pd.DataFrame) -> Figure:
    """Milliseconds of a query against the size of the gallery, on logarithmic axes.

    times     a row for each size (its index), a column for each way to search
    measured  the same with booleans; what was only calculated is drawn hollow and dashed
    """
    figure = _figure(8, 4.4)
    axes = figure.subplots()
    for name, colour, marker in zip(times, COLOURS, "osD^vP*"):
        known = measured[name].to_numpy()
        axes.plot(times.index[known], times[name][known], f"{marker}-", color=colour, label=name)
        if not known.all():
            beyond = np.flatnonzero(~known)
            tail = times[name].iloc[max(beyond[0] - 1, 0):]
            axes.plot(tail.index, tail, "--", color=colour, linewidth=1.3)
            axes.plot(times.index[~known], times[name][~known], marker, color=colour, markerfacecolor="white")
    axes.set(xscale="log", yscale="log", xlabel="items in the gallery", ylabel="ms for one query")
    axes.set_xticks(times.index, [f"{size:,}" for size in times.index])
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# retrieval --------------------------------------------------------------------------------------------------

@_styled
def similarity_matrix(similarity: np.ndarray, owner: np.ndarray | None = None) -> Figure:
    """Scores of N images (rows) and M texts (columns); frames mark the pairs that belong together."""
    rows, columns = similarity.shape
    figure = _figure(max(5.0, min(11.0, 1.8 + 5 * columns / rows)), 5)
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
            axes.add_patch(Rectangle((text - 0.46, image - 0.46), 0.92, 0.92, fill=False, edgecolor="white",
                                     linewidth=width, path_effects=[black]))
    return figure


@_styled
def recall_bars(table: pd.DataFrame) -> Figure:
    """Recalls of several systems side by side.

    table  one row per system and metric: system, metric (of METRICS), value, and where known low and high
           (the confidence interval, a whisker) and claimed (the published value, a diamond), all in percent
    """
    systems = list(dict.fromkeys(table.system))
    metrics = [metric for metric in METRICS if metric in set(table.metric)]
    figure = _figure(10, 4.6)
    axes, width = figure.subplots(), 0.8 / len(systems)
    for row, system in enumerate(systems):
        part = table[table.system == system].set_index("metric").reindex(metrics)
        x = np.arange(len(metrics)) + (row - (len(systems) - 1) / 2) * width
        axes.bar(x, part.value, width * 0.92, label=system, color=COLOURS[row % len(COLOURS)])
        _whiskers(axes, x, part)
        if "claimed" in part and part.claimed.notna().any():
            axes.plot(x, part.claimed, "D", color="white", markeredgecolor="black", markersize=7,
                      label="claimed by the paper" if row == 0 else None)
    names = [metric.replace("i2t_", "image→text\n").replace("t2i_", "text→image\n") for metric in metrics]
    axes.set_xticks(range(len(metrics)), names)
    axes.set_ylabel("%")
    axes.margins(x=0.02)
    axes.grid(axis="x", visible=False)
    _legend_above(axes, 3)
    return figure


def _whiskers(axes, x: np.ndarray, part: pd.DataFrame, horizontal: bool = False) -> None:
    """The intervals low..high about value, where the table has them."""
    if {"low", "high"} <= set(part):
        spread = np.abs(np.array([part.value - part.low, part.high - part.value], float))
        where, along = ((part.value, x), "xerr") if horizontal else ((x, part.value), "yerr")
        axes.errorbar(*where, **{along: spread}, fmt="none", ecolor="black", capsize=3, elinewidth=1.3)


@_styled
def recall_curve(hits: Mapping[str, np.ndarray], chance: np.ndarray | None = None) -> Figure:
    """R@K over K for every named curve: value k-1 is R@k in percent; chance is drawn dotted."""
    figure = _figure(7.5, 4.4)
    axes = figure.subplots()
    for (name, curve), style in zip(hits.items(), ["-", "--", "-.", ":"] * len(hits)):
        axes.plot(np.arange(1, len(curve) + 1), curve, style, label=name)
    if chance is not None:
        axes.plot(np.arange(1, len(chance) + 1), chance, ":", color=GREY, label="chance")
    axes.set(xlabel="K", ylabel="R@K (%)", ylim=(0, 102), xlim=(1, None))
    _legend_above(axes, 3)
    return figure


@_styled
def rank_histogram(ranks: Mapping[str, np.ndarray], bins: int = 20) -> Figure:
    """How many queries find their first right item at which rank (axis from 1, `ranks` from 0)."""
    figure = _figure(5 * len(ranks), 3.8)
    panels = figure.subplots(1, len(ranks), squeeze=False).ravel()
    for axes, (name, values), colour in zip(panels, ranks.items(), COLOURS):
        values = np.asarray(values, float) + 1
        edges = np.unique(np.geomspace(1, max(values.max(), 2) + 1, bins + 1).round())  # ranks are whole
        axes.hist(values, edges, color=colour, edgecolor="white")
        axes.axvline(np.median(values), color="black", linestyle="--", linewidth=1.5)
        axes.set(xscale="log", xlabel="rank of the first right item", ylabel="queries",
                 title=f"{name}: median {np.median(values):.1f}")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.get_major_locator().set_params(integer=True)
    return figure


@_styled
def ablation_bars(table: pd.DataFrame, metric: str = "mR") -> Figure:
    """One bar per row, the first one being the reference: variant, value and, where known, low and high."""
    figure = _figure(8, 1.3 + 0.55 * len(table))
    axes, y = figure.subplots(), np.arange(len(table))
    axes.barh(y, table.value, 0.65, color=[GREY] + [BLUE] * (len(table) - 1))
    _whiskers(axes, y, table, horizontal=True)
    ends = table.high if "high" in table else table.value
    for row, (end, value) in enumerate(zip(ends, table.value)):
        axes.annotate(f"{value:.1f}", (end, row), (5, 0), textcoords="offset points", va="center",
                      fontsize=SMALL)
    axes.axvline(table.value.iloc[0], color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(y, [_wrap(name, 2.6, lines=2) for name in table.variant])
    axes.set(xlabel=f"{metric} (%)", xlim=(0, 1.12 * max(ends)))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


@_styled
def bar_with_ceiling(values: Mapping[str, float], ceilings: Mapping[str, float],
                     chance: Mapping[str, float] | None = None) -> Figure:
    """Measured recalls (bars), the best that repeated captions allow (outlines) and chance (lines)."""
    names = list(values)
    figure = _figure(max(6.0, 1.3 * len(names)), 4.2)
    axes, x = figure.subplots(), np.arange(len(names))
    axes.bar(x, [ceilings[name] for name in names], 0.7, color="#EEEEEE", edgecolor="black", linestyle="--",
             label="ceiling")
    bars = axes.bar(x, list(values.values()), 0.7, color=BLUE, label="measured")
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=SMALL)
    if chance is not None:
        level = [chance[name] for name in names]
        axes.hlines(level, x - 0.35, x + 0.35, color=ORANGE, linewidth=3, label="chance")
    axes.set_xticks(x, [name.replace("_", "\n") for name in names])
    axes.set(ylabel="%", ylim=(0, 105))
    axes.grid(axis="x", visible=False)
    _legend_above(axes, 3)
    return figure


@_styled
def parameters_against_recall(table: pd.DataFrame, metric: str = "mR") -> Figure:
    """Recall over the number of trained parameters, one point per row of a table indexed by system.

    table  trainable, the metric, low and high (its interval) in percent; a row that trains nothing is a dashed line
    """
    figure = _figure(8, 4.6)
    axes = figure.subplots()
    for (name, row), colour in zip(table.iterrows(), COLOURS):
        if row.trainable == 0:
            axes.axhline(row[metric], color=GREY, linestyle="--", linewidth=1.5)
            axes.annotate(f"{name} {row[metric]:.1f}", (0.995, row[metric]), (0, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", color=GREY, fontsize=SMALL)
            continue
        axes.errorbar(row.trainable, row[metric], [[row[metric] - row.low], [row.high - row[metric]]], fmt="o", markersize=8,
                      capsize=4, linewidth=1.5, color=colour, label=f"{name} {row[metric]:.1f}")
    axes.set(xscale="log", xlabel="trained parameters", ylabel=f"{metric} (%)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.15)
    _legend_above(axes, 3)
    return figure


# captions ---------------------------------------------------------------------------------------------------

@_styled
def score_bars(table: pd.DataFrame, line: str = "") -> Figure:
    """Caption scores times 100, one panel per metric and one bar per system.

    table  one row per system and metric: system, metric, value, and the ends low and high of its interval, all fractions
    line   the system that is drawn as a line with its interval as a band, such as the human one
    """
    systems = [name for name in dict.fromkeys(table.system) if name != line]
    metrics = list(dict.fromkeys(table.metric))
    figure = _figure(11, 1.7 + 0.42 * len(systems))
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True).ravel()
    for axes, metric in zip(panels, metrics):
        part = table[table.metric == metric].set_index("system")[["value", "low", "high"]] * 100
        bars, y = part.reindex(systems), np.arange(len(systems))
        axes.barh(y, bars.value, 0.65, color=[COLOURS[row % len(COLOURS)] for row in y])
        _whiskers(axes, y, bars, horizontal=True)
        if line in part.index:
            axes.axvspan(part.low[line], part.high[line], color="#CCCCCC", linewidth=0, zorder=0)
            axes.axvline(part.value[line], color="black", linestyle="--", linewidth=1.5, label=line)
        axes.set_title(metric.replace("_", "-"))
        axes.set(xlim=(0, 1.08 * part.high.max()), xlabel="x 100")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3, integer=True))
        axes.set_yticks(y, [_wrap(name, 1.9, lines=2) for name in systems])
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    if line in set(table.system):
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right")
    return figure


@_styled
def score_table(values: pd.DataFrame, label: str) -> Figure:
    """Numbers from 0 to 100 as a table whose cells are the darker the higher: rows and columns as the table names them."""
    figure = _figure(3.6 + 0.95 * values.shape[1], 1.1 + 0.42 * len(values))
    axes = figure.subplots()
    drawn = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values.to_numpy()):
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else "black", fontsize=SMALL)
    axes.set_xticks(range(values.shape[1]), [name.replace("_", "-") for name in values])
    axes.set_yticks(range(len(values)), [_wrap(name, 3.2, lines=1) for name in values.index])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes, label=label, pad=0.02)
    return figure


# the data ---------------------------------------------------------------------------------------------------

@_styled
def caption_length_histogram(lengths: Mapping[str, np.ndarray]) -> Figure:
    """Words per caption, one outline per split or set, each as a share of its captions."""
    figure = _figure(7.5, 4)
    axes = figure.subplots()
    edges = np.arange(min(min(v) for v in lengths.values()), max(max(v) for v in lengths.values()) + 2) - 0.5
    for (name, values), style in zip(lengths.items(), ["-", "--", "-.", ":"] * len(lengths)):
        share = 100 * np.histogram(values, edges)[0] / len(values)
        axes.stairs(share, edges, label=f"{name} ({len(values):,})", linestyle=style, linewidth=2)
    axes.set(xlabel="words per caption", ylabel="captions (%)")
    _legend_above(axes, 3)
    return figure


@_styled
def class_counts(counts: pd.DataFrame) -> Figure:
    """Images per scene class: one row per class, one column per split, drawn as stacked horizontal bars."""
    figure = _figure(8, 1.2 + 0.27 * len(counts))
    axes, left = figure.subplots(), np.zeros(len(counts))
    for split, colour in zip(counts, COLOURS):
        axes.barh(np.arange(len(counts)), counts[split], 0.75, left=left, color=colour, label=split)
        left += counts[split].to_numpy(float)
    axes.set_yticks(range(len(counts)), [_wrap(name, 2.2, lines=1) for name in counts.index])
    axes.set(xlabel="images", ylim=(len(counts) - 0.5, -0.5))
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", visible=False)
    _legend_above(axes, 3)
    return figure

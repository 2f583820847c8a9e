"""Maps over an image: beliefs, attention, what mixing does."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nbhelpers.figures.style import BLUE, GREY, SMALL, new, draw_image, styled


@styled
def belief_map(image: np.ndarray, belief: np.ndarray, kept: Sequence[int], grid: int = 7) -> Figure:
    """Belief of a prior instruction in the tokens of an image (PIR, section 3.2).

    belief  (1 + grid*grid,) softmax weights: first the global token, then the local ones row by row
    kept    indices of the tokens that stay, into the same order
    From left to right: the image, the belief over its local tokens, that in the global token, what is kept.
    """
    belief, local = np.asarray(belief, float), np.asarray(belief, float)[1:].reshape(grid, grid)
    shown = matplotlib.colors.Normalize(0, belief.max())
    figure = new(11, 4.5)
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


@styled
def soft_belief_maps(image: np.ndarray, maps: Mapping[str, np.ndarray], grid: int = 7) -> Figure:
    """The image, and beside it quantities of its tokens, such as belief and weight (PIR-CLIP), each on its own scale.

    maps  title -> (1 + grid*grid,): first the class token, whose value stands above, then the local ones row by row
    """
    figure = new(3.1 * (1 + len(maps)), 4)
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


@styled
def pooled_tokens(image: np.ndarray, change: np.ndarray, patches: np.ndarray, words: np.ndarray) -> Figure:
    """What happens to tokens on their way to a code (CFITR).

    change   (S,S) how far LFEM moves each patch;  patches (S,S), words (L,) the learned weights of the poolings
    """
    figure = new(11, 3.5)
    panels = figure.subplots(1, 4, width_ratios=[3, 3, 3, 4])
    limit = np.abs(patches).max()
    draw_image(panels[0], image)
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


@styled
def mixing_maps(rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Arrays of tokens (down) by channels (across), each on its own symmetric scale.

    rows  what is shown in a row -> its arrays (T,D), one for each of `titles`
    """
    figure = new(3.7 * len(titles), 2.75 * len(rows))
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


@styled
def query_maps(image: np.ndarray, maps: np.ndarray) -> Figure:
    """What each query reads of an image in each layer.

    maps  (layers, queries, S, S) attention weights; every panel has its own scale, and its largest weight stands above
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

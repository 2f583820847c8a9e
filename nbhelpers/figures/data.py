"""Pictures and captions of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nbhelpers.figures.style import (
    COLOURS,
    DASHES,
    LINE,
    RED,
    SMALL,
    draw_image,
    legend_above,
    line_count,
    new,
    sheet,
    stacked_bars,
    styled,
    text_list,
    wrap,
)


@styled
def contact_sheet(
    images: Sequence[np.ndarray], titles: Sequence[str] = (), columns: int = 6
) -> Figure:
    """Draw images in rows of `columns`, each under its title."""
    rows = max(1, -(-len(images) // columns))
    figure = new(1.6 * columns, (1.85 if len(titles) else 1.65) * rows)
    grid = sheet(figure, rows, columns, len(images))
    for axes, image in zip(grid, images, strict=True):
        draw_image(axes, image)
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(wrap(title, 1.5, lines=1), fontsize=SMALL, pad=3)
    return figure


@styled
def parts_told(image: np.ndarray, masks: Sequence[np.ndarray], words: Sequence[str]) -> Figure:
    """Draw the image, and one panel for each mask (H, W) bool under its words.

    A panel outlines its mask and is pale outside it.
    """
    columns = min(4, 1 + len(masks))
    rows = -(-(1 + len(masks)) // columns)
    figure = new(2.6 * columns, 3.05 * rows)
    grid = sheet(figure, rows, columns, 1 + len(masks))
    pale = 190 + image.mean(axis=2, keepdims=True).astype(np.uint8) // 5
    shown = [image, *(np.where(mask[..., None], image, pale) for mask in masks)]
    for axes, picture, text in zip(grid, shown, ["the image", *words], strict=True):
        draw_image(axes, picture)
        axes.set_title(wrap(text, 2.4, lines=2), fontsize=SMALL, pad=3)
    for axes, mask in zip(grid[1:], masks, strict=False):
        axes.contour(np.asarray(mask, float), [0.5], colors=RED, linewidths=1.5)
    return figure


@styled
def captions_beside_images(
    images: Sequence[np.ndarray], captions: Sequence[Sequence[str]]
) -> Figure:
    """Draw one row per image: the image, and its captions to the right."""
    wrapped = [[wrap(text, 7.4, SMALL, 2) for text in texts] for texts in captions]
    rows = max(1, len(images))
    figure = new(10, rows * max([2.3, *(LINE * line_count(texts) for texts in wrapped)]))
    grid = figure.subplots(rows, 2, squeeze=False, width_ratios=[2.2, 7.8])
    for (left, right), image, texts in zip(grid, images, wrapped, strict=False):
        draw_image(left, image)
        text_list(right, texts)
    for axes in grid[len(images) :].ravel():
        axes.set_visible(False)
    return figure


@styled
def caption_length_histogram(lengths: Mapping[str, np.ndarray]) -> Figure:
    """Draw words per caption, one outline per split or set, as shares of its captions."""
    figure = new(7.5, 4)
    axes = figure.subplots()
    edges = (
        np.arange(min(min(v) for v in lengths.values()), max(max(v) for v in lengths.values()) + 2)
        - 0.5
    )
    for (name, values), style in zip(lengths.items(), cycle(DASHES), strict=False):
        share = 100 * np.histogram(values, edges)[0] / len(values)
        axes.stairs(share, edges, label=f"{name} ({len(values):,})", linestyle=style, linewidth=2)
    axes.set(xlabel="words per caption", ylabel="captions (%)")
    legend_above(axes, 3)
    return figure


@styled
def class_counts(counts: pd.DataFrame) -> Figure:
    """Draw images per scene class as stacked horizontal bars.

    counts  one row per class, one column per split
    """
    figure = new(8, 1.2 + 0.27 * len(counts))
    axes = figure.subplots()
    stacked_bars(axes, counts, COLOURS, 0.75)
    axes.set(xlabel="images")
    axes.locator_params(axis="x", integer=True)
    legend_above(axes, 3)
    return figure

"""Small pictures of one step of a method: a loss, a code, a caption word by word, a gallery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nbhelpers.figures.style import (
    COLOURS,
    DASHES,
    GREEN,
    LINE,
    ORANGE,
    RED,
    SMALL,
    draw_image,
    legend_above,
    line_count,
    new,
    row_of_panels,
    sheet,
    styled,
    text_list,
    wrap,
)

# how a caption is judged: the colour of its frame, its dashes, its mark
VERDICTS = {
    "good": (GREEN, False, "✓"),
    "bad": (RED, True, "✗"),
    "copied": (ORANGE, True, "="),
}


@styled
def curves(panels: Mapping[str, pd.DataFrame], label: str = "loss") -> Figure:
    """Draw one panel for each table, with a curve for each of its columns.

    panels  title -> table; its index is x, and the name of the index is the label of x
    """
    most = max(table.shape[1] for table in panels.values())
    figure = new(max(5.5, 3.7 * len(panels)), 3.2 + 0.25 * most)
    for axes, (title, table) in zip(
        row_of_panels(figure, len(panels)), panels.items(), strict=True
    ):
        for (name, values), style in zip(table.items(), cycle(DASHES), strict=False):
            axes.plot(table.index, values, style, label=name)
        axes.set_title(title, pad=8 + 18 * most)
        axes.set_xlabel(str(table.index.name))
        if table.shape[1] > 1:  # a single curve needs no name
            legend_above(axes, 1)
    figure.axes[0].set_ylabel(label)
    return figure


@styled
def code_steps(codes: Mapping[str, np.ndarray]) -> Figure:
    """Draw how two vectors of numbers in (-1, 1) become codes, and where these differ.

    codes  name -> numbers h (bits,), of an image and of a text
    """
    (first, one), (second, two) = codes.items()
    rows = {
        f"h of the {first}": one,
        f"code of the {first}": np.where(one >= 0, 1.0, -1.0),
        f"code of the {second}": np.where(two >= 0, 1.0, -1.0),
        f"h of the {second}": two,
    }
    figure = new(1.8 + 0.62 * len(one), 2.5)
    axes = figure.subplots()
    axes.imshow(list(rows.values()), cmap="RdBu_r", vmin=-1.6, vmax=1.6, aspect="auto")
    for row, (name, values) in enumerate(rows.items()):
        for column, value in enumerate(values):
            text = f"{value:.1f}" if name.startswith("h ") else f"{int(value > 0)}"
            axes.text(column, row, text, ha="center", va="center", fontsize=SMALL)
    differ = (one >= 0) != (two >= 0)
    for bit in np.flatnonzero(differ):
        frame = Rectangle((bit - 0.46, 0.54), 0.92, 1.92, fill=False, linewidth=2.5)
        axes.add_patch(frame)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_title(f"{differ.sum()} of {len(one)} bits differ (black frames)")
    return figure


@styled
def two_text_lists(
    image: np.ndarray, lists: Mapping[str, tuple[Sequence[str], Sequence[bool]]]
) -> Figure:
    """Draw an image and several rankings of captions beside it.

    lists  name -> (captions, whether each is the image's own); its own are green and ticked
    """
    columns = {
        name: [
            wrap(f"{place}. {'✓' if hit else '✗'} {text}", 3.9, SMALL, 2)
            for place, (text, hit) in enumerate(zip(texts, right, strict=True), 1)
        ]
        for name, (texts, right) in lists.items()
    }
    height = max(LINE * line_count(texts) for texts in columns.values())
    figure = new(2.6 + 4.2 * len(lists), 0.6 + max(2.4, height))
    panels = figure.subplots(1, 1 + len(lists), width_ratios=[2.6] + [4.2 for _ in lists])
    draw_image(panels[0], image)
    for axes, (name, texts) in zip(panels[1:], columns.items(), strict=True):
        text_list(axes, texts, [GREEN if hit else RED for hit in lists[name][1]])
        axes.set_title(name, loc="left")
    return figure


@styled
def word_bars(words: Sequence[str], values: Mapping[str, Sequence[float]], label: str) -> Figure:
    """Draw a number for each word of a sentence, with a bar for each series.

    values  name of a series -> a number for each word
    """
    figure = new(max(6, 1.5 + 0.62 * len(words)), 3.6)
    axes, width = figure.subplots(), 0.8 / len(values)
    for row, ((name, numbers), colour) in enumerate(zip(values.items(), COLOURS, strict=False)):
        x = np.arange(len(words)) + (row - (len(values) - 1) / 2) * width
        axes.bar(x, numbers, width * 0.92, color=colour, label=name)
    axes.set_xticks(range(len(words)), list(words), rotation=45, ha="right")
    axes.set(ylabel=label)
    axes.grid(axis="x", visible=False)
    legend_above(axes, 2)
    return figure


@styled
def caption_gallery(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    references: Sequence[str],
    verdicts: Sequence[tuple[str, str]],
    columns: int = 4,
) -> Figure:
    """Draw images with the captions that a system gave them, each marked by its verdict.

    references  one sentence of a person for each image
    verdicts    ("good", "bad" or "copied", a note such as the score) for each image
    """
    texts = [
        "\n".join([wrap(said, 2.6, lines=4), wrap(f"person: {person}", 2.6, lines=4)])
        for said, person in zip(captions, references, strict=True)
    ]
    rows = -(-len(images) // columns)
    lines = max(text.count("\n") + 1 for text in texts)
    # a picture, its title, the longest text, and room before the title of the next row
    figure = new(2.9 * columns, (3.3 + LINE * lines) * rows)
    grid = sheet(figure, rows, columns, len(images))
    for axes, image, text, (verdict, note) in zip(grid, images, texts, verdicts, strict=True):
        colour, dashed, mark = VERDICTS[verdict]
        draw_image(axes, image, colour, dashed=dashed)
        axes.set_anchor("N")  # so that the room is below the picture, for its text
        axes.set_title(f"{mark} {verdict}, {note}", fontsize=SMALL, color=colour, pad=6)
        axes.set_xlabel(text, fontsize=SMALL, loc="left")
    return figure

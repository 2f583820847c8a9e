"""Figures of worked examples: they draw what they were given, and nothing overlaps."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from nbhelpers import figures

LONG = "two white planes are parked near a long building with a grey roof and some trees, " * 3


def rows(seed: int, noise: float) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(8, 6))
    values = values + noise * np.random.default_rng(seed).normal(size=(8, 6))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def falling() -> pd.DataFrame:
    metrics = ["Bleu_1", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]
    return pd.DataFrame({name: 100 - 9.0 * i * np.arange(6) for i, name in enumerate(metrics)})


def drawn() -> dict:
    cosines = {
        "L_vt, image × caption": rows(1, 0.7) @ rows(2, 0.7).T,
        "L_v, image × its view": rows(1, 0.1) @ rows(1, 0.2).T,
        "L_t, caption × its view": rows(2, 0.1) @ rows(2, 0.2).T,
    }
    image = np.full((96, 96, 3), 90, np.uint8)
    scores = {"Bleu_1": 0.8, "Bleu_4": 0.5, "METEOR": 0.3, "ROUGE_L": 0.6, "CIDEr": 12.4}
    return {
        "tie_orders": figures.tie_orders(1, 4, 2, 3),
        "ranking_terms": figures.ranking_terms(cosines, 0.2),
        "caption_scored": figures.caption_scored(image, LONG, [LONG] * 5, scores),
        "broken_scores": figures.broken_scores(
            {"removed from the end": falling(), "replaced by words of another": falling()},
            "words changed",
        ),
    }


DRAWN = drawn()


@pytest.mark.parametrize("name", DRAWN)
def test_no_text_overlaps_another_or_is_cut_off(name, tmp_path):
    figure = DRAWN[name]
    FigureCanvasAgg(figure).draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    texts = [text for text in texts if text.get_window_extent().width > 1]
    boxes = {text: text.get_window_extent() for text in texts}
    inside = {text: box for text, box in boxes.items() if figure.bbox.padded(1).overlaps(box)}
    for text, box in inside.items():
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, f"'{text.get_text()}' is cut off"
    overlapping = [
        (a.get_text(), b.get_text())
        for a, b in itertools.combinations(inside, 2)
        if inside[a].padded(-1).overlaps(inside[b]) and a.axes is b.axes
    ]
    assert not overlapping
    assert figures.save(figure, tmp_path / "figure.png").stat().st_size < 200_000


@pytest.mark.parametrize(
    "counts, hits, orders", [((1, 4, 2, 3), 5, 6), ((0, 3, 1, 1), 1, 3), ((2, 2, 1, 2), 0, 2)]
)
def test_every_order_of_a_tie_is_drawn_once_with_its_answer(counts, hits, orders):
    (axes,) = figures.tie_orders(*counts).axes
    marks = [text.get_text() for text in axes.texts]
    assert marks.count("✓ hit") == hits and marks.count("✗ miss") == orders - hits
    assert marks.count("own") == orders * counts[2]
    assert axes.get_title(loc="left").startswith(f"{hits} of {orders} orders")


def test_the_title_of_a_term_is_its_loss():
    cosines = np.array([[0.9, 0.2, 0.8], [0.1, 0.5, 0.6], [0.3, 0.0, 0.7]])
    axes = figures.ranking_terms({"L": cosines}, 0.2).axes[0]
    assert axes.get_title() == "L: 0.70"
    dots, triangles = (line.get_xydata().round().tolist() for line in axes.lines)
    assert dots == [[2, 0], [2, 1]] and triangles == [[2, 0]]


def test_what_is_left_of_a_score_is_a_line_per_metric():
    axes = figures.broken_scores({"shorter": falling()}, "words").axes[0]
    assert [line.get_label() for line in axes.lines][:2] == ["Bleu-1", "Bleu-4"]
    assert list(axes.lines[1].get_ydata()) == list(falling().Bleu_4)

"""The candidate panel measures each K once, marks it, and says what it gives and takes."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from nbhelpers.errors import UserError
from nbhelpers.systems.candidate_panel import CandidatePanel

LEVELS = {"coarse alone": 40.0, "exhaustive": 60.0}
asked: list[int] = []


def point_of(k: int) -> dict[str, float]:
    asked.append(k)
    return {"k": k, "mR": 40.0 + k, "i2t_total_ms": 2.0 * k, "t2i_total_ms": 1.0 * k}


@pytest.fixture
def panel() -> CandidatePanel:
    asked.clear()
    return CandidatePanel(point_of, [10, 20], LEVELS, k=20, most=30)


def test_the_slider_asks_for_each_k_once_and_redraws(panel):
    first = panel.image.value
    assert Image.open(io.BytesIO(first)).width > 500 and asked == [10, 20]
    panel.k.value = 12
    assert panel.image.value != first and panel.said.value.startswith("mR 52.0")
    panel.k.value = 20
    panel.k.value = 12
    assert asked == [10, 20, 12] and list(panel.points.k) == [10, 12, 20]


def test_it_says_recall_against_both_ends_and_both_times(panel):
    assert panel.sentence(20) == (
        "mR 60.0, +20.0 to coarse alone, +0.0 to exhaustive; 40.0 ms for an image, 20.0 ms for a"
        " text"
    )


def test_the_figure_marks_the_chosen_k(panel):
    left, right = panel.draw(20).axes
    assert "K = 20" in [text.get_text() for text in left.get_legend().get_texts()]
    assert [axes.lines[0].get_xdata()[0] for axes in (left, right)] == [20, 20]


@pytest.mark.parametrize("steps, k", [([], 1), ([10], 31), ([40], 10), ([0], 1)])
def test_numbers_out_of_range_are_refused(steps, k):
    with pytest.raises(UserError, match="give at least one step, and each between 1 and 30"):
        CandidatePanel(point_of, steps, LEVELS, k, most=30)

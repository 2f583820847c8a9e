"""The belief panel draws the cut that its slider says, and asks for each recall once."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from nbhelpers.errors import UserError
from nbhelpers.systems.belief_panel import BeliefPanel

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
BELIEFS = RNG.dirichlet(np.ones(50), 3)
NAMES = ["a", "b", "c"]


def title(figure) -> str:
    return figure.axes[3].get_title()


@pytest.mark.parametrize("k", [1, 40, 50])
def test_the_picture_says_how_many_tokens_stay(k):
    assert title(BeliefPanel(PICTURES, BELIEFS, NAMES, 40).draw(1, k)) == f"kept tokens: {k} of 50"


def test_slider_and_list_redraw_and_recalls_are_computed_once():
    asked = []

    def recall_at(k: int) -> float:
        asked.append(k)
        return 50.0 + k

    panel = BeliefPanel(PICTURES, BELIEFS, NAMES, 40, recall_at)
    first = panel.image.value
    assert Image.open(io.BytesIO(first)).width > 500 and panel.said.value.endswith("90.0")
    panel.cut.value = 10
    second = panel.image.value
    panel.picture.value = 2
    assert len({first, second, panel.image.value}) == 3 and panel.said.value.endswith("60.0")
    assert asked == [40, 10]


def test_without_a_function_no_recall_is_shown():
    assert BeliefPanel(PICTURES, BELIEFS, NAMES, 40).said.value == ""


@pytest.mark.parametrize("names", [NAMES[:2], []])
def test_counts_that_differ_are_refused(names):
    with pytest.raises(UserError, match="3 pictures, 3 beliefs and"):
        BeliefPanel(PICTURES, BELIEFS, names, 40)

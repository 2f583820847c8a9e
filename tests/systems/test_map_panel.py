"""The map panel draws the map that its lists say, and offers what a system has."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from nbhelpers.errors import UserError
from nbhelpers.systems.map_panel import MapPanel

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
SENTENCES = ["two ponds", "two planes and two cars"]
MAPS = {
    "PIR": {"belief": list(RNG.random((2, 7, 7))), "relevance": list(RNG.normal(size=(2, 7, 7)))},
    "CFITR": {"relevance": list(RNG.normal(size=(2, 7, 7)))},
}
WORDS = {
    "CFITR": [(text.split(), RNG.random((len(text.split()), 7, 7))) for text in SENTENCES],
}
VERDICTS = {("PIR", "belief"): "gain < 0: no"}


@pytest.fixture
def panel() -> MapPanel:
    return MapPanel(PICTURES, SENTENCES, MAPS, WORDS, VERDICTS)


def drawn(figure: Figure) -> np.ndarray:
    """The values of the last map of a figure."""
    return np.asarray(figure.axes[-1].images[-1].get_array())


def test_the_figure_is_of_the_chosen_map(panel):
    assert np.array_equal(drawn(panel.draw(1, "PIR", "relevance")), MAPS["PIR"]["relevance"][1])
    word = panel.draw(1, "CFITR", "words", "4. two")
    assert np.array_equal(drawn(word), WORDS["CFITR"][1][1][3])
    assert word.axes[-1].get_title() == "CFITR: 4. two"


def test_lists_offer_what_a_system_has_and_keep_what_both_have(panel):
    assert panel.method.options == ("belief", "relevance") and panel.said.value == "gain &lt; 0: no"
    assert panel.word.layout.visibility == "hidden"
    first = panel.image.value
    assert Image.open(io.BytesIO(first)).width > 300
    panel.method.value = "relevance"
    panel.system.value = "CFITR"
    assert panel.method.options == ("relevance", "words") and panel.method.value == "relevance"
    assert panel.said.value == "" and panel.image.value != first


def test_words_follow_the_image(panel):
    panel.system.value = "CFITR"
    panel.method.value = "words"
    assert panel.word.layout.visibility == "visible"
    assert panel.word.options == ("1. two", "2. ponds")
    seen = {panel.image.value}
    panel.word.value = "2. ponds"
    seen.add(panel.image.value)
    panel.picture.value = 1
    seen.add(panel.image.value)
    assert panel.word.options[-1] == "5. cars" and len(seen) == 3
    panel.system.value = "PIR"
    assert panel.method.value == "belief" and panel.word.layout.visibility == "hidden"


@pytest.mark.parametrize(
    "given", [(PICTURES[:1], SENTENCES, MAPS), (PICTURES, SENTENCES[:1], MAPS), (PICTURES, [], {})]
)
def test_counts_that_differ_are_refused(given):
    with pytest.raises(UserError, match="give one of each for every picture"):
        MapPanel(*given)

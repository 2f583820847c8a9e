"""The small pictures of one step: nothing overlaps, marks and numbers stand where they belong."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from test_figures import CAPTIONS, LONG, pictures, shown_texts

from nbhelpers import figures


def table(x: str, **columns) -> pd.DataFrame:
    return pd.DataFrame(columns, index=pd.Index(np.linspace(0, 1, 5), name=x))


def all_steps() -> dict:
    rng = np.random.default_rng(0)
    return {
        "curves": figures.curves(
            {
                "triplet": table("s wrong - s right", hardest=range(5)),
                "quantisation": table("h", intended=range(5), released=range(5)),
                "balance": table("bits that are 1", balance=[4, 1, 0, 1, 4]),
            }
        ),
        "code_steps": figures.code_steps(
            {"image": rng.uniform(-1, 1, 12), "text": rng.uniform(-1, 1, 12)}
        ),
        "two_text_lists": figures.two_text_lists(
            pictures(1)[0],
            {
                "coarse: by code": ([*CAPTIONS[:3], LONG], [0, 0, 1, 0]),
                "reranked: read together": ([LONG, *CAPTIONS[:3]], [0, 1, 0, 0]),
            },
        ),
        "word_bars": figures.word_bars(
            LONG.split()[:12], {"own image": range(12), "another image": range(12)}, "log p"
        ),
        "caption_gallery": figures.caption_gallery(
            pictures(6),
            [LONG] * 6,
            [LONG] * 6,
            [("good", "CIDEr 321"), ("bad", "CIDEr 0"), ("copied", "CIDEr 12")] * 2,
        ),
    }


STEPS = all_steps()


@pytest.mark.parametrize("name", STEPS)
def test_no_text_of_a_step_overlaps_another_or_is_cut_off(name):
    boxes = {text: text.get_window_extent() for text in shown_texts(STEPS[name])}
    page = STEPS[name].bbox
    for text, box in boxes.items():
        assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1, f"'{text.get_text()}' leaves it"
        assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1, f"'{text.get_text()}' leaves it"
    assert not [
        (a.get_text(), b.get_text())
        for a, b in itertools.combinations(boxes, 2)
        if boxes[a].padded(-1).overlaps(boxes[b])
    ]


def test_bits_that_differ_are_counted_and_framed():
    figure = figures.code_steps(
        {"image": np.array([0.9, -0.2, 0.0]), "text": np.array([0.8, 0.1, -0.3])}
    )
    axes = figure.axes[0]
    assert axes.get_title().startswith("2 of 3 bits differ")
    assert [round(patch.get_x() + 0.46) for patch in axes.patches] == [1, 2]


def test_a_caption_is_marked_by_its_verdict():
    titles = [axes.get_title() for axes in STEPS["caption_gallery"].axes[:3]]
    assert titles == ["✓ good, CIDEr 321", "✗ bad, CIDEr 0", "= copied, CIDEr 12"]


def test_the_own_captions_are_ticked():
    texts = [text.get_text() for text in STEPS["two_text_lists"].axes[1].texts]
    assert [text.split()[1] for text in texts] == ["✗", "✗", "✓", "✗"]


def test_bars_stand_at_their_numbers():
    figure = figures.word_bars(["a", "b"], {"own": [1.0, 2.0], "other": [3.0, 4.0]}, "log p")
    assert [patch.get_height() for patch in figure.axes[0].patches] == [1, 2, 3, 4]

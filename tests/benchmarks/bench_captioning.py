"""Scores of an RSICD-sized test (1093 images, 5 references) against pycocoevalcap's scorers, one
after the other.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from nbhelpers.data.scenes.recipes import RECIPES
from nbhelpers.metrics import caption_scores, java

IMAGES, REFERENCES = 1093, 5


def sentences(count: int) -> list[str]:
    """Captions in the style of the field: about 11 words, some repeated."""
    rng = np.random.default_rng(0)
    nouns = [
        "planes",
        "storage tanks",
        "trees",
        "houses",
        "cars",
        "boats",
        "bridges",
        "ponds",
        "roads",
        "buildings",
        *RECIPES,
    ]
    words = [
        ["many", "two", "several", "some"],
        ["white", "green", "gray", "dense", "long"],
        nouns,
        ["are near", "are beside", "stand around", "are parked in"],
        ["a", "the"],
        ["large", "small", "curved", "wide"],
        nouns,
        ["with", "and", "without"],
        nouns,
    ]
    return [
        " ".join(choices[rng.integers(len(choices))] for choices in words) + "."
        for _ in range(count)
    ]


def one_after_the_other(hyps: dict, refs: dict) -> dict[str, float]:
    """As pycocoevalcap's own evaluation does, without SPICE."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    refs = tokenizer.tokenize(
        {one: [{"caption": text} for text in own] for one, own in refs.items()}
    )
    hyps = tokenizer.tokenize({one: [{"caption": text}] for one, text in hyps.items()})
    found = dict(
        zip(caption_scores.BLEU, Bleu(4).compute_score(refs, hyps, verbose=0)[0], strict=True)
    )
    return found | {
        name: make().compute_score(refs, hyps)[0]
        for name, make in (("METEOR", Meteor), ("ROUGE_L", Rouge), ("CIDEr", Cider))
    }


def seconds(function, *arguments):
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


@pytest.mark.skipif(java.find() is None, reason="there is no Java")
def test_all_metrics_cold_and_warm(benchmark, monkeypatch):
    """`cold` and `warm` are shares of the time that the scorers take one after the other; at most
    0.8 and 0.3 are wanted.
    """
    # pycocoevalcap looks nowhere else
    monkeypatch.setenv("PATH", str(Path(java.find()).parent), prepend=os.pathsep)
    texts = sentences(IMAGES * (REFERENCES + 1))
    refs = {one: texts[one * REFERENCES : (one + 1) * REFERENCES] for one in range(IMAGES)}
    hyps, other = (dict(enumerate(texts[-IMAGES:][::step])) for step in (1, -1))
    expected, sequential = seconds(one_after_the_other, hyps, refs)
    with caption_scores.CaptionScorer() as scorer:
        found, cold = seconds(scorer.score, hyps, refs)
        assert found.corpus == expected
        # other captions, so that only references are known
        benchmark.pedantic(scorer.score, (other, refs), rounds=1)
    warm = benchmark.stats.stats.min
    benchmark.extra_info |= {
        "sequential": round(sequential, 1),
        "cold": round(cold / sequential, 2),
        "warm": round(warm / sequential, 2),
    }

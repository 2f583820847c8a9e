"""Caption scores against those of pycocoevalcap 1.2, per image and for the corpus."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nbhelpers.metrics import caption_scores as caption_scores_
from nbhelpers.metrics import java

GROUP = dict.fromkeys(caption_scores_.BLEU, "Bleu")


@pytest.fixture(scope="module")
def captions(request):
    path = request.config.getoption("--reference-dir") / "captions.json"
    return (
        json.loads(path.read_text("utf-8"))
        if path.exists()
        else pytest.skip(f"{path.parent} holds no captions.json")
    )


@pytest.fixture(scope="module")
def caption_scores(captions):
    items = captions["items"]
    if java.find() is None:
        pytest.skip("there is no Java")
    return caption_scores_.score_captions(
        {item["image_id"]: item["hypothesis"] for item in items},
        {item["image_id"]: item["references"] for item in items},
        captions["corpus"],
    )


@pytest.mark.parametrize("metric", caption_scores_.METRICS)
def test_caption_scores_of_the_corpus_and_of_each_image(captions, caption_scores, metric):
    if metric not in captions["corpus"]:
        pytest.skip(f"these captions have no {metric}")
    tolerance = captions["tolerance"][GROUP.get(metric, metric)]
    assert caption_scores.corpus[metric] == pytest.approx(
        captions["corpus"][metric], abs=tolerance, rel=0
    )
    expected = [item["scores"][metric] for item in captions["items"]]
    assert list(caption_scores.per_image.index) == [item["image_id"] for item in captions["items"]]
    np.testing.assert_allclose(caption_scores.per_image[metric], expected, atol=tolerance, rtol=0)


def test_captions_are_tokenised_alike(captions):
    if java.find() is None:
        pytest.skip("there is no Java")
    items = captions["items"]
    for texts, tokens in (
        (
            [[item["hypothesis"]] for item in items],
            [[item["tokenized_hypothesis"]] for item in items],
        ),
        ([item["references"] for item in items], [item["tokenized_references"] for item in items]),
    ):
        assert java.tokenize([caption_scores_.clean(text) for own in texts for text in own]) == sum(
            tokens, []
        )

"""CLIPScore and RefCLIPScore are the paper's formulas, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nbhelpers.errors import UserError
from nbhelpers.metrics.caption_scores import bootstrap, score_captions
from nbhelpers.metrics.clip_score import beside, clip_score, ref_clip_score

IMAGES = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
CAPTIONS = np.array([[0.6, 0.8], [1, 0], [-1, 0]], np.float32)
REFERENCES = np.array([[1, 0], [0.8, 0.6], [1, 0], [-1, 0]], np.float32)
OWNER = np.array([0, 0, 1, 2])


def test_clip_score_is_the_weighted_cosine_and_never_negative():
    assert clip_score(IMAGES, CAPTIONS) == pytest.approx([2.5 * 0.6, 0, 0])


def test_ref_clip_score_is_the_harmonic_mean_with_the_nearest_reference():
    found = ref_clip_score(clip_score(IMAGES, CAPTIONS), CAPTIONS, REFERENCES, OWNER)
    nearest = max(0.6, 0.6 * 0.8 + 0.8 * 0.6)
    assert found == pytest.approx([2 * 1.5 * nearest / (1.5 + nearest), 0, 0])
    with pytest.raises(UserError, match="1 captions have no reference .first: row 2"):
        ref_clip_score(np.ones(3), CAPTIONS, REFERENCES[:3], OWNER[:3])


def test_they_stand_beside_the_other_scores_with_intervals():
    said = {"a": "a red field", "b": "a pond", "c": "trees"}
    truth = {"a": ["a red field"], "b": ["a lake"], "c": ["two trees"]}
    whole = beside(score_captions(said, truth, ["ROUGE_L"]), {"CLIPScore": np.array([1, 2, 6.0])})
    assert whole.corpus["CLIPScore"] == 3 and list(whole.per_image.CLIPScore) == [1, 2, 6]
    low, high = bootstrap(whole, 200)["CLIPScore"]
    assert 1 <= low < 3 < high <= 6
    assert set(whole.corpus) == {"ROUGE_L", "CLIPScore"}

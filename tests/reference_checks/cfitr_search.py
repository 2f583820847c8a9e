"""The two-stage search against the authors' functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closeness import assert_close

from nbhelpers.metrics import recall
from nbhelpers.tasks import two_stage

RELEASED = {
    "t2i_R1": "t2i_R@1",
    "t2i_R5": "t2i_R@5",
    "t2i_R10": "t2i_R@10",
    "i2t_R1": "i2t_R@1",
    "i2t_R5": "i2t_R@5",
    "i2t_R10": "i2t_R@10",
    "mean": "mR",
}


def packed(v):
    return (two_stage.pack(v[f"input/code_{kind}"]) for kind in ("img", "txt"))


def same_metrics(found, v, key):
    # the mean stands last, and the full reranking has none
    for name, expected in zip(v.meta["metric_order"], v.arrays[key], strict=False):
        assert found.metrics[RELEASED[name]] == pytest.approx(float(expected), abs=0.011), name


def test_cfitr_coarse_scores_and_their_post_processing(vectors):
    v = vectors("cfitr/two_stage.npz")
    scores = two_stage.negative_hamming(*packed(v))
    assert np.array_equal(scores, v.arrays["output/neg_hamming"])
    processed = two_stage.post_process(scores, neighbours=v.meta["knn"])
    assert_close(torch.from_numpy(processed), v["output/ppsr_scores"])


def test_cfitr_two_stage_metrics(vectors):
    v = vectors("cfitr/two_stage.npz")
    owner, fine = v.arrays["input/text_image_id"], v.arrays["input/pair_score"]
    coarse = two_stage.post_process(
        two_stage.negative_hamming(*packed(v)), neighbours=v.meta["knn"]
    )
    same_metrics(
        two_stage.two_stage(coarse, fine, owner, v.meta["K"]), v, "output/metrics_two_stage"
    )
    same_metrics(recall.evaluate(fine, owner), v, "output/metrics_full_rerank")


@pytest.mark.parametrize(
    "name, codes, distances",
    [
        ("hash_head", "output/eval/code_{}", "output/eval/neg_hamming"),
        ("losses", "input/h_{}", "output/neg_hamming"),
    ],
)
def test_cfitr_distances_of_codes_of_other_lengths(vectors, name, codes, distances):
    v = vectors(f"cfitr/{name}.npz")
    images, texts = (two_stage.pack(v[codes.format(kind)]) for kind in ("img", "txt"))
    assert np.array_equal(two_stage.negative_hamming(images, texts), v.arrays[distances])

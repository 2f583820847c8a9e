"""Recall against loops that sort and enumerate, against an independent library, and by its
properties.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.retrieval import RetrievalHitRate

from nbhelpers.errors import UserError
from nbhelpers.metrics import recall

KS = (1, 5, 10)
RECALLS = [f"{direction}_R@{k}" for direction in ("i2t", "t2i") for k in KS]


def scored(seed=0, images=30, captions=5, levels=None):
    """Scores in which own items are higher, and their unordered owners; `levels` makes ties."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(images), captions))
    similarity = rng.standard_normal((images, len(owner))).astype(np.float32)
    similarity[owner, np.arange(len(owner))] += 1.5
    return (np.round(similarity * levels) / levels if levels else similarity), owner


# ---- oracles
def all_orders(scores, own):
    """Every ranking of the items that the scores allow, each as the rank of the best own item."""
    orders = [
        order
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in zip(order, order[1:], strict=False))
    ]
    return [min(order.index(item) for item in own) for order in orders]


def queries(similarity, owner):
    """(scores, own items) of every image as a query, then of every caption."""
    i2t = [
        (row, [j for j, i in enumerate(owner) if i == image])
        for image, row in enumerate(similarity)
    ]
    return i2t, [(similarity[:, j], [i]) for j, i in enumerate(owner)]


def released_rank(scores, own):
    order = list(np.argsort(scores, kind="stable")[::-1])
    return min(order.index(item) for item in own)


@st.composite
def tied_scores(draw):
    """Up to 4 images, up to 6 captions, few different scores; every image has a caption."""
    images = draw(st.integers(1, 4))
    extra = draw(st.lists(st.integers(0, images - 1), max_size=6 - images))
    owner = np.array(draw(st.permutations([*range(images), *extra])))
    rows = st.lists(st.integers(0, 2), min_size=len(owner), max_size=len(owner))
    return np.array(draw(st.lists(rows, min_size=images, max_size=images)), dtype=np.float32), owner


@settings(max_examples=60, deadline=None)
@given(tied_scores())
def test_expectation_is_the_average_over_every_order_of_the_ties(case):
    similarity, owner = case
    found = recall.evaluate(similarity, owner, ks=(1, 2, 5))
    ranks_and_hits = (found.i2t_ranks, found.i2t_hits), (found.t2i_ranks, found.t2i_hits)
    for asked, (ranks, hits) in zip(queries(similarity, owner), ranks_and_hits, strict=True):
        for (scores, own), rank, hit in zip(asked, ranks, hits, strict=True):
            possible = all_orders(scores, own)
            assert rank == pytest.approx(np.mean(possible))
            assert hit == pytest.approx([np.mean([r < k for r in possible]) for k in (1, 2, 5)])


@settings(max_examples=60, deadline=None)
@given(tied_scores())
def test_optimistic_is_the_best_of_every_order_and_released_the_stable_sort_reversed(case):
    similarity, owner = case
    optimistic = recall.evaluate(similarity, owner, ties="optimistic")
    released = recall.evaluate(similarity, owner, ties="released")
    i2t, t2i = queries(similarity, owner)
    assert list(optimistic.i2t_ranks) == [min(all_orders(*query)) for query in i2t]
    assert list(optimistic.t2i_ranks) == [min(all_orders(*query)) for query in t2i]
    assert list(released.i2t_ranks) == [released_rank(*query) for query in i2t]
    assert list(released.t2i_ranks) == [released_rank(*query) for query in t2i]


@pytest.mark.parametrize("levels", [None, 20, 2])
def test_released_rule_agrees_with_the_released_loop_beyond_one_block_of_rows(levels):
    similarity, owner = scored(1, images=300, captions=3, levels=levels)
    found = recall.evaluate(similarity, owner, ties="released")
    i2t, t2i = ([released_rank(*query) for query in side] for side in queries(similarity, owner))
    assert list(found.i2t_ranks) == i2t and list(found.t2i_ranks) == t2i
    expected = [100 * np.mean(np.array(ranks) < k) for ranks in (i2t, t2i) for k in KS]
    assert [found.metrics[key] for key in RECALLS] == pytest.approx(expected)
    assert found.metrics["mR"] == pytest.approx(np.mean(expected))
    assert found.metrics["i2t_median_rank"] == np.median(i2t)
    assert found.metrics["t2i_median_rank"] == np.median(t2i)


def test_torchmetrics_agrees_where_nothing_ties():
    similarity, owner = scored(2)
    metrics = recall.evaluate(similarity, owner).metrics
    own = torch.from_numpy(owner[None, :] == np.arange(len(similarity))[:, None])
    for direction, scores, target in (("i2t", similarity, own), ("t2i", similarity.T, own.T)):
        query = torch.arange(len(scores))[:, None].expand(*scores.shape)
        for k in KS:
            rate = RetrievalHitRate(top_k=k)
            theirs = rate(torch.tensor(scores).flatten(), target.flatten(), query.flatten())
            assert metrics[f"{direction}_R@{k}"] == pytest.approx(100 * float(theirs), abs=1e-4)


def test_every_rule_gives_the_published_protocols_numbers_on_the_tie_free_reference():
    with np.load(Path(__file__).parents[1] / "reference" / "pir" / "itm_eval.npz") as v:
        similarity = v["input/sims"]
        names = [f"output/{side}_r{k}" for side in ("txt", "img") for k in KS] + ["output/r_mean"]
        published = [float(v[name]) for name in names]
    for ties in recall.TIES:
        metrics = recall.evaluate(similarity, np.repeat(np.arange(12), 5), ties=ties).metrics
        assert [metrics[key] for key in [*RECALLS, "mR"]] == pytest.approx(published, abs=0.011)


# ---- properties
@settings(max_examples=30, deadline=None)
@given(tied_scores(), st.randoms(use_true_random=False))
def test_expectation_does_not_depend_on_the_order_of_images_and_captions(case, random):
    similarity, owner = case
    rows, columns = list(range(len(similarity))), list(range(len(owner)))
    random.shuffle(rows), random.shuffle(columns)
    shuffled = recall.evaluate(similarity[rows][:, columns], np.argsort(rows)[owner][columns])
    plain = recall.evaluate(similarity, owner)
    assert shuffled.i2t_ranks == pytest.approx(plain.i2t_ranks[rows])
    assert shuffled.t2i_hits == pytest.approx(plain.t2i_hits[columns])


@settings(max_examples=30, deadline=None)
@given(tied_scores())
def test_hits_grow_with_k_and_the_optimistic_rule_is_an_upper_bound(case):
    found = {ties: recall.evaluate(*case, ks=(1, 2, 3), ties=ties) for ties in recall.TIES}
    for hits in ("i2t_hits", "t2i_hits"):
        expected = getattr(found["expectation"], hits)
        assert (
            (np.diff(expected, axis=1) >= -1e-12).all()
            and expected.min() >= 0
            and expected.max() <= 1
        )
        assert (getattr(found["optimistic"], hits) >= expected - 1e-12).all()
        assert (getattr(found["optimistic"], hits) >= getattr(found["released"], hits)).all()


def test_raising_own_scores_never_lowers_recall():
    similarity, owner = scored(3, levels=4)
    raised = similarity.copy()
    raised[owner, np.arange(len(owner))] += 0.25
    before, after = recall.evaluate(similarity, owner), recall.evaluate(raised, owner)
    assert (after.i2t_hits >= before.i2t_hits - 1e-12).all()
    assert (after.t2i_hits >= before.t2i_hits - 1e-12).all()
    assert after.metrics["mR"] > before.metrics["mR"]


def test_scores_that_say_nothing_give_chance_and_only_by_expectation():
    owner = np.repeat(np.arange(20), 5)
    constant = np.ones((20, 100))
    chance = recall.chance(owner)
    assert recall.evaluate(constant, owner).metrics == pytest.approx(chance)
    assert [chance["t2i_R@1"], chance["t2i_R@10"], chance["i2t_R@1"]] == pytest.approx([5, 50, 5])
    assert chance["t2i_median_rank"] == 9.5
    assert recall.evaluate(constant, owner, ties="optimistic").metrics["mR"] == 100
    # only the last image
    assert recall.evaluate(constant, owner, ties="released").metrics["i2t_R@5"] == 5
    rng = np.random.default_rng(0)
    drawn = [recall.evaluate(rng.random((20, 100)), owner).metrics for _ in range(200)]
    assert np.mean([m["mR"] for m in drawn]) == pytest.approx(chance["mR"], abs=0.6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_any_number_type_and_infinite_scores(dtype):
    similarity, owner = scored(4, levels=4)
    similarity = (similarity * 4).astype(dtype)
    dropped = similarity.astype(float)
    assert recall.evaluate(similarity, owner).metrics == recall.evaluate(dropped, owner).metrics
    dropped[:, :70] = -np.inf
    lowest = np.where(np.isinf(dropped), -1e9, dropped)
    assert recall.evaluate(dropped, owner).metrics == recall.evaluate(lowest, owner).metrics


def test_a_transposed_view_gives_the_same():
    similarity, owner = scored(5, images=200)
    fortran = np.asfortranarray(similarity)
    assert recall.evaluate(fortran, owner).metrics == recall.evaluate(similarity, owner).metrics


# ---- intervals and the paired test
def test_bootstrap_holds_the_estimate_is_reproducible_and_shrinks_with_images():
    widths = []
    for images in (50, 800):
        similarity, owner = scored(6, images)
        found = recall.evaluate(similarity, owner)
        intervals = recall.bootstrap(found, owner, samples=500)
        assert intervals == recall.bootstrap(found, owner, samples=500)
        assert list(intervals) == [*RECALLS, "mR"]
        assert all(low <= found.metrics[key] <= high for key, (low, high) in intervals.items())
        widths.append(intervals["t2i_R@10"][1] - intervals["t2i_R@10"][0])
    assert widths[1] < widths[0]


def test_bootstrap_width_is_the_binomial_one_where_only_images_are_drawn():
    """Half of 400 images hit: 50 +- 1.96 * 100 * sqrt(.25 / 400) = 50 +- 4.9 for i2t, and the same
    for t2i, since the five captions of an image follow it and are no fivefold sample.
    """
    hit = np.arange(400) % 2 == 0
    owner = np.repeat(np.arange(400), 5)
    found = recall.Recall(
        "expectation",
        (1,),
        1.0 - hit,
        1.0 - hit[owner],
        hit[:, None].astype(float),
        hit[owner][:, None].astype(float),
    )
    intervals = recall.bootstrap(found, owner)
    for key in ("i2t_R@1", "t2i_R@1", "mR"):
        assert intervals[key] == pytest.approx((45.1, 54.9), abs=0.6)


def test_bootstrap_weighs_images_by_their_captions():
    """Two images, one with 9 captions that hit, one with 1 that misses: t2i is 0, 90 or 100 %,
    never 50 %.
    """
    owner = np.array([0] * 9 + [1])
    hits = (owner == 0)[:, None].astype(float)
    found = recall.Recall("expectation", (1,), np.zeros(2), 1 - hits[:, 0], np.ones((2, 1)), hits)
    assert recall.bootstrap(found, owner, level=0.4)["t2i_R@1"][0] == pytest.approx(90)
    assert recall.bootstrap(found, owner, level=0.9)["t2i_R@1"] == pytest.approx((0, 100))


def test_paired_test_tells_a_better_run_from_an_equal_one():
    similarity, owner = scored(7, images=120)
    better = similarity.copy()
    better[owner, np.arange(len(owner))] += 0.5
    a, b = recall.evaluate(better, owner), recall.evaluate(similarity, owner)
    result = recall.paired_test(a, b, owner, samples=999)
    assert result["mR"]["difference"] == pytest.approx(a.metrics["mR"] - b.metrics["mR"])
    assert result["mR"]["p"] == pytest.approx(1 / 1000)
    assert result["mR"]["low"] > 0
    turned = recall.paired_test(b, a, owner, samples=999)
    assert turned["mR"]["difference"] == pytest.approx(-result["mR"]["difference"])
    assert turned["i2t_R@1"]["p"] == result["i2t_R@1"]["p"]
    same = recall.paired_test(a, a, owner, samples=99)
    assert all(row == {"difference": 0, "low": 0, "high": 0, "p": 1} for row in same.values())


def test_p_values_are_uniform_when_nothing_differs():
    """Two noisy runs of equal quality: about one in ten comparisons has p < 0.1."""
    small = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        similarity, owner = scored(seed, images=40)
        runs = [
            recall.evaluate(similarity + rng.standard_normal(similarity.shape), owner)
            for _ in range(2)
        ]
        small.append(recall.paired_test(*runs, owner, samples=200)["mR"]["p"] < 0.1)
    assert 0 < sum(small) <= 14  # binomial(60, 0.1): 6 expected, more than 14 in one of 2000


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.5, 3.5, "higher"),
        (-3.5, -0.5, "lower"),
        (-0.5, 3.5, "no difference can be shown"),
        (0.0, 3.5, "no difference can be shown"),
    ],
)
def test_a_verdict_names_a_difference_only_where_its_interval_leaves_zero_out(low, high, shown):
    said = recall.verdict("mR, a - b", {"difference": 1.25, "low": low, "high": high, "p": 0.1})
    assert said == f"mR, a - b: +1.2, 95 % interval {low:+.1f} to {high:+.1f}: {shown}"


def test_paired_test_equals_the_exact_permutation_p():
    """Four images that all gain alike: 2 of the 16 sign patterns are as extreme, p = 1/8."""
    owner = np.arange(4)
    ones, zeros = np.ones((4, 1)), np.zeros((4, 1))
    a = recall.Recall("expectation", (1,), zeros[:, 0], zeros[:, 0], ones, ones)
    b = recall.Recall("expectation", (1,), ones[:, 0], ones[:, 0], zeros, zeros)
    assert recall.paired_test(a, b, owner)["mR"]["p"] == pytest.approx(1 / 8, abs=0.02)


def test_arrays_restore_the_recall():
    similarity, owner = scored(8, levels=3)
    found = recall.evaluate(similarity, owner)
    restored = recall.Recall.from_arrays(found.ties, found.arrays())
    assert restored.metrics == found.metrics and restored.ks == found.ks


# ---- bad input
@pytest.mark.parametrize("row, column", [(0, 0), (29, 149), (15, 3)])
def test_nan_is_refused_wherever_it_stands(row, column):
    similarity, owner = scored()
    similarity[row, column] = np.nan
    with pytest.raises(UserError, match="NaN"):
        recall.evaluate(similarity, owner)


GOOD = np.zeros((2, 3)), np.array([0, 1, 1])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"similarity": np.zeros(3)}, r"shape \(images, captions\)"),
        (
            {"similarity": np.zeros((0, 0)), "owner": np.zeros(0, int)},
            r"shape \(images, captions\)",
        ),
        ({"similarity": GOOD[0] > 0}, "bool"),
        ({"similarity": GOOD[0].T}, "owner is int64 of shape"),
        ({"owner": np.array([0.0, 1, 1])}, "whole number"),
        ({"owner": np.array([0, 1, 2])}, "names image rows 0 to 2, but there are 2 images"),
        ({"owner": np.array([-1, 0, 1])}, "names image rows -1"),
        ({"owner": np.array([1, 1, 1])}, r"1 images have no caption \(first: row 0\)"),
        ({"ks": (0, 5)}, "cut-offs"),
        ({"ks": (1, 1)}, "cut-offs"),
        ({"ties": "luck"}, "Unknown tie rule 'luck'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        recall.evaluate(**{"similarity": GOOD[0], "owner": GOOD[1]} | arguments)


def test_runs_that_cannot_be_paired_are_refused():
    similarity, owner = scored()
    a = recall.evaluate(similarity, owner)
    for other in ({"ties": "released"}, {"ks": (1,)}):
        b = recall.evaluate(similarity, owner, **other)
        with pytest.raises(UserError, match="cut-offs, tie rule"):
            recall.paired_test(a, b, owner)
    with pytest.raises(UserError, match="level"):
        recall.bootstrap(a, owner, level=95)
    with pytest.raises(UserError, match="owner"):
        recall.bootstrap(a, owner[:-1])

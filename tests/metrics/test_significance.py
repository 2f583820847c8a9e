"""Comparing systems: corrections and groups against their definitions, the tests against exact and
simulated cases.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nbhelpers.errors import UserError
from nbhelpers.metrics import recall, significance
from nbhelpers.results import records

UCM = Path(__file__).parents[2] / "data" / "results" / "ucm"


def run(rate: float, seed: int = 0, images: int = 60, noise: float = 1.0):
    """A run whose own captions score higher by `rate`; seeds share the noise of images."""
    owner = np.repeat(np.arange(images), 3)
    scores = np.random.default_rng(99).standard_normal((images, len(owner)))
    scores += noise * np.random.default_rng(seed).standard_normal(scores.shape)
    scores[owner, np.arange(len(owner))] += rate
    return recall.evaluate(scores, owner), owner


def test_image_shares_add_up_to_the_metrics():
    found, owner = run(2.0)
    for metric in ("i2t_R@1", "t2i_R@10", "mR"):
        assert recall.image_shares(found, owner, metric).sum() == pytest.approx(
            found.metrics[metric]
        )
    with pytest.raises(UserError, match="no metric 'R@1'.*i2t_R@1"):
        recall.image_shares(found, owner, "R@1")


# ---- Holm
def test_holm_by_hand():
    """Four p-values, smallest times 4, next times 3, ..., and never less than the one before."""
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert list(significance.holm([0.9, 0.8])) == [1, 1] and len(significance.holm([])) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.2))
def test_holm_rejects_what_the_step_down_procedure_rejects(p, level):
    """The procedure: go through the p-values from the smallest, stop at the first that is above
    level / (those left).
    """
    rejected, left = set(), len(p)
    for value in sorted(p):
        if value * left > level:
            break
        rejected.add(value)
        left -= 1
    assert {
        value
        for value, corrected in zip(p, significance.holm(p), strict=True)
        if corrected <= level
    } == rejected


# ---- letters
def symmetric(size: int, pairs) -> np.ndarray:
    different = np.zeros((size, size), bool)
    for one, other in pairs:
        different[one, other] = different[other, one] = True
    return different


@pytest.mark.parametrize(
    "size, pairs, expected",
    [
        (3, [], ["a", "a", "a"]),
        (3, [(0, 1), (0, 2), (1, 2)], ["a", "b", "c"]),
        (3, [(0, 2)], ["a", "ab", "b"]),
        (4, [(0, 2), (0, 3), (1, 3)], ["a", "ab", "bc", "c"]),
        (1, [], ["a"]),
    ],
)
def test_letters_of_small_cases(size, pairs, expected):
    assert significance.letters(symmetric(size, pairs)) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 7).flatmap(
        lambda size: st.tuples(
            st.just(size), st.sets(st.sampled_from(list(combinations(range(size), 2)) or [(0, 0)]))
        )
    )
)
def test_two_share_a_letter_exactly_if_they_do_not_differ(case):
    size, pairs = case
    different = symmetric(size, [pair for pair in pairs if pair[0] != pair[1]])
    found = significance.letters(different)
    for one, other in combinations(range(size), 2):
        assert bool(set(found[one]) & set(found[other])) != different[one, other]
    assert all(found), "everybody has a letter"


def test_there_are_names_for_more_than_26_groups():
    found = significance.letters(~np.eye(30, dtype=bool))
    assert found[25] == "z" and found[26] == "a'" and len(set(found)) == 30


# ---- tests
def test_one_pair_with_one_seed_is_the_paired_test():
    (a, owner), b = run(1.0), run(0.6, seed=5)[0]
    found = significance.groups({"a": {0: a}, "b": {0: b}}, owner, "t2i_R@5", samples=500)
    expected = recall.paired_test(a, b, owner, samples=500)["t2i_R@5"]
    assert found.differences.loc["a", "b"] == pytest.approx(expected["difference"])
    assert found.p.loc["a", "b"] == pytest.approx(expected["p"])
    assert (
        significance.paired_test({0: a}, {0: b, 1: a}, owner, "t2i_R@5", samples=500)
        == {"seeds": 1} | expected
    )


def test_groups_stand_in_order_and_say_which_differences_are_real():
    owner = run(0)[1]
    runs = {
        "poor": {0: run(0.2)[0]},
        "good": {0: run(2.5)[0]},
        "also good": {0: run(2.4, seed=3)[0]},
    }
    found = significance.groups(runs, owner)
    assert found.table["group"].to_dict() == {
        found.table.index[0]: "a",
        found.table.index[1]: "a",
        "poor": "b",
    }
    assert list(found.table["mean"]) == sorted(found.table["mean"], reverse=True)
    assert found.table.loc["good", "mean"] == pytest.approx(runs["good"][0].metrics["mR"])
    assert found.table.spread.isna().all() and (found.table.seeds == 1).all()
    assert (found.differences.to_numpy() == -found.differences.to_numpy().T).all() and (
        np.diag(found.p) == 1
    ).all()
    assert sum("is better than poor by" in said for said in found.sentences()) == 2
    assert sum("cannot be told apart" in said for said in found.sentences()) == 1


def test_many_comparisons_cost():
    """The pair that differs at p = .03 alone does not among ten others."""
    (a, owner), b = run(1.0), run(0.8, seed=4)[0]
    alone = significance.groups({"a": {0: a}, "b": {0: b}}, owner).p.loc["a", "b"]
    more = {f"c{k}": {0: run(1.0, seed=k + 20)[0]} for k in range(4)}
    assert (
        alone
        < significance.groups({"a": {0: a}, "b": {0: b}} | more, owner).p.loc["a", "b"]
        <= 15 * alone + 1e-9
    )


def test_the_crossed_test_is_min_f():
    differences = np.random.default_rng(0).normal(0.3, 1, (4, 30))
    by_seed, by_image = (
        stats.ttest_1samp(differences.mean(axis), 0).statistic ** 2 for axis in (1, 0)
    )
    f = by_seed * by_image / (by_seed + by_image)
    freedom = (by_seed + by_image) ** 2 / (by_seed**2 / 29 + by_image**2 / 3)
    found = significance.crossed_test(differences)
    assert found["p"] == pytest.approx(stats.f.sf(f, 1, freedom)) and found[
        "difference"
    ] == pytest.approx(differences.mean())
    edge = significance.crossed_test(differences - found["low"])["p"]
    assert edge == pytest.approx(0.05), "an interval of 95 % ends where p is 5 %"
    assert found["high"] - found["difference"] == pytest.approx(found["difference"] - found["low"])
    assert (
        significance.crossed_test(np.zeros((2, 5)))["p"] == 1
        and significance.crossed_test(np.ones((2, 5)))["p"] == 0
    )


def test_the_crossed_test_holds_its_level_where_the_seed_decides():
    """Equal systems whose seeds differ much: testing the images alone calls most of them different,
    by mistake.
    """
    rng, crossed, images_alone = np.random.default_rng(1), 0, 0
    for _ in range(300):
        differences = rng.normal(0, 1, (5, 1)) + rng.normal(0, 1, (5, 80))
        crossed += significance.crossed_test(differences)["p"] < 0.05
        images_alone += stats.ttest_1samp(differences.mean(0), 0).pvalue < 0.05
    assert crossed <= 32 and images_alone > 150  # binomial(300, 0.06): more than 32 in one of 1000


def test_several_seeds_are_averaged_and_paired_by_seed():
    owner = run(0)[1]
    runs = {
        "a": {0: run(2.0, 1)[0], 1: run(2.0, 2)[0], 2: run(2.0, 3)[0]},
        "b": {1: run(0.5, 2)[0], 2: run(0.5, 3)[0], 7: run(0.5, 9)[0]},
    }
    found = significance.groups(runs, owner)
    scores = [one.metrics["mR"] for one in runs["a"].values()]
    assert found.table.loc["a", ["seeds", "mean", "spread"]].tolist() == pytest.approx(
        [3, np.mean(scores), np.std(scores, ddof=1)]
    )
    both = [runs["a"][seed].metrics["mR"] - runs["b"][seed].metrics["mR"] for seed in (1, 2)]
    assert found.differences.loc["a", "b"] == pytest.approx(np.mean(both))
    shares = [
        recall.image_shares(runs["a"][seed], owner) - recall.image_shares(runs["b"][seed], owner)
        for seed in (1, 2)
    ]
    assert found.p.loc["a", "b"] == pytest.approx(significance.crossed_test(np.array(shares))["p"])
    pair = significance.paired_test(runs["a"], runs["b"], owner)
    assert (
        pair["seeds"] == 2
        and pair["difference"] == pytest.approx(np.mean(both))
        and pair["low"] < pair["difference"] < pair["high"]
    )
    assert pair["p"] == pytest.approx(found.p.loc["a", "b"])


def test_the_committed_records_give_groups():
    runs, owners = {}, {}
    for record in records.read(UCM):
        name = f"{record['system']} {record['variant']}"
        found, owners[name] = records.read_recall(UCM / f"{records.file_stem(record)}.json")
        runs.setdefault(name, {})[record["seed"]] = found
    found = significance.groups(runs, owners["PIR "])
    assert not set(found.table.loc["PIR ", "group"]) & set(
        found.table.loc["CLIP zero_shot", "group"]
    )
    assert set(found.table.loc["PIR ", "group"]) & set(found.table.loc["PIR-CLIP ", "group"])


# ---- bad input
def test_what_cannot_be_compared_is_refused():
    (a, owner), (b, _) = run(1.0), run(1.0, images=50)
    for runs, words in (
        ({}, "at least one run"),
        ({"a": {}}, "at least one run"),
        ({"a": {0: a}, "b": {0: b}}, "number of queries"),
        ({"a": {0: a}, "b": {1: a}}, "no seed in common"),
    ):
        with pytest.raises(UserError, match=words):
            significance.groups(runs, owner)

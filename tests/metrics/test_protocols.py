import numpy as np
import pytest

from nbhelpers.errors import UserError
from nbhelpers.metrics import protocols, recall
from nbhelpers.metrics.protocols import Scores

TOY = np.array([[0.9, 0.2, 0.9], [0.5, 0.7, 0.5]])
TEXTS, OWNER = ["a lake", "a road", "A  lake"], np.array([0, 1, 1])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rule", recall.TIES)
def test_tie_rules_are_those_of_recall(seed, rule):
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.concatenate([np.arange(12), rng.integers(0, 12, 30)]))
    scores = rng.integers(0, 6, (12, 42)) if seed % 2 else rng.random((12, 42))
    texts = [str(number) for number in range(42)]
    found, kept = protocols.evaluate(rule, Scores.of(scores), texts, owner)
    expected = recall.evaluate(scores, owner, ties=rule)
    assert np.array_equal(kept, owner)
    for name, values in expected.arrays().items():
        assert np.array_equal(found.arrays()[name], values)


def test_any_owner_counts_as_worked_out_by_hand():
    strict, _ = protocols.evaluate("expectation", Scores.of(TOY), TEXTS, OWNER)
    loose, kept = protocols.evaluate("any-owner", Scores.of(TOY), TEXTS, OWNER)
    assert strict.metrics["t2i_R@1"] == pytest.approx(200 / 3)
    assert loose.metrics["t2i_R@1"] == 100 and len(kept) == 3
    assert strict.metrics["i2t_R@1"] == 75 and loose.metrics["i2t_R@1"] == 100


def test_unique_texts_leave_the_first_of_equal_captions():
    found, kept = protocols.evaluate("unique-texts", Scores.of(TOY), TEXTS, OWNER)
    assert kept.tolist() == [0, 1] and found.t2i_hits.shape == (2, 3)
    assert found.metrics["t2i_R@1"] == 100


def test_the_bridge_has_a_sentence_for_each_protocol_and_numbers_where_it_can():
    table = protocols.bridge(Scores.of(TOY), TEXTS, OWNER, {"prefix": Scores.of(TOY * 0)})
    assert list(table.index) == list(protocols.PROTOCOLS)
    assert table["what it does"].str.len().min() > 40
    assert table.mR.isna().sum() == 1 and "--model" in table["what it does"]["capitalize"]
    assert table.difference["expectation"] == 0 and table.difference["prefix"] < 0
    assert table.captions["unique-texts"] == 2


def test_nan_and_unknown_protocols_are_refused():
    with pytest.raises(UserError, match="scores hold NaN"):
        protocols.evaluate("any-owner", Scores.of(TOY * np.nan), TEXTS, OWNER)
    with pytest.raises(UserError, match="Unknown protocol 'skyscript'; choose one of expectation"):
        protocols.evaluate("skyscript", Scores.of(TOY), TEXTS, OWNER)

import numpy as np
import pytest

from nbhelpers.data.distinct import Rows, distinct
from nbhelpers.errors import UserError
from nbhelpers.metrics import blocks, recall


def case(seed):
    """Embeddings with repeated rows, coarse numbers that tie, and captions in any order."""
    rng = np.random.default_rng(seed)
    images, width = int(rng.integers(1, 40)), int(rng.integers(1, 9))
    owner = np.concatenate([np.arange(images), rng.integers(0, images, rng.integers(0, 90))])
    owner = rng.permutation(owner) if seed % 2 else np.sort(owner)
    high = 2 if seed % 3 else 100
    seen = rng.integers(-high, high + 1, (images, width)).astype(np.float32)
    read = rng.integers(-high, high + 1, (len(owner), width)).astype(np.float32)
    seen[rng.integers(0, images, 3)] = seen[0]
    read[rng.integers(0, len(owner), 5)] = read[0]
    return seen, read, owner


@pytest.mark.parametrize("part", range(4))
def test_blocks_equal_brute_force_to_the_last_digit(monkeypatch, part):
    for seed in range(50 * part, 50 * part + 50):
        monkeypatch.setattr(blocks, "ROWS", 1 + seed % 13)
        monkeypatch.setattr(blocks, "COLUMNS", 1 + seed % 17)
        images, texts, owner = case(seed)
        found = blocks.evaluate(images, texts, owner, normalise=False)
        for rule in recall.TIES:
            expected = recall.evaluate(images @ texts.T, owner, ties=rule)
            assert found[rule].metrics == expected.metrics
            for name, values in expected.arrays().items():
                assert np.array_equal(found[rule].arrays()[name], values)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_of(vectors):
    once = distinct([row.tobytes() for row in vectors])
    return Rows(vectors[once.first], once.row)


def test_equal_vectors_tie_in_blocks_of_any_shape(monkeypatch):
    monkeypatch.setattr(blocks, "ROWS", 32)
    monkeypatch.setattr(blocks, "COLUMNS", 48)
    rng = np.random.default_rng(1)
    images = rng.standard_normal((100, 64)).astype(np.float32)
    images[60:] = images[:40]
    owner = np.repeat(np.arange(100), 3)
    texts = images[owner] + rng.standard_normal((300, 64)).astype(np.float32)
    texts[200:260] = texts[:60]
    expected = recall.evaluate(rows_of(unit(images)).products(rows_of(unit(texts))), owner)
    found = blocks.evaluate(images, texts, owner)["expectation"]
    assert found.metrics == expected.metrics
    assert found.t2i_ranks.max() % 1 == 0.5 or (found.t2i_ranks % 1 == 0.5).any()


def test_lengths_count_only_without_normalising():
    images = np.array([[1, 0], [3, 3]], np.float32)
    texts, owner = np.array([[1, 0.0], [0, 1]], np.float64), np.array([0, 1])
    assert blocks.evaluate(images, texts, owner)["optimistic"].metrics["t2i_R@1"] == 100
    raw = blocks.evaluate(images, texts, owner, normalise=False)["optimistic"]
    assert raw.metrics["t2i_R@1"] == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, t: t.__setitem__((1, 0), np.nan), "Row 1 of the captions holds NaN"),
        (lambda i, t: i.__setitem__((0, 0), np.inf), "Row 0 of the images holds NaN or infinity"),
        (lambda i, t: i.__setitem__(1, 0), "Row 1 of the images is zero"),
    ],
)
def test_rows_that_are_no_vectors_are_refused(change, message):
    images, texts = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    change(images, texts)
    with pytest.raises(UserError, match=message):
        blocks.evaluate(images, texts, np.array([0, 1]))


def test_other_widths_and_rules_are_refused():
    two, three = np.ones((2, 2), np.float32), np.ones((2, 3), np.float32)
    with pytest.raises(UserError, match="rows of one width"):
        blocks.evaluate(two, three, np.array([0, 1]))
    with pytest.raises(UserError, match="Unknown tie rule 'best'"):
        blocks.evaluate(two, two, np.array([0, 1]), ("best",))

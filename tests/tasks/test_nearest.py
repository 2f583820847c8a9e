"""Large galleries are searched through lists, small ones by comparing with all."""

import numpy as np
import pytest

from nbhelpers.errors import UserError
from nbhelpers.tasks import nearest
from nbhelpers.tasks.nearest import Nearest, folder_of


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def vectors():
    """2,000 vectors around 40 kinds."""
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((40, 24))
    return (kinds[rng.integers(0, 40, 2000)] + 0.7 * rng.standard_normal((2000, 24))).astype("f4")


@pytest.fixture
def few(monkeypatch):
    """A rule that makes lists of 500 vectors and more, and blocks that do not divide them."""
    monkeypatch.setattr(nearest, "FLAT", 500)
    monkeypatch.setattr(nearest, "BLOCK", 333)


def brute_force(questions, vectors, k):
    scores = unit(questions) @ unit(vectors).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(scores, rows, 1)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("k", [1, 7, 5000])
def test_a_small_gallery_is_compared_as_brute_force_does(vectors, dtype, k):
    gallery = Nearest.of(vectors.astype(dtype))
    assert gallery.lists is None and gallery.recall == 1
    found = gallery.search(vectors[:5] + 0.1, k)
    rows, scores = brute_force(vectors[:5] + 0.1, vectors.astype(dtype).astype("f4"), k)
    assert found.rows.shape == (5, min(k, 2000))
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    assert (found.rows == rows).mean() > 0.99  # near ties may change places
    assert gallery.how() == "The question was compared with all 2,000 vectors."


def test_of_equal_vectors_the_first_row_leads(vectors):
    vectors[1500] = vectors[3] = vectors[700]
    assert Nearest.of(vectors).search(vectors[700:701], 3).rows.tolist() == [[3, 700, 1500]]


def test_a_large_gallery_is_searched_through_lists_with_its_recall(vectors, few):
    gallery = Nearest.of(vectors)
    assert gallery.lists.nlist == 45 and gallery.read < 45
    assert gallery.recall >= nearest.TARGET
    questions = vectors[::20] + 0.05
    found, right = gallery.search(questions), gallery.flat(questions)
    np.testing.assert_allclose(right.scores, brute_force(questions, vectors, 10)[1], atol=1e-6)
    shared = [len(np.intersect1d(a, b)) for a, b in zip(found.rows, right.rows, strict=True)]
    assert np.mean(shared) / 10 == pytest.approx(gallery.recall, abs=0.03)
    assert f"finds {100 * gallery.recall:.1f} % of what comparing with all finds" in gallery.how()


def test_fewer_lists_are_read_where_less_must_be_found(vectors, few, monkeypatch):
    read = Nearest.of(vectors).read
    monkeypatch.setattr(nearest, "TARGET", 0.2)
    assert Nearest.of(vectors).read < read


def test_more_answers_than_the_lists_hold_come_from_all(vectors, few, monkeypatch):
    monkeypatch.setattr(nearest, "TARGET", 0.2)
    found = Nearest.of(vectors).search(vectors[:1], 1900)
    assert sorted(found.rows[0]) == sorted(brute_force(vectors[:1], vectors, 1900)[0][0])


def test_lists_are_kept_and_belong_to_their_vectors(vectors, few, tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "these")
    first = Nearest.of(vectors, folder)
    monkeypatch.setattr(nearest, "_with_lists", lambda _: pytest.fail("they are there"))
    again = Nearest.of(vectors, folder)
    assert (again.read, again.recall) == (first.read, first.recall)
    assert np.array_equal(again.search(vectors[:9]).rows, first.search(vectors[:9]).rows)
    assert folder_of(tmp_path, "others") != folder
    with pytest.raises(UserError, match="delete that folder, and they are made again"):
        Nearest.of(vectors[:1000], folder)


def test_what_cannot_be_searched_is_refused(vectors, few):
    gallery = Nearest.of(vectors)
    with pytest.raises(UserError, match="has 5 numbers and the gallery has 24 a vector"):
        gallery.search(vectors[:1, :5])
    with pytest.raises(UserError, match="to find 0 vectors; ask for at least 1"):
        gallery.search(vectors[:1], 0)
    with pytest.raises(UserError, match="Row 0 of the questions is zero"):
        gallery.search(vectors[:1] * 0)
    vectors[1999] = np.nan
    for some in (vectors, vectors[1800:]):
        with pytest.raises(UserError, match=f"Row {len(some) - 1} of the gallery holds NaN"):
            Nearest.of(some)

"""What systems get wrong: every count against a plain loop, the judgements on hand-made captions,
and real ranks reproduced.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nbhelpers.data import layouts
from nbhelpers.data.archives import open_images
from nbhelpers.data.array_store import ArrayStore
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.data.scenes import generate
from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import Tokenizer, train_tokenizer
from nbhelpers.errors import UserError
from nbhelpers.metrics import audit, recall
from nbhelpers.papers import cfitr, pir
from nbhelpers.systems import mistakes
from nbhelpers.systems.trained_systems import System
from nbhelpers.tasks import two_stage
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.towers.backbones import image_input, vilt_size


def table(texts: dict[str, list[str]], classes: dict[str, str] | None = None) -> CaptionTable:
    images = pd.DataFrame(
        {
            "image_id": list(texts),
            "file": list(texts),
            "split": "test",
            "scene": [(classes or {}).get(image, image) for image in texts],
        }
    )
    return CaptionTable(
        "made",
        images,
        pd.DataFrame(
            [(i, t) for i, some in texts.items() for t in some], columns=["image_id", "text"]
        ),
    )


def drawn(numbers, count: int = 60) -> CaptionTable:
    """The images with these numbers of each class of the generated set, as one split."""
    images = {
        spec.name: generate.draw(spec) for spec in generate.specs(count) if spec.number in numbers
    }
    return table(
        {name: one.captions for name, one in images.items()},
        {name: one.spec.scene for name, one in images.items()},
    )


PORT = table(
    {
        "a": ["many boats .", "a grey pier"],
        "b": ["Many  boats .", "white boats at a pier"],
        "c": ["a road", "a grey road"],
        "d": ["a bare hill", "nothing"],
    },
    {"a": "port", "b": "port", "c": "road"},
)


@st.composite
def scored(draw):
    """Few queries and items with many equal scores, some never ranked, and at least one right item
    each.
    """
    queries, items = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rows = st.lists(st.sampled_from([0.0, 1.0, 2.0, -np.inf]), min_size=items, max_size=items)
    scores = np.array(draw(st.lists(rows, min_size=queries, max_size=queries)))
    # each query has ranked something
    scores[:, draw(st.integers(0, items - 1))] = 1.0
    right = np.array(
        draw(
            st.lists(
                st.lists(st.booleans(), min_size=items, max_size=items),
                min_size=queries,
                max_size=queries,
            )
        )
    )
    right[:, draw(st.integers(0, items - 1))] = True
    right[draw(st.integers(0, queries - 1))] = True
    return scores, right


def orders(scores):
    """Every ranking of the items that the scores allow."""
    return [
        order
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in zip(order, order[1:], strict=False))
    ]


# ---- recall with several right items
@settings(max_examples=80, deadline=None)
@given(scored())
def test_recall_is_the_average_over_every_order_of_the_ties(case):
    scores, right = case
    found = mistakes.Scores(scores, scores).recall(right, ks=(1, 2, 3))
    for query, (row, own) in enumerate(zip(scores, right, strict=True)):
        best = row[own].max()
        possible = [min(order.index(item) for item in np.flatnonzero(own)) for order in orders(row)]
        expected = [
            np.mean([rank < k for rank in possible]) if np.isfinite(best) else 0 for k in (1, 2, 3)
        ]
        assert found.i2t_hits[query] == pytest.approx(expected)
        assert found.i2t_ranks[query] == pytest.approx(np.mean(possible))


def test_own_pairs_give_the_protocols_recall():
    rng, owner = np.random.default_rng(0), np.repeat(np.arange(20), 3)
    similarity = rng.integers(0, 9, (20, 60)).astype(float)
    expected, found = (
        recall.evaluate(similarity, owner),
        mistakes.Scores(similarity, similarity).recall(mistakes.own_pairs(owner)),
    )
    for name in recall.QUERY_ARRAYS:
        assert getattr(found, name) == pytest.approx(getattr(expected, name))
    assert found.metrics == pytest.approx(expected.metrics)


def test_two_stages_give_the_recall_of_the_two_stage_search():
    rng, owner = np.random.default_rng(1), np.repeat(np.arange(15), 3)
    coarse, fine = rng.random((2, 15, 45))
    masks = two_stage.chosen(coarse, 4), two_stage.chosen(coarse.T, 4).T
    found = mistakes.Scores(*(np.where(mask, fine, -np.inf) for mask in masks)).recall(
        mistakes.own_pairs(owner)
    )
    expected = two_stage.two_stage(coarse, fine, owner, 4)
    for name in recall.QUERY_ARRAYS:
        assert getattr(found, name) == pytest.approx(getattr(expected, name))


def test_a_query_without_a_right_item_is_refused():
    with pytest.raises(UserError, match="no right item"):
        mistakes.Scores(np.ones((2, 2)), np.ones((2, 2))).recall(
            np.array([[True, False], [True, False]])
        )


# ---- which items are right, or may be
def test_a_repeated_sentence_is_right_for_every_image_that_has_it():
    same = mistakes.same_sentence(PORT)
    expected = mistakes.own_pairs(PORT.owner())
    expected[1, 0] = expected[0, 2] = True  # "many boats ." of a and of b
    assert (same == expected).all()
    assert (mistakes.same_sentence(PORT, "exact") == mistakes.own_pairs(PORT.owner())).all()


def test_repetitions_make_a_hit_of_what_the_protocol_calls_a_miss():
    """Each caption finds the other image that has it; by the protocol wrong, with repetitions
    right.
    """
    twins = table({"a": ["many boats"], "b": ["many boats"]})
    scores = mistakes.Scores(*[np.array([[0.0, 1.0], [1.0, 0.0]])] * 2)
    assert scores.recall(mistakes.own_pairs(twins.owner()), (1,)).metrics["mR"] == 0
    assert scores.recall(mistakes.same_sentence(twins), (1,)).metrics["mR"] == 100


def test_all_words_by_a_plain_loop_on_generated_captions():
    some = drawn(range(3))
    words = [set(audit.NORMALISE["words"](text).split()) for text in some.captions.text]
    owner = some.owner()
    of_image = [
        set().union(*(words[j] for j in np.flatnonzero(owner == image)))
        for image in range(len(some))
    ]
    telling = {
        word
        for word in set().union(*words)
        if sum(word in all_of for all_of in of_image) <= len(some) / 2
    }
    expected = [[(word & telling) <= all_of for word in words] for all_of in of_image]
    assert (mistakes.all_words(some) == np.array(expected)).all()
    assert mistakes.all_words(some)[mistakes.own_pairs(owner)].all()


def test_each_pair_is_of_the_surest_kind_that_holds():
    """Images a and c look alike (equal hashes); a and b are of one class; "white boats at a pier"
    needs words that a lacks.
    """
    hashes = np.array([0, 2**60 - 1, 1, 2**40 - 1], np.uint64)
    found = np.array(mistakes.KINDS)[mistakes.kinds(PORT, hashes)]
    assert (found[mistakes.own_pairs(PORT.owner())] == "own").all()
    assert found[1, 0] == found[0, 2] == "same sentence"
    assert list(found[2, :2]) == list(found[0, 4:6]) == ["same picture"] * 2
    assert found[0, 3] == "same class" and found[3, 3] == "other class"
    assert found[1, 4] == "other class" and found[1, 5] == "other class"
    assert list(mistakes.classes(PORT)) == ["port", "port", "road", "unknown"]


def test_the_drawing_program_could_say_all_that_was_said():
    some = drawn([0], 30)
    whole = table({spec.name: [] for spec in generate.specs(30)})
    ids = list(some.images.image_id[:4])
    said = mistakes.truths(whole, ids)
    for name in ids:
        assert set(some.captions.text[some.captions.image_id == name]) <= said[name]
        assert "eleven purple ships are on the moon ." not in said[name]
    assert not said[ids[0]] <= said[ids[1]]


# ---- what mistakes have in common
def test_recall_by_class_is_the_recall_of_each_class():
    rng, owner = np.random.default_rng(2), np.repeat(np.arange(12), 2)
    found = recall.evaluate(rng.random((12, 24)), owner)
    scene = np.array(["port", "pond", "road"])[rng.integers(0, 3, 12)]
    by_class = mistakes.by_class(found, owner, scene)
    for name, row in by_class.iterrows():
        assert row["i2t_R@5"] == pytest.approx(100 * found.i2t_hits[scene == name, 1].mean())
        assert row["t2i_R@10"] == pytest.approx(
            100 * found.t2i_hits[scene[owner] == name, 2].mean()
        )
        assert row.images == (scene == name).sum()
        assert row.mR == pytest.approx(
            row[["i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10"]].mean()
        )
    assert by_class.mR.is_monotonic_increasing
    assert (by_class.mR * by_class.images).sum() / 12 == pytest.approx(found.metrics["mR"])


def test_confusion_shares_a_tied_first_place():
    scores = np.array([[3.0, 1, 0], [2, 2, 0], [0, 0, 1]])
    found = mistakes.confusion(
        scores, np.array(["port", "port", "road"]), np.array(["port", "pond", "pond"])
    )
    expected = pd.DataFrame(
        {"pond": [0, 25, 100], "port": [0, 75, 0], "road": [0, 0, 0]},
        index=["pond", "port", "road"],
    )
    assert (found.to_numpy() == expected.to_numpy()).all() and list(found) == list(expected)
    assert mistakes.misplaced(found) == ["road taken for pond: 100 %", "port taken for pond: 25 %"]


def test_shares_of_the_first_place_add_up():
    scores, kind = np.array([[1.0, 1], [0, 2]]), np.array([[0, 1], [0, 5]])
    assert mistakes.shares(scores, kind).to_dict() == dict(
        zip(mistakes.KINDS, [25, 25, 0, 0, 0, 50], strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(scored(), st.integers(1, 4))
def test_appearances_are_the_average_over_every_order_of_the_ties(case, k):
    scores = case[0]
    finite = np.isfinite(scores).sum(1).min()
    k = min(k, finite)
    expected = np.zeros(scores.shape[1])
    for row in scores:
        possible = orders(row)
        for order in possible:
            expected[list(order[:k])] += 1 / len(possible)
    assert mistakes.appearances(scores, k) == pytest.approx(expected)


def test_a_hub_is_seen_in_every_figure():
    counts = np.array([0.0, 0, 0, 0, 40, 1, 1, 2])
    found = mistakes.hubness(counts)
    assert found["skewness"] == pytest.approx(stats.skew(counts)) and found["skewness"] > 2
    assert found["largest / mean"] == pytest.approx(40 / 5.5) and found["hardly ever %"] == 50


def test_rank_correlation_is_spearmans_and_images_are_drawn_whole():
    rng, owner = np.random.default_rng(3), np.repeat(np.arange(40), 5)
    generic = rng.integers(1, 9, 200)
    ranks = generic + rng.normal(0, 2, 200)
    rho, low, high = mistakes.rank_correlation(generic, ranks, owner)
    assert rho == pytest.approx(stats.spearmanr(generic, ranks).statistic) and low < rho < high
    # five captions say the same
    whole = np.repeat(rng.integers(1, 9, 40), 5), np.repeat(rng.integers(1, 9, 40), 5)
    narrow, wide = (
        mistakes.rank_correlation(generic, rng.random(200), owner),
        mistakes.rank_correlation(*whole, owner),
    )
    assert wide[2] - wide[1] > 1.5 * (narrow[2] - narrow[1])


# ---- one interface to every system
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("misses")
    captions = generate.write_dataset(folder / "scenes", 24)
    listed = layouts.read(captions)
    pixels = DecodedCache.build(
        open_images(captions.parent / "images"), list(listed.images.file), folder / "cache"
    )
    words = train_tokenizer(list(listed.captions.text), folder / "words.json")
    return DataSet(listed, pixels, None, []), Tokenizer(words, 32, fixed=True), folder


def test_one_stage_gives_the_similarity_of_the_evaluation(data):
    whole, words, folder = data
    torch.manual_seed(0)
    model = pir.PIR(pir.PIRConfig.tiny(words.vocab_size)).eval()
    image = image_input(model.config.vision)
    found = mistakes.scores(
        System("pir", model, words, image, {}, folder), whole, folder, folder, k=3
    )
    expected = RetrievalTask(whole, words, image).embeddings(model, "test")
    assert_close(found.i2t, expected.similarity())
    assert found.i2t is found.t2i


def test_two_stages_rank_their_candidates_alone_as_23_cfitr_does(data):
    whole, words, folder = data
    torch.manual_seed(0)
    model = cfitr.CFITR(cfitr.CFITRConfig.tiny(words.vocab_size)).eval()
    image = vilt_size(model.config.vilt).image
    found = mistakes.scores(
        System("cfitr", model, words, image, {}, folder), whole, folder, folder, k=3
    )
    assert (np.isfinite(found.i2t).sum(1) == 3).all() and (np.isfinite(found.t2i).sum(0) == 3).all()

    task = RetrievalTask(whole, words, image)
    place = two_stage.store_folder(folder, model)
    pair = two_stage.write_stores(model, task, "test", place / "test")
    train = task.table("train")
    bank = [ArrayStore.open(place / "train" / kind) for kind in ("images", "texts")]
    assert len(bank[1]) == len(cfitr.without_repeats(train).captions) < len(train.captions)
    # what 23_cfitr has scored is read from there
    assert len(list((place / "test").glob("fine-*.npy"))) == 1
    coarse = two_stage.coarse_scores(*pair, banks=tuple(bank))["PPSR online"]
    fine = two_stage.fine_scores(model, *pair)
    owner = task.table("test").owner()
    expected = two_stage.two_stage(coarse[0], fine, owner, 3, coarse[1])
    recomputed = found.recall(mistakes.own_pairs(owner))
    for name in recall.QUERY_ARRAYS:
        assert getattr(recomputed, name) == pytest.approx(getattr(expected, name))


def test_scores_with_nan_are_not_ranked():
    scores = np.array([[0.5, np.nan], [0.1, 0.9]])
    with pytest.raises(UserError, match="hold NaN, so nothing can be ranked"):
        mistakes.Scores(scores, scores).recall(mistakes.own_pairs(np.array([0, 1])))

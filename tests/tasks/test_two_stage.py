"""The two-stage search: coarse scores against loops, rankings against all pairs, both directions,
and what is refused.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from closeness import assert_close
from coloured_set import coloured
from hypothesis import given, settings
from hypothesis import strategies as st

from nbhelpers.data.array_store import ArrayStore
from nbhelpers.data.tokenization import Tokenizer, train_tokenizer
from nbhelpers.errors import UserError
from nbhelpers.metrics import recall
from nbhelpers.papers.cfitr import CFITR, Captions, CFITRConfig
from nbhelpers.tasks import search_times, two_stage
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.tasks.two_stage import Search
from nbhelpers.towers import backbones
from nbhelpers.training import device

# what states kept in float16 may change in a score of the small models below; those spread over
# more than 0.5
HALF = 5e-3


def words(data, folder, length: int = 32):
    captions = list(data.table.split("train").captions.text)
    return Tokenizer(train_tokenizer(captions, folder / "tokenizer.json"), length, fixed=True)


def lively(config, seed: int = 0):
    """A random model in eval mode whose scores and codes differ clearly between pairs."""
    torch.manual_seed(seed)
    model = CFITR(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                name.startswith(("vilt.", "rank_output.", "imagepooler_be.", "textpooler_be."))
                and parameter.ndim > 1
            ):
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(data, tmp_path_factory):
    return words(data, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(tokenizer):
    return lively(CFITRConfig.tiny(tokenizer.vocab_size, bits=16, hidden=32))


@pytest.fixture(scope="module")
def task(data, tokenizer):
    return RetrievalTask(data, tokenizer, backbones.vilt_size("vilt_standin").image, workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def stores(model, task, folder):
    """(images, texts) of the test split: 12 and 24."""
    return two_stage.write_stores(model, task, "test", folder)


@pytest.fixture(scope="module")
def banks(model, task, tmp_path_factory):
    return two_stage.write_stores(
        model, task, "train", tmp_path_factory.mktemp("train"), states=False
    )


@pytest.fixture(scope="module")
def queries(model, task):
    """(encoded images, encoded texts) of the test split, their states in float32."""
    images, texts = two_stage.split_inputs(model, task, "test")
    return two_stage.encode(model, images(np.arange(12))), two_stage.encode(
        model, texts(np.arange(24))
    )


@pytest.fixture(scope="module")
def fine(model, stores):
    return two_stage.fine_scores(model, *stores)


def test_codes_states_and_scores_in_bf16_are_close_to_those_in_fp32(
    model, task, stores, fine, tmp_path, monkeypatch
):
    monkeypatch.setattr(device, "_encoding", "bf16")
    images, texts = two_stage.write_stores(model, task, "test", tmp_path)
    assert images.key == stores[0].key | {"encoded in": "bf16"}
    for ours, theirs in ((images, stores[0]), (texts, stores[1])):
        flipped = np.unpackbits(ours["codes"] ^ theirs["codes"]).mean()
        assert flipped < 0.05
        scale = np.abs(np.asarray(theirs["states"], np.float32)).max()
        difference = np.asarray(ours["states"], np.float32) - np.asarray(
            theirs["states"], np.float32
        )
        assert 0 < np.abs(difference).max() < 0.05 * scale
    found = two_stage.fine_scores(model, images, texts, kept=tmp_path)
    assert found.dtype == np.float32 and np.abs(found - fine).max() < 0.1 * np.ptp(fine)
    monkeypatch.setattr(device, "_encoding", "fp32")
    again = two_stage.fine_scores(model, images, texts, kept=tmp_path)
    assert not np.array_equal(again, found), "scores in bf16 are not taken for those in fp32"


# ---- coarse scores against loops
def codes(rows: int, bits: int, seed: int = 0) -> np.ndarray:
    return two_stage.pack(
        torch.from_numpy(np.random.default_rng(seed).integers(0, 2, (rows, bits)))
    )


def stable_best(scores, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda item: (-scores[item], item))[:k]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 140), st.integers(0, 99))
def test_packed_codes_differ_in_the_bits_that_differ(queries, items, bits, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2, (queries, bits)), rng.integers(0, 2, (items, bits))
    packed = two_stage.pack(torch.from_numpy(a) == 1), two_stage.pack(torch.from_numpy(2 * b - 1))
    assert packed[0].shape == (queries, -(-bits // 8)) and packed[0].dtype == np.uint8
    assert np.array_equal(two_stage.negative_hamming(*packed), -(a[:, None] != b).sum(2))


def post_processed(scores, neighbours):
    """The formula, item by item."""

    def mean(line):
        return np.mean(sorted(line)[-neighbours:])

    return [[2 * s - mean(row) - mean(scores[:, j]) for j, s in enumerate(row)] for row in scores]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 12), st.integers(0, 99))
def test_post_processing_follows_its_formula(queries, items, neighbours, seed):
    scores = -np.random.default_rng(seed).integers(0, 17, (queries, items)).astype(np.float32)
    assert_close(
        two_stage.post_process(scores, neighbours=neighbours), post_processed(scores, neighbours)
    )


def test_online_post_processing_takes_its_columns_from_the_bank():
    gallery, bank, query = codes(30, 16), codes(25, 16, 1), codes(4, 16, 2)
    columns = two_stage.bank_means(gallery, bank)
    assert columns == pytest.approx(
        np.sort(two_stage.negative_hamming(gallery, bank), axis=1)[:, -10:].mean(1)
    )
    scores = two_stage.negative_hamming(query, gallery)
    together = two_stage.post_process(scores, columns)
    alone = np.vstack([two_stage.post_process(row[None], columns) for row in scores])
    assert np.array_equal(together, alone)  # no query depends on another one
    assert not np.allclose(two_stage.post_process(scores), together)
    assert two_stage.bank_means(gallery, bank[:3]) == pytest.approx(
        two_stage.negative_hamming(gallery, bank[:3]).mean(1)
    )


def engine(model, gallery, **options) -> Search:
    """A search over codes alone, whose fine stage is never called."""
    key = two_stage.store_key(model, "texts")
    bank = (
        ArrayStore(key | {"kind": "images"}, {"codes": options.pop("bank")})
        if "bank" in options
        else None
    )
    return Search(
        model,
        ArrayStore(key, {"codes": gallery, "states": gallery, "mask": gallery}),
        bank,
        **options,
    )


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from([0, 1, 1000]),
    st.integers(0, 10_000),
)
def test_candidates_are_the_best_of_all_and_of_equal_ones_the_first(
    items, k, neighbours, pool, seed
):
    """Codes of few bits, so that many distances and scores tie.

    `pool` 0 is a search without a bank.
    """
    gallery, query, bank = codes(items, 8, seed), codes(3, 8, seed + 1), codes(15, 8, seed + 2)
    scores = two_stage.negative_hamming(query, gallery)
    if pool:
        scores = two_stage.post_process(
            scores, two_stage.bank_means(gallery, bank, neighbours), neighbours
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_stage.search, "POOL", pool)
        found = engine(
            Plain(), gallery, k=k, neighbours=neighbours, **({"bank": bank} if pool else {})
        ).coarse(query)
    assert found.rows.tolist() == [stable_best(row, k) for row in scores]
    assert np.array_equal(found.scores, np.take_along_axis(scores, found.rows, 1))
    assert np.array_equal(two_stage.chosen(scores, k).sum(1), [min(k, items)] * 3)
    assert [np.flatnonzero(mask).tolist() for mask in two_stage.chosen(scores, k)] == [
        sorted(stable_best(row, k)) for row in scores
    ]


@pytest.mark.parametrize("with_bank", [False, True])
def test_candidates_of_many_long_codes(with_bank):
    gallery, query, bank = codes(20_000, 128), codes(5, 128, 1), codes(300, 128, 2)
    scores = two_stage.negative_hamming(query, gallery)
    if with_bank:
        scores = two_stage.post_process(scores, two_stage.bank_means(gallery, bank))
    found = engine(Plain(), gallery, **({"bank": bank} if with_bank else {})).coarse(query)
    assert np.array_equal(found.rows, np.argsort(-scores, axis=1, kind="stable")[:, :70])


def test_a_far_item_that_no_query_of_the_bank_is_near_to_is_not_missed():
    """By Hamming distance it would come behind more others than are looked at first."""
    others = two_stage.POOL + 50
    bits = np.zeros((others + 1, 128), dtype=int)
    bits[:others, :10] = 1  # distance 10 from the query, 0 from the bank
    bits[others, 20:35] = 1  # distance 15 from the query, 25 from the bank
    gallery, bank, query = (
        two_stage.pack(torch.from_numpy(part)) for part in (bits, bits[:1], 0 * bits[:1])
    )
    found = engine(Plain(), gallery, bank=bank).coarse(query)
    assert found.rows[0].tolist() == [others, *range(69)]
    assert found.scores[0].tolist() == [-30 + 10 + 25] + 69 * [-20 + 10]


# ---- a model with known scores
class Plain(torch.nn.Module):
    """States are the inputs, codes their signs; a pair scores by the dot product of the sums of its
    states.
    """

    def __init__(self, bits: int = 8):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.config = CFITRConfig(bits=bits)
        self.eval()

    def image_states(self, vision):
        return vision * self.scale

    def text_states(self, text, mask):
        return text * self.scale

    def image_codes(self, states):
        return states[:, 0].tanh()

    text_codes = image_codes
    binary = staticmethod(CFITR.binary)

    def score_pairs(self, image_states, text_states, text_mask):
        return (image_states.sum(1) * (text_states * text_mask.unsqueeze(2)).sum(1)).sum(1)


def plain_rows(kind: str, rows: int, seed: int = 0) -> dict:
    states = torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(seed))
    inputs = (
        {"vision": states}
        if kind == "images"
        else {"text": states, "mask": torch.tensor([[1, 1, 0]]).expand(rows, -1)}
    )
    return two_stage.encode(Plain(), inputs)


def in_memory(kind: str, rows: dict) -> ArrayStore:
    arrays = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in rows.items()
    }
    return ArrayStore(two_stage.store_key(Plain(), kind), arrays)


@pytest.mark.parametrize("kind, other", [("images", "texts"), ("texts", "images")])
def test_equal_fine_scores_keep_the_order_of_the_candidates(kind, other):
    rows = plain_rows(kind, 6)
    twice = {name: value[[0, 1, 1, 2, 1, 3]] for name, value in rows.items()}
    found = Search(Plain(), in_memory(kind, twice))(plain_rows(other, 5, seed=1))
    for line in found.rows.tolist():
        assert [row for row in line if row in (1, 2, 4)] == [1, 2, 4]
        assert sorted(line) == list(range(6))


def test_masked_words_do_not_count():
    texts = plain_rows("texts", 4)
    changed = texts | {"states": texts["states"].clone()}
    changed["states"][:, 2] += 9
    query = plain_rows("images", 2, seed=1)
    assert np.array_equal(
        *(Search(Plain(), in_memory("texts", rows))(query).scores for rows in (texts, changed))
    )


def test_texts_of_like_length_are_read_together_without_padding_and_no_score_changes(
    model, queries, monkeypatch
):
    images, texts = queries
    rows, seen, score = np.arange(12), [], model.score_pairs
    expected = score(
        images["states"][rows].float(), texts["states"][rows].float(), texts["mask"][rows].long()
    )
    monkeypatch.setattr(
        model,
        "score_pairs",
        lambda image, text, mask: seen.append(text.shape[1]) or score(image, text, mask),
    )
    found = two_stage.pair_scores(model, images, rows, texts, rows, batch=4)
    lengths = texts["mask"][rows].sum(1).sort().values
    assert seen == lengths[3::4].tolist() and seen[0] < seen[2] < texts["mask"].shape[1]
    assert_close(found, expected.detach().numpy())


# ---- the search against all pairs
@pytest.mark.parametrize("kind", ["images", "texts"])
@pytest.mark.parametrize("k", [1, 5, 70])
def test_rankings_are_those_of_all_pairs_within_the_candidates(
    model, stores, banks, queries, fine, kind, k
):
    """Also with K beyond the gallery; the query's states are float32, the stored ones float16."""
    gallery, bank, query = (
        (stores[0], banks[1], queries[1]) if kind == "images" else (stores[1], banks[0], queries[0])
    )
    expected = fine.T if kind == "images" else fine
    engine = Search(model, gallery, bank, k)
    found, candidates = engine(query), engine.coarse(query["codes"]).rows
    assert found.rows.shape == (len(expected), min(k, len(gallery)))
    assert np.array_equal(np.sort(found.rows), np.sort(candidates))
    assert_close(found.scores, np.take_along_axis(expected, found.rows, 1), HALF)
    assert (np.diff(found.scores) <= 0).all() and np.ptp(expected, axis=1).min() > 20 * HALF


@pytest.mark.parametrize("kind", [0, 1])
def test_a_batch_of_queries_gives_what_each_gives_alone(model, stores, banks, queries, kind):
    engine = Search(model, stores[kind], banks[1 - kind], k=5, batch=4)
    together = engine(queries[1 - kind])
    for row in range(len(together.rows)):
        alone = engine({name: value[row : row + 1] for name, value in queries[1 - kind].items()})
        assert np.array_equal(alone.rows[0], together.rows[row])
        assert_close(alone.scores[0], together.scores[row])


def test_states_in_float16_keep_the_scores(model, queries, fine):
    exact = two_stage.pair_scores(
        model, queries[0], np.repeat(np.arange(12), 24), queries[1], np.tile(np.arange(24), 12)
    )
    assert np.ptp(exact) > 0.5
    assert_close(fine.ravel(), exact, HALF)


def test_scores_from_scratch_are_those_from_the_store(model, task, stores, fine):
    images, texts = two_stage.split_inputs(model, task, "test")
    one = np.zeros(1, dtype=int)
    directions = (
        (stores[1], images(one), texts, fine[0]),
        (
            stores[0],
            texts(one),
            images,
            fine[:, 0],
        ),
    )
    for gallery, inputs, items, expected in directions:
        engine = Search(model, gallery, batch=5)
        assert_close(search_times.from_scratch(engine, inputs, items), expected, HALF)


def test_added_images_are_found(model, task, stores, queries, tmp_path):
    images, _ = two_stage.split_inputs(model, task, "test")
    items = [str(row) for row in range(12)]

    def built(count):
        return ArrayStore.build(
            tmp_path / "images",
            two_stage.store_key(model, "images"),
            items[:count],
            lambda rows: two_stage.encode(model, images(rows)),
            batch=4,
        )

    assert Search(model, built(7), k=12)(queries[1]).rows.max() == 6
    grown = Search(model, built(12), k=12)(queries[1])
    whole = Search(model, stores[0], k=12)(queries[1])
    assert np.array_equal(np.sort(grown.rows), np.sort(whole.rows))
    assert_close(np.sort(grown.scores), np.sort(whole.scores), HALF)


# ---- a whole split
def test_every_stage_of_a_split(stores, banks, task, fine):
    owner = task.table("test").owner()
    coarse = two_stage.coarse_scores(*stores, neighbours=3, banks=banks)
    found = two_stage.stages(coarse, fine, owner, k=5)
    assert list(found) == [
        "Hamming",
        "Hamming + fine",
        "PPSR",
        "PPSR + fine",
        "PPSR online",
        "PPSR online + fine",
        "exhaustive",
    ]
    hamming = two_stage.negative_hamming(stores[0]["codes"], stores[1]["codes"])
    assert found["Hamming"].metrics == recall.evaluate(hamming, owner).metrics
    assert (
        found["PPSR"].metrics
        == recall.evaluate(two_stage.post_process(hamming, neighbours=3), owner).metrics
    )
    assert found["exhaustive"].metrics == recall.evaluate(fine, owner).metrics
    wanted = two_stage.candidate_pairs(coarse, 5)
    without = two_stage.stages(coarse, np.where(wanted, fine, -np.inf), owner, k=5)
    assert not wanted.all() and [name for name in found if name not in without] == ["exhaustive"]
    assert all(np.array_equal(found[name].i2t_ranks, without[name].i2t_ranks) for name in without)
    assert list(two_stage.coarse_scores(*stores)) == ["Hamming", "PPSR"]


def test_equal_texts_are_scored_once(model, stores, fine, monkeypatch):
    same, scored, score = stores[1].same, [], model.score_pairs
    monkeypatch.setattr(
        model, "score_pairs", lambda *given: scored.append(len(given[0])) or score(*given)
    )
    wanted = np.zeros(fine.shape, dtype=bool)
    wanted[0], wanted[5, 3] = True, True
    found = two_stage.fine_scores(model, *stores, wanted)
    assert sum(scored) == len(np.unique(same)) + 1 and len(np.unique(same)) < len(same)
    assert np.array_equal(np.isfinite(found), wanted)
    assert_close(found[wanted], fine[wanted])
    assert np.array_equal(found[0], found[0][same]) and np.array_equal(fine, fine[:, same])


def test_scores_that_are_kept_are_not_computed_again(model, stores, fine, monkeypatch, tmp_path):
    same, scored, pairs = stores[1].same, [], two_stage.pair_scores
    monkeypatch.setattr(
        two_stage.reranking,
        "pair_scores",
        lambda *given: scored.append(len(given[2])) or pairs(*given),
    )
    twins = np.flatnonzero(same == np.bincount(same).argmax())
    wanted, more, twin = (np.zeros(fine.shape, dtype=bool) for _ in range(3))
    wanted[0], more[0], more[5, twins[0]], twin[5, twins] = True, True, True, True
    found = [
        two_stage.fine_scores(model, *stores, one, kept=tmp_path) for one in (wanted, more, twin)
    ]
    # the twin of a text that was scored is known, too
    assert len(twins) > 1 and scored == [len(np.unique(same)), 1]
    assert np.array_equal(found[0][0], found[1][0])
    for one, scores in zip((wanted, more, twin), found, strict=True):
        assert np.array_equal(np.isfinite(scores), one)
        assert_close(scores[one], fine[one])


def test_kept_scores_that_are_damaged_are_refused_until_they_are_deleted(
    model, stores, fine, tmp_path
):
    two_stage.fine_scores(model, *stores, kept=tmp_path)
    [path] = tmp_path.glob("fine-*.npy")
    for harm in (
        lambda: path.write_bytes(b"\x93NUMPY"),
        lambda: np.save(path, np.zeros((3, 4), np.float32)),
    ):
        harm()
        with pytest.raises(UserError, match="is damaged .* delete it"):
            two_stage.fine_scores(model, *stores, kept=tmp_path)
    path.unlink()
    np.testing.assert_array_equal(two_stage.fine_scores(model, *stores, kept=tmp_path), fine)


def test_validation_is_the_two_stage_search_over_first_captions(model, task, tmp_path):
    images, texts = two_stage.write_stores(model, task, "val", tmp_path)
    first = np.arange(0, len(texts), 2)
    texts = ArrayStore(texts.key, {name: array[first] for name, array in texts.arrays.items()})
    hamming = two_stage.negative_hamming(images["codes"], texts["codes"])
    expected = two_stage.two_stage(
        hamming, two_stage.fine_scores(model, images, texts), np.arange(len(images)), k=3
    )
    assert two_stage.validate(model, task, k=3) == pytest.approx(expected.metrics)


def test_the_online_stage_is_what_the_search_finds(model, stores, banks, queries, task):
    owner, k = task.table("test").owner(), 6
    coarse = two_stage.coarse_scores(*stores, neighbours=3, banks=banks)
    fine = two_stage.fine_scores(model, *stores, two_stage.candidate_pairs(coarse, k))
    found = two_stage.stages(coarse, fine, owner, k, ties="optimistic")["PPSR online + fine"]
    by_image = Search(model, stores[1], banks[0], k, neighbours=3)(half(queries[0])).rows
    by_text = Search(model, stores[0], banks[1], k, neighbours=3)(half(queries[1])).rows
    # of candidates that tie for the last place the search takes the first
    i2t, t2i = coarse["PPSR online"]
    by_code = two_stage.chosen(i2t, k), two_stage.chosen(t2i.T, k).T
    taken = [
        recall.evaluate(np.where(mask, fine, -np.inf), owner, ties="optimistic") for mask in by_code
    ]
    own = owner[None, :] == np.arange(len(fine))[:, None]
    wanted = (
        taken[0].i2t_hits * (by_code[0] & own).any(axis=1)[:, None],
        taken[1].t2i_hits * (by_code[1] & own).any(axis=0)[:, None],
    )
    for column, cut in enumerate((1, 5)):
        hits = (
            [i in owner[line[:cut]] for i, line in enumerate(by_image)],
            [owner[t] in line[:cut] for t, line in enumerate(by_text)],
        )
        assert wanted[0][:, column].tolist() == hits[0] and wanted[1][:, column].tolist() == hits[1]
        assert (found.i2t_hits[:, column] >= hits[0]).all() and (
            found.t2i_hits[:, column] >= hits[1]
        ).all()


def half(query):
    """A query as the store keeps it."""
    return query | {"states": query["states"].half()}


def scored(seed: int, images: int = 9, captions: int = 3):
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(images), captions))
    return (
        rng.integers(-4, 1, (images, len(owner))).astype(np.float32),
        rng.standard_normal((images, len(owner))),
        owner,
    )


@pytest.mark.parametrize("k", [1, 3, 9, 100])
@pytest.mark.parametrize("seed", range(3))
def test_a_query_fails_without_an_own_candidate_and_is_ranked_by_fine_scores_with_one(seed, k):
    """By a rule that takes the first of the items that tie for the last candidates."""
    coarse, fine, owner = scored(seed)
    found = two_stage.two_stage(coarse, fine, owner, k, ties="released")
    for image in range(9):
        best = sorted(stable_best(coarse[image], k), key=lambda item: -fine[image, item])
        assert found.i2t_hits[image].tolist() == [image in owner[best[:cut]] for cut in (1, 5, 10)]
    for text, image in enumerate(owner):
        best = sorted(stable_best(coarse[:, text], k), key=lambda item: -fine[item, text])
        assert found.t2i_hits[text].tolist() == [image in best[:cut] for cut in (1, 5, 10)]
    if k == 100:
        assert (
            two_stage.two_stage(coarse, fine, owner, k).metrics
            == recall.evaluate(fine, owner).metrics
        )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 10_000))
def test_by_expectation_candidates_and_ranks_are_means_over_all_orders_of_the_ties(images, k, seed):
    """Both stages have few different scores, so that items tie for the last candidates and behind
    it.
    """
    rng = np.random.default_rng(seed)
    owner = rng.permutation(
        np.concatenate([np.arange(images), rng.integers(0, images, 5 - images)])
    )
    coarse, fine = rng.integers(0, 3, (2, images, 5)).astype(np.float32)
    found = two_stage.two_stage(coarse, fine, owner, k, ks=(1, 2, 3))
    for image in range(images):
        rank, hits = mean_over_orders(coarse[image], fine[image], owner == image, k)
        assert (found.i2t_ranks[image], *found.i2t_hits[image]) == pytest.approx((rank, *hits))
    for text in range(5):
        rank, hits = mean_over_orders(
            coarse[:, text], fine[:, text], np.arange(images) == owner[text], k
        )
        assert (found.t2i_ranks[text], *found.t2i_hits[text]) == pytest.approx((rank, *hits))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_the_optimistic_rule_is_nowhere_below_the_others(images, k, seed):
    rng = np.random.default_rng(seed)
    owner = rng.permutation(
        np.concatenate([np.arange(images), rng.integers(0, images, 5 - images)])
    )
    coarse, fine = rng.integers(0, 3, (2, images, 5)).astype(np.float32)
    found = {
        rule: two_stage.two_stage(coarse, fine, owner, k, ks=(1, 2, 3), ties=rule)
        for rule in recall.TIES
    }
    for other in (found["expectation"], found["released"]):
        assert (found["optimistic"].i2t_hits >= other.i2t_hits - 1e-9).all()
        assert (found["optimistic"].t2i_hits >= other.t2i_hits - 1e-9).all()


def mean_over_orders(coarse, fine, right, k):
    """Rank and hits at 1, 2, 3 of one query, over every order in which its candidates can be
    chosen.
    """
    found = []
    for order in permutations(range(len(coarse))):
        some = sorted(order, key=lambda item: -coarse[item])[:k]
        best = max((fine[item] for item in some if right[item]), default=None)
        if best is None:
            found.append(
                [len(some) + (len(coarse) - len(some) - right.sum()) / (right.sum() + 1), 0, 0, 0]
            )
            continue
        above, level = (fine[some] > best).sum(), (fine[some] == best).sum()
        own = (right[some] & (fine[some] == best)).sum()
        found.append(
            [
                above + (level - own) / (own + 1),
                *recall.hit_probability(above, level, own, (1, 2, 3))[0],
            ]
        )
    mean = np.mean(found, axis=0)
    return mean[0], mean[1:]


def test_each_direction_may_have_coarse_scores_of_its_own():
    coarse, fine, owner = scored(0)
    other = coarse[:, ::-1]
    found = two_stage.two_stage(coarse, fine, owner, 2, t2i=other)
    assert np.array_equal(found.i2t_hits, two_stage.two_stage(coarse, fine, owner, 2).i2t_hits)
    assert np.array_equal(found.t2i_hits, two_stage.two_stage(other, fine, owner, 2).t2i_hits)
    assert not np.array_equal(found.t2i_hits, two_stage.two_stage(coarse, fine, owner, 2).t2i_hits)


def test_candidates_without_a_fine_score_are_refused(model, stores):
    coarse, fine, owner = scored(0)
    partial = np.where(two_stage.chosen(coarse, 2), fine, -np.inf)
    with pytest.raises(UserError, match="lack some of the best 3"):
        two_stage.two_stage(coarse, partial, owner, 3)
    wanted = np.zeros((12, 24), dtype=bool)
    wanted[3, [5, 7]] = True
    found = two_stage.fine_scores(model, *stores, wanted)
    assert np.array_equal(np.isfinite(found), wanted)


# ---- frozen towers
def test_stores_from_cached_towers_are_those_from_pixels(data, tmp_path):
    torch.manual_seed(0)
    config = CFITRConfig.compact(bits=16, hidden=32)
    model, image = CFITR(config).eval(), backbones.vilt_size("vilt_compact").image
    model.text_encoder = backbones.bert(
        vocab_size=200,
        hidden_size=384,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    model.text_encoder.requires_grad_(False).eval()
    tokenizer = words(data, tmp_path)
    cached = RetrievalTask(data, tokenizer, image, workers=1, frozen=FrozenTowers(model, tmp_path))
    direct = RetrievalTask(data, tokenizer, image, workers=1)
    ours, theirs = (
        two_stage.write_stores(model, task, "val", tmp_path / name)
        for name, task in (("a", cached), ("b", direct))
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.key == other.key and len(one) == len(other)
        np.testing.assert_allclose(one["states"], other["states"], atol=0.05)
        assert np.ptp(one["states"].astype(np.float32), axis=0).max() > 0.5
    assert np.array_equal(ours[1]["mask"], theirs[1]["mask"])
    with pytest.raises(UserError, match="not those whose features are cached"):
        two_stage.split_inputs(CFITR(config).eval(), cached, "val")


def test_of_several_cached_views_the_first_is_encoded(data):
    table, model = data.table.split("train"), Plain()
    vision, text = (
        np.arange(24 * 2 * 3, dtype=np.float16).reshape(24, 2, 3),
        np.ones((48, 3, 8), np.float16),
    )
    model.IMAGE_FEATURES, model.TEXT_FEATURES = ("vision",), ("text",)
    task = SimpleNamespace(
        table=lambda split: table,
        towers=model,
        views=2,
        distinct_texts=lambda split: SimpleNamespace(row=np.arange(48)),
        features=lambda split: (
            {"vision": vision if split == "train" else vision[:, 0]},
            {"text": text, "mask": np.ones((48, 3), int)},
        ),
        _check_towers=lambda model: None,
    )
    for split in ("train", "test"):
        found = two_stage.split_inputs(model, task, split)[0](np.array([5, 2]))["vision"]
        assert torch.equal(found, torch.from_numpy(vision[[5, 2], 0]).float())


# ---- what is refused
def test_a_store_belongs_to_its_model(model, stores, banks, task, folder):
    other = lively(model.config, seed=1)
    with pytest.raises(
        UserError, match="wants a store under .*, not .*; encode it with this model"
    ):
        Search(other, stores[0])
    with pytest.raises(UserError, match="model: stored"):
        two_stage.write_stores(other, task, "test", folder)
    longer = lively(replace(model.config, bits=24))
    with pytest.raises(UserError, match="bits: stored 16, wanted 24"):
        two_stage.write_stores(longer, task, "test", folder)
    with pytest.raises(UserError, match="wants a store under"):
        Search(model, stores[0], banks[0])  # a bank of the same kind as the gallery


def test_a_model_that_was_trained_reads_the_store_of_its_copy(model, task, stores):
    trained = CFITR(model.config)
    trained.load_state_dict(model.state_dict())
    trained.set_captions(Captions.of(task))
    Search(trained.eval(), stores[0])


def test_a_store_of_other_inputs_is_refused(model, task, stores, folder):
    other = RetrievalTask(
        task.data, task.tokenizer, replace(task.image, mean=(0.0, 0.0, 0.0)), workers=1
    )
    with pytest.raises(UserError, match="inputs: stored 'ImageInput"):
        two_stage.write_stores(model, other, "test", folder)


def test_training_mode_is_refused(model, task, stores):
    images, _ = two_stage.split_inputs(model, task, "test")
    before = two_stage.store_key(model, "images")
    model.train()
    try:
        for use in (
            lambda: two_stage.encode(model, images(np.arange(2))),
            lambda: Search(model, stores[0]),
        ):
            with pytest.raises(UserError, match="training mode"):
                use()
    finally:
        model.eval()
    assert two_stage.store_key(model, "images") == before  # no batch statistics were touched


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_states_and_scores_are_refused(value):
    states = torch.ones(2, 3, 8)
    states[1, 2, 5] = value
    for inputs in ({"vision": states}, {"text": states, "mask": torch.ones(2, 3)}):
        with pytest.raises(UserError, match="hold NaN or infinity"):
            two_stage.encode(Plain(), inputs)
    query = plain_rows("images", 2)
    query["states"] = query["states"].clone().index_fill_(0, torch.tensor([1]), value)
    with pytest.raises(UserError, match="NaN or infinite scores"):
        Search(Plain(), in_memory("texts", plain_rows("texts", 3)))(query)
    with pytest.raises(UserError, match="coarse scores hold NaN"):
        two_stage.chosen(np.array([[0.0, np.nan]]), 1)


def test_an_empty_gallery_is_refused(model, banks):
    empty = {name: value[:0] for name, value in plain_rows("texts", 1).items()}
    for gallery in (in_memory("texts", empty), banks[0]):
        with pytest.raises(UserError, match="gallery is empty or holds only codes"):
            Search(Plain(), gallery)


def test_queries_of_the_wrong_kind_and_senseless_sizes_are_refused():
    texts = in_memory("texts", plain_rows("texts", 3))
    with pytest.raises(UserError, match="finds texts; give it queries of the other kind"):
        Search(Plain(), texts)(plain_rows("texts", 1))
    for options in ({"k": 0}, {"neighbours": 0}):
        with pytest.raises(UserError, match="at least one"):
            Search(Plain(), texts, **options)


# ---- what a query costs
def test_a_tiled_gallery_repeats_its_rows(model, stores, banks, queries, fine):
    large = search_times.tiled(stores[1], 60)
    engine = Search(model, large, banks[0], k=60)
    found = engine(half(queries[0]))
    assert len(large) == 60 and np.array_equal(np.sort(found.rows[0]), np.arange(60))
    assert_close(found.scores[3], fine[3, found.rows[3] % 24])


def test_times_are_medians_without_the_first_call(monkeypatch):
    clock = iter([0, 100, 200, 201, 300, 303, 400, 402])
    monkeypatch.setattr(search_times.time, "perf_counter", lambda: next(clock))
    assert search_times.milliseconds(lambda: None, repeats=3) == 2000


def test_every_part_of_a_query_is_timed(model, task, stores, banks):
    images, texts = two_stage.split_inputs(model, task, "test")
    engine, one = Search(model, stores[1], banks[0], k=3), images(np.zeros(1, dtype=int))
    times = search_times.query_times(engine, one, repeats=1)
    assert list(times) == ["encode", "coarse", "fine", "total"] and min(times.values()) > 0
    assert list(search_times.exhaustive_times(engine, one)) == ["cached"]
    assert list(search_times.exhaustive_times(engine, one, texts)) == ["cached", "scratch"]


def test_a_search_that_would_take_long_is_calculated_in_proportion(model, task, stores, banks):
    images, texts = two_stage.split_inputs(model, task, "test")

    def search(size: int) -> Search:
        return Search(model, search_times.tiled(stores[1], size), banks[0], k=3)

    def items(rows):
        return texts(rows % len(stores[1]))

    one = images(np.zeros(1, dtype=int))
    times, measured = search_times.by_gallery_size(search, one, items, (24, 48, 96), limit=1e-6)
    exhaustive = ["exhaustive, cached", "exhaustive, scratch"]
    assert list(times) == ["coarse", "fine", "two stages", *exhaustive]
    assert (times > 0).all(axis=None) and list(times.index) == [24, 48, 96]
    assert measured[exhaustive].to_numpy().tolist() == [[True] * 2, [False] * 2, [False] * 2]
    assert measured.drop(columns=exhaustive).all(axis=None)
    assert np.allclose(times[exhaustive].loc[96], 4 * times[exhaustive].loc[24])


def test_a_trade_off_is_read_as_it_was_written(tmp_path):
    points = [{"k": 10, "mR": 20.5, "i2t_fine_ms": 3.0}, {"k": 20, "mR": 22.0, "i2t_fine_ms": 6.0}]
    path = search_times.write_tradeoff(
        tmp_path / "tradeoff" / "23.json", points, profile="default", seed=0
    )
    read, about = search_times.read_tradeoff(path)
    assert read.to_dict("records") == points and about == {"profile": "default", "seed": 0}
    with pytest.raises(UserError, match="holds NaN or infinity"):
        search_times.write_tradeoff(path, [{"k": 1, "mR": float("nan")}])
    assert search_times.read_tradeoff(path)[1] == about
    with pytest.raises(UserError, match="holds no trade-off"):
        search_times.read_tradeoff(tmp_path / "other.json")

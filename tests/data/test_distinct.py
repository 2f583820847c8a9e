"""Equal captions, images and pairs have equal embeddings and scores in every system, whatever the
size of the set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nbhelpers.data.archives import open_images
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.distinct import Once, Rows, distinct, text_keys
from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import CLIPTokenizer, Tokenizer, train_tokenizer
from nbhelpers.metrics import recall
from nbhelpers.papers.cfitr import CFITR, CFITRConfig
from nbhelpers.papers.pe_rsitr import PERSITR, PERSITRConfig
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.systems import image_folder, trained_systems
from nbhelpers.tasks import two_stage
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.towers import backbones

SENTENCES = (
    "a pond",
    "many green trees stand around a small pond",
    "two planes",
    "a long grey road between bare fields",
    "boats",
    "a bare hill",
    "three white planes are parked near a building in the lower left",
)
PICTURES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("repeated")
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(
            place / f"{number}.png"
        )
    train_tokenizer(list(SENTENCES), place / "tokenizer.json")
    return place


def repeated(folder: Path, images: list[int], captions: list[int]) -> DataSet:
    """A test split of copies of the pictures, each with one of the sentences; the split before it
    holds one of each.
    """
    place = folder / f"copies {len(list(folder.glob('copies *')))}"
    place.mkdir()
    rows, texts = [], []
    for split, pictures, sentences in (
        ("train", range(PICTURES), range(PICTURES)),
        ("test", images, captions),
    ):
        for number, (picture, sentence) in enumerate(zip(pictures, sentences, strict=True)):
            file = f"{split}{number}.png"
            (place / file).hardlink_to(folder / f"{picture}.png")
            rows.append({"image_id": file, "file": file, "split": split, "scene": "x"})
            texts.append({"image_id": file, "text": SENTENCES[sentence]})
    table = CaptionTable("copies", pd.DataFrame(rows), pd.DataFrame(texts))
    return DataSet(
        table,
        DecodedCache.build(open_images(place), list(table.images.file), place / "cache"),
        None,
        [],
    )


def system(name: str, folder: Path) -> trained_systems.System:
    """A random system in eval mode; PIR attends the padding of its batches, and once stands on
    frozen towers.
    """
    words = Tokenizer(folder / "tokenizer.json", 32, fixed=name in ("pir, frozen", "cfitr"))
    torch.manual_seed(0)
    clip = backbones.clip_size("clip_standin").image
    model, tokenizer, image = {
        "pir": lambda: (
            PIR(PIRConfig.tiny(words.vocab_size)),
            words,
            backbones.image_input("swin_standin"),
        ),
        "pir, frozen": lambda: (
            PIR(PIRConfig.tiny(words.vocab_size, freeze_towers=True, use_mask=True)),
            words,
            backbones.image_input("swin_standin"),
        ),
        "pir_clip": lambda: (PIRCLIP(PIRCLIPConfig.tiny()), CLIPTokenizer(40), clip),
        "pe_rsitr": lambda: (PERSITR(PERSITRConfig.tiny()), CLIPTokenizer(40), clip),
        "cfitr": lambda: (
            CFITR(CFITRConfig.tiny(words.vocab_size)),
            words,
            backbones.vilt_size("vilt_standin").image,
        ),
    }[name]()
    return trained_systems.System(name, model.eval(), tokenizer, image, {}, folder / "model")


def task_of(one: trained_systems.System, data: DataSet, folder: Path) -> RetrievalTask:
    return RetrievalTask(
        data,
        one.tokenizer,
        one.image,
        workers=1,
        frozen=FrozenTowers.of(one.model, folder / "features"),
    )


def two_stages(
    one: trained_systems.System, data: DataSet, folder: Path, k: int
) -> two_stage.Ranking:
    task, place = task_of(one, data, folder), data.pixels.folder.parent
    banks = two_stage.write_stores(one.model, task, "train", place / f"train {k}", states=False)
    stores = two_stage.write_stores(one.model, task, "test", place / f"test {k}")
    return two_stage.rank(one.model, stores, task.table("test").owner(), k, banks)


RETRIEVAL = ("pir", "pir, frozen", "pir_clip", "pe_rsitr", "cfitr")


# ---- what is equal
@given(st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=9))
def test_items_are_numbered_by_first_appearance(items):
    first, row = distinct(items)
    assert [items[position] for position in first] == list(dict.fromkeys(items))
    assert [items[first[number]] for number in row] == items
    once = Once(str)
    assert (
        list(once(items)) == list(dict.fromkeys(items))
        and once.distinct.row.tolist() == row.tolist()
    )


def test_texts_are_equal_if_their_token_ids_are(folder):
    words = Tokenizer(folder / "tokenizer.json", 5)
    texts = [
        "A pond.",
        "a  pond",
        "a zebra",
        "a whale",
        "",
        "a long grey road between",
        "a long grey road near",
    ]
    # unknown words; words behind the longest
    assert distinct(text_keys(texts, words)).row.tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert distinct(text_keys(["A pond", "a pond", "a pond."], CLIPTokenizer())).row.tolist() == [
        0,
        0,
        1,
    ]


def test_products_of_repeated_rows_are_equal():
    rng = np.random.default_rng(0)
    a, b = (
        rng.standard_normal((3, 40)).astype(np.float32),
        rng.standard_normal((2, 40)).astype(np.float32),
    )
    one, other = Rows(a, np.array([0, 2, 2, 1, 0])), Rows(b, np.array([1, 1, 0]))
    assert one.products(other).shape == (5, 3) and one.all().shape == (5, 40)
    np.testing.assert_allclose(one.products(other), one.all() @ other.all().T, rtol=1e-5)


# ---- every retrieval system
@pytest.mark.parametrize(
    "name, count",
    [(name, count) for name in ("pir", "cfitr") for count in (1, 2, 12, 127, 128, 129, 131)]
    + [(name, count) for name in ("pir, frozen", "pir_clip", "pe_rsitr") for count in (12, 129)],
)
def test_equal_images_with_equal_captions_give_chance(name, count, folder):
    one, data = system(name, folder), repeated(folder, [0] * count, [1] * count)
    chance = recall.chance(np.arange(count))
    if name == "cfitr":
        ranking = two_stages(one, data, folder, 20)
        results = ranking.results(20)
    else:
        results = {"": task_of(one, data, folder).embeddings(one.model, "test").recall()}
    for way, found in results.items():
        assert found.metrics == pytest.approx(chance), way


@pytest.mark.parametrize("name", RETRIEVAL[:-1])
@settings(max_examples=2, deadline=None)
@given(st.integers(125, 135), st.integers(0, 99))
def test_equal_pairs_have_equal_similarities(name, folder, count, seed):
    rng = np.random.default_rng(seed)
    images, captions = rng.integers(0, PICTURES, count), rng.integers(0, len(SENTENCES), count)
    one = system(name, folder)
    found = task_of(one, repeated(folder, images, captions), folder).embeddings(one.model, "test")
    scores = found.similarity()
    of_pair = scores[np.ix_(distinct(images).first, distinct(captions).first)]
    assert np.array_equal(scores, of_pair[np.ix_(distinct(images).row, distinct(captions).row)])
    assert len(np.unique(of_pair)) == of_pair.size > 1
    assert len(np.unique(found.texts, axis=0)) == len(set(captions)) and len(
        np.unique(found.images, axis=0)
    ) == len(set(images))


@settings(max_examples=3, deadline=None)
@given(st.integers(125, 135), st.integers(0, 99))
def test_equal_pairs_have_equal_scores_in_both_stages(folder, count, seed):
    rng = np.random.default_rng(seed)
    images, captions = rng.integers(0, PICTURES, count), rng.integers(0, len(SENTENCES), count)
    ranking = two_stages(system("cfitr", folder), repeated(folder, images, captions), folder, None)
    for scores in (ranking.fine, *(part for pair in ranking.coarse.values() for part in pair)):
        of_pair = scores[np.ix_(distinct(images).first, distinct(captions).first)]
        assert np.array_equal(scores, of_pair[np.ix_(distinct(images).row, distinct(captions).row)])


def test_the_order_of_the_files_does_not_matter(folder):
    """Items that tie for the last candidate stand in another order."""
    rng = np.random.default_rng(3)
    images, captions = rng.integers(0, PICTURES, 40), rng.integers(0, len(SENTENCES), 40)
    one, order = system("cfitr", folder), rng.permutation(40)
    found = two_stages(one, repeated(folder, images, captions), folder, 7).results(7)
    again = two_stages(one, repeated(folder, images[order], captions[order]), folder, 7).results(7)
    for way, result in found.items():
        assert again[way].metrics == pytest.approx(result.metrics), way


# ---- a system in use
@pytest.mark.parametrize("name", RETRIEVAL[:-1])
def test_what_is_encoded_is_equal_where_the_inputs_are(name, folder):
    one = system(name, folder)
    texts, pictures = (
        [SENTENCES[number % 7] for number in range(130)],
        [folder / f"{number % 5}.png" for number in range(130)],
    )
    for encoded, count in ((one.encode_texts(texts), 7), (one.encode_images(pictures), 5)):
        assert len(np.unique(encoded, axis=0)) == count and np.array_equal(
            encoded[:-count], encoded[count:]
        )


@pytest.mark.parametrize("name", ["pir", "cfitr"])
def test_copies_of_an_image_have_one_score_in_a_search(name, folder):
    data = repeated(folder, [0, 1, 2] * 43, [0] * 129)
    found = image_folder.search(system(name, folder), data.pixels.folder.parents[1], "a pond", 134)
    files = dict(zip(data.table.images.file, data.pixels.digests, strict=True))
    assert (
        len(found) == 134
        and found.groupby(found.file.map(files)).score.nunique().tolist() == [1] * PICTURES
    )
    assert found.score.nunique() == PICTURES

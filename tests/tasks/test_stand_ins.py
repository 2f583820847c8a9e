"""Scene recognition fitted here: priors, an instruction encoder and image towers, equal for equal
seeds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from closeness import assert_close
from coloured_set import COLOURS, coloured
from torch import nn

from nbhelpers.data import image_input, scene_labels
from nbhelpers.data.images import resize
from nbhelpers.errors import UserError
from nbhelpers.papers.baseline import FrozenConfig, FrozenHeads
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.tasks import stand_ins
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.tasks.stand_ins import SceneBatches, SceneClassifier
from nbhelpers.towers import backbones, checkpoints
from nbhelpers.towers.starting_weights import Start, Tower
from nbhelpers.training import loop

IMAGE = backbones.image_input("swin_standin")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("other"), "other")


def make():
    return PIR(PIRConfig.tiny(30, instru_num=1, cycle_num=1))


def squares(count=20, size=112):
    """Dark and bright pictures, with classes 0 and 1."""
    scene = np.arange(count) % 2
    noise = np.random.default_rng(0).integers(0, 60, size=(count, size, size, 3))
    return (noise + 150 * scene[:, None, None, None]).astype(np.uint8), scene


def drawn(batches, epoch):
    batches.set_epoch(epoch)
    return [(batch["inputs"], batch["scene"]) for batch in batches]


def test_scene_batches_depend_on_seed_and_epoch_alone():
    pictures, scene = squares()
    rows = np.arange(20, dtype=np.float32)[:, None]
    first, second = (SceneBatches(pictures, scene, 6, 1, IMAGE) for _ in range(2))
    drawn(first, 7)
    for (a, own), (b, other) in zip(drawn(first, 2), drawn(second, 2), strict=True):
        assert torch.equal(a, b) and torch.equal(own, other)
    assert a.shape == (6, 3, 112, 112) and a.dtype == torch.float32 and len(first) == 3
    orders = [
        torch.cat([x for x, _ in drawn(SceneBatches(rows, scene, 6, seed), epoch)])
        .flatten()
        .tolist()
        for seed, epoch in ((1, 2), (1, 3), (2, 2))
    ]
    assert orders[0] != orders[1] != orders[2] and all(len(set(order)) == 18 for order in orders)
    for inputs, own in drawn(SceneBatches(rows, scene, 6, 1), 0):
        assert torch.equal(inputs.flatten().long() % 2, own)


def test_pictures_are_turned_but_never_changed_otherwise():
    picture = np.random.default_rng(1).integers(0, 256, size=(1, 112, 112, 3), dtype=np.uint8)
    plain = image_input.ImageInput(112, (0.0,) * 3, (1.0,) * 3)
    batches = SceneBatches(picture, np.zeros(1, int), 1, 0, plain)
    seen = {
        tuple(
            (255 * drawn(batches, epoch)[0][0][0])
            .round()
            .permute(1, 2, 0)
            .numpy()
            .astype(np.uint8)[:2, :2]
            .ravel()
        )
        for epoch in range(20)
    }
    assert seen == {tuple(np.rot90(picture[0], turns)[:2, :2].ravel()) for turns in range(4)}


def test_a_classifier_is_fitted_once_and_its_body_becomes_a_tower(tmp_path):
    pictures, scene = squares(size=32)
    config = loop.TrainConfig(
        epochs=15, lr=3e-3, batch_size=10, seed=0, schedule="constant", warmup_fraction=0.0
    )

    def fit(fingerprint="data"):
        batches = SceneBatches(pictures, scene, 10, 0, IMAGE)
        classifier, path = stand_ins.fit_scenes(
            "prior",
            lambda: SceneClassifier(backbones.prior_tower("resnet_standin"), 2),
            batches,
            config,
            tmp_path,
            fingerprint,
        )
        return classifier, Tower.stand_in("prior", path, "squares")

    torch.manual_seed(8)
    classifier, tower = fit()
    assert (classifier.predict(pictures, IMAGE) == scene).mean() > 0.9
    again, same = fit()
    assert same == tower and len(list(tmp_path.glob("prior-*/model.safetensors"))) == 1
    torch.manual_seed(9)  # what was drawn before changes nothing
    assert (
        fit("other data")[1].sha256 == tower.sha256
        and len(list(tmp_path.glob("prior-*/model.safetensors"))) == 2
    )
    filled = Start("", 0, {"conv_encoder": tower}).build(make, 0)
    assert_close(
        filled.conv_encoder.state_dict(),
        {n: v.cpu() for n, v in classifier.body.state_dict().items()},
    )
    assert tower.kind == "stand-in" and tower.source == "squares"


def test_the_global_token_stands_for_a_vision_tower():
    body = backbones.vision_tower("swin_standin").eval()
    classifier = SceneClassifier(body, 3, stand_ins.global_token).eval()
    pixels = torch.randn(2, 3, 112, 112)
    expected = classifier.classifier(backbones.image_tokens(body, pixels)[:, 0])
    assert_close(classifier.logits(pixels), expected)


# ---- the starts
def test_the_tiny_start_fills_both_towers_from_the_other_set(data, other, tmp_path):
    start, accuracy = stand_ins.stand_in_start(data, other, tmp_path, seed=0, epochs=1)
    assert set(start.towers) == {"vision_encoder", "conv_encoder"} and set(accuracy) == {
        "swin_standin",
        "resnet_standin",
    }
    assert all(0 <= percent <= 100 for percent in accuracy.values())
    tokenizer = start.read_tokenizer()
    model = start.build(lambda: PIR(PIRConfig.tiny(tokenizer.vocab_size)), 0)
    found = checkpoints.read_state_dict(start.towers["vision_encoder"].path)
    assert torch.equal(model.vision_encoder.norm.weight, found["norm.weight"])
    again, _ = stand_ins.stand_in_start(data, other, tmp_path, seed=0, epochs=1)
    assert again == start


def test_a_stand_in_is_judged_by_images_it_did_not_learn_from(other, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        SceneClassifier,
        "predict",
        lambda self, inputs, image: asked.append(inputs) or np.zeros(len(inputs), int),
    )
    _, percent = stand_ins.fitted("resnet_standin", other, tmp_path, 0, 1)
    held = other.table.split("val", "test")
    assert (
        len(asked[0]) == len(held)
        and percent == 100 * (held.images.scene == sorted(COLOURS)[0]).mean()
    )
    for picture, file in zip(asked[0][:3], held.images.file, strict=False):
        assert np.array_equal(picture, resize(other.pixels[other.pixels.rows([file])[0]], 112))


def test_the_instruction_stand_in_fills_the_encoder_of_pir_clip(other, tmp_path):
    tower, _ = stand_ins.fitted("instruction_standin", other, tmp_path, 0, 2)
    model = Start("", 0, {"res_visual": tower}).build(lambda: PIRCLIP(PIRCLIPConfig.tiny()), 0)
    state = checkpoints.read_state_dict(tower.path)
    assert state.keys() == model.res_visual.state_dict().keys()
    assert all(
        torch.equal(model.res_visual.state_dict()[name], value) for name, value in state.items()
    )
    assert state["bn1.running_mean"].abs().max() > 0  # it has seen images


def test_the_compact_start_fits_a_scene_head_on_the_training_classes(data, tmp_path):
    task = stand_ins.compact_task(data, tmp_path, seed=0, workers=1)
    start, accuracy = stand_ins.compact_start(task, tmp_path, epochs=30)
    assert start.classes == sorted(COLOURS) and start.fixed and accuracy["scene_head"] > 50
    assert [tower.kind for tower in start.towers.values()] == ["package", "package", "stand-in"]
    model = start.build(lambda: PIR(PIRConfig.compact()), 0).eval()
    head = checkpoints.read_state_dict(start.towers["conv_encoder"].path)
    assert torch.equal(model.conv_encoder[0].weight, head["0.weight"])
    tokenizer = start.read_tokenizer()
    ids, mask = tokenizer(["a red field"])
    assert ids.shape == (1, 32) and tokenizer.vocab_size == 30522
    seen = model.image_features(torch.zeros(1, 3, 224, 224))
    assert {name: tuple(value.shape) for name, value in seen.items()} == {"vision": (1, 192, 7, 7)}
    assert model.tokens(seen["vision"]).shape == (1, 50, 1280) and model.belief(**seen).shape == (
        1,
        50,
    )


def test_the_scene_head_reads_features_that_other_systems_on_these_towers_find_again(
    data, tmp_path, monkeypatch
):
    task = stand_ins.compact_task(data, tmp_path, seed=0, workers=1)
    start, _ = stand_ins.compact_start(task, tmp_path, epochs=1)
    model = start.build(lambda: FrozenHeads(FrozenConfig.compact()), 1)
    monkeypatch.setattr(model, "image_features", None)  # not to be asked again
    task = RetrievalTask(
        data,
        start.read_tokenizer(),
        backbones.image_input("efficientnet_lite0"),
        1,
        1,
        frozen=FrozenTowers(model, tmp_path),
    )
    assert task.features("train")[0]["vision"].shape == (24, 50, 1280)


def test_classes_too_small_to_fit_are_left_out_and_too_few_refused(data):
    table = data.table
    one = replace(
        table,
        images=table.images.assign(
            scene=table.images.image_id.where(table.images.scene == "red", "other")
        ),
    )
    with pytest.raises(UserError, match="colours has one scene class of 5 or more training images"):
        scene_labels.scene_classes(one)
    two = replace(
        table,
        images=table.images.assign(
            scene=table.images.scene.where(table.images.scene != "red", table.images.image_id)
        ),
    )
    assert scene_labels.scene_classes(two) == ["blue", "green", "grey"]
    rows, scene = stand_ins._labelled(two.split("val"), ["blue", "green", "grey"])
    assert list(two.split("val").images.scene.iloc[rows]) == [
        ["blue", "green", "grey"][i] for i in scene
    ]


def test_a_fitted_prior_starts_from_the_given_resnet(data, tmp_path, monkeypatch):
    monkeypatch.setitem(backbones.PRIOR, "resnet50", backbones.PRIOR["resnet_standin"])
    monkeypatch.setattr(backbones, "image_input", lambda name: image_input.ImageInput(40))
    torch.manual_seed(0)
    body = backbones.prior_tower("resnet50")
    nn.init.constant_(body.layer4[0].bn2.bias, 3.0)
    path = checkpoints.save_checkpoint(tmp_path / "imagenet.safetensors", body, {})
    tower, accuracy = stand_ins.fitted_prior(
        data, tmp_path, 0, 2, Tower.stand_in("resnet50", path, "a test")
    )
    state = checkpoints.read_state_dict(tower.path)
    assert (
        state["layer4.0.bn2.bias"] - 3
    ).abs().max() < 0.1 and tower.sha256 != checkpoints.sha256(path)
    assert (
        0 <= accuracy["resnet50"] <= 100
        and "fitted on the training classes of colours" in tower.source
    )

"""What systems start from: nothing is filled silently, and equal seeds give equal weights."""
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from coloured_set import COLOURS, coloured
from torch import nn

from nbhelpers import backbones, starting, training, weights
from nbhelpers.data import scenes
from nbhelpers.errors import UserError
from nbhelpers.papers.frozen import FrozenConfig, FrozenHeads
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.starting import SceneBatches, SceneClassifier, Start, Tower

IMAGE = backbones.image_input("swin_standin")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("data"))


@pytest.fixture
def towers(tmp_path):
    """A vision tower and a prior, saved with numbers that no initialisation gives."""
    made = {}
    for attribute, module in (("vision_encoder", backbones.vision_tower("swin_standin")),
                              ("conv_encoder", backbones.prior_tower("resnet_standin"))):
        state = {name: torch.full_like(value, 0.25) for name, value in module.state_dict().items()}
        path = weights.save_checkpoint(tmp_path / f"{attribute}.safetensors", state, {})
        made[attribute] = Tower.stand_in(f"{attribute}-test", path, "a test")
    return made


@pytest.fixture
def start(towers, tmp_path):
    return Start(str(tmp_path / "tokenizer.json"), 12, towers, fixed=True, classes=["a", "b"], options={"filter_size": 9})


def make():
    return PIR(PIRConfig.tiny(30, instru_num=1, cycle_num=1))


# ---- Start -------------------------------------------------------------------------------------------------------------
def test_a_start_is_read_as_it_was_written(start, tmp_path):
    path = start.write(tmp_path / "pir.json")
    assert Start.read(path) == start
    assert start.sha256s() == [weights.sha256(tmp_path / f"{name}.safetensors") for name in ("vision_encoder", "conv_encoder")]
    assert start.record()[1] == {"name": "conv_encoder: conv_encoder-test", "source": "a test", "kind": "stand-in",
                                 "sha256": start.sha256s()[1]}


def test_a_start_that_is_missing_or_broken_names_the_notebook_that_writes_it(start, tmp_path):
    path = tmp_path / "pir.json"
    with pytest.raises(UserError, match=r"pir.json does not exist; run 12_starting_weights first") as error:
        Start.read(path)
    assert "\n" not in str(error.value)
    content = json.loads(start.write(path).read_text())
    for text in ("", "[]", "{}", json.dumps(content | {"unknown": 1}), json.dumps(content | {"towers": {"a": {"path": "x"}}})):
        path.write_text(text)
        with pytest.raises(UserError, match="run 12_starting_weights again"):
            Start.read(path)


def test_towers_are_filled_and_the_rest_is_drawn_from_the_seed(start):
    torch.manual_seed(5)
    model = start.build(make, seed=3)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))  # the caller's generator is left alone
    again, other = start.build(make, seed=3), start.build(make, seed=4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if name.startswith(("vision_encoder", "conv_encoder")):
            assert (value == 0.25).all() or not value.is_floating_point()
    assert not torch.equal(model.text_proj.weight, other.text_proj.weight)


def test_a_model_without_prior_is_filled_with_what_it_has(start):
    model = start.build(lambda: FrozenHeads(FrozenConfig.tiny(30)), seed=0)
    assert (model.vision_encoder.norm.weight == 0.25).all() and not hasattr(model, "conv_encoder")


def test_published_classifiers_and_computed_buffers_are_left_out_but_nothing_else(start, towers, tmp_path):
    state = weights.read_state_dict(towers["vision_encoder"].path)
    more = {"head.fc.weight": torch.zeros(9, 96), "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    path = weights.save_checkpoint(tmp_path / "published.safetensors", state | more, {})
    replace(start, towers={"vision_encoder": Tower.stand_in("published", path, "")}).fill(make())
    path = weights.save_checkpoint(tmp_path / "other.safetensors", {"adapter": torch.zeros(1)} | state, {})
    with pytest.raises(UserError, match="adapter"):
        replace(start, towers={"vision_encoder": Tower.stand_in("other", path, "")}).fill(make())


def test_a_resnet_under_the_names_of_the_released_loader_is_refused_key_by_key(start, towers, tmp_path):
    state = weights.read_state_dict(towers["conv_encoder"].path)
    path = weights.save_checkpoint(tmp_path / "odd.safetensors", {f"{i}.{n}": v for i, (n, v) in enumerate(state.items())}, {})
    model = make()
    first = next(model.conv_encoder.parameters())
    before = first.clone()
    with pytest.raises(UserError, match="nothing was loaded") as error:
        replace(start, towers={"conv_encoder": Tower.stand_in("odd", path, "")}).fill(model)
    assert "conv1.0.weight" in str(error.value) and torch.equal(first, before)


def test_weights_that_changed_since_or_went_away_are_refused(start, towers, tmp_path):
    weights.save_checkpoint(tmp_path / "conv_encoder.safetensors", backbones.prior_tower("resnet_standin"), {})
    with pytest.raises(UserError, match="changed since 12_starting_weights"):
        start.fill(make())
    (tmp_path / "conv_encoder.safetensors").unlink()
    with pytest.raises(UserError, match="conv_encoder.safetensors"):
        start.fill(make())


# ---- scene recognition ---------------------------------------------------------------------------------------------------
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
    for (a, own), (b, other) in zip(drawn(first, 2), drawn(second, 2)):
        assert torch.equal(a, b) and torch.equal(own, other)
    assert a.shape == (6, 3, 112, 112) and a.dtype == torch.float32 and len(first) == 3
    orders = [torch.cat([x for x, _ in drawn(SceneBatches(rows, scene, 6, seed), epoch)]).flatten().tolist()
              for seed, epoch in ((1, 2), (1, 3), (2, 2))]
    assert orders[0] != orders[1] != orders[2] and all(len(set(order)) == 18 for order in orders)
    for inputs, own in drawn(SceneBatches(rows, scene, 6, 1), 0):
        assert torch.equal(inputs.flatten().long() % 2, own)


def test_pictures_are_turned_but_never_changed_otherwise():
    picture = np.random.default_rng(1).integers(0, 256, size=(1, 112, 112, 3), dtype=np.uint8)
    plain = backbones.ImageInput(112, (0.0,) * 3, (1.0,) * 3)
    batches = SceneBatches(picture, np.zeros(1, int), 1, 0, plain)
    seen = {tuple((255 * drawn(batches, epoch)[0][0][0]).round().permute(1, 2, 0).numpy().astype(np.uint8)[:2, :2].ravel())
            for epoch in range(20)}
    assert seen == {tuple(np.rot90(picture[0], turns)[:2, :2].ravel()) for turns in range(4)}


def test_a_classifier_is_fitted_once_and_its_body_becomes_a_tower(tmp_path):
    pictures, scene = squares(size=32)
    config = training.TrainConfig(epochs=15, lr=3e-3, batch_size=10, seed=0, schedule="constant", warmup_fraction=0.0)

    def fit(fingerprint="data"):
        batches = SceneBatches(pictures, scene, 10, 0, IMAGE)
        return starting.fit_scenes("prior", lambda: SceneClassifier(backbones.prior_tower("resnet_standin"), 2), batches, config,
                                   tmp_path, fingerprint, source="squares")

    torch.manual_seed(8)
    classifier, tower = fit()
    assert (classifier.predict(pictures, IMAGE) == scene).mean() > 0.9
    again, same = fit()
    assert same == tower and len(list(tmp_path.glob("prior-*/model.safetensors"))) == 1
    torch.manual_seed(9)  # what was drawn before changes nothing
    assert fit("other data")[1].sha256 == tower.sha256 and len(list(tmp_path.glob("prior-*/model.safetensors"))) == 2
    filled = Start("", 0, {"conv_encoder": tower}).build(make, 0)
    torch.testing.assert_close(filled.conv_encoder.state_dict(), {n: v.cpu() for n, v in classifier.body.state_dict().items()})
    assert tower.kind == "stand-in" and tower.source == "squares"


def test_the_global_token_stands_for_a_vision_tower():
    body = backbones.vision_tower("swin_standin").eval()
    classifier = SceneClassifier(body, 3, starting.global_token).eval()
    pixels = torch.randn(2, 3, 112, 112)
    expected = classifier.classifier(backbones.image_tokens(body, pixels)[:, 0])
    torch.testing.assert_close(classifier.logits(pixels), expected)


# ---- the starts ------------------------------------------------------------------------------------------------------------
def test_the_other_world_is_another_and_always_the_same():
    pixels, scene = starting.other_world(6, seed=0)
    assert pixels.shape == (6, 112, 112, 3) and pixels.dtype == np.uint8
    assert [scenes.CLASSES[i] for i in scene] == [spec.scene for spec in scenes.specs(6, 0, "a")]
    assert np.array_equal(pixels, starting.other_world(6, seed=0)[0])
    ours = np.stack([starting.resize(made.pixels, 112) for made in scenes.generate(6, seed=0, world="a")])
    assert all(np.abs(a.astype(int) - b).mean() > 5 for a, b in zip(pixels, ours))
    assert not np.array_equal(pixels, starting.other_world(6, seed=1)[0])


def test_the_tiny_start_fills_both_towers_from_the_other_world(data, tmp_path, monkeypatch):
    pictures, scene = squares(42)
    monkeypatch.setattr(starting, "other_world", lambda images, seed: (pictures[:images], scene[:images]))
    start, accuracy = starting.stand_in_start(data, tmp_path, seed=0, images=42, epochs=1)
    assert set(start.towers) == {"vision_encoder", "conv_encoder"} and set(accuracy) == {"swin_standin", "resnet_standin"}
    assert all(0 <= percent <= 100 for percent in accuracy.values())
    tokenizer = start.read_tokenizer()
    model = start.build(lambda: PIR(PIRConfig.tiny(tokenizer.vocab_size)), 0)
    found = weights.read_state_dict(start.towers["vision_encoder"].path)
    assert torch.equal(model.vision_encoder.norm.weight, found["norm.weight"])
    again, _ = starting.stand_in_start(data, tmp_path, seed=0, images=42, epochs=1)
    assert again == start


def test_the_compact_start_fits_a_scene_head_on_the_training_classes(data, tmp_path):
    start, accuracy = starting.compact_start(data, tmp_path, tmp_path, seed=0, epochs=30, workers=1)
    assert start.classes == sorted(COLOURS) and start.fixed and accuracy["scene_head"] > 50
    assert [tower.kind for tower in start.towers.values()] == ["package", "package", "stand-in"]
    model = start.build(lambda: PIR(PIRConfig.compact()), 0).eval()
    head = weights.read_state_dict(start.towers["conv_encoder"].path)
    assert torch.equal(model.conv_encoder[0].weight, head["0.weight"])
    tokenizer = start.read_tokenizer()
    ids, mask = tokenizer(["a red field"])
    assert ids.shape == (1, 32) and tokenizer.vocab_size == 30522
    seen = model.image_features(torch.zeros(1, 3, 224, 224))
    assert seen["vision"].shape == (1, 50, 1280) and seen["prior"].shape == (1, 256)


def test_a_whole_checkpoint_needs_a_tokenizer_and_no_weights(start, tmp_path):
    bert, minilm = (Start.for_checkpoint(name, tmp_path / "none.json") for name in ("bert_base", "minilm"))
    assert not bert.towers and not minilm.towers and (bert.max_length, bert.fixed) == (47, False)
    assert (minilm.max_length, minilm.fixed) == (32, True)
    assert bert.read_tokenizer().encode(["a red field"])[0][0] == 101 and bert.read_tokenizer().vocab_size == 30522
    path = start.write(tmp_path / "pir.json")
    assert Start.for_checkpoint("bert_standin", path) == replace(start, towers={})
    with pytest.raises(UserError, match="run 12_starting_weights first"):
        Start.for_checkpoint("bert_standin", tmp_path / "none.json")


def test_classes_too_small_to_fit_are_left_out_and_too_few_refused(data):
    table = data.table
    one = replace(table, images=table.images.assign(scene=table.images.image_id.where(table.images.scene == "red", "other")))
    with pytest.raises(UserError, match="colours has 1 scene classes of 5 or more training images"):
        starting.scene_classes(one)
    two = replace(table, images=table.images.assign(scene=table.images.scene.where(table.images.scene != "red", table.images.image_id)))
    assert starting.scene_classes(two) == ["blue", "green", "grey"]
    rows, scene = starting._labelled(two.split("val"), ["blue", "green", "grey"])
    assert list(two.split("val").images.scene.iloc[rows]) == [["blue", "green", "grey"][i] for i in scene]


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder with the published files by their names; only their hashes matter here."""
    monkeypatch.delenv("NBHELPERS_WEIGHTS", raising=False)
    (tmp_path / "bert_base").mkdir()
    for name in ("swin_t.safetensors", "resnet50.safetensors", "bert_base/model.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def test_the_paper_start_stops_without_the_aid_prior_unless_another_is_chosen(published):
    with pytest.raises(UserError, match="aid_28-rsp-resnet-50-ckpt.pth.*MB.*PRIOR"):
        starting.paper_start("aid", published)
    start = starting.paper_start("imagenet", published)
    assert start.tokenizer == str(published / "bert_base") and start.max_length == 47 and not start.fixed
    assert start.towers["conv_encoder"].name == "resnet50" and start.towers["conv_encoder"].kind == "file"
    assert set(starting.paper_start("random", published).towers) == {"vision_encoder", "text_encoder"}
    fitted = starting.paper_start("fit", published, fit=lambda tower: replace(tower, name=f"fitted {tower.name}"))
    assert fitted.towers["conv_encoder"].name == "fitted resnet50"
    (published / "resnet50_aid.pth").write_bytes(b"their file")
    assert starting.paper_start("aid", published).towers["conv_encoder"].name == "resnet50_aid"
    for prior, fit in (("", None), ("vgg", None), ("fit", None)):
        with pytest.raises(UserError, match="choose aid"):
            starting.paper_start(prior, published, fit)


def test_a_fitted_prior_starts_from_the_given_resnet(data, tmp_path, monkeypatch):
    monkeypatch.setitem(backbones.PRIOR, "resnet50", backbones.PRIOR["resnet_standin"])
    monkeypatch.setattr(backbones, "image_input", lambda name: backbones.ImageInput(40))
    torch.manual_seed(0)
    body = backbones.prior_tower("resnet50")
    nn.init.constant_(body.layer4[0].bn2.bias, 3.0)
    path = weights.save_checkpoint(tmp_path / "imagenet.safetensors", body, {})
    tower, accuracy = starting.fitted_prior(data, tmp_path, 0, 2, Tower.stand_in("resnet50", path, "a test"))
    state = weights.read_state_dict(tower.path)
    assert (state["layer4.0.bn2.bias"] - 3).abs().max() < 0.1 and tower.sha256 != weights.sha256(path)
    assert 0 <= accuracy["resnet50"] <= 100 and "fitted on the training classes of colours" in tower.source

"""What is pre-trained on another set: which set, what becomes a tower's weights, and that it was
learned there alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from coloured_set import coloured

from nbhelpers.data import catalog
from nbhelpers.data.scenes import generate
from nbhelpers.data.tokenization import distinct_captions
from nbhelpers.errors import UserError
from nbhelpers.papers.cfitr import CFITR, Captions, CFITRConfig
from nbhelpers.papers.clip import CLIP, CLIPConfig, clip_loss
from nbhelpers.papers.pe_rsitr import PERSITR, PERSITRConfig
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.tasks import pretraining
from nbhelpers.tasks.pretraining import MatchingViLT, Pretraining
from nbhelpers.towers import backbones, checkpoints
from nbhelpers.training import loop


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    found = coloured(tmp_path_factory.mktemp("other"), "other")
    captions = found.table.captions.assign(
        text=found.table.captions.text.str.replace("place", "meadow")
    )
    return replace(found, table=replace(found.table, captions=captions))


@pytest.fixture
def training_of(other, tmp_path):
    """training_of(epochs) -> a short Pretraining on `other`."""

    def build(epochs=1, batch_size=16, **changes):
        config = loop.TrainConfig(epochs, lr=1e-3, batch_size=batch_size, seed=0)
        return Pretraining(other, config, tmp_path, tmp_path, workers=1, **changes)

    return build


# ---- the other set
def test_the_first_caption_of_training_images_stays_and_all_of_the_others(other):
    thin, whole = pretraining.first_captions(other, 1).table, other.table
    assert (thin.split("train").captions.groupby("image_id").size() == 1).all()
    assert thin.split("test").captions.equals(whole.split("test").captions)
    first = whole.split("train").captions.groupby("image_id", sort=False).head(1)
    assert list(thin.split("train").captions.text) == list(first.text) and thin.images.equals(
        whole.images
    )
    assert (
        thin.fingerprint() != whole.fingerprint() and pretraining.first_captions(other, 0) is other
    )


def test_some_images_of_a_split_are_spread_and_the_other_splits_stay(other):
    few = pretraining.some_images(other, "val", 3)
    of = {
        name: list(one.table.split("val").images.image_id)
        for name, one in (("few", few), ("whole", other))
    }
    assert len(of["few"]) == 3 and of["few"] == [
        of["whole"][row] for row in np.linspace(0, len(of["whole"]) - 1, 3).round().astype(int)
    ]
    assert set(few.table.split("val").captions.image_id) == set(of["few"])
    for split in ("train", "test"):
        assert few.table.split(split).fingerprint() == other.table.split(split).fingerprint()
    assert all(
        pretraining.some_images(other, "val", count) is other
        for count in (0, len(of["whole"]), 10**6)
    )


def test_the_other_world_is_another_and_always_the_same(tmp_path):
    found = pretraining.other_world(tmp_path, 6, seed=0)
    assert (
        found.table.name == "scenes_b"
        and len(found.table) == 6
        and found.pixels[0].shape == (224, 224, 3)
    )
    ours = list(generate.generate(6, seed=0, world="a"))
    assert list(found.table.images.scene) == [made.spec.scene for made in ours]
    here = {text for made in ours for text in made.captions}
    assert not here & set(found.table.captions.text)
    for made, file in zip(ours, found.table.images.file, strict=True):
        assert (
            np.abs(found.pixels[found.pixels.rows([file])[0]].astype(int) - made.pixels).mean() > 5
        )
    assert (
        pretraining.other_world(tmp_path, 6, seed=0).table.fingerprint()
        == found.table.fingerprint()
    )
    assert (
        pretraining.other_world(tmp_path, 6, seed=1).table.fingerprint()
        != found.table.fingerprint()
    )


def test_the_first_set_that_can_be_had_is_taken_and_said(data, tmp_path, monkeypatch, capsys):
    def find(name, folder):
        if name != "ucm":
            raise UserError("not here")
        return tmp_path, tmp_path

    monkeypatch.setattr(catalog, "find", find)
    monkeypatch.setattr(
        catalog,
        "open_dataset",
        lambda name, folder, cache: replace(data, table=replace(data.table, name=name)),
    )
    monkeypatch.setattr(
        pretraining,
        "other_world",
        lambda cache, images, seed: replace(data, table=replace(data.table, name="scenes_b")),
    )

    def chosen(names, under_study="rsitmd", folder="somewhere"):
        return pretraining.another_set(names, under_study, folder, tmp_path, 6, 0).table.name

    assert chosen(["rsicd", "ucm", "scenes"]) == "ucm"
    assert capsys.readouterr().out == "pre-training set: ucm, 44 images; rsicd is not in DATA\n"
    assert (
        chosen(["rsicd", "scenes"]) == "scenes_b"
        and chosen(["ucm", "scenes"], folder="") == "scenes_b"
    )
    # the set under study is the world "a"
    assert chosen(["scenes"], under_study="scenes") == "scenes_b"
    with pytest.raises(UserError, match="names ucm, the set under study"):
        chosen(["ucm", "scenes"], under_study="ucm")
    for names, why in ((["rsicd"], "rsicd is not in DATA"), ([], "it is empty")):
        with pytest.raises(UserError, match=f"None of PRETRAIN_SETS can be had .{why}"):
            chosen(names)


# ---- CLIP
def test_the_trained_clip_fills_the_systems_that_start_from_it(training_of):
    start, model = training_of().clip_start("tiny")
    tower = start.towers["clip"]
    assert (tower.kind, tower.source) == (
        "stand-in",
        "pre-trained on the training split of other",
    ) and start.options == {"clip": "clip_standin"}
    state = checkpoints.read_state_dict(tower.path)
    assert all(
        torch.equal(value.cpu(), state[name]) for name, value in model.clip.state_dict().items()
    )
    for system in (PIRCLIP(PIRCLIPConfig.tiny()), PERSITR(PERSITRConfig.tiny())):
        start.fill(system)
        assert all(
            torch.equal(value, state[name]) for name, value in system.clip.state_dict().items()
        )
    untrained = start.build(lambda: CLIP(CLIPConfig.tiny()), 0)
    assert torch.equal(untrained.clip.visual.proj, state["visual.proj"])
    assert (
        start.read_tokenizer().max_length
        == backbones.clip_size("clip_standin").text["context_length"]
    )


def test_a_clip_is_trained_once_and_anew_when_the_set_or_the_seed_is_another(
    training_of, data, tmp_path
):
    first, _ = training_of().clip_start("tiny")
    again, _ = training_of().clip_start("tiny")
    assert again == first and len(list(tmp_path.glob("clip_standin-*/model.safetensors"))) == 1
    on_data = replace(training_of(), other=data).clip_start("tiny")[0]
    assert "colours" in on_data.towers["clip"].source
    seeded = replace(training_of(), config=replace(training_of().config, seed=1)).clip_start(
        "tiny"
    )[0]
    shas = {start.towers["clip"].sha256 for start in (first, on_data, seeded)}
    assert len(shas) == 3 and len(list(tmp_path.glob("clip_standin-*/model.safetensors"))) == 3


def test_a_clip_sees_the_training_pairs_of_the_other_set_as_they_are(training_of, other, tmp_path):
    """Not cropped, not mirrored."""
    start, _ = training_of().clip_start("tiny")
    task = pretraining.task_of(other, start, 0, tmp_path, workers=1)
    batch = next(iter(pretraining.loader(task, 16)))
    table = other.table.split("train")
    picture = torch.cat(list(task.pixels(table)))
    assert torch.equal(batch["pixels"], picture[batch["image_index"]])
    assert len(pretraining.loader(task, 16).dataset) == len(table.captions)


def test_the_compact_clip_reads_cached_features(training_of, other, tmp_path, monkeypatch):
    start, model = training_of().clip_start("compact")
    assert set(start.towers) == {"vision_encoder", "text_encoder", "clip"} and start.options == {
        "clip": "clip_compact"
    }
    assert [tower.kind for tower in start.towers.values()] == ["package", "package", "stand-in"]
    filled = start.build(lambda: PERSITR(PERSITRConfig.compact()), 0)
    assert torch.equal(filled.clip.visual.conv1.weight, model.clip.visual.conv1.weight.cpu())
    monkeypatch.setattr(model, "image_features", None)
    task = pretraining.task_of(other, start, 0, tmp_path, workers=1)
    assert task.embeddings(model, "val").images.shape == (8, 256)


# ---- ViLT
def test_the_trained_vilt_fills_cfitr_and_knows_the_words_of_both_sets(training_of, data, tmp_path):
    start, model = training_of().vilt_start("tiny", data)
    tokenizer = start.read_tokenizer()
    assert len(set(tokenizer.encode(["meadow place"])[0])) == 4 and (
        tokenizer.fixed,
        tokenizer.max_length,
    ) == (True, 32)
    filled = start.build(lambda: CFITR(CFITRConfig.tiny(tokenizer.vocab_size)), 0)
    for part in ("vilt", "rank_output"):
        state = checkpoints.read_state_dict(start.towers[part].path)
        trained = getattr(model, part).state_dict()
        assert all(
            torch.equal(value, state[name]) and torch.equal(value, trained[name].cpu())
            for name, value in getattr(filled, part).state_dict().items()
        )
    assert "other" in start.towers["vilt"].source and start.options == {"vilt": "vilt_standin"}
    assert (
        training_of().vilt_start("tiny", data)[0] == start
        and len(list(tmp_path.glob("vilt_*/model.safetensors"))) == 2
    )


def test_the_compact_vilt_starts_from_the_packages(training_of, data):
    start, model = training_of().vilt_start("compact", data)
    filled = start.build(lambda: CFITR(CFITRConfig.compact()), 0)
    assert torch.equal(
        filled.vilt.encoder.layer[0].output.dense.weight,
        model.vilt.encoder.layer[0].output.dense.weight.cpu(),
    )
    assert list(start.towers) == ["vision_encoder", "text_encoder", "vilt", "rank_output"]


# the last reads like the first
CAPTIONS = Captions(np.arange(8), np.array([0, 1, 2, 3, 4, 5, 6, 0]), {"mask": np.ones((7, 32))})


def small(matching):
    torch.manual_seed(0)
    return MatchingViLT(CFITRConfig.tiny(40, dropout=0.0)).learn(CAPTIONS, matching)


def batch_of(rows):
    torch.manual_seed(1)
    ids, mask = torch.randint(5, 40, (rows, 32)), torch.ones(rows, 32, dtype=torch.long)
    mask[0, 5:] = 0
    return {
        "pixels": torch.randn(rows, 3, 112, 112),
        "ids": ids,
        "mask": mask,
        "row": torch.arange(rows),
    }


def test_the_means_of_image_and_words_behind_the_lower_layers_are_compared():
    model, batch = small(False).eval(), batch_of(3)
    states = model.image_states(batch["pixels"]), model.text_states(batch["ids"], batch["mask"])
    keep = torch.ones(3, 50), batch["mask"]
    rows = [
        F.normalize(
            torch.stack(
                [
                    row[words.bool()].mean(0)
                    for row, words in zip(model.vilt.layernorm(x), mask, strict=True)
                ]
            ),
            dim=1,
        )
        for x, mask in zip(states, keep, strict=True)
    ]
    for found, expected in zip(model.embed_batch(batch), rows, strict=True):
        assert_close(found, expected)
    terms = model.loss(batch)
    assert_close(terms["loss"], clip_loss(*rows, torch.tensor(1 / 0.07)))
    assert set(terms) == {"loss", "aligned"}


def test_matching_asks_for_the_own_caption_among_false_ones():
    model, batch = small(True).eval(), batch_of(4)
    image, text = (
        model.image_states(batch["pixels"]),
        model.text_states(batch["ids"], batch["mask"]),
    )
    choices = torch.tensor([[0, 2, 3], [1, 0, 3], [2, 1, 1], [3, 0, 0]])
    scores = model.score_choices(image, text, batch["mask"], choices)
    for i, j in ((0, 1), (2, 0), (3, 2)):
        pair = model.score_pairs(
            image[i : i + 1], text[choices[i, j]][None], batch["mask"][choices[i, j]][None]
        )
        assert_close(scores[i, j], pair[0])
    torch.manual_seed(3)
    terms = model.loss(batch, matching=True)
    torch.manual_seed(3)
    expected = F.cross_entropy(
        model.score_choices(image, text, batch["mask"], model.choices(batch["row"])),
        torch.zeros(4, dtype=torch.long),
    )
    assert_close(terms["matched"], expected)
    assert_close(terms["loss"], terms["aligned"] + terms["matched"])


def test_false_texts_are_false_where_the_batch_has_some():
    model = small(True)
    for _ in range(20):
        choices = model.choices(torch.tensor([0, 7, 3]))  # 0 and 7 read alike
        assert choices[:, 0].tolist() == [0, 1, 2]
        assert set(choices[0, 1:].tolist()) == {2} == set(choices[1, 1:].tolist()) and set(
            choices[2, 1:].tolist()
        ) <= {0, 1}
    assert model.choices(torch.tensor([0, 7])).shape == (2, 3)  # none is false


def test_padding_changes_no_embedding():
    model, batch = small(False).eval(), batch_of(2)
    changed = batch["ids"].clone()
    changed[0, 5:] = 7
    before, after = (model.encode_texts(ids, batch["mask"]) for ids in (batch["ids"], changed))
    assert_close(before, after)


@pytest.mark.parametrize("matching", [False, True])
def test_every_part_that_trains_has_a_gradient_and_the_rest_rests(matching):
    model = small(matching).train()
    model.loss(batch_of(4), matching)["loss"].backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert (
        any("layer.3" in name for name in trained)
        == any("pooler.dense" in name for name in trained)
        == matching
    )
    assert ("rank_output.weight" in trained) == matching and not any(
        "module" in name for name in trained
    )
    assert sum(len(group["params"]) for group in model.parameter_groups(0.1)) == len(trained)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.after_step()
    assert model.logit_scale.exp() <= 100.01


def test_a_few_steps_bring_image_and_caption_together():
    model, batch = small(False).train(), batch_of(7)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.01), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model.loss(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_the_share_of_matched_images_counts_only_a_clear_first_place(
    training_of, data, other, tmp_path, monkeypatch
):
    start, model = training_of().vilt_start("tiny", data)
    task = pretraining.task_of(other, start, 0, tmp_path, workers=1)
    before = torch.get_rng_state()
    found = pretraining.matched(model, task, "test", others=3)
    assert 0 <= found <= 100 and found == pretraining.matched(model, task, "test", others=3)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(pretraining, "BATCH", 3)  # in smaller parts
    assert found == pretraining.matched(model, task, "test", others=3)
    asked = []
    for scores, percent in (([1.0, 0.0], 100), ([0.0, 0.0], 0), ([0.0, 1.0], 0)):
        monkeypatch.setattr(
            model,
            "score_choices",
            lambda image, text, mask, chosen: (
                asked.append(chosen) or torch.tensor([scores] * len(image))
            ),
        )
        assert pretraining.matched(model, task, "test", others=1) == percent
    table = other.table.split("test")
    texts, string = distinct_captions(table, task.tokenizer.clean)
    for image, (own, false) in zip(
        table.images.image_id, torch.cat(asked[:2]).tolist(), strict=True
    ):
        described = {
            task.tokenizer.clean(text)
            for text in table.captions.text[table.captions.image_id == image]
        }
        assert texts[own] in described and texts[false] not in described

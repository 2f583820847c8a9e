"""What systems start from: nothing is filled silently, and equal seeds give equal weights."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet

from nbhelpers.data.tokenization import CLIPTokenizer
from nbhelpers.errors import UserError
from nbhelpers.papers.baseline import FrozenConfig, FrozenHeads
from nbhelpers.papers.cfitr import CFITR, CFITRConfig
from nbhelpers.papers.clip import CLIP, CLIPConfig
from nbhelpers.papers.pe_rsitr import PERSITR, PERSITRConfig
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.towers import backbones, checkpoints, public_weights, starting_weights
from nbhelpers.towers.starting_weights import Start, Tower


@pytest.fixture
def towers(tmp_path):
    """A vision tower and a prior, saved with numbers that no initialisation gives."""
    made = {}
    for attribute, module in (
        ("vision_encoder", backbones.vision_tower("swin_standin")),
        ("conv_encoder", backbones.prior_tower("resnet_standin")),
    ):
        state = {name: torch.full_like(value, 0.25) for name, value in module.state_dict().items()}
        path = checkpoints.save_checkpoint(tmp_path / f"{attribute}.safetensors", state, {})
        made[attribute] = Tower.stand_in(f"{attribute}-test", path, "a test")
    return made


@pytest.fixture
def start(towers, tmp_path):
    return Start(
        str(tmp_path / "tokenizer.json"),
        12,
        towers,
        fixed=True,
        classes=["a", "b"],
        options={"filter_size": 40},
    )


def make():
    return PIR(PIRConfig.tiny(30, instru_num=1, cycle_num=1))


# ---- Start
def test_a_start_is_read_as_it_was_written(start, tmp_path):
    path = start.write(tmp_path / "pir.json")
    assert Start.read(path) == start
    digests = [
        checkpoints.sha256(tmp_path / f"{name}.safetensors")
        for name in ("vision_encoder", "conv_encoder")
    ]
    assert [tower.sha256 for tower in start.towers.values()] == digests
    assert start.record()[1] == {
        "name": "conv_encoder: conv_encoder-test",
        "source": "a test",
        "kind": "stand-in",
        "sha256": digests[1],
    }


def test_a_start_that_is_missing_or_broken_names_the_notebook_that_writes_it(start, tmp_path):
    path = tmp_path / "pir.json"
    with pytest.raises(
        UserError, match=r"pir.json does not exist; run 12_starting_weights first"
    ) as error:
        Start.read(path)
    assert "\n" not in str(error.value)
    content = json.loads(start.write(path).read_text())
    for text in (
        "",
        "[]",
        "{}",
        json.dumps(content | {"unknown": 1}),
        json.dumps(content | {"towers": {"a": {"path": "x"}}}),
    ):
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


def test_published_classifiers_and_computed_buffers_are_left_out_but_nothing_else(
    start, towers, tmp_path
):
    state = checkpoints.read_state_dict(towers["vision_encoder"].path)
    more = {
        "head.fc.weight": torch.zeros(9, 96),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49),
    }
    path = checkpoints.save_checkpoint(tmp_path / "published.safetensors", state | more, {})
    replace(start, towers={"vision_encoder": Tower.stand_in("published", path, "")}).fill(make())
    path = checkpoints.save_checkpoint(
        tmp_path / "other.safetensors", {"adapter": torch.zeros(1)} | state, {}
    )
    with pytest.raises(UserError, match="adapter"):
        replace(start, towers={"vision_encoder": Tower.stand_in("other", path, "")}).fill(make())


def test_a_resnet_under_the_names_of_the_released_loader_is_refused_key_by_key(
    start, towers, tmp_path
):
    state = checkpoints.read_state_dict(towers["conv_encoder"].path)
    path = checkpoints.save_checkpoint(
        tmp_path / "odd.safetensors", {f"{i}.{n}": v for i, (n, v) in enumerate(state.items())}, {}
    )
    model = make()
    first = next(model.conv_encoder.parameters())
    before = first.clone()
    with pytest.raises(UserError, match="nothing was loaded") as error:
        replace(start, towers={"conv_encoder": Tower.stand_in("odd", path, "")}).fill(model)
    assert "conv1.0.weight" in str(error.value) and torch.equal(first, before)


def test_weights_that_changed_since_or_went_away_are_refused(start, towers, tmp_path):
    checkpoints.save_checkpoint(
        tmp_path / "conv_encoder.safetensors", backbones.prior_tower("resnet_standin"), {}
    )
    with pytest.raises(UserError, match="changed since 12_starting_weights"):
        start.fill(make())
    (tmp_path / "conv_encoder.safetensors").unlink()
    with pytest.raises(UserError, match="conv_encoder.safetensors"):
        start.fill(make())


def test_a_model_configured_otherwise_than_the_weights_want_is_refused(start):
    model = PIR(PIRConfig.tiny(30, instru_num=1, cycle_num=1, filter_size=30))
    before = model.vision_encoder.norm.weight.clone()
    with pytest.raises(
        UserError, match="PIR was configured with filter_size=30, but its starting weights want 40"
    ):
        start.fill(model)
    assert torch.equal(model.vision_encoder.norm.weight, before)


def test_parts_that_a_file_lacks_stay_random_only_if_they_are_named(start, towers, tmp_path):
    state = checkpoints.read_state_dict(towers["conv_encoder"].path)
    path = checkpoints.save_checkpoint(
        tmp_path / "part.safetensors",
        {n: v for n, v in state.items() if not n.startswith("layer4.")},
        {},
    )
    tower = Tower.stand_in("part", path, "")
    with pytest.raises(UserError, match="layer4.0.conv1.weight"):
        replace(start, towers={"conv_encoder": tower}).fill(make())
    model = replace(start, towers={"conv_encoder": replace(tower, left=["layer4.*"])}).build(
        make, 0
    )
    drawn = starting_weights.seeded(make, 0).conv_encoder.layer4.state_dict()
    assert all(
        torch.equal(value, drawn[name])
        for name, value in model.conv_encoder.layer4.state_dict().items()
    )
    assert (model.conv_encoder.layer3[0].conv1.weight == 0.25).all()


# ---- tokenizers
def test_a_start_may_name_the_words_of_clip(tmp_path):
    start = Start("clip", 40, {}, fixed=True)
    tokenizer = Start.read(start.write(tmp_path / "clip.json")).read_tokenizer()
    ids, mask = tokenizer(["A red field."])
    assert (
        isinstance(tokenizer, CLIPTokenizer)
        and ids.shape == (1, 40)
        and tokenizer.vocab_size == 49408
    )
    assert (
        ids[0, 0] == 49406
        and ids[0, mask.sum() - 1] == 49407
        and tokenizer.clean("A red field.") == "A red field."
    )


# ---- the starts
def test_a_whole_checkpoint_needs_a_tokenizer_and_no_weights(start, tmp_path):
    nowhere = tmp_path / "none.json"
    lengths = {
        "bert_base": (47, False),
        "minilm": (32, True),
        "vilt_b32": (40, True),
        "clip_compact": (32, True),
        "vilt_compact": (32, True),
        "vit_b32": (77, True),
        "vit_b32_quickgelu": (77, True),
        "clip_standin": (40, True),
    }
    for name, (length, fixed) in lengths.items():
        found = Start.for_checkpoint(name, nowhere)
        assert not found.towers and (found.max_length, found.fixed) == (length, fixed), name
        tokenizer = found.read_tokenizer()
        assert (tokenizer.max_length, tokenizer.fixed) == (length, fixed)
        ids = tokenizer.encode(["a red field"])[0]
        assert (ids[0], ids[-1]) == {"vilt_b32": (101, 102)}.get(
            name, (49406, 49407) if found.tokenizer == "clip" else (101, ids[-1])
        )
        assert tokenizer.vocab_size == (49408 if found.tokenizer == "clip" else 30522)
    # PIR has no [SEP]
    assert (
        102
        not in Start.for_checkpoint("bert_base", nowhere)
        .read_tokenizer()
        .encode(["a red field"])[0]
    )
    path = start.write(tmp_path / "pir.json")
    for name in ("bert_standin", "vilt_standin"):
        assert Start.for_checkpoint(name, path) == replace(start, towers={})
        with pytest.raises(UserError, match="run 12_starting_weights first"):
            Start.for_checkpoint(name, nowhere)


def test_compact_sizes_read_with_one_tokenizer_so_that_they_share_features(tmp_path):
    shas = {starting_weights.package_start().read_tokenizer().sha256}
    shas |= {
        Start.for_checkpoint(name, tmp_path).read_tokenizer().sha256
        for name in ("minilm", "clip_compact", "vilt_compact")
    }
    assert len(shas) == 1


def test_the_package_towers_fill_every_compact_system():
    model = starting_weights.package_start(clip="clip_compact").build(
        lambda: CLIP(CLIPConfig.compact()), 0
    )
    lite0 = checkpoints.read_state_dict(public_weights.resolve("efficientnet_lite0").path)
    assert torch.equal(model.vision_encoder.conv_stem.weight, lite0["_conv_stem.weight"])
    with pytest.raises(
        UserError, match="clip='clip_standin', but its starting weights want 'clip_compact'"
    ):
        starting_weights.package_start(clip="clip_compact").fill(CLIP(CLIPConfig.tiny()))


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
        starting_weights.paper_start("aid", published)
    start = starting_weights.paper_start("imagenet", published)
    assert (
        start.tokenizer == str(published / "bert_base")
        and start.max_length == 47
        and not start.fixed
    )
    assert (
        start.towers["conv_encoder"].name == "resnet50"
        and start.towers["conv_encoder"].kind == "file"
    )
    assert set(starting_weights.paper_start("random", published).towers) == {
        "vision_encoder",
        "text_encoder",
    }
    fitted = starting_weights.paper_start(
        "fit", published, fit=lambda tower: replace(tower, name=f"fitted {tower.name}")
    )
    assert fitted.towers["conv_encoder"].name == "fitted resnet50"
    (published / "resnet50_aid.pth").write_bytes(b"their file")
    assert (
        starting_weights.paper_start("aid", published).towers["conv_encoder"].name == "resnet50_aid"
    )
    for prior, fit in (("", None), ("vgg", None), ("fit", None)):
        with pytest.raises(UserError, match="choose aid"):
            starting_weights.paper_start(prior, published, fit)


# ---- a published CLIP (PIR-CLIP, PE-RSITR)
@pytest.fixture
def small_b32(monkeypatch, tmp_path):
    """ViT-B/32 made small in both activations, with one file of weights as OpenAI's and LAION's
    users have them.
    """
    monkeypatch.delenv("NBHELPERS_WEIGHTS", raising=False)
    for name, quick in (("vit_b32", False), ("vit_b32_quickgelu", True)):
        size = replace(backbones.CLIP["clip_standin"], quick_gelu=quick)
        monkeypatch.setitem(backbones.CLIP, name, size)
        monkeypatch.setitem(backbones.INSTRUCTION, name, backbones.INSTRUCTION["clip_standin"])
    state = {
        name: torch.full_like(value, 0.25)
        for name, value in backbones.clip("vit_b32").state_dict().items()
    }
    for name in ("clip_vit_b32", "clip_vit_b32_laion2b", "georsclip_vit_b32", "mine"):
        torch.save(
            {"state_dict": {f"module.{key}": value for key, value in state.items()}},
            tmp_path / f"{name}.pt",
        )
    return tmp_path


@pytest.mark.parametrize(
    "name, expected",
    [
        ("clip_vit_b32", "vit_b32_quickgelu"),
        ("clip_vit_b32_laion2b", "vit_b32"),
        ("georsclip_vit_b32", "vit_b32_quickgelu"),
    ],
)
def test_a_known_clip_brings_its_activation(small_b32, name, expected):
    start = starting_weights.paper_clip_start(name, folder=small_b32)
    assert start.options == {"clip": expected} and start.towers["clip"].layout == "clip"
    other = "vit_b32" if expected == "vit_b32_quickgelu" else "vit_b32_quickgelu"
    for system, config in ((PIRCLIP, PIRCLIPConfig), (PERSITR, PERSITRConfig)):
        small = {"bottleneck": 4, "share_dim": 4} if system is PERSITR else {}
        make = partial(system, config.paper(clip=expected, **small))
        make_other = partial(system, config.paper(clip=other, **small))
        model = start.build(make, 0)
        assert (model.clip.visual.conv1.weight == 0.25).all() and (
            model.clip.token_embedding.weight == 0.25
        ).all()
        with pytest.raises(
            UserError, match=f"clip='{other}', but its starting weights want '{expected}'"
        ):
            start.build(make_other, 0)


def test_the_activation_of_a_file_must_be_said_and_that_of_a_known_clip_cannot_be_changed(
    small_b32,
):
    path = str(small_b32 / "mine.pt")
    assert starting_weights.paper_clip_start(path, "gelu").options == {"clip": "vit_b32"}
    assert starting_weights.paper_clip_start(path, "quick_gelu").options == {
        "clip": "vit_b32_quickgelu"
    }
    for activation in ("", "relu"):
        with pytest.raises(UserError, match="its file does not hold it: give quick_gelu"):
            starting_weights.paper_clip_start(path, activation)
    with pytest.raises(UserError, match="it was trained with quick_gelu: leave ACTIVATION empty"):
        starting_weights.paper_clip_start("clip_vit_b32", "gelu", small_b32)
    with pytest.raises(UserError, match="'swin_t' is no CLIP"):
        starting_weights.paper_clip_start("swin_t", "", small_b32)


def test_a_clip_that_is_missing_is_an_error_before_any_training(small_b32, monkeypatch):
    monkeypatch.setattr(public_weights, "_on_hub", lambda known, download: None)
    with pytest.raises(UserError, match="RemoteCLIP-ViT-B-32.pt, 605 MB"):
        starting_weights.paper_clip_start("remoteclip_vit_b32", folder=small_b32)


def test_part_of_a_clip_is_refused_key_by_key(small_b32):
    path = small_b32 / "mine.pt"
    state = torch.load(path)["state_dict"]
    torch.save(
        {name: value for name, value in state.items() if "ln_post" not in name}
        | {"module.visual.extra": torch.zeros(1)},
        path,
    )
    with pytest.raises(UserError, match="nothing was loaded") as error:
        starting_weights.paper_clip_start(str(path), "gelu").build(
            lambda: CLIP(CLIPConfig(clip="vit_b32")), 0
        )
    assert all(
        key in str(error.value)
        for key in ("visual.ln_post.weight", "visual.ln_post.bias", "visual.extra")
    )


def test_an_instruction_encoder_fills_all_but_its_last_projection(small_b32):
    encoder = backbones.instruction_encoder("clip_standin")
    theirs = ModifiedResNet((1, 1, 1, 1), output_dim=99, heads=8, image_size=112, width=16)
    torch.save(
        {f"visual.{name}": value for name, value in theirs.state_dict().items()},
        small_b32 / "clip_rn50.pt",
    )
    start = starting_weights.paper_clip_start("clip_vit_b32", folder=small_b32)
    assert starting_weights.with_instruction(start, "random") == start
    start = starting_weights.with_instruction(start, "clip_rn50", small_b32)
    model = start.build(lambda: PIRCLIP(PIRCLIPConfig.paper(**start.options)), 0)
    filled = model.res_visual.state_dict()
    assert filled.keys() == encoder.state_dict().keys()
    assert all(
        torch.equal(value, filled[name])
        for name, value in theirs.state_dict().items()
        if "c_proj" not in name
    )
    assert (
        "without attnpool.c_proj" in start.record()[1]["source"]
        and start.record()[1]["name"] == "res_visual: clip_rn50"
    )
    plain = start.build(lambda: PIRCLIP(PIRCLIPConfig.paper(**start.options).baseline()), 0)
    assert not hasattr(plain, "res_visual")


# ---- a published ViLT (CFITR)
@pytest.fixture
def small_vilt(monkeypatch, tmp_path):
    monkeypatch.delenv("NBHELPERS_WEIGHTS", raising=False)
    monkeypatch.setitem(backbones.VILT, "vilt_b32", backbones.VILT["vilt_standin"])
    state = {
        f"vilt.{name}": torch.full_like(value, 0.25)
        for name, value in backbones.vilt("vilt_b32", 60).state_dict().items()
    }
    torch.save(state, tmp_path / "vilt_mlm.bin")
    torch.save(
        state
        | {
            "rank_output.weight": torch.full((1, 64), 2.0),
            "rank_output.bias": torch.zeros(1),
        },
        tmp_path / "mine.bin",
    )
    return tmp_path


def test_a_vilt_fills_the_trunk_and_the_rank_head_where_the_file_has_one(small_vilt, capsys):
    def build(start):
        return start.build(lambda: CFITR(CFITRConfig(vocab_size=60, split=2, hidden=8, bits=8)), 0)

    start = starting_weights.paper_vilt_start("vilt_mlm", small_vilt)
    assert (
        "holds no matching head, so the rank head starts at random" in capsys.readouterr().out
        and set(start.towers) == {"vilt"}
    )
    model = build(start)
    assert (
        model.vilt.encoder.layer[3].output.dense.weight == 0.25
    ).all() and model.rank_output.weight.std() > 0
    start = starting_weights.paper_vilt_start(str(small_vilt / "mine.bin"))
    assert "comes with it" in capsys.readouterr().out
    assert (build(start).rank_output.weight == 2).all() and start.options == {"vilt": "vilt_b32"}
    tokenizer = start.read_tokenizer()
    ids, mask = tokenizer(["a red field"])
    assert ids.shape == (1, 40) and ids[0, mask.sum() - 1] == 102
    with pytest.raises(
        UserError, match="vilt='vilt_standin', but its starting weights want 'vilt_b32'"
    ):
        start.fill(CFITR(CFITRConfig.tiny(60)))

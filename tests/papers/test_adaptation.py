"""The comparators of PE-RSITR start as the CLIP they are given, train what they claim and nothing
else, and come back.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from closeness import assert_close
from torch import nn

from nbhelpers.data import image_input
from nbhelpers.errors import UserError
from nbhelpers.papers import adaptation
from nbhelpers.papers.adaptation import METHODS, adapted, optimizer_bytes, trainable
from nbhelpers.papers.clip import CLIP, CLIPConfig, clip_loss
from nbhelpers.towers import backbones, checkpoints
from nbhelpers.training import loop

SIZE = backbones.CLIPSize(
    16,
    {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "image_size": 32},
    {"layers": 2, "width": 20, "heads": 4, "context_length": 9, "vocab_size": 40},
    image_input.ImageInput(32),
)
CONFIG = CLIPConfig("small")
TRAINED = [method for method in METHODS if method != "zero_shot"]


@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    monkeypatch.setitem(backbones.CLIP, "small", SIZE)


def start(model: CLIP) -> CLIP:
    """Fills CLIP with random weights, large enough that every part matters; equal whenever it is
    called.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.clip.named_parameters()):
            if p.ndim:
                p.copy_(
                    ("ln_" in name and "weight" in name)
                    + 0.2 * torch.randn(p.shape, generator=generator)
                )
    return model


def pairs(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixels": torch.randn(count, 3, 32, 32, generator=generator),
        "ids": torch.randint(1, 40, (count, 9), generator=generator),
        "mask": torch.ones(count, 9, dtype=torch.long),
        "image_index": torch.arange(count),
        "scene": torch.arange(count),
    }


def both(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text embeddings of the pairs in eval mode, on the CPU."""
    model.cpu().eval()
    with torch.no_grad():
        return model.embed_batch(pairs())


def similarity(model: nn.Module) -> torch.Tensor:
    image, text = both(model)
    return image @ text.t()


@pytest.mark.parametrize("method", METHODS)
def test_each_starts_as_the_clip_it_is_given(method):
    torch.manual_seed(3)
    model = adapted(method, CONFIG, start)
    assert_close(similarity(model), similarity(start(CLIP(CONFIG))))
    for rows in both(model):
        assert_close(rows.norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("method", TRAINED)
def test_each_trains_what_it_claims_by_the_loss_of_clip(tmp_path, method):
    torch.manual_seed(3)
    model, batch = adapted(method, CONFIG, start), pairs()
    assert_close(clip_loss(*both(model), model.clip.logit_scale.exp()), model.loss(batch)["loss"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    claimed = {
        "linear_probe": ("image_probe.", "text_probe."),
        "full": ("clip.",),
        "adaptformer": ("Uniadapt.",),
    }.get(method, ())
    claims = {
        name
        for name in before
        if name.startswith(claimed) or (method == "lora" and ".lora_" in name)
    }
    assert claims == {name for name, p in model.named_parameters() if p.requires_grad}
    config = loop.TrainConfig(
        epochs=4, lr=1e-2, batch_size=6, weight_decay=0.1, schedule="constant", warmup_fraction=0.0
    )
    history = loop.fit(model, [batch], config, tmp_path, progress=False)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    for name, p in model.named_parameters():
        assert torch.equal(p.cpu(), before[name]) != (name in claims), name


@pytest.mark.parametrize("method", TRAINED)
def test_clip_rests_in_training_unless_it_is_trained(method):
    model = adapted(method, CONFIG, start).train()
    assert any(part.training for part in model.clip.modules()) == (method == "full")


@pytest.mark.parametrize(
    "method, counted",
    [
        ("zero_shot", 0),
        ("linear_probe", 2 * 512 * 1024),
        ("full", 151_277_313),
        ("lora", 12 * (2 * (768 + 3072) + 2 * (512 + 2048))),
        ("adaptformer", 165_248),
    ],
)
def test_counts_of_the_paper_size_and_what_adam_keeps_for_them(method, counted):
    with torch.device("meta"):
        model = adapted(method, CLIPConfig("vit_b32_quickgelu"))
    assert trainable(model) == counted and optimizer_bytes(model) == 8 * counted


def test_optimizer_bytes_are_those_of_adam():
    model = adapted("adaptformer", CONFIG)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=1e-3)
    model.loss(pairs())["loss"].backward()
    optimizer.step()
    kept = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert (
        optimizer_bytes(model) == sum(moment.numel() * moment.element_size() for moment in kept) > 0
    )


def test_rank_and_bottleneck_set_the_number_of_parameters():
    assert trainable(adapted("lora", CONFIG, rank=3)) == 3 * trainable(adapted("lora", CONFIG))
    narrow, wide = (trainable(adapted("adaptformer", CONFIG, bottleneck=width)) for width in (4, 8))
    assert wide - narrow == 4 * (2 * 24 + 1 + 2 * 20 + 1)


def test_lora_reaches_both_matrices_of_every_ffn_and_no_attention():
    names = {
        name.split(".lora_")[0]
        for name, p in adapted("lora", CONFIG).named_parameters()
        if p.requires_grad
    }
    assert names == {
        f"clip.{tower}transformer.resblocks.{i}.mlp.{part}"
        for tower in ("visual.", "")
        for i in range(2)
        for part in ("c_fc", "c_proj")
    }


def test_adaptformer_adds_a_tenth_of_its_bottleneck_beside_the_ffn():
    model = adapted("adaptformer", CONFIG, start, bottleneck=4).eval()
    nn.init.ones_(model.Uniadapt.up_proj.weight)
    x = torch.randn(2, 9, 20)
    inner = torch.relu(model.Uniadapt.down_proj(x)).sum(-1, keepdim=True)
    assert_close(model.adapt(1, x, visual=False), 0.1 * inner.expand_as(x))


@pytest.mark.parametrize("method", TRAINED)
def test_each_comes_back_from_its_checkpoint(tmp_path, method):
    settings = loop.TrainConfig(
        epochs=2, lr=1e-2, batch_size=6, schedule="constant", warmup_fraction=0.0
    )
    arguments = [
        method,
        lambda: adapted(method, CONFIG, start),
        [pairs()],
        settings,
        tmp_path,
        "k" * 64,
    ]
    first, _, trained = loop.load_or_train(
        *arguments, loop.Options(meta={"system": method, "model": asdict(CONFIG)})
    )
    again, _, anew = loop.load_or_train(*arguments)
    (found,) = tmp_path.glob("*/model.safetensors")
    stored = checkpoints.load_checkpoint(found)[0]
    assert (
        trained
        and not anew
        and set(stored) == {name for name, p in first.named_parameters() if p.requires_grad}
    )
    assert torch.equal(similarity(again), similarity(first))
    # it has learnt something
    assert (similarity(again) - similarity(adapted(method, CONFIG, start))).abs().max() > 1e-3


def test_zero_shot_has_nothing_to_train_and_other_methods_do_not_exist(tmp_path):
    config = loop.TrainConfig(epochs=1, lr=1e-2, batch_size=6)
    with pytest.raises(UserError, match="No parameter of FrozenCLIP is trainable"):
        loop.fit(adapted("zero_shot", CONFIG, start), [pairs()], config, tmp_path, progress=False)
    with pytest.raises(UserError, match="no adaptation called 'prompt'; choose one of zero_shot"):
        adapted("prompt", CONFIG)


@pytest.mark.parametrize("method", TRAINED)
def test_the_compact_size_leaves_its_frozen_towers_alone(method):
    with torch.device("meta"):
        model = adapted(method, CLIPConfig.compact())
    assert not any(
        name.startswith(("vision_encoder", "text_encoder"))
        for name, p in model.named_parameters()
        if p.requires_grad
    )
    assert model.frozen() == [model.vision_encoder, model.text_encoder]
    assert not any(part.training for tower in model.train().frozen() for part in tower.modules())


def test_names_of_methods_are_those_that_can_be_made():
    assert {type(adapted(method, CONFIG)) for method in METHODS} == {
        adaptation.FrozenCLIP,
        adaptation.LinearProbe,
        CLIP,
        adaptation.LoRA,
        adaptation.AdaptFormer,
    }

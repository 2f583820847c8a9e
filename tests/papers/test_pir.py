"""PIR: options of the ablations, frozen parts, and files that give the same model again.

The numbers of the authors' code are in test_reference.py. As a script this file is one of two
processes.
"""

from __future__ import annotations

import pickle
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import release_states
import torch
import torch.nn.functional as F
import two_processes
from closeness import SINGLE, assert_close
from release_files import write_release
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer

from nbhelpers.data import image_input
from nbhelpers.errors import UserError
from nbhelpers.papers import pir
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.paths import repository_root
from nbhelpers.towers import backbones, checkpoints, starting_weights
from nbhelpers.training import loop

SMALL = PIRConfig(embed_dim=16, heads=2, dropout=0.0)
WORDS, LENGTH = 40, 9


def swin():
    return SwinTransformer(
        img_size=56,
        patch_size=4,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=7,
        num_classes=0,
        drop_path_rate=0.0,
    )


def resnet():
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(4, 8, 8, 16))


def bert():
    return backbones.bert(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def small(config: PIRConfig = SMALL, **changes) -> PIR:
    """A PIR of 50 image tokens, without dropout; parts that two of them share start from the same
    weights.
    """
    config = replace(config, **changes)
    torch.manual_seed(0)
    towers = swin(), bert(), resnet() if config.vir else None
    torch.manual_seed(1)
    model = PIR(config, towers)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # larger than the default, so that every part matters
        for name, p in sorted(model.named_parameters()):
            if p.dim() and not name.startswith(("vision_encoder", "text_encoder", "conv_encoder")):
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def pairs(count: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pairs; two share an image, three a class; captions of 4 to 9 words, padded with 0."""
    generator = torch.Generator().manual_seed(seed)
    mask = (
        torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (count, 1), generator=generator)
    ).long()
    ids = torch.randint(1, WORDS, (count, LENGTH), generator=generator) * mask
    index = torch.arange(count)
    index[1:2] = 0
    return {
        "pixels": torch.randn(count, 3, 56, 56, generator=generator),
        "ids": ids,
        "mask": mask,
        "image_index": index,
        "scene": index.clamp(min=2) // 2,
    }


def step(model: PIR, batch: dict, lr: float = 1e-5) -> dict[str, torch.Tensor]:
    """The terms of one training step, which leaves gradients and new weights."""
    optimizer = torch.optim.AdamW(model.parameter_groups(0.01), lr=lr)
    terms = model.loss(batch)
    terms["loss"].backward()
    optimizer.step()
    return {name: value.detach().clone() for name, value in terms.items()}


def both(model: PIR, batch: dict) -> torch.Tensor:
    """(2B, D) embeddings in eval mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat(model.embed_batch(batch))


# ---- options
OPTIONS = {
    "baseline": SMALL.baseline(),
    "vir": replace(SMALL, lca=False, affiliation=False),
    "vir_lca": replace(SMALL, affiliation=False),
    "affiliation_symmetric": replace(SMALL, affiliation_form="symmetric"),
    "triplet": replace(SMALL, triplet=True, affiliation=False),
    "triplet_baseline": replace(SMALL.baseline(), triplet=True),
    "max_violation": replace(SMALL, triplet=True, affiliation=False, max_violation=True),
    # attention over a single token trains neither its queries nor its keys
    "filter_2": replace(SMALL, filter_size=2),
    "filter_50": replace(SMALL, filter_size=50),
    "instru_1": replace(SMALL, instru_num=1),
    "instru_3": replace(SMALL, instru_num=3),
    "cycle_1": replace(SMALL, cycle_num=1),
    "cycle_5": replace(SMALL, cycle_num=5),
    "center_factor": replace(SMALL, center_factor=10.0),
    "use_mask": replace(SMALL, use_mask=True),
    "text_mean": replace(SMALL, text_global="mean"),
    "feature_norm": replace(SMALL, feature_norm=True),
    "feature_dropout": replace(SMALL, feature_dropout=0.5),
}


@cache
def loss_of_all() -> float:
    return small().loss(pairs())["loss"].item()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_loss_and_trains(name):
    batch, model = pairs(), small(OPTIONS[name])
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    terms = step(model, batch)
    assert abs(terms["loss"] - loss_of_all()) > 1e-4
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(
        torch.isfinite(p.grad).all() for key, p in model.named_parameters() if key in trained
    )
    assert all(
        torch.equal(p, before[key]) != (key in trained) for key, p in model.named_parameters()
    )
    assert model.loss(batch)["loss"] < terms["loss"]


def test_attention_over_the_only_kept_token_cannot_learn_where_to_look():
    """Its softmax is 1 whatever queries and keys say; their gradients are zero but for rounding,
    and all else trains.
    """
    batch, model = pairs(), small(replace(SMALL, filter_size=1))
    terms, grads = (
        step(model, batch),
        {key: p.grad for key, p in model.named_parameters() if p.requires_grad},
    )
    asking = {
        key
        for key in grads
        if key.startswith(("img_sa.", "img_ca.")) and ("linear_q" in key or "linear_k" in key)
    }
    assert asking and all(grads[key].abs().max() < 1e-6 for key in asking)
    assert all(
        grads[key.replace("linear_q", "linear_v")].abs().max() > 1e-4
        for key in asking
        if key.endswith("linear_q.weight")
    )
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert abs(terms["loss"] - loss_of_all()) > 1e-4 and model.loss(batch)["loss"] < terms["loss"]


def test_the_baseline_has_linear_projections_alone():
    parts = {name.split(".")[0] for name, _ in small(SMALL.baseline()).named_parameters()}
    assert parts == {"temp", "vision_encoder", "text_encoder", "vision_proj", "text_proj"}
    assert set(small(SMALL.baseline()).loss(pairs())) == {"loss", "contrastive", "temp"}


def test_with_zero_heads_pir_starts_as_its_baseline_and_leaves_it():
    batch = pairs()
    model = PIR(replace(SMALL, zero_heads=True), (swin(), bert(), resnet()))
    baseline = PIR(SMALL.baseline(), (model.vision_encoder, model.text_encoder, None))
    baseline.load_state_dict(
        {key: value for key, value in model.state_dict().items() if key in baseline.state_dict()}
    )
    assert torch.equal(both(model, batch), both(baseline, batch))
    model.train()
    for _ in range(2):  # the first step moves the heads alone
        step(model, batch, lr=1e-3)
    assert model.img_sa[0].mhatt.linear_q.weight.grad.abs().max() > 0
    assert not torch.allclose(both(model, batch), both(baseline, batch), atol=1e-4)


def test_normed_features_forget_their_scale():
    model, batch = small(feature_norm=True).eval(), pairs()
    epsilon = 4 * SINGLE  # the epsilon of the norms does not grow with the features
    with torch.no_grad():
        image, text = (
            model.image_features(batch["pixels"]),
            model.text_features(batch["ids"], batch["mask"])["text"],
        )
        for embed, features in (
            (lambda x: model.embed_images(x, image["prior"]), image["vision"]),
            (model.embed_texts, text),
        ):
            assert_close(embed(7.0 * features), embed(features), epsilon)
        assert_close(
            model.belief(7.0 * image["vision"], image["prior"]), model.belief(**image), epsilon
        )


def test_dropped_channels_are_the_same_in_all_tokens():
    model = small(feature_dropout=0.5, vir=False)
    seen = []
    model.vision_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = torch.ones(3, 50, model.vision_encoder.num_features)
    model.embed_images(tokens)
    assert set(seen[0].unique().tolist()) == {0.0, 2.0}
    model.eval().embed_images(tokens)
    assert torch.equal(seen[1], tokens[:, 0])
    whole = small(feature_dropout=0.5)
    whole.vision_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    whole.embed_images(tokens, torch.ones(3, whole.conv_encoder.num_features))
    assert torch.equal(seen[2], seen[2][:, :1].expand_as(seen[2])) and not torch.equal(
        seen[2][0], seen[2][1]
    )


def test_the_terms_add_up_with_the_weight_of_the_affiliation():
    for factor in (0.0, 1.0, 2.5):
        terms = small(center_factor=factor).loss(pairs())
        assert_close(terms["loss"], terms["contrastive"] + factor * terms["affiliation"])
        assert terms["affiliation"] > 0 and terms["temp"] == terms["temp2"] == torch.tensor(0.07)


def test_triplet_stands_alone_and_sums_all_or_the_hardest_violations():
    model, batch = small(triplet=True, affiliation=False), pairs()
    assert set(model.loss(batch)) == {"loss", "triplet"} and not hasattr(model, "temp")
    image, text = model.embed_batch(batch)
    scores, count = (image @ text.t()).tolist(), len(image)
    violations = [
        [max(0.0, 0.2 + scores[i][j] - scores[i][i]) if i != j else 0.0 for j in range(count)]
        for i in range(count)
    ]
    turned = [
        [max(0.0, 0.2 + scores[j][i] - scores[i][i]) if i != j else 0.0 for j in range(count)]
        for i in range(count)
    ]
    every = sum(map(sum, violations + turned))
    hardest = sum(map(max, violations + turned))
    assert model.loss(batch)["loss"].item() == pytest.approx(every, rel=1e-4)
    assert small(triplet=True, affiliation=False, max_violation=True).loss(batch)[
        "loss"
    ].item() == pytest.approx(hardest, rel=1e-4)
    assert every > hardest + 0.1


@pytest.mark.parametrize("symmetric", [False, True])
def test_affiliation_equals_a_plain_loop(symmetric):
    generator = torch.Generator().manual_seed(3)
    image, text = (F.normalize(torch.randn(7, 5, generator=generator), dim=1) for _ in range(2))
    scene, temp = [0, 1, 0, 2, 1, 0, 5], 0.3
    centre = {
        (kind, s): torch.stack([rows[j] for j in range(7) if scene[j] == s]).mean(0)
        for kind, rows in (("image", image), ("text", text))
        for s in scene
    }

    def cross_entropy(query, candidates, own):
        scores = torch.stack([query @ candidate / temp for candidate in candidates])
        return torch.logsumexp(scores, 0) - scores[own]

    total = 0
    for i in range(7):
        total += cross_entropy(image[i], [centre["text", s] for s in scene], i)
        if symmetric:
            total += cross_entropy(text[i], [centre["image", s] for s in scene], i)
        else:
            total += cross_entropy(centre["image", scene[i]], list(text), i)
    ours = pir.affiliation_loss(image, text, torch.tensor(scene), torch.tensor(temp), symmetric)
    assert_close(ours, total / 14)


def test_captions_of_one_image_share_the_target():
    image, text = (
        F.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(s)), dim=1)
        for s in (1, 2)
    )
    index, temp = [3, 8, 3, 4], torch.tensor(0.2)
    total = 0
    for rows, columns in ((image, text), (text, image)):
        for i in range(4):
            own = [j for j in range(4) if index[j] == index[i]]
            logs = (columns @ rows[i] / temp).log_softmax(0)
            total -= sum(logs[j] for j in own) / len(own)
    assert_close(pir.contrastive_loss(image, text, temp, torch.tensor(index)), total / 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"filter_size": 0}, "filter_size 0 must lie between 1 and the 50"),
        ({"filter_size": 51}, "filter_size 51"),
        ({"embed_dim": 20}, "multiple of heads 8"),
        ({"affiliation_form": "official"}, "'release' or 'symmetric'"),
        ({"text_global": "max"}, "'cls' or 'mean'"),
        ({"prior_batchnorm": "train"}, "'eval' or 'release'"),
        ({"instru_num": 0}, "at least 1"),
        ({"cycle_num": 0}, "at least 1"),
        ({"prior": "scene_head"}, "freeze_towers=True"),
        ({"freeze_towers": True, "finetune_prior": True}, "freezes the prior"),
        ({"freeze_towers": True, "prior_batchnorm": "release"}, "freezes the prior"),
        ({"tuned_stages": 1}, "goes with freeze_towers=True"),
        ({"triplet": True}, "set affiliation=False"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(changes, message):
    with pytest.raises(UserError, match=message) as error:
        PIRConfig.paper(**changes)
    assert "\n" not in str(error.value)


def test_names_of_towers_that_do_not_exist_are_refused():
    for changes in ({"vision": "swin_x"}, {"text": "bart"}, {"prior": "vgg"}):
        with pytest.raises(UserError, match="choose one of"), torch.device("meta"):
            PIR(PIRConfig.tiny(WORDS, **changes))


# ---- towers, on the meta device
@pytest.mark.parametrize(
    "changes, vision_width, prior_width",
    [({"prior": "vgg19_bn"}, 768, 512), ({"vision": "deit_s_released"}, 384, 2048)],
)
def test_paper_towers_of_all_kinds_meet_their_projections(changes, vision_width, prior_width):
    with torch.device("meta"):
        model = PIR(PIRConfig.paper(**changes)).eval()
        seen = model.image_features(torch.empty(2, 3, 224, 224))
        assert seen["vision"].shape == (2, 197 if vision_width == 384 else 50, vision_width)
        assert seen["prior"].shape == (2, prior_width)
        assert model.embed_images(**seen).shape == (2, 512)
        assert model.belief(**seen).shape == (2, 50)


def test_the_released_vit_has_twelve_heads_and_the_real_one_six():
    with torch.device("meta"):
        heads = [
            backbones.vision_tower(name).blocks[0].attn.num_heads
            for name in ("deit_s", "deit_s_released")
        ]
    assert heads == [6, 12]


def test_compact_counts_its_scene_head_among_the_frozen():
    with torch.device("meta"):
        model = PIR(PIRConfig.compact())
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert (
        not trained & {"text_encoder", "conv_encoder"}
        and {"conv_proj", "img_ca", "txt_ca"} <= trained
    )
    assert (
        model.vision_proj.in_features,
        model.conv_proj.in_features,
        model.text_proj.in_features,
    ) == (1280, 256, 384)


# ---- VIR
@pytest.mark.parametrize("k", [1, 7, 50])
def test_the_k_tokens_of_highest_belief_stay_best_first_and_unweighted(k):
    model = small(filter_size=k)
    tokens, instruction = torch.randn(3, 50, 16), torch.randn(3, 1, 16)
    logits = (tokens * instruction).sum(2)
    kept = model.filter_tokens(tokens, instruction)
    for b in range(3):
        order = sorted(range(50), key=lambda j: -logits[b, j].item())[:k]
        assert torch.equal(kept[b], tokens[b, order])


def test_under_saturation_the_released_ranking_keeps_the_order_of_equal_beliefs():
    """Logits 0, 400, ..., 19600: all beliefs but the first two round to 0 in float32."""
    instruction = torch.ones(1, 1, 4)
    tokens = 100.0 * torch.arange(50.0).view(1, 50, 1).expand(1, 50, 4)
    by_logits = small(filter_size=5).filter_tokens(tokens, instruction)
    released = small(filter_size=5, ranking="softmax").filter_tokens(tokens, instruction)
    assert by_logits[0, :, 0].tolist() == [4900, 4800, 4700, 4600, 4500]
    assert released[0, :, 0].tolist() == [4900, 0, 100, 200, 300]


def test_without_saturation_both_rankings_agree():
    tokens, instruction = torch.randn(4, 50, 16), torch.randn(4, 1, 16)
    assert torch.equal(
        pir.select_tokens(tokens, instruction, 40), pir.select_by_softmax(tokens, instruction, 40)
    )


def test_a_selection_of_ones_own_is_used_in_place_of_the_packages():
    plain, own = small().eval(), small().eval()
    own.select = PIR(SMALL, (swin(), bert(), resnet()), select=lambda s, c, k: s[:, :k]).select
    vision, prior = torch.randn(2, 50, 16), torch.randn(2, 16)
    assert not torch.allclose(plain.embed_images(vision, prior), own.embed_images(vision, prior))


def test_too_few_tokens_for_the_filter_are_refused():
    with pytest.raises(UserError, match="filter_size is 40 but the vision tower gives 17 tokens"):
        small().embed_images(torch.randn(2, 17, 16), torch.randn(2, 16))


def test_of_many_tokens_only_the_candidates_are_ranked():
    model = small().eval()
    vision, prior = torch.randn(2, 197, 16), torch.randn(2, 16)
    changed = vision.clone()
    changed[:, 50:] += 1
    assert torch.equal(model.embed_images(vision, prior), model.embed_images(changed, prior))
    assert model.belief(vision, prior).shape == (2, 50)
    assert_close(model.belief(vision, prior).sum(1), torch.ones(2))


def test_the_belief_only_orders_and_passes_no_gradient():
    batch = pairs()
    model = small()
    model.loss(batch)["loss"].backward()
    assert model.conv_proj.weight.grad.abs().max() > 1e-6
    deaf = small()
    for mapping in deaf.mapping_img:  # the instruction goes nowhere now but into the order
        torch.nn.init.zeros_(mapping.weight)
    seen = deaf.image_features(batch["pixels"])
    order = deaf.belief(**seen).argsort(1)
    deaf.loss(batch)["loss"].backward()
    assert deaf.conv_proj.weight.grad.abs().max() == 0
    with torch.no_grad():
        deaf.conv_proj.weight.neg_()
        deaf.conv_proj.bias.neg_()
    assert not torch.equal(order, deaf.belief(**seen).argsort(1))


def test_belief_needs_vir():
    model = small(SMALL.baseline())
    with pytest.raises(UserError, match="vir=True"):
        model.belief(torch.randn(2, 50, 16), torch.randn(2, 16))


def test_layers_of_a_stack_start_as_copies_and_part_in_training():
    torch.manual_seed(0)
    model = PIR(replace(SMALL, instru_num=3, cycle_num=4), (swin(), bert(), resnet()))
    stacks = {
        "mapping_img": 3,
        "img_sa": 3,
        "img_ca": 3,
        "mapping_txt": 4,
        "txt_sa": 4,
        "txt_ca": 4,
    }
    for name, count in stacks.items():
        layers = getattr(model, name)
        assert len(layers) == count
        for other in layers[1:]:
            assert all(
                torch.equal(a, b)
                for a, b in zip(layers[0].parameters(), other.parameters(), strict=True)
            )
    step(model, pairs())
    for name in stacks:
        first, second = (
            torch.cat([p.flatten() for p in layer.parameters()])
            for layer in getattr(model, name)[:2]
        )
        assert not torch.equal(first, second)


def test_a_batch_of_one_is_a_batch():
    model, batch = small(), pairs()
    one = {name: value[:1] for name, value in batch.items()}
    assert model.eval().encode_images(one["pixels"]).shape == (1, 16)
    assert_close(both(model, one), both(model, batch)[[0, 6]])
    assert step(model.train(), one)["contrastive"].abs() < 1e-6


# ---- LCA and padding
@pytest.mark.parametrize("text_global", ["cls", "mean"])
@pytest.mark.parametrize("lca", [True, False])
@pytest.mark.parametrize("use_mask", [True, False])
def test_embeddings_depend_on_padding_only_as_released(use_mask, lca, text_global):
    model = small(use_mask=use_mask, lca=lca, text_global=text_global).eval()
    ids, mask = pairs()["ids"], pairs()["mask"]
    short = model.encode_texts(ids, mask)
    longer = model.encode_texts(F.pad(ids, (0, 5)), F.pad(mask, (0, 5)))
    difference = (short - longer).abs().max()
    assert difference < 1e-5 if use_mask else difference > 1e-3


@pytest.mark.parametrize("use_mask", [True, False])
def test_the_mean_of_the_words_takes_the_place_of_cls(use_mask):
    model = small(use_mask=use_mask, text_global="mean", lca=False).eval()
    batch = pairs()
    words = model.text_features(batch["ids"], batch["mask"])["text"]
    expected = []
    for row, mask in zip(words, batch["mask"], strict=True):
        seen = [row[j] for j in range(LENGTH) if mask[j] or not use_mask]
        expected.append(F.normalize(model.text_proj(sum(seen) / len(seen)), dim=0))
    assert_close(model.encode_texts(batch["ids"], batch["mask"]), torch.stack(expected))


# ---- what is frozen
def buffers(module):
    return {name: value.clone() for name, value in module.named_buffers() if "running" in name}


@pytest.mark.parametrize("call_train", [False, True])
def test_the_frozen_prior_rests_unless_its_drift_is_asked_for(call_train):
    for rule, drifts in (("eval", False), ("release", True)):
        model = small(prior_batchnorm=rule)
        if call_train:
            model.eval().train()
        before = buffers(model.conv_encoder)
        step(model, pairs())
        after = buffers(model.conv_encoder)
        assert (
            before and any(not torch.equal(before[name], after[name]) for name in before) == drifts
        )
        assert all(p.grad is None for p in model.conv_encoder.parameters())


def test_a_prior_that_is_finetuned_trains():
    model = small(finetune_prior=True)
    step(model, pairs())
    assert model.conv_encoder.training and model.conv_encoder.conv1.weight.grad.abs().max() > 0


def test_frozen_towers_rest_and_get_no_gradient():
    model = small(freeze_towers=True).train()
    towers = (model.vision_encoder, model.text_encoder, model.conv_encoder)
    step(model, pairs())
    assert model.training and model.img_sa.training
    for tower in towers:
        assert not any(part.training for part in tower.modules())
        assert all(p.grad is None and not p.requires_grad for p in tower.parameters())


def tuned(stages: int = 2, prior: str = "scene_head", **changes) -> PIR:
    """A PIR over the real EfficientNet-Lite0 at random weights; 64 pixels make 2x2 tokens."""
    config = replace(
        SMALL,
        freeze_towers=True,
        tuned_stages=stages,
        prior=prior,
        candidates=5,
        filter_size=3,
        **changes,
    )
    torch.manual_seed(0)
    vision = backbones.vision_tower("efficientnet_lite0")
    return PIR(
        config, (vision, bert(), backbones.SceneHead(1280) if prior == "scene_head" else resnet())
    )


def pictures(count: int = 6) -> dict[str, torch.Tensor]:
    return pairs(count) | {
        "pixels": torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    }


@pytest.mark.parametrize("prior", ["scene_head", "resnet"])
def test_a_tower_in_two_parts_is_the_tower(prior):
    whole, parted = tuned(0, prior).eval(), tuned(2, prior).eval()
    parted.load_state_dict(whole.state_dict())
    assert parted.image_features(pictures()["pixels"])["vision"].shape == (6, 112, 4, 4)
    assert_close(both(parted, pictures()), both(whole, pictures()))
    seen = [model.belief(**model.image_features(pictures()["pixels"])) for model in (whole, parted)]
    assert_close(*seen)
    assert {name for name, _ in parted.named_parameters()} == {
        name for name, _ in whole.named_parameters()
    }


def test_the_last_stages_alone_are_trained_and_norms_rest():
    model = tuned().train()
    before = buffers(model.vision_encoder)
    step(model, pictures())
    trained = {
        name.removeprefix("vision_encoder.")
        for name, p in model.named_parameters()
        if name.startswith("vision_encoder.") and p.grad is not None
    }
    assert {name.split(".")[0] for name in trained} == {"blocks", "conv_head"}
    assert {name.split(".")[1] for name in trained if name.startswith("blocks")} == {
        "5",
        "6",
    } and not any("bn" in name for name in trained)
    assert all(
        torch.equal(value, before[name]) for name, value in buffers(model.vision_encoder).items()
    )
    rates = [(group.get("rate"), len(group["params"])) for group in model.parameter_groups(0.05)]
    assert [rate for rate, _ in rates] == [None, None, 0.3] and rates[2][1] == len(trained)


def test_only_towers_with_stages_can_be_trained_in_part():
    for build, stages in (
        (lambda: small(freeze_towers=True, tuned_stages=1), 1),
        (lambda: tuned(7), 7),
    ):
        with pytest.raises(UserError, match=f"tuned_stages is {stages}, but"):
            build()


def test_a_map_of_the_lower_stages_takes_the_place_of_pixels():
    model, batch = tuned(use_mask=True), pictures()
    with torch.no_grad():
        cached = model.image_features(batch["pixels"]) | model.text_features(
            batch["ids"], batch["mask"]
        )
    cached |= {name: batch[name] for name in ("mask", "image_index", "scene")}
    assert_close(model.loss(cached)["loss"], model.loss(batch)["loss"])


@pytest.mark.parametrize("config", [SMALL, SMALL.baseline()])
def test_cached_features_take_the_place_of_pixels_and_ids(config):
    model, batch = small(config, freeze_towers=True, use_mask=True), pairs()
    with torch.no_grad():
        cached = model.image_features(batch["pixels"]) | model.text_features(
            batch["ids"], batch["mask"]
        )
    cached |= {name: batch[name] for name in ("mask", "image_index", "scene")}
    assert_close(model.loss(cached)["loss"], model.loss(batch)["loss"])


# ---- optimisation
def test_parameter_groups_hold_each_trained_parameter_once_by_the_released_rule():
    model = small()
    name_of = {id(p): name for name, p in model.named_parameters()}
    (kept, decay), (free, none) = (
        ([name_of[id(p)] for p in group["params"]], group["weight_decay"])
        for group in model.parameter_groups(0.05)
    )
    assert (decay, none) == (0.05, 0.0)
    assert sorted(kept + free) == sorted(
        name for name, p in model.named_parameters() if p.requires_grad
    )
    assert {"temp", "temp2", "img_sa.0.ffn.1.weight", "vision_proj.weight"} <= set(kept)
    assert {
        "img_ca.1.norm1.weight",
        "txt_sa.0.norm2.bias",
        "conv_proj.bias",
        "vision_encoder.norm.weight",
        "text_encoder.embeddings.LayerNorm.weight",
        "vision_encoder.layers.0.blocks.0.attn.relative_position_bias_table",
    } <= set(free)


def test_a_step_in_bfloat16_is_finite_and_its_losses_are_taken_in_float32():
    batch, model, exact = pairs(), small(dropout=0.2), small(dropout=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        terms = step(model, batch)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values())
    assert all(
        p.isfinite().all() and (p.grad is None or p.grad.isfinite().all())
        for p in model.parameters()
    )
    with torch.autocast("cpu", torch.bfloat16):
        model, exact = small().eval(), exact.eval()
        image, text = (rows.float() for rows in model.embed_batch(batch))
        inside = model.loss(batch)["contrastive"]
    assert_close(inside, pir.contrastive_loss(image, text, model.temp, batch["image_index"]))


@pytest.mark.gpu
def test_the_paper_size_takes_a_bfloat16_step_on_the_gpu():
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = PIR(PIRConfig.paper())
        batch = {
            "pixels": torch.randn(8, 3, 224, 224),
            "ids": torch.randint(1, 30000, (8, 20)),
            "mask": torch.ones(8, 20, dtype=torch.long),
            "image_index": torch.arange(8),
            "scene": torch.arange(8) // 2,
        }
    before = buffers(model.conv_encoder)
    with torch.autocast("cuda", torch.bfloat16):
        terms = step(model, batch, lr=1e-5)
        again = model.loss(batch)
    assert all(value.isfinite() for value in (*terms.values(), *again.values()))
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(
        torch.equal(value, before[name]) for name, value in buffers(model.conv_encoder).items()
    )


@pytest.mark.gpu
def test_masked_attention_stands_half_precision_on_the_gpu():
    model, batch = (
        small(use_mask=True).cuda(),
        {name: value.cuda() for name, value in pairs().items()},
    )
    exact = torch.cat(model.eval().embed_batch(batch))
    with torch.autocast("cuda", torch.float16):
        half = torch.cat(model.embed_batch(batch)).float()
    torch.testing.assert_close(half, exact, atol=2e-2, rtol=0)


# ---- files
@pytest.fixture
def tiny_names(monkeypatch):
    """The names of the paper's towers stand for the small ones here."""
    monkeypatch.setitem(backbones.VISION, "swin_t", (swin, image_input.ImageInput(56)))
    monkeypatch.setitem(backbones.PRIOR, "resnet50", resnet)
    monkeypatch.setattr(backbones, "text_tower", lambda name, vocab_size=None: bert())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"heads": 4, "filter_size": 9, "instru_num": 1},
        {"use_mask": True, "text_global": "mean"},
        {"vir": False},
        {"triplet": True, "affiliation": False},
    ],
)
def test_what_is_written_as_release_is_read_as_the_same_model(tmp_path, tiny_names, changes):
    model = small(**changes)
    write_release(model, tmp_path / "pir.pth")
    again, said = pir.read(tmp_path / "pir.pth")
    assert said["release"] and again.config == model.config and not again.training
    assert torch.equal(both(again, pairs()), both(model, pairs()))


@pytest.mark.parametrize(
    "changes",
    [
        {"filter_size": 20, "instru_num": 1, "cycle_num": 3},
        {"affiliation": False, "vir": False, "lca": False},
        {"triplet": True, "affiliation": False, "vir": False, "lca": False},
    ],
)
def test_a_released_file_says_its_sizes_by_its_tensors(tmp_path, tiny_names, changes):
    model = small(**{"heads": 8, "dropout": 0.2, "instru_num": 1, "cycle_num": 1, **changes})
    content = {
        "model": release_states.pir_state(model),
        "config": {"filter_size": model.config.filter_size, "is_baseline": "ignored"},
    }
    assert "conv_encoder.0.weight" in content["model"] or not model.config.vir
    torch.save(content, tmp_path / "checkpoint_best.pth")
    again, _ = pir.read(tmp_path / "checkpoint_best.pth")
    assert again.config == replace(model.config, ranking="softmax")
    assert torch.equal(both(again, pairs()), both(model, pairs()))


def test_the_released_names_are_those_of_the_old_swin_and_of_a_sequential_resnet():
    state = release_states.pir_state(small())
    assert state["conv_encoder.4.0.conv1.weight"].shape == (4, 64, 3, 3)
    assert {
        "vision_encoder.layers.0.downsample.reduction.weight",
        "conv_encoder.1.running_mean",
        "vision_encoder.layers.0.blocks.0.attn.relative_position_index",
    } <= set(state)


def test_our_own_checkpoints_come_back_from_training(tmp_path):
    config = PIRConfig.tiny(WORDS, embed_dim=16, heads=2, instru_num=1, cycle_num=1, use_mask=True)
    batch = pairs(4) | {"pixels": torch.randn(4, 3, 112, 112)}
    settings = loop.TrainConfig(
        epochs=1, lr=1e-3, batch_size=4, schedule="constant", warmup_fraction=0.0
    )
    model, _, trained = loop.load_or_train(
        "pir",
        lambda: PIR(config),
        [batch],
        settings,
        tmp_path,
        "k" * 64,
        loop.Options(meta={"system": "pir", "model": asdict(config)}),
    )
    (found,) = tmp_path.glob("pir-*/model.safetensors")
    again, meta = pir.read(found)
    assert (
        trained
        and again.config == config
        and meta["history"][0]["temp"] == pytest.approx(0.07)
        and not again.training
    )
    device = next(model.parameters()).device
    assert_close(both(again, batch), both(model, {n: v.to(device) for n, v in batch.items()}).cpu())


@pytest.mark.parametrize(
    "config", [PIRConfig.compact(tuned_stages=0).baseline(), PIRConfig.compact()]
)
def test_heads_come_back_over_the_towers_of_their_packages(tmp_path, config):
    model = starting_weights.package_start().build(lambda: PIR(config), 0).eval()
    path = pir.write_heads(
        model, {"system": "pir", "model": asdict(config)}, tmp_path / "heads.safetensors"
    )
    assert path.stat().st_size < (1e6 if not config.vir else 15e6)
    again, about = pir.read(path)
    assert set(about["packages"]) == {"vision_encoder", "text_encoder"} and not again.training
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )
    short = pir.write_heads(model, about, tmp_path / "half.safetensors", half=True)
    assert 1.9 < path.stat().st_size / short.stat().st_size < 2.1
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = zip(
            model.encode_images(pixels), pir.read(short)[0].encode_images(pixels), strict=True
        )
    assert min(float(one @ other) for one, other in pairs) > 0.9999  # cosine
    state, about = checkpoints.load_checkpoint(path)
    about["packages"]["text_encoder"] = "0" * 64
    with pytest.raises(UserError, match="other weights than the installed packages"):
        pir.read(checkpoints.save_checkpoint(tmp_path / "others.safetensors", state, about))
    with torch.no_grad():
        next(model.text_encoder.parameters()).add_(1)
    with pytest.raises(UserError, match="keep its whole checkpoint"):
        pir.write_heads(model, {}, tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize(
    "path",
    sorted((repository_root() / "data" / "results").glob("*/heads/*.safetensors")),
    ids=lambda path: path.parts[-3],
)
def test_the_heads_that_are_kept_here_are_small_and_open(path):
    model, about = pir.read(path)
    whole = path.stem == "pir"
    assert path.stat().st_size < (8e6 if whole else 1e6) and about["tokenizer"]
    assert (model.config.baseline() == model.config) != whole
    assert model.encode_images(torch.zeros(1, 3, 224, 224)).shape == (1, model.config.embed_dim)


def test_a_pir_on_other_towers_keeps_them(tmp_path):
    with pytest.raises(UserError, match="the compact size"):
        pir.write_heads(small(freeze_towers=True), {}, tmp_path / "no.safetensors")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_of_other_models_and_files_with_code_are_refused(tmp_path, tiny_names):
    model = small()
    meta = {"system": "pir", "model": asdict(model.config)}
    made = {
        "frozen": (
            checkpoints.save_checkpoint(tmp_path / "frozen", model, meta | {"system": "frozen"}),
            "something else.*'frozen'",
        ),
        "best": (
            checkpoints.save_checkpoint(tmp_path / "best", model, {"config": {}}),
            "something else",
        ),
        "silent": (
            checkpoints.save_checkpoint(tmp_path / "silent", model, {"system": "pir"}),
            "does not say which PIR",
        ),
        "newer": (
            checkpoints.save_checkpoint(tmp_path / "newer", model, meta | {"model": {"magic": 1}}),
            "does not say which PIR",
        ),
        "cut": (
            checkpoints.save_checkpoint(
                tmp_path / "cut", {k: v for k, v in model.state_dict().items() if k != "temp"}, meta
            ),
            "missing in the file .1.:\n  temp",
        ),
    }
    torch.save({"state_dict": swin().state_dict()}, tmp_path / "swin.pth")
    torch.save(
        {"model": {**release_states.pir_state(model), "momentum": torch.zeros(1)}},
        tmp_path / "clip.pth",
    )
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"model": Bomb(tmp_path / "touched")}))
    torch.save(
        {"model": {"vision_proj.weight": Bomb(tmp_path / "touched")}}, tmp_path / "armed.pth"
    )
    made |= {
        "swin": (tmp_path / "swin.pth", "holds no PIR"),
        "clip": (tmp_path / "clip.pth", "unknown to the model .1.:\n  momentum"),
        "bomb": (tmp_path / "bomb.pth", "bomb.pth"),
        "armed": (tmp_path / "armed.pth", "armed.pth"),
        "absent": (tmp_path / "absent.pth", "no weight file"),
    }
    for path, message in made.values():
        with pytest.raises(UserError, match=message):
            pir.read(path)
    assert not (tmp_path / "touched").exists()


# ---- two processes
def half(rows: slice) -> dict[str, np.ndarray]:
    return two_processes.one_step(small(), {name: value[rows] for name, value in pairs(8).items()})


other = two_processes.fixture(__file__)


def test_two_processes_have_the_loss_and_gradients_of_one(other):
    whole = half(slice(None))
    for part in two_processes.meet(other, half):
        two_processes.assert_alike(part, whole)
    assert all(
        np.abs(whole[f"grad/{name}"]).max() > 1e-5
        for name in ("temp", "temp2", "conv_proj.weight", "txt_ca.0.norm2.weight")
    )


if __name__ == "__main__":
    two_processes.be_the_other(half)

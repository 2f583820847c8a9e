"""PIR against the vectors of the authors' modules."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import release_states
import torch
from closeness import assert_close
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from nbhelpers import errors
from nbhelpers.data import augment, tokenization
from nbhelpers.metrics.recall import evaluate
from nbhelpers.papers import pir
from nbhelpers.towers import backbones
from nbhelpers.training.schedule import TrainConfig, learning_rates
from reference_checks.common import check_gradients, fill, reference_file


def stub_towers(vision_width=4, text_width=4, prior_width=4):
    """Towers that are never called, for vectors that start behind them."""
    vision, text, prior = nn.Identity(), nn.Identity(), nn.Identity()
    vision.num_features, prior.num_features = vision_width, prior_width
    text.config = SimpleNamespace(hidden_size=text_width)
    return vision, text, prior


def test_pir_self_attention(vectors):
    v = vectors("pir/mhsa.npz")
    layer = fill(
        pir.SelfAttention(v.meta["embed_dim"], v.meta["heads"], v.meta["dropout"]), v.param()
    )
    for suffix, mask in (("", None), ("_masked", v["input/mask"])):
        x = v.leaf("input/x")
        y = layer(x, mask)
        assert_close(y, v[f"output/y{suffix}"])
        loss = (y * v["input/cotangent"]).sum()
        loss.backward()
        if not suffix:
            assert_close(loss, v["output/loss"])
        assert_close(x.grad, v[f"grad/x{suffix}"])


def test_pir_cross_attention(vectors):
    v = vectors("pir/crosa.npz")
    layer = fill(
        pir.CrossAttention(v.meta["embed_dim"], v.meta["heads"], v.meta["dropout"]), v.param()
    )
    x, y = v.leaf("input/x"), v.leaf("input/y")
    out = layer(x, y)
    loss = (out * v["input/cotangent"]).sum()
    loss.backward()
    assert_close(out, v["output/o"])
    assert_close(loss, v["output/loss"])
    assert_close(x.grad, v["grad/x"])
    assert_close(y.grad, v["grad/y"])


def test_pir_vision_instruction_representation(vectors):
    v = vectors("pir/vir.npz")
    m = v.meta
    config = pir.PIRConfig(
        embed_dim=m["embed_dim"],
        heads=m["heads"],
        filter_size=m["filter_size"],
        instru_num=m["instru_num"],
        candidates=m["tokens"],
        lca=False,
    )
    model = fill(
        pir.PIR(config, stub_towers(m["vision_width"], prior_width=m["conv_width"])), v.param()
    )
    vision, prior = v.leaf("input/vision_tokens"), v.leaf("input/conv_feat")
    tokens, instruction = model.instruct(vision, prior)
    logits = pir.belief_logits(tokens, instruction)
    assert_close(instruction, v["output/instruction"])
    assert_close(logits, v["output/belief_logits"])
    assert_close(model.belief(vision, prior), v["output/belief"])
    assert torch.equal(
        logits.argsort(dim=1, descending=True, stable=True), v["output/sorted_index"]
    )
    embed = model.embed_images(vision, prior)
    loss = (embed * v["input/cotangent"]).sum()
    loss.backward()
    assert_close(embed, v["output/embed"])
    assert_close(loss, v["output/loss"])
    assert_close(vision.grad, v["grad/vision_tokens"])
    assert_close(prior.grad, v["grad/conv_feat"])
    check_gradients(dict(model.named_parameters()), v)


def test_pir_language_cycle_attention(vectors):
    v = vectors("pir/lca.npz")
    m = v.meta
    config = pir.PIRConfig(
        embed_dim=m["embed_dim"], heads=m["heads"], cycle_num=m["cycle_num"], vir=False
    )
    model = fill(pir.PIR(config, stub_towers(text_width=m["text_width"])), v.param())
    tokens = v.leaf("input/text_tokens")
    embed = model.embed_texts(tokens)
    loss = (embed * v["input/cotangent"]).sum()
    loss.backward()
    assert_close(embed, v["output/embed"])
    assert_close(loss, v["output/loss"])
    assert_close(tokens.grad, v["grad/text_tokens"])
    check_gradients(dict(model.named_parameters()), v)


def tiny_release(v):
    """The whole model of full_tiny: a Swin and a BERT of the stored sizes, the prior left out."""
    swin, m = v.meta["swin"], v.meta
    vision = SwinTransformer(
        img_size=swin["img"],
        patch_size=4,
        embed_dim=swin["dim"],
        depths=swin["depths"],
        num_heads=swin["heads"],
        window_size=swin["win"],
        num_classes=0,
    )
    prior = nn.Identity()
    prior.num_features = m["conv_width"]
    config = pir.PIRConfig(
        embed_dim=m["embed_dim"],
        heads=m["heads"],
        filter_size=m["filter_size"],
        instru_num=m["instru_num"],
        cycle_num=m["cycle_num"],
        temperature=m["temp"],
    )
    model = pir.PIR(config, (vision, backbones.bert(**m["bert"]), prior))
    return model.eval()


def test_pir_whole_model(vectors):
    v = vectors("pir/full_tiny.npz")
    model = tiny_release(v)
    recomputed = pir.load_release(model, v.param())
    for name in recomputed:
        assert_close(release_states.pir_state(model)[name].float(), v[f"param/{name}"].float())
    pixels, prior, ids = v.leaf("input/image"), v.leaf("input/conv_feat"), v["input/text_ids"]
    vision = backbones.image_tokens(model.vision_encoder, pixels)
    text = model.text_features(ids, (ids != 0).long())["text"]
    image_embed, text_embed = model.embed_images(vision, prior), model.embed_texts(text)
    assert_close(vision, v["output/vision_tokens"])
    assert_close(text, v["output/text_tokens"])
    assert_close(image_embed, v["output/vision_fusion"])
    assert_close(text_embed, v["output/text_fusion"])
    loss = pir.contrastive_loss(image_embed, text_embed, model.temp, v["input/idx"])
    loss.backward()
    assert_close(loss, v["output/loss"])
    assert_close(pixels.grad, v["grad/image"])
    assert_close(prior.grad, v["grad/conv_feat"])
    check_gradients(dict(model.named_parameters()), v)


def test_pir_baseline_embeddings(vectors):
    v = vectors("pir/full_tiny.npz")
    model = tiny_release(v)
    pir.load_release(model, v.param())
    baseline = pir.PIR(model.config.baseline(), (model.vision_encoder, model.text_encoder, None))
    fill(baseline, {k: p for k, p in model.state_dict().items() if k in baseline.state_dict()})
    ids = v["input/text_ids"]
    assert_close(baseline.encode_images(v["input/image"]), v["output/vision_baseline"])
    assert_close(baseline.encode_texts(ids, (ids != 0).long()), v["output/text_baseline"])


@pytest.mark.parametrize("targets", ["diag", "idx"])
def test_pir_contrastive_loss(vectors, targets):
    v = vectors("pir/contrastive.npz")
    image, text, temp = v.leaf("input/image"), v.leaf("input/text"), v.leaf("input/temp")
    loss = pir.contrastive_loss(image, text, temp, v["input/idx"] if targets == "idx" else None)
    loss.backward()
    assert_close(loss, v[f"output/loss_{targets}"])
    for name, leaf in (("image", image), ("text", text), ("temp", temp)):
        assert_close(leaf.grad, v[f"grad/{name}_{targets}"])


def test_pir_affiliation_loss(vectors):
    v = vectors("pir/affiliation.npz")
    image, text, temp = v.leaf("input/image"), v.leaf("input/text"), v.leaf("input/temp2")
    loss = pir.affiliation_loss(image, text, v["input/label"], temp)
    loss.backward()
    assert_close(loss, v["output/loss"])
    for name, leaf in (("image", image), ("text", text), ("temp2", temp)):
        assert_close(leaf.grad, v[f"grad/{name}"])


@pytest.mark.parametrize("kind", ["sum", "max"])
def test_pir_triplet_loss(vectors, kind):
    v = vectors("pir/triplet.npz")
    image, text = v.leaf("input/image"), v.leaf("input/text")
    loss = pir.triplet_loss(image, text, v.meta["margin"], max_violation=kind == "max")
    loss.backward()
    assert_close(loss, v[f"output/loss_{kind}"])
    assert_close(image.grad, v[f"grad/image_{kind}"])
    assert_close(text.grad, v[f"grad/text_{kind}"])


def test_pir_learning_rates(vectors):
    v = vectors("pir/lr_linear.npz")
    for name, spec in v.meta["specs"].items():
        config = TrainConfig(
            epochs=spec["epochs"],
            lr=spec["lr"],
            warmup_fraction=spec["warmup_fraction"],
            schedule="linear",
        )
        ours = learning_rates(config, steps_per_epoch=spec["step_per_epoch"])
        np.testing.assert_allclose(ours, v.arrays[f"output/{name}"], rtol=1e-5, atol=1e-12)


def test_pir_evaluation_protocol(vectors):
    v = vectors("pir/itm_eval.npz").arrays
    images, texts = v["input/sims"].shape
    metrics = evaluate(
        v["input/sims"], np.repeat(np.arange(images), texts // images), ties="released"
    ).metrics
    for k in (1, 5, 10):
        assert metrics[f"i2t_R@{k}"] == pytest.approx(float(v[f"output/txt_r{k}"]), abs=0.011)
        assert metrics[f"t2i_R@{k}"] == pytest.approx(float(v[f"output/img_r{k}"]), abs=0.011)
    assert metrics["mR"] == pytest.approx(float(v["output/r_mean"]), abs=0.011)


def test_pir_caption_cleaning(request):
    golden = json.loads(reference_file(request, "pir/pre_caption.json").read_text())
    assert [
        tokenization.clean_caption(text, golden["max_words"]) for text in golden["input"]
    ] == golden["output"]


def test_pir_randaugment_operations(vectors):
    v = vectors("pir/randaugment_ops.npz")
    image = v.arrays["input/image"]
    released = {
        "AutoContrast": "AutoContrast_official_uint8_wrap",
        "Sharpness": "Sharpness_official_wrap",
    }
    for name, arguments in v.meta["args"].items():
        ours = augment.OPS[name](image, *arguments)
        assert np.abs(ours.astype(int) - v.arrays[f"output/{name}"]).max() <= 1, name
    for name, key in released.items():
        ours = augment.RELEASED_OPS[name](image, *v.meta["args"][name])
        assert np.abs(ours.astype(int) - v.arrays[f"output/{key}"]).max() <= 1, key


@pytest.fixture(scope="module")
def paper_size():
    with torch.device("meta"):
        return pir.PIR(pir.PIRConfig.paper())


def test_pir_paper_parameter_counts(paper_size):
    assert sum(p.numel() for p in paper_size.parameters()) == 184_642_492
    assert sum(p.numel() for p in paper_size.parameters() if p.requires_grad) == 161_134_460


def test_pir_release_keys_and_shapes(paper_size, request):
    golden = json.loads(reference_file(request, "pir/official_state_dict.json").read_text())[
        "state_dict"
    ]
    assert len(golden) == 905
    ours = {name: list(value.shape) for name, value in release_states.pir_state(paper_size).items()}
    assert ours == golden


def test_pir_release_loads_key_by_key(paper_size, request):
    golden = json.loads(reference_file(request, "pir/official_state_dict.json").read_text())[
        "state_dict"
    ]
    state = {name: torch.empty(shape, device="meta") for name, shape in golden.items()}
    assert len(pir.load_release(paper_size, state)) == 17
    del state["txt_ca.2.norm2.bias"]
    with pytest.raises(errors.UserError, match="txt_ca.2.norm2.bias"):
        pir.load_release(paper_size, state)


def test_pir_parameter_groups(paper_size, request):
    golden = json.loads(reference_file(request, "pir/official_state_dict.json").read_text())[
        "param_group"
    ]
    kept, free = ({id(p) for p in group["params"]} for group in paper_size.parameter_groups(0.01))
    group_of = dict.fromkeys(name for name, _ in paper_size.named_parameters())
    for name, p in paper_size.named_parameters():
        if p.requires_grad:
            group_of[name] = 0 if id(p) in kept else 1
    assert kept.isdisjoint(free)
    renamed = release_states.pir_names(group_of)
    assert renamed == golden

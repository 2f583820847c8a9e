"""BITA against the vectors of the authors' modules."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from transformers import BertConfig, OPTConfig, OPTForCausalLM

from nbhelpers.papers import bita, ift
from nbhelpers.towers import backbones
from nbhelpers.towers.key_names import clip_vision_state_of
from nbhelpers.training import schedule
from reference_checks.common import reference_file

MODES = ("query", "text", "joint")


def same_gradients(module, v, prefix="grad/param/", mode=""):
    """Every stored gradient of a parameter; its key may end in @mode."""
    stored = {
        key.removeprefix(prefix).removesuffix(mode): v[key]
        for key in v.arrays
        if key.startswith(prefix) and key.endswith(mode)
    }
    assert len(stored) > 1
    assert_close({name: module.get_parameter(name).grad for name in stored}, stored)


def bert_config(m):
    return BertConfig(
        vocab_size=m["vocab"],
        hidden_size=m["hidden"],
        num_hidden_layers=m["layers"],
        num_attention_heads=m["heads"],
        intermediate_size=m["intermediate"],
        max_position_embeddings=m["max_position_embeddings"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=m["layer_norm_eps"],
        pad_token_id=0,
    )


def filled(module, state):
    """The stored parameters are those of the module, all of them."""
    found = module.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and not found.missing_keys, found
    return module.eval()


@pytest.mark.parametrize("mode", MODES)
def test_bita_fourier_sublayer(vectors, mode):
    v = vectors("bita/fourier_sublayer.npz")
    module, x = (
        filled(ift.Mixing(bert_config(v.meta), "fourier"), v.param()),
        v.leaf(f"input/x_{mode}"),
    )
    assert_close(ift.fourier_mix(x.detach()), v[f"output/mixed_{mode}"])
    out = module(x)
    (out * v[f"input/cotangent_{mode}"]).sum().backward()
    assert_close(out, v[f"output/y_{mode}"])
    assert_close(x.grad, v[f"grad/x_{mode}"])
    for part in ("weight", "bias"):
        assert_close(
            getattr(module.output.LayerNorm, part).grad,
            v[f"grad/param/output.LayerNorm.{part}_{mode}"],
        )


@pytest.mark.parametrize("mode", MODES)
def test_bita_layer(vectors, mode):
    v = vectors("bita/ift_layer.npz")
    layer = filled(
        ift.Layer(bert_config(v.meta), v.meta["encoder_width"], "fourier", cross=True, text=True),
        v.param(),
    )
    x, context = v.leaf(f"input/x_{mode}"), v.leaf("input/encoder_hidden_states")
    out = layer(x, 0 if mode == "text" else v.meta["num_query"], context)
    (out * v[f"input/cotangent_{mode}"]).sum().backward()
    assert_close(out, v[f"output/y_{mode}"])
    assert_close(x.grad, v[f"grad/x_{mode}"])
    if mode != "text":
        assert_close(context.grad, v[f"grad/encoder_hidden_states_{mode}"])
    same_gradients(layer, v, mode=f"@{mode}")


@pytest.mark.parametrize("mode", MODES)
def test_bita_whole_transformer(vectors, mode):
    v = vectors("bita/ift_full.npz")
    model = ift.IFT(bert_config(v.meta), v.meta["encoder_width"])
    del model.cls
    # the gradients of the keys' biases are zero, and in float32 noise that depends on the processor
    filled(model, v.param()).double()
    queries, context = (
        v[f"input/{name}"].double().requires_grad_()
        for name in ("query_tokens", "encoder_hidden_states")
    )
    inputs = (
        {}
        if mode == "text"
        else {"queries": queries.expand(len(context), -1, -1), "context": context}
    )
    inputs |= (
        {}
        if mode == "query"
        else {"ids": v["input/input_ids"].long(), "mask": v["input/attention_mask"].long()}
    )
    out = model(**inputs)
    (out * v[f"input/cotangent_{mode}"]).sum().backward()
    assert_close(out, v[f"output/last_hidden_{mode}"])
    if mode != "text":
        assert_close(queries.grad, v[f"grad/query_tokens_{mode}"])
        assert_close(context.grad, v[f"grad/encoder_hidden_states_{mode}"])
    same_gradients(model, v, mode=f"@{mode}")


def test_bita_language_head(vectors):
    v = vectors("bita/ift_lm_head.npz")
    model = filled(ift.IFT(bert_config(v.meta), v.meta["encoder_width"]), v.param())
    queries, context, ids = (
        v.leaf("input/query_tokens"),
        v.leaf("input/encoder_hidden_states"),
        v["input/input_ids"].long(),
    )
    states = model(queries.expand(len(ids), -1, -1), ids, context)
    logits = model.cls(states[:, v.meta["num_query"] :])
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        v["input/labels"].long()[:, 1:].flatten(),
        ignore_index=v.meta["ignore_index"],
        label_smoothing=v.meta["label_smoothing"],
    )
    loss.backward()
    assert_close(logits, v["output/logits"])
    assert_close(loss, v["output/loss"])
    assert_close(queries.grad, v["grad/query_tokens"])
    assert_close(context.grad, v["grad/encoder_hidden_states"])


def config_of(m, **changes):
    decoder = {"decoder_vocab": m["opt"]["vocab_size"]} if "opt" in m else {}
    return bita.BITAConfig(
        image="none",
        decoder="none",
        frozen_dtype="float32",
        vocab_size=m["vocab"] - 1,
        queries=m["num_query"],
        width=m["hidden"],
        layers=m["layers"],
        heads=m["heads"],
        hidden=m["intermediate"],
        positions=m["max_position_embeddings"],
        dropout=0.0,
        embed_dim=m.get("embed_dim", 1),
        **decoder,
        **changes,
    )


def tower_of(m):
    return torch.nn.Linear(1, 1), m["encoder_width"]


@pytest.mark.parametrize("two_sided", [False, True])
def test_bita_stage_1(vectors, two_sided, monkeypatch):
    v = vectors("bita/stage1_itc.npz")
    monkeypatch.setattr(bita.BITAConfig, "text_length", v["input/input_ids"].shape[1])
    model = bita.Aligner(config_of(v.meta, two_sided=two_sided), tower_of(v.meta)).eval()
    # not among the vectors
    head = {
        name: value for name, value in model.state_dict().items() if name.startswith("Fformer.cls.")
    }
    bita.load_release(model, head | v.param())
    image, ids, mask = (
        v.leaf("input/image"),
        v["input/input_ids"].long(),
        v["input/attention_mask"].long(),
    )
    assert_close(model.read(image), v["output/query_hidden"])
    seen, read = model.embed_images(image), model.embed_texts(ids)
    assert_close(seen, v["output/image_feats"])
    assert_close(read, v["output/text_feat"])
    for ours, name in zip(
        bita.similarities(seen, read, model.temp, two_sided), ("sim_i2t", "sim_t2i"), strict=True
    ):
        assert_close(ours, v[f"output/{name}"])
    logits = model.match_logits(image, ids)
    assert_close(logits, v["output/itm_logits"])
    assert_close(logits[:, :, 1].mean(1), v["output/itm_score"])
    loss = model.loss({"vision": image, "ids": ids, "mask": mask})["loss"]
    loss.backward()
    assert_close(loss, v["output/loss_itc"])
    start = "grad/fullgather/" if two_sided else "grad/"
    assert_close(image.grad, v[f"{start}image"])
    same_gradients(model, v, f"{start}param/")


def captioner_of(v):
    m = v.meta
    sizes = {name: value for name, value in m["opt"].items() if name != "activation"}
    decoder = OPTForCausalLM(
        OPTConfig(
            **sizes,
            activation_function=m["opt"]["activation"],
            dropout=0.0,
            attn_implementation="eager",
        )
    )
    model = bita.Captioner(config_of(m), tower_of(m), decoder)
    state = {name: value for name, value in v.param().items() if not name.startswith("opt_model.")}
    filled(
        decoder,
        {
            name.removeprefix("opt_model."): value
            for name, value in v.param().items()
            if name not in state
        },
    )
    bita.load_release(model, state)
    return model.eval()


@pytest.mark.parametrize("stage", ["stage2", "finetune"])
def test_bita_prefix_language_model(vectors, stage):
    v = vectors(f"bita/{stage}_opt.npz")
    model, image = captioner_of(v), v.leaf("input/image")
    ids, mask, queries = (
        v["input/text_input_ids"].long(),
        v["input/text_attention_mask"].long(),
        v.meta["num_query"],
    )
    length = v.meta["prompt_length"]
    prefix = model.prefix(image)
    assert_close(prefix, v["output/opt_inputs"])
    logits, there = (
        model.opt_model.lm_head(model.states(prefix, ids, mask)),
        v["output/attention_mask"].bool(),
    )
    assert_close(logits[there], v["output/logits"][there])
    assert torch.equal(bita.targets(ids, mask, length), v["output/targets"][:, queries:])
    assert (v["output/targets"][:, :queries] == -100).all()
    loss = model.loss({"vision": image, "ids": ids, "mask": mask}, length)["loss"]
    loss.backward()
    assert_close(loss, v["output/loss"])
    assert_close(image.grad, v["grad/image"])
    same_gradients(model, v)
    assert all(p.grad is None for p in model.opt_model.parameters())


def test_bita_generation(vectors):
    v = vectors("bita/generate_opt.npz")
    model, keys = (
        captioner_of(v),
        [key for key in v.arrays if key.startswith("output/ids5_new_beam")],
    )
    assert keys
    for key in keys:
        beams, longest, shortest = (int(part.lstrip("beamxin")) for part in key.split("_")[-3:])
        found = model.generate(
            v["input/image"],
            v["input/prompt_ids"].long()[0],
            v.meta["eos_token_id"],
            v.meta["opt"]["pad_token_id"],
            beams,
            longest - 1,
            shortest - 1,
        )
        assert torch.equal(found, v[key].long()), key


def test_bita_image_tower(vectors):
    v = vectors("bita/clip_vit.npz")
    m = v.meta
    tower = backbones.clip_vision(
        hidden_size=m["width"],
        intermediate_size=4 * m["width"],
        num_hidden_layers=m["blocks_built"],
        num_attention_heads=m["heads"],
        image_size=m["input_resolution"],
        patch_size=m["patch_size"],
        hidden_act="quick_gelu",
    )
    filled(tower, clip_vision_state_of(v.param(), m["blocks_built"]))
    pixels = v.leaf("input/image")
    tokens = backbones.image_tokens(tower, pixels)
    (tokens * v["input/cotangent"]).sum().backward()
    assert_close(tokens, v["output/tokens"])
    assert_close(pixels.grad, v["grad/image"])


def test_bita_captions_and_learning_rates(request):
    content = json.loads(reference_file(request, "bita/processor_schedule.json").read_text())
    for case in content["processor"]:
        assert case["prompt"] + bita.clean_bita_caption(case["raw"]) == case["processed"]
    names = {
        "max_epoch": "epochs",
        "min_lr": "lr_last",
        "init_lr": "lr",
        "warmup_steps": "warmup_steps",
        "warmup_start_lr": "lr_first",
    }
    for case in content["schedule"]:
        config = bita.train_config(
            case["name"], **{names[name]: value for name, value in case["config"].items()}
        )
        for epoch, step, rate in case["epoch_step_lr"]:
            assert schedule.epoch_cosine(config, epoch, step, config.warmup_steps) == pytest.approx(
                rate, rel=1e-9
            )


def test_bita_paper_parameter_counts():
    def count(parts):
        return sum(p.numel() for p in parts if p.requires_grad)

    with torch.device("meta"):
        tower, channels, _ = backbones.image_reader("clip_vit_l14_21")
        aligner, captioner = (
            kind(bita.BITAConfig.paper(), (tower, channels), *rest)
            for kind, rest in (
                (bita.Aligner, ()),
                (bita.Captioner, (backbones.language_model("opt_2.7b"),)),
            )
        )
    assert sum(p.numel() for p in tower.parameters()) == 265_389_056
    assert count(aligner.Fformer.parameters()) == 170_938_171
    assert count(aligner.parameters()) == 171_360_062
    assert count(captioner.Fformer.parameters()) == 89_793_024
    assert count(captioner.parameters()) == 91_788_288
    assert not any(
        p.requires_grad for p in [*captioner.opt_model.parameters(), *tower.parameters()]
    )

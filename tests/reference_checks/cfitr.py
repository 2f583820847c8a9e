"""CFITR against the vectors of the authors' modules."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import release_states
import torch
from closeness import SINGLE, assert_close

from nbhelpers.papers import cfitr, vilt
from nbhelpers.towers import backbones
from reference_checks.common import Vectors, fill, reference_file


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_cfitr_local_feature_enhancement(vectors, mode):
    v = vectors("cfitr/lfem.npz")
    module = fill(cfitr.LFEM(v.meta["channels"]), v.param()).train(mode == "train")
    x = v.leaf("input/x")
    out = module(x)
    loss = (out * v["input/cotangent"]).sum()
    loss.backward()
    assert_close(out, v[f"output/{mode}/out"])
    assert_close(loss, v[f"output/{mode}/loss"])
    assert_close(x.grad, v[f"grad/{mode}/x"])
    assert_close(module.net[3].weight.grad, v[f"grad/{mode}/net.3.weight"])
    after = {
        key.removeprefix("output/train/"): v[key]
        for key in v.arrays
        if key.startswith("output/train/net.")
    }
    assert len(after) == 6
    for name, value in after.items() if mode == "train" else ():
        assert_close(module.state_dict()[name], value)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_cfitr_hash_heads(vectors, mode):
    v = vectors("cfitr/hash_head.npz")
    m, image, text = v.meta, v.leaf("input/be_image_feats"), v.leaf("input/be_text_feats")
    heads = torch.nn.ModuleDict(
        {
            name: cfitr.hash_head(m["in_dim"], m["hidden_dim"], m["hash_dim"])
            for name in ("image_module", "text_module")
        }
    )
    fill(heads, v.param()).train(mode == "train")
    h_image, h_text = heads["image_module"](image), heads["text_module"](text)
    loss = (h_image * v["input/cotangent"]).sum() + (h_text * v["input/cotangent"].flip(0)).sum()
    loss.backward()
    assert_close(h_image, v[f"output/{mode}/h_img"])
    assert_close(h_text, v[f"output/{mode}/h_txt"])
    assert_close(loss, v[f"output/{mode}/loss"])
    assert_close(image.grad, v[f"grad/{mode}/be_image_feats"])
    assert_close(text.grad, v[f"grad/{mode}/be_text_feats"])
    binary = [2.0 * cfitr.CFITR.binary(h) - 1 for h in (h_image, h_text)]
    assert torch.equal(binary[0], v[f"output/{mode}/code_img"]) and torch.equal(
        binary[1], v[f"output/{mode}/code_txt"]
    )
    if mode == "eval":
        assert_close((binary[0] @ binary[1].t() - m["hash_dim"]) / 2, v["output/eval/neg_hamming"])


def tiny_release(v, **changes):
    """The whole model of model.npz: a ViLT of the stored sizes."""
    m, p = v.meta, v.param()
    trunk = backbones.vilt_model(
        dropout=0.0,
        vocab_size=m["vocab"],
        hidden_size=m["embed_dim"],
        num_hidden_layers=m["depth"],
        num_attention_heads=m["heads"],
        intermediate_size=len(p["transformer.blocks.0.mlp.fc1.bias"]),
        image_size=m["img_size"],
        patch_size=m["patch"],
        max_position_embeddings=m["text_len"],
    )
    config = cfitr.CFITRConfig(
        split=m["shared_layers"],
        bits=m["hash_dim"],
        hidden=m["hidden_dim"],
        false_texts=m["false_texts"],
    )
    model = cfitr.CFITR(replace(config, **changes), trunk)
    dropped = cfitr.load_release(model, p)
    assert set(dropped) == (
        set() if model.config.lfem else {name for name in p if name.startswith("res.")}
    )
    return model.eval()


def permuted(states, permutation):
    """The class token, then the patches in the order of `permutation`."""
    order = torch.cat([torch.zeros_like(permutation[:, :1]), permutation + 1], dim=1)
    return states.gather(1, order.unsqueeze(2).expand_as(states))


def test_cfitr_whole_model(vectors):
    v = vectors("cfitr/model.npz")
    model, m = tiny_release(v, lfem=False), v.meta
    pixels, ids, mask = (
        v.leaf("input/image"),
        v["input/text_ids"].long(),
        v["input/text_masks"].long(),
    )
    permutation, modality = (
        v["input/patch_perm"].long(),
        model.vilt.embeddings.token_type_embeddings.weight,
    )
    tokens, words = (
        vilt.image_tokens(model.vilt, pixels, permutation),
        vilt.text_tokens(model.vilt, ids),
    )
    assert_close(tokens - modality[1], v["output/visual_embed"])
    assert_close(tokens, v["output/image_embeds"])
    assert_close(words, v["output/text_embeds"])
    image, text = model.image_states(pixels, permutation), model.text_states(ids, mask)
    assert_close(image, v["output/be_image_embeds"])
    assert_close(text, v["output/be_text_embeds"])
    # raster order differs in nothing but the order
    assert_close(permuted(model.image_states(pixels), permutation), image)
    assert_close(model.pooled_images(image), v["output/be_image_feats"])
    assert_close(model.pooled_texts(text), v["output/be_text_feats"])
    h_image, h_text = model.image_codes(image), model.text_codes(text)
    assert_close(h_image, v["output/h_img"])
    assert_close(h_text, v["output/h_txt"])
    image_mask = v["output/image_masks"]
    count = m["batch"]
    rows, columns = torch.arange(count).repeat_interleave(count), torch.arange(count).repeat(count)
    assert_close(
        model.fuse_pairs(image[:1].expand_as(image), text, mask, image_mask),
        v["output/cls_feats_img0"],
    )
    scores = model.score_pairs(image[rows], text[columns], mask[columns], image_mask[rows])
    assert_close(scores.view(count, count), v["output/pair_score"])
    diagonal = model.score_pairs(image, text, mask)
    scalar = diagonal.sum() + (h_image * h_text).sum()
    scalar.backward()
    assert_close(diagonal, v["output/diag_score"])
    assert_close(scalar, v["output/scalar"])
    assert_close(pixels.grad, v["grad/image"])
    assert_close(
        model.vilt.embeddings.text_embeddings.word_embeddings.weight.grad,
        v["grad/text_embeddings.word_embeddings.weight"],
    )
    assert_close(model.imagepooler_be.dense.weight.grad, v["grad/imagepooler_be.dense.weight"])


def test_cfitr_states_with_lfem(vectors):
    v = vectors("cfitr/model.npz")
    model, without = tiny_release(v), tiny_release(v, lfem=False)
    permutation = v["input/patch_perm"].long()
    # the release convolves the shuffled grid
    states = without.image_states(v["input/image"], permutation)
    states = torch.cat([states[:, :1], model.res(states[:, 1:])], dim=1)
    assert_close(states, v["output/lfem_be_image_embeds"])
    assert_close(model.pooled_images(states), v["output/lfem_be_image_feats"])
    raster = without.image_states(v["input/image"])
    assert_close(
        model.image_states(v["input/image"]),
        torch.cat([raster[:, :1], model.res(raster[:, 1:])], dim=1),
    )


def test_cfitr_training_step(vectors, request):
    v, weights = (
        vectors("cfitr/train_step.npz"),
        Vectors(reference_file(request, "cfitr/model.npz")),
    )
    m = v.meta
    model = tiny_release(
        weights, lfem=False, beta=m["beta"], gamma=m["gamma"], margin=m["margin"]
    ).train()
    model.image_states = partial(model.image_states, permutation=v["input/patch_perm"].long())
    ids, mask = v["input/text_ids"].long(), v["input/text_masks"].long()
    model.captions = SimpleNamespace(  # the false texts that the release drew
        draw=lambda row, count, also_true: torch.arange(len(row) * count).view(len(row), count),
        texts=lambda drawn: {
            "ids": ids[:, 1:].flatten(0, 1)[drawn],
            "mask": mask[:, 1:].flatten(0, 1)[drawn],
        },
    )
    model.bank = v["input/code_bank"].to(torch.int8)
    seen = {}
    for name in ("image_module", "text_module"):
        getattr(model, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: (args[0], out)})
        )
    model.rank_output.register_forward_hook(lambda module, args, out: seen.update(scores=out))
    pixels = v.leaf("input/image")
    terms = model.loss(
        {"pixels": pixels, "ids": ids[:, 0], "mask": mask[:, 0], "row": v["input/raw_index"].long()}
    )
    terms["loss"].backward()
    for name, kind in (("image_module", "img"), ("text_module", "txt")):
        assert_close(seen[name][0], v[f"output/be_{'image' if kind == 'img' else 'text'}_feats"])
        assert_close(seen[name][1], v[f"output/h_{kind}"])
    assert_close(seen["scores"].view_as(v["output/irtr_scores"]), v["output/irtr_scores"])
    names = {
        "triplet": "triplet",
        "quantisation": "quant_raw",
        "balance": "balance_raw",
        "rerank": "irtr_loss",
    }
    for ours, theirs in names.items():
        assert_close(terms[ours], v[f"output/{theirs}"])
    assert_close(terms["loss"] - terms["rerank"], v["output/hash_loss"])
    assert_close(terms["loss"], v["output/total"])
    ours = release_states.vilt_state({name: p.grad for name, p in model.named_parameters()}) | {
        "image": pixels.grad
    }
    stored = [key.removeprefix("grad/") for key in v.arrays if key.startswith("grad/")]
    assert len(stored) == 8
    # Batch norms over two samples cancel nearly all of these gradients: weights that differ by half
    # a rounding each change
    # them by up to 3e-4 of their largest value.
    assert_close(
        {name: ours[name] for name in stored},
        {name: v[f"grad/{name}"] for name in stored},
        16 * SINGLE,
    )


def own(h):
    return torch.eye(len(h), dtype=torch.bool)


LOSSES = {
    "triplet_hard": lambda a, b, m, bank: cfitr.triplet_loss(a, b, own(a), m["margin"]),
    "triplet_all": lambda a, b, m, bank: cfitr.triplet_loss(
        a, b, own(a), m["margin"], hardest=False
    ),
    "quant_raw_bank": lambda a, b, m, bank: cfitr.quantisation_loss(a, b, bank),
    "quant_raw_zero_bank": lambda a, b, m, bank: cfitr.quantisation_loss(
        a, b, torch.zeros_like(bank)
    ),
    "balance_raw": lambda a, b, m, bank: cfitr.balance_loss(a, b),
}


def hash_total(h_image, h_text, m, bank):
    return (
        cfitr.triplet_loss(h_image, h_text, own(h_image), m["margin"])
        + m["gamma"] * cfitr.balance_loss(h_image, h_text)
        + m["beta"] * cfitr.quantisation_loss(h_image, h_text, bank)
    )


LOSSES |= {
    "hash_total_bank": hash_total,
    "hash_total_zero_bank": lambda a, b, m, bank: hash_total(a, b, m, torch.zeros_like(bank)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_cfitr_hash_losses(vectors, name):
    v = vectors("cfitr/losses.npz")
    h_image, h_text = v.leaf("input/h_img"), v.leaf("input/h_txt")
    loss = LOSSES[name](h_image, h_text, v.meta, v["input/code_bank"][v["input/ind"].long()])
    loss.backward()
    assert_close(loss, v[f"output/{name}"])
    assert_close(h_image.grad, v[f"grad/{name}/h_img"])
    assert_close(h_text.grad, v[f"grad/{name}/h_txt"])


def test_cfitr_rerank_loss_and_similarities(vectors):
    v = vectors("cfitr/losses.npz")
    scores = v.leaf("input/irtr_scores")
    loss = cfitr.rerank_loss(scores)
    loss.backward()
    assert_close(loss, v["output/irtr_ce"])
    assert_close(scores.grad, v["grad/irtr_ce/scores"])
    h_image, h_text = v["input/h_img"], v["input/h_txt"]
    assert_close(cfitr.cosine(h_image, h_text), v["output/cosine"])
    a, b = (2.0 * cfitr.CFITR.binary(h) - 1 for h in (h_image, h_text))
    assert_close((a @ b.t() - v.meta["hash_dim"]) / 2, v["output/neg_hamming"])


def test_cfitr_paper_parameter_count():
    with torch.device("meta"):
        model = cfitr.CFITR(cfitr.CFITRConfig.paper())
    assert sum(p.numel() for p in model.parameters()) == 127_960_252

"""PIR-CLIP against the vectors of the authors' modules."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import release_states
import torch
import torch.nn.functional as F
from closeness import assert_close

from nbhelpers import errors
from nbhelpers.data import image_input
from nbhelpers.metrics.recall import evaluate
from nbhelpers.papers import pir_clip
from nbhelpers.papers.clip import image_tokens, pool_text, text_tokens
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.towers import backbones, checkpoints
from nbhelpers.training.schedule import TrainConfig, learning_rates
from reference_checks.common import check_gradients, fill, reference_file

# of vectors without a text tower
TEXT = {"context_length": 4, "vocab_size": 4, "width": 4, "heads": 1, "layers": 1}
# of vectors without an image tower
VISION = {"image_size": 32, "patch_size": 16, "width": 4, "head_width": 4, "layers": 1}
RESNET = {"layers": (1, 1, 1, 1), "width": 2, "heads": 1}


@pytest.fixture
def pir_clip_of(monkeypatch):
    """pir_clip_of(D, vision, resnet, text) -> PIR-CLIP of these sizes, nothing frozen."""

    def build(embed_dim, vision=VISION, resnet=RESNET, text=TEXT, **changes):
        size = backbones.CLIPSize(
            embed_dim, vision, text, image_input.ImageInput(vision["image_size"])
        )
        monkeypatch.setitem(backbones.CLIP, "golden", size)
        monkeypatch.setitem(backbones.INSTRUCTION, "golden", resnet)
        return PIRCLIP(PIRCLIPConfig(clip="golden", freeze_instruction=False, **changes)).eval()

    return build


def image_sizes(v):
    """D, image tower and instruction encoder of visual_tower.npz."""
    m = v.meta
    return (
        m["D"],
        {
            "image_size": m["img"],
            "patch_size": m["ps"],
            "width": m["vw"],
            "head_width": m["hw"],
            "layers": m["vl"],
        },
        {"layers": m["rl"], "width": m["rw"], "heads": m["res_attnpool_heads"]},
    )


def text_sizes(v):
    return {name: v.meta[name] for name in TEXT}


def ours(v):
    """The stored parameters under our names."""
    return checkpoints.rename(v.param(), pir_clip.FROM_RELEASE)


def check_gradients_by_released_names(model, v):
    check_gradients(
        checkpoints.rename(dict(model.named_parameters()), release_states.TO_PIR_CLIP), v
    )


def mask_of(ids):
    return (torch.arange(ids.shape[1]) <= ids.argmax(1, keepdim=True)).long()


def test_pir_clip_soft_belief(vectors, pir_clip_of):
    v = vectors("pir_clip/soft_belief.npz")
    m = v.meta
    model = pir_clip_of(
        4, dict(VISION, image_size=m["image_size"], patch_size=m["patch_size"], width=m["width"])
    )
    fill(model.clip.visual, v.param())
    image, instruction = v.leaf("input/image"), v.leaf("input/instruction")
    tokens = image_tokens(model.clip, image)
    assert_close(tokens, v["output/tokens"])
    model.res_visual, model.vision_proj_res.forward = (
        torch.nn.Identity(),
        lambda seen: instruction.squeeze(1),
    )
    _, _, logits = model.instruct(image)
    belief = logits.softmax(1)
    weighted = model.apply_belief(tokens, logits)
    assert_close(belief, v["output/belief"])
    assert torch.equal(belief.argsort(1, descending=True), v["output/sorted_index"])
    assert_close(weighted, v["output/weighted"])
    loss = (weighted * v["input/cotangent"]).sum()
    loss.backward()
    assert_close(loss, v["output/loss"])
    assert_close(image.grad, v["grad/image"])
    assert_close(instruction.grad, v["grad/instruction"])
    check_gradients(dict(model.clip.visual.named_parameters()), v)


def test_pir_clip_image_tower(vectors, pir_clip_of):
    v = vectors("pir_clip/visual_tower.npz")
    model = fill(pir_clip_of(*image_sizes(v)), ours(v))
    image = v.leaf("input/image")
    tokens, instruction, logits = model.instruct(image)
    belief, added = model.belief(image)
    assert_close(model.res_visual(image), v["output/res_features"])
    assert_close(instruction, v["output/instruction"])
    assert_close(tokens, v["output/tokens_ln_pre"])
    assert_close(logits, v["output/belief_logits"])
    assert_close(belief, v["output/belief"])
    assert torch.equal(belief.argsort(1, descending=True), v["output/sorted_index"])
    assert_close(added, v["output/index_weights"])
    assert_close(model.apply_belief(tokens, logits), v["output/weighted_tokens"])
    features = model.pooled(image)
    assert_close(features, v["output/features"])
    loss = (features * v["input/cotangent"]).sum()
    loss.backward()
    assert_close(loss, v["output/loss"])
    assert_close(image.grad, v["grad/image"])
    check_gradients_by_released_names(model, v)


def test_pir_clip_image_tower_of_the_earlier_release(vectors, pir_clip_of):
    v = vectors("pir_clip/visual_tower.npz")
    model = fill(pir_clip_of(*image_sizes(v), belief_rule="pre_fix"), ours(v))
    assert_close(model.pooled(v["input/image"]), v["output/features_pre_2024_10"])


def test_pir_clip_image_tower_with_training_batch_norms(vectors, pir_clip_of):
    v = vectors("pir_clip/visual_tower.npz")
    model = fill(pir_clip_of(*image_sizes(v)), ours(v)).train()
    assert_close(model.pooled(v["input/image"]), v["output/features_train_bn"])


def test_pir_clip_text_tower(vectors, pir_clip_of):
    v = vectors("pir_clip/text_tower.npz")
    model = fill(pir_clip_of(v.meta["D"], text=text_sizes(v)), ours(v))
    ids, words = v["input/text_ids"], []
    model.clip.token_embedding.register_forward_hook(
        lambda module, inputs, out: (out.retain_grad(), words.append(out))[0]
    )
    states = model.clip.transformer(text_tokens(model.clip, ids), attn_mask=model.clip.attn_mask)
    features = pool_text(model.clip, states, mask_of(ids))
    assert_close(features, v["output/features"])
    assert_close(model.encode_texts(ids, mask_of(ids)), F.normalize(v["output/features"], dim=1))
    loss = (features * v["input/cotangent"]).sum()
    loss.backward()
    assert_close(loss, v["output/loss"])
    assert_close(words[0].grad, v["grad/token_embeddings"])
    check_gradients(dict(model.clip.named_parameters()), v)


def test_pir_clip_whole_model(vectors, pir_clip_of):
    v, visual, text = (
        vectors(f"pir_clip/{name}.npz") for name in ("full_tiny", "visual_tower", "text_tower")
    )
    model = fill(
        pir_clip_of(*image_sizes(visual), text_sizes(text), affiliation=False),
        {**ours(visual), **ours(text), "clip.logit_scale": v["input/logit_scale"]},
    )
    image, ids = v.leaf("input/image"), v["input/text_ids"]
    batch = {"pixels": image, "ids": ids, "mask": mask_of(ids)}
    image_features, text_features = model.embed_batch(batch)
    assert_close(image_features, v["output/image_features"])
    assert_close(text_features, v["output/text_features"])
    loss = model.loss(batch)["loss"]
    loss.backward()
    assert_close(loss, v["output/loss"])
    assert_close(image.grad, v["grad/image"])
    assert_close(model.clip.logit_scale.grad, v["grad/logit_scale"])
    check_gradients_by_released_names(model, v)


@pytest.mark.parametrize("term", ["contrastive", "affiliation"])
def test_pir_clip_losses(vectors, pir_clip_of, term):
    v = vectors("pir_clip/losses.npz")
    model, image, text = pir_clip_of(4), v.leaf("input/image"), v.leaf("input/text")
    model.embed_batch = lambda batch: (image, text)
    model.clip.logit_scale.data = v["input/logit_scale"]
    terms = model.loss({"scene": v["input/label"]})
    assert_close(terms["loss"], v["output/total"])
    assert_close(terms[term], v[f"output/{term}"])
    terms[term].backward()
    assert_close(image.grad, v[f"grad/image_{term}"])
    assert_close(text.grad, v[f"grad/text_{term}"])
    assert_close(model.clip.logit_scale.grad, v[f"grad/logit_scale_{term}"])


def test_pir_clip_learning_rates(vectors):
    v = vectors("pir_clip/lr_cosine.npz")
    for name, spec in v.meta["specs"].items():
        config = TrainConfig(1, spec["lr"], schedule="cosine", warmup_steps=spec["warmup"])
        np.testing.assert_allclose(
            learning_rates(config, spec["total"]), v.arrays[f"output/{name}"], rtol=1e-5, atol=1e-12
        )


def test_pir_clip_classes_of_a_batch(request):
    golden = json.loads(reference_file(request, "pir_clip/labels_from_names.json").read_text())
    assert pir_clip.labels_from_names(golden["input"]).tolist() == golden["output"]


def test_pir_clip_evaluation_protocol(vectors):
    v = vectors("pir_clip/retrieval_metrics.npz").arrays
    metrics = evaluate(v["input/scores"].T, v["input/text_image_index"]).metrics
    for way in ("i2t", "t2i"):
        for k in (1, 5, 10):
            assert metrics[f"{way}_R@{k}"] == pytest.approx(
                float(v[f"output/{way}_R{k}"]), abs=1e-3
            )
    assert metrics["mR"] == pytest.approx(float(v["output/mean_recall"]), abs=1e-3)


@pytest.fixture(scope="module")
def paper_pir_clip():
    with torch.device("meta"):
        return PIRCLIP(replace(PIRCLIPConfig.paper(), freeze_instruction=False))


def official(request):
    return json.loads(reference_file(request, "pir_clip/official_state_dict.json").read_text())


def test_pir_clip_paper_parameter_count(paper_pir_clip):
    assert sum(p.numel() for p in paper_pir_clip.parameters()) == 188_939_105


def test_pir_clip_release_keys_and_shapes(paper_pir_clip, request):
    golden = official(request)["state_dict"]
    assert len(golden) == 643
    assert {
        name: list(value.shape)
        for name, value in release_states.pir_clip_state(paper_pir_clip).items()
    } == golden


@pytest.mark.parametrize("prefix", ["", "module."])
def test_pir_clip_release_loads_key_by_key(paper_pir_clip, request, prefix):
    state = {
        prefix + name: torch.empty(shape, device="meta")
        for name, shape in official(request)["state_dict"].items()
    }
    pir_clip.load_release(paper_pir_clip, state)
    for name in (
        "res_visual.layer3.5.bn2.num_batches_tracked",
        "vision_proj_res.bias",
        "visual.proj",
    ):
        with pytest.raises(errors.UserError, match=name):
            pir_clip.load_release(
                paper_pir_clip, {key: value for key, value in state.items() if key != prefix + name}
            )
    with pytest.raises(errors.UserError, match="unknown to the model .1.:\n  clip.logit_bias"):
        pir_clip.load_release(
            paper_pir_clip, state | {prefix + "logit_bias": torch.empty((), device="meta")}
        )


def test_pir_clip_parameter_groups(paper_pir_clip, request):
    kept, free = (
        {id(p) for p in group["params"]} for group in paper_pir_clip.parameter_groups(0.5)
    )
    assert kept.isdisjoint(free) and len(kept | free) == len(list(paper_pir_clip.parameters()))
    group_of = {name: 0 if id(p) in kept else 1 for name, p in paper_pir_clip.named_parameters()}
    assert (
        checkpoints.rename(group_of, release_states.TO_PIR_CLIP) == official(request)["param_group"]
    )


def test_pir_clip_starts_from_a_stock_clip(paper_pir_clip, request):
    with torch.device("meta"):
        state = open_clip.create_model("ViT-B-32", device="meta").state_dict()
    checkpoints.load_into(paper_pir_clip.clip, state)
    left = [name for name in paper_pir_clip.state_dict() if not name.startswith("clip.")]
    expected = {
        name
        for name in official(request)["state_dict"]
        if name.startswith(("res_visual.", "vision_proj_res."))
    }
    assert set(left) == expected and len(state) + len(left) == len(official(request)["state_dict"])

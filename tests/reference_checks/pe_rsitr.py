"""PE-RSITR against the vectors of the authors' modules, and of an exact loss."""

from __future__ import annotations

import numpy as np
import pytest
import release_states
import torch
import torch.nn.functional as F
from closeness import assert_close

from nbhelpers.data import image_input
from nbhelpers.metrics.recall import evaluate
from nbhelpers.papers import pe_rsitr
from nbhelpers.papers.clip import image_tokens, text_tokens
from nbhelpers.towers import backbones
from reference_checks.common import fill


def recorded_dropout(monkeypatch, *keep):
    """Each dropout that drops anything keeps what the next of these masks kept."""
    masks = iter(keep)
    monkeypatch.setattr(
        F, "dropout", lambda x, p, training: x * next(masks) / (1 - p) if training and p else x
    )


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_pe_rsitr_adapter(vectors, monkeypatch, mode):
    v = vectors("pe_rsitr/mrs_adapter.npz")
    m = v.meta
    adapter = pe_rsitr.MRSAdapter(
        m["d_model"], m["visual_width"], m["bottleneck"], m["shared_up_dim"], m["dropout"]
    )
    fill(adapter, v.param()).train(mode == "train")
    recorded_dropout(monkeypatch, v["input/keep_text"], v["input/keep_visual"])
    text, visual = v.leaf("input/x_text"), v.leaf("input/x_visual")
    made = adapter(text, visual=False), adapter(visual, visual=True)
    scalar = (made[0] * v["input/cot_text"]).sum() + (made[1] * v["input/cot_visual"]).sum()
    scalar.backward()
    assert_close(made[0], v[f"output/{mode}/text"])
    assert_close(made[1], v[f"output/{mode}/visual"])
    assert_close(scalar, v[f"output/{mode}/scalar"])
    assert_close(text.grad, v[f"grad/{mode}/x_text"])
    assert_close(visual.grad, v[f"grad/{mode}/x_visual"])
    checked = [name for name, p in adapter.named_parameters() if f"grad/{mode}/{name}" in v.arrays]
    assert len(checked) == 2
    assert_close(
        {name: adapter.get_parameter(name).grad for name in checked},
        {name: v[f"grad/{mode}/{name}"] for name in checked},
    )


def test_pe_rsitr_adapter_of_full_size(vectors):
    v = vectors("pe_rsitr/mrs_adapter_fullsize.npz")
    text, visual = v["input/x_text"], v["input/x_visual"]
    config = pe_rsitr.PERSITRConfig.paper()
    adapter = pe_rsitr.MRSAdapter(
        text.shape[2], visual.shape[2], config.bottleneck, config.share_dim
    )
    names = sorted(name for name, _ in adapter.named_parameters())
    assert (
        names == v.meta["names"]
        and sum(p.numel() for p in adapter.parameters()) == v.meta["params"]
    )
    with torch.no_grad():
        for i, name in enumerate(names):
            p = adapter.get_parameter(name)
            p.copy_(torch.from_numpy(0.05 * np.sin(np.arange(p.numel()) * 0.37 + i)).view_as(p))
    adapter.eval()
    assert_close(adapter(text, visual=False), v["output/text"])
    assert_close(adapter(visual, visual=True), v["output/visual"])


@pytest.fixture
def pe_rsitr_clip(vectors, monkeypatch):
    """(the vectors, a PERSITR on the tiny CLIP of their sizes)."""
    v = vectors("pe_rsitr/adapted_clip.npz")
    m = v.meta
    monkeypatch.setitem(
        backbones.CLIP,
        "reference",
        backbones.CLIPSize(
            m["embed"],
            {
                "layers": m["layers"],
                "width": m["vw"],
                "head_width": m["vw"] // m["vh"],
                "patch_size": m["patch"],
                "image_size": m["res"],
            },
            {
                "layers": m["layers"],
                "width": m["d_model"],
                "heads": m["th"],
                "context_length": m["ctx"],
                "vocab_size": m["vocab"],
            },
            image_input.ImageInput(m["res"]),
            quick_gelu=True,
        ),
    )
    config = pe_rsitr.PERSITRConfig(
        "reference",
        m["adapter_bottleneck"],
        m["adapter_shared_dim"],
        adapter_dropout=0.0,
        view_dropout=m["aug_dropout"],
    )
    return v, pe_rsitr.PERSITR(config)


def caption_mask(ids):
    return (torch.arange(ids.shape[1]) <= ids.argmax(1, keepdim=True)).long()


def test_pe_rsitr_starts_as_clip(pe_rsitr_clip):
    v, model = pe_rsitr_clip
    pe_rsitr.load_release(model, v.param())
    for name, p in model.Uniadapt.named_parameters():
        if "up_proj" in name:
            torch.nn.init.zeros_(p)
    ids = v["input/text"].long()
    with torch.no_grad():
        assert_close(
            model.eval().image_vectors(image_tokens(model.clip, v["input/image"])),
            v["output/init/image"],
        )
        assert_close(
            model.text_vectors(text_tokens(model.clip, ids), caption_mask(ids)),
            v["output/init/text"],
        )


def test_pe_rsitr_adapted_clip_and_its_views(pe_rsitr_clip, monkeypatch):
    v, model = pe_rsitr_clip
    pe_rsitr.load_release(model, v.param())
    assert {
        name.removeprefix("PE_RSITR."): p.shape
        for name, p in release_states.pe_rsitr_state(model).items()
    } == {name: p.shape for name, p in v.param().items()}
    pixels, ids = v.leaf("input/image"), v["input/text"].long()
    patches, words, mask = (
        image_tokens(model.clip, pixels),
        text_tokens(model.clip, ids),
        caption_mask(ids),
    )
    made = {"image": model.image_vectors(patches), "text": model.text_vectors(words, mask)}
    recorded_dropout(monkeypatch, v["input/keep_image"], v["input/keep_text"])
    made["image_aug"] = model.image_vectors(model.view(patches))
    made["text_aug"] = model.text_vectors(model.view(words), mask)
    for name, value in made.items():
        assert_close(value, v[f"output/{name}"])
    image, text = v["input/cot_i"], v["input/cot_t"]
    scalar = sum(
        (made[name] * cotangent).sum()
        for name, cotangent in (
            ("image", image),
            ("text", text),
            ("image_aug", image.flip(0)),
            ("text_aug", text.flip(0)),
        )
    )
    scalar.backward()
    assert_close(scalar, v["output/scalar"])
    assert_close(pixels.grad, v["grad/image"])
    for name, p in model.Uniadapt.named_parameters():
        assert_close(p.grad, v[f"grad/Uniadapt.{name}"])


@pytest.mark.parametrize("kind", ["hard", "all"])
def test_pe_rsitr_hmmc_loss(vectors, kind):
    v = vectors("pe_rsitr/hmmc.npz")
    rows = {name: v.leaf(f"input/{name}") for name in ("v", "t", "v_aug", "t_aug")}
    pairs = {"cross": ("v", "t"), "intra_v": ("v", "v_aug"), "intra_t": ("t", "t_aug")}
    terms = {
        name: pe_rsitr.ranking_loss(rows[a], rows[b], v.meta["margin"], hardest=kind == "hard")
        for name, (a, b) in pairs.items()
    }
    total = sum(terms.values())
    total.backward()
    for name, value in (terms | {"total": total}).items():
        assert_close(value, v[f"output/{kind}/{name}"])
    for name, leaf in rows.items():
        assert_close(leaf.grad, v[f"grad/{kind}/{name}"])
    assert_close(
        pe_rsitr.unit_rows(rows["v"]) @ pe_rsitr.unit_rows(rows["t"]).t(), v["output/cos_vt"]
    )


def test_pe_rsitr_evaluation_protocol(vectors):
    v = vectors("pe_rsitr/metrics.npz")
    image, caption = (pe_rsitr.unit_rows(v[f"input/{name}"]) for name in ("image", "caption"))
    scores = (image @ caption.t()).numpy()
    assert_close(scores, v.arrays["output/sims"])
    found = evaluate(scores, np.arange(scores.shape[1]) // v.meta["captions_per_image"])
    keys = [f"{way}_R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert_close([found.metrics[key] for key in keys], v.arrays["output/recalls"])
    assert found.metrics["mR"] == pytest.approx(float(v["output/mR"]), abs=1e-5)
    ranks = [
        figure
        for way in (found.i2t_ranks, found.t2i_ranks)
        for figure in (np.floor(np.median(way)) + 1, way.mean() + 1)
    ]
    assert_close(ranks, v.arrays["output/medr_meanr"])


def test_pe_rsitr_paper_parameter_counts():
    with torch.device("meta"):
        model = pe_rsitr.PERSITR(pe_rsitr.PERSITRConfig.paper())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 161_088
    assert sum(p.numel() for p in model.clip.parameters()) == 151_277_313
    assert sum(p.numel() for p in model.parameters()) == 151_277_313 + 161_088
    assert len(model.clip.state_dict()) == 302

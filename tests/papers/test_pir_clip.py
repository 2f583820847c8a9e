"""PIR-CLIP: options of the ablations, frozen parts, and files that give the same model again.

The numbers of the authors' code are in test_reference.py. As a script this file is one of two
processes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import open_clip
import pytest
import release_states
import torch
import torch.nn.functional as F
import two_processes
from closeness import assert_close
from release_files import write_release

from nbhelpers.data import image_input
from nbhelpers.data.tokenization import CLIPTokenizer
from nbhelpers.errors import UserError
from nbhelpers.papers import pir_clip
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.towers import backbones, checkpoints, starting_weights
from nbhelpers.training import loop

WORDS, LENGTH, TOKENS = 40, 9, 17
TEXT = {"context_length": LENGTH, "vocab_size": WORDS, "width": 16, "heads": 2, "layers": 1}
SIZES = {
    "small": backbones.CLIPSize(
        20,
        {"image_size": 64, "patch_size": 16, "width": 24, "head_width": 8, "layers": 2},
        TEXT,
        image_input.ImageInput(64),
    ),
    "small_compact": backbones.CLIPSize(
        20,
        {"image_size": 7, "patch_size": 1, "width": 24, "head_width": 8, "layers": 1},
        TEXT,
        image_input.ImageInput(112),
        towers=("swin_standin", "bert_standin"),
    ),
}
RESNET = {"layers": (1, 1, 1, 1), "width": 4, "heads": 2}
# so small a model gains nothing from a second, and loses much where the cores are busy
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    for name, size in SIZES.items():
        monkeypatch.setitem(backbones.CLIP, name, size)
    monkeypatch.setitem(backbones.INSTRUCTION, "small", RESNET)


def small(clip="small", **changes) -> PIRCLIP:
    """A PIR-CLIP of 17 image tokens; parts that two of them share start from the same weights."""
    torch.manual_seed(0)
    model = PIRCLIP(replace(PIRCLIPConfig(clip=clip, filter_size=12), **changes))
    with torch.no_grad():
        # larger than the default, so that every part matters
        for name, p in model.named_parameters():
            if p.dim():
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                p.copy_(
                    torch.randn(p.shape, generator=generator) * 0.25
                    + ("weight" in name and p.dim() == 1)
                )
        if model.config.instruction_token:
            model.vision_proj_res.weight.mul_(0.1)  # no single token takes all of the belief
    return model


def pairs(count: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pairs of which two share an image and three a class; captions of 3 to 9 tokens, padded with
    0.
    """
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(3, LENGTH + 1, (count, 1), generator=generator)
    place = torch.arange(LENGTH)
    ids = torch.randint(1, WORDS - 2, (count, LENGTH), generator=generator) * (place < length)
    ids[:, 0] = WORDS - 2
    ids[place == length - 1] = WORDS - 1
    index = torch.arange(count)
    index[1:2] = 0
    return {
        "pixels": torch.randn(count, 3, 64, 64, generator=generator),
        "ids": ids,
        "mask": (place < length).long(),
        "image_index": index,
        "scene": index.clamp(min=2) // 2,
    }


def step(model: PIRCLIP, batch: dict, lr: float = 1e-5) -> dict[str, torch.Tensor]:
    """The terms of one training step, which leaves gradients and new weights."""
    optimizer = torch.optim.AdamW(model.parameter_groups(0.01), lr=lr)
    terms = model.loss(batch)
    terms["loss"].backward()
    optimizer.step()
    model.after_step()
    return {name: value.detach().clone() for name, value in terms.items()}


def both(model: PIRCLIP, batch: dict) -> torch.Tensor:
    """(2B,D) embeddings in eval mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat(model.embed_batch(batch))


def values(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---- options
OPTIONS = {
    "baseline": {"instruction_token": False, "belief": "none", "affiliation": False},
    "instruction_only": {"belief": "none"},
    "hard": {"belief": "hard"},
    "pre_fix": {"belief_rule": "pre_fix"},
    "rank": {"belief_rule": "rank"},
    "contrastive_only": {"affiliation": False},
    "multi_positive": {"multi_positive": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_loss_and_trains(name):
    batch, model = pairs(), small(**OPTIONS[name])
    before = values(model)
    terms = step(model, batch)
    assert abs(terms["loss"] - small().loss(batch)["loss"]) > 1e-4
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad.isfinite().all() for key, p in model.named_parameters() if key in trained)
    assert all(
        torch.equal(value, before[key]) != (key in trained) for key, value in values(model).items()
    )
    assert model.loss(batch)["loss"] < terms["loss"]


@pytest.mark.parametrize(
    "options",
    [{}, {"freeze_instruction": False}, {"freeze_text": True}, {"clip": "small_compact"}],
)
def test_what_is_frozen_rests_and_all_else_trains(options):
    model, batch = small(**options).eval().train(), pairs()
    if options.get("clip"):
        batch["pixels"] = torch.randn(6, 3, 112, 112)
    before, terms = values(model), step(model, batch)
    moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    text = ["clip.token", "clip.positional", "clip.transformer", "clip.ln_final", "clip.text"]
    frozen = [] if options.get("freeze_instruction") is False else ["res_visual."]
    frozen += text if options.get("freeze_text") else []
    frozen += ["vision_encoder.", "text_encoder."] if options.get("clip") else []
    still = {name for name in before if name.startswith(tuple(frozen))}
    assert moved == before.keys() - still and math.isfinite(terms["loss"])
    assert all((p.grad is None) == (name in still) for name, p in model.named_parameters())
    for name, part in model.named_modules():
        assert part.training == (not f"{name}.".startswith(tuple(frozen))), name
    running = {name for name in before if "running_mean" in name and name.startswith("res_visual.")}
    assert bool(running & moved) == (options.get("freeze_instruction") is False)


def test_the_parts_that_freezing_spares_are_what_the_losses_reach():
    model = small(freeze_text=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"clip.logit_scale", "vision_proj_res.weight"} <= trained
    assert all(
        name.startswith(("clip.visual.", "vision_proj_res.", "clip.logit_scale"))
        for name in trained
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"belief": "medium"}, "'soft', 'hard' or 'none'"),
        ({"belief_rule": "fixed"}, "'official', 'pre_fix' or 'rank'"),
        ({"filter_size": 0}, "filter_size 0 must be at least 1"),
        ({"instruction_token": False}, "needs the instruction token"),
        ({"clip": "vit_b16"}, "no CLIP tower called 'vit_b16'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(changes, message):
    with pytest.raises(UserError, match=message) as error:
        PIRCLIP(PIRCLIPConfig.tiny(**changes))
    assert "\n" not in str(error.value)


def test_the_three_sizes():
    for size, width, dim in (("tiny", 96, 64), ("compact", 256, 256), ("paper", 768, 512)):
        config = getattr(PIRCLIPConfig, size)()
        edge = backbones.clip_size(config.clip).image.size
        with torch.device("meta"):
            model = PIRCLIP(config).eval()
            seen = model.image_features(torch.empty(2, 3, edge, edge))
            tokens, instruction, logits = model.instruct(seen["vision"])
        assert (
            tokens.shape == (2, 50, width)
            and instruction.shape == (2, 1, width)
            and logits.shape == (2, 50)
        )
        assert model.vision_proj_res.in_features == dim
        assert (
            config.freeze_instruction == (config.clip != "clip_compact") and not config.freeze_text
        )


# ---- plain CLIP
def test_the_baseline_is_the_clip_of_open_clip():
    config, batch = replace(PIRCLIPConfig(clip="small"), multi_positive=True).baseline(), pairs()
    model = small(**asdict(config)).eval()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {
        "clip"
    } and config.multi_positive
    assert_close(
        model.encode_images(batch["pixels"]),
        model.clip.encode_image(batch["pixels"], normalize=True),
    )
    text = model.encode_texts(batch["ids"], batch["mask"])
    assert_close(text, model.clip.encode_text(batch["ids"], normalize=True))
    assert set(model.loss(batch)) == {"loss", "contrastive", "scale"}


def test_a_belief_needs_an_instruction():
    model = small(**OPTIONS["baseline"])
    with pytest.raises(UserError, match="holds no belief"):
        model.belief(pairs()["pixels"])


# ---- soft belief
@pytest.mark.parametrize("rule", ["official", "pre_fix", "rank"])
def test_soft_belief_equals_a_plain_loop(rule):
    generator = torch.Generator().manual_seed(1)
    tokens, belief = (
        torch.randn(3, 5, 4, generator=generator),
        torch.randn(3, 5, generator=generator).softmax(1),
    )
    expected = torch.zeros(3, 5, 4)
    for b in range(3):
        order = sorted(range(5), key=lambda j: -belief[b, j].item())
        place = order if rule == "official" else [order.index(i) for i in range(5)]
        assert place != list(range(5))
        for i in range(5):
            added = belief[b, i] if rule == "pre_fix" else (1 + place[i]) ** -0.5
            expected[b, i] = (belief[b, i] + added) * tokens[b, i]
        for column in range(4):
            expected[b, :, column] /= expected[b, :, column].square().sum().sqrt()
    assert_close(pir_clip.soft_belief(tokens, belief, rule), expected)


def test_the_image_tower_equals_its_steps():
    model, batch = small().eval(), pairs()
    visual, pixels = model.clip.visual, batch["pixels"]
    instruction = model.vision_proj_res(model.res_visual(pixels))
    tokens = visual._embeds(pixels)
    belief = torch.stack([row @ y for row, y in zip(tokens, instruction, strict=True)]).softmax(1)
    weighted = pir_clip.soft_belief(tokens, belief)
    states = visual.transformer(
        torch.stack(
            [torch.cat([y[None], row]) for y, row in zip(instruction, weighted, strict=True)]
        )
    )
    expected = visual.ln_post(states)[:, 0] @ visual.proj
    assert_close(model.encode_images(pixels), F.normalize(expected, dim=1))
    found, added = model.belief(pixels)
    assert_close(found, belief)
    assert_close(found.sum(1), torch.ones(6))
    assert_close(added, pir_clip.added_weights(belief, "official"))


def test_tokens_are_weighed_by_the_given_function():
    def plain(tokens, belief, rule):
        given.append((rule, belief.sum(1)))
        return tokens

    given, pixels = [], pairs()["pixels"]
    model, unweighted = small(belief_rule="rank"), small(belief="none").eval()
    own = PIRCLIP(model.config, weigh=plain).eval()
    own.load_state_dict(model.state_dict())
    assert_close(own.encode_images(pixels), unweighted.encode_images(pixels))
    ((rule, total),) = given
    assert rule == "rank"
    assert_close(total, torch.ones(6))
    assert model.weigh is pir_clip.soft_belief


def test_with_constant_weights_the_output_does_not_depend_on_the_order_of_belief(monkeypatch):
    model, pixels = small().eval(), pairs()["pixels"]
    tokens, instruction, logits = model.instruct(pixels)
    shuffled = logits[:, torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))]

    def output(logits):
        model.instruct = lambda vision: (tokens, instruction, logits)
        return model.encode_images(pixels)

    assert (output(logits) - output(shuffled)).abs().max() > 1e-3
    # b + w = 1
    monkeypatch.setattr(
        pir_clip, "added_weights", lambda belief, rule: torch.ones_like(belief) - belief
    )
    assert_close(output(logits), output(shuffled))


def test_a_hard_belief_keeps_the_best_tokens_unweighted():
    model = small(belief="hard").eval()
    tokens, logits = torch.randn(3, TOKENS, 24), torch.randn(3, TOKENS)
    kept = model.apply_belief(tokens, logits)
    for b in range(3):
        order = sorted(range(TOKENS), key=lambda j: -logits[b, j].item())[:12]
        assert torch.equal(kept[b], tokens[b, order])
    with pytest.raises(UserError, match="filter_size is 18 but the image tower has 17 tokens"):
        small(belief="hard", filter_size=18).encode_images(pairs()["pixels"])


def test_gradients_reach_the_instruction_through_belief_and_token():
    model, batch = small(freeze_instruction=False), pairs()
    tokens, instruction, logits = model.instruct(batch["pixels"])
    (through_belief,) = torch.autograd.grad(
        model.apply_belief(tokens, logits)[:, :, 0].sum(), instruction, retain_graph=True
    )
    assert through_belief.abs().max() > 1e-5
    model.apply_belief = lambda tokens, logits: tokens
    (through_token,) = torch.autograd.grad(
        model.encode_images(batch["pixels"]).sum(), model.vision_proj_res.bias
    )
    assert through_token.abs().max() > 1e-5


def test_the_belief_is_float32_in_half_precision():
    model, pixels = small().eval(), pairs()["pixels"]
    with torch.no_grad():
        model.vision_proj_res.weight.mul_(3e4 / model.instruct(pixels)[1].abs().max())
    exact = model.instruct(pixels)[2]
    assert exact.abs().max() > torch.finfo(torch.float16).max
    with torch.autocast("cpu", torch.float16):
        tokens, _, logits = model.instruct(pixels)
        weighted = model.apply_belief(tokens, logits)
        embedded = model.encode_images(pixels)
    assert (
        logits.dtype == weighted.dtype == torch.float32
        and logits.isfinite().all()
        and embedded.isfinite().all()
    )
    torch.testing.assert_close(logits, exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())


def test_figures_of_an_instruction_that_knows_nothing():
    model, pixels = small().eval(), pairs()["pixels"]
    norm = model.instruct(pixels)[1].norm(dim=2).mean().item()
    figures = model.instruction_figures(pixels)
    assert_close(figures["instruction_norm"], norm)
    assert 0 < figures["belief_entropy"] < math.log(TOKENS) - 0.01
    torch.nn.init.zeros_(model.vision_proj_res.weight)
    torch.nn.init.zeros_(model.vision_proj_res.bias)
    figures = model.instruction_figures(pixels)
    assert figures["instruction_norm"] == 0
    assert_close(figures["belief_entropy"], math.log(TOKENS))


# ---- losses
def test_both_terms_share_the_scale_and_add_up():
    model, batch = small(), pairs()
    terms = model.loss(batch)
    assert_close(terms["loss"], terms["contrastive"] + terms["affiliation"])
    assert (
        terms["scale"].item() == pytest.approx(math.exp(model.clip.logit_scale.item()))
        and not terms["scale"].requires_grad
    )
    image, text = model.embed_batch(batch)
    own, scores = torch.arange(6), terms["scale"] * image @ text.t()
    contrastive = (F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)) / 2
    assert_close(terms["contrastive"], contrastive)
    centres = [
        torch.stack([rows[batch["scene"] == s].mean(0) for s in batch["scene"]])
        for rows in (text, image)
    ]
    affiliation = (
        sum(
            F.cross_entropy(terms["scale"] * rows @ c.t(), own)
            for rows, c in zip((image, text), centres, strict=True)
        )
        / 2
    )
    assert_close(terms["affiliation"], affiliation)


def test_affiliation_is_never_below_the_log_of_the_class_sizes():
    model, batch = small(), pairs()
    sizes = torch.tensor([(batch["scene"] == s).sum() for s in batch["scene"]])
    bound = sizes.log().mean()
    assert model.loss(batch)["affiliation"] > bound + 1e-3
    rows = F.one_hot(batch["scene"], 20).float()  # classes at right angles, each pair on its centre
    model.embed_batch = lambda batch: (rows, rows)
    model.clip.logit_scale.data.fill_(math.log(100.0))
    assert_close(model.loss(batch)["affiliation"], bound)


def test_a_few_pairs_are_learnt_by_heart():
    model, batch = (
        small(),
        pairs(6)
        | {
            "image_index": torch.arange(6),
            "scene": torch.arange(6) // 2,
        },
    )
    first = model.loss(batch)
    for _ in range(45):
        terms = step(model, batch, lr=1e-3)
    assert terms["contrastive"] < 0.1 and first["contrastive"] > 1.5
    assert terms["affiliation"] == pytest.approx(math.log(2), abs=0.05) and terms[
        "affiliation"
    ] > math.log(2)


def test_the_scale_stays_between_1_and_100():
    model, batch = small(), pairs()
    for start, end in ((10.0, math.log(100.0)), (-3.0, 0.0)):
        model.clip.logit_scale.data.fill_(start)
        step(model, batch)
        assert model.clip.logit_scale.item() == pytest.approx(end)


def test_names_without_underscore_are_classes_of_their_own():
    labels = pir_clip.labels_from_names(["port_1.tif", "7.tif", "port_2.tif", "port.tif", "7.jpg"])
    assert labels.tolist() == [0, 1, 0, 2, 3] and labels.dtype == torch.int64
    assert (
        pir_clip.labels_from_names([]).shape == (0,)
        and pir_clip.labels_from_names([]).dtype == torch.int64
    )


def test_a_step_in_bfloat16_is_finite_and_its_losses_are_taken_in_float32():
    model = small(freeze_instruction=False)
    with torch.autocast("cpu", torch.bfloat16):
        terms = step(model, pairs())
    assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values())
    assert all(
        p.isfinite().all() and (p.grad is None or p.grad.isfinite().all())
        for p in model.parameters()
    )


@pytest.mark.gpu
def test_the_paper_size_takes_a_half_precision_step_on_the_gpu():
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = PIRCLIP(PIRCLIPConfig.paper())
        ids = torch.randint(1, 40000, (8, 77))
        batch = {
            "pixels": torch.randn(8, 3, 224, 224),
            "ids": ids,
            "mask": torch.ones_like(ids),
            "scene": torch.arange(8) // 2,
        }
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            terms = step(model, batch)
        assert all(value.isfinite() for value in terms.values())
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---- batches and bad input
@pytest.mark.parametrize("options", [{}, {"belief": "hard"}, {"freeze_instruction": False}])
def test_a_batch_of_one_is_a_batch(options):
    model, batch = small(**options), pairs()
    one = {name: value[2:3] for name, value in batch.items()}
    assert_close(both(model, one), both(model, batch)[[2, 8]])
    assert step(model.train(), one)["loss"].abs() < 1e-6


@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (128, 64)])
def test_images_of_another_size_are_refused(shape):
    for options in ({}, OPTIONS["baseline"]):
        with pytest.raises(UserError, match=f"takes images of 64x64, not {shape[0]}x{shape[1]}"):
            small(**options).encode_images(torch.randn(2, 3, *shape))


def test_long_captions_are_refused_and_empty_ones_are_read():
    model, batch = small().eval(), pairs()
    with pytest.raises(UserError, match="captions of 9 tokens, not 11"):
        model.encode_texts(
            F.pad(batch["ids"], (0, 2)), torch.ones_like(F.pad(batch["mask"], (0, 2)))
        )
    empty = torch.tensor([[WORDS - 2, WORDS - 1] + [0] * (LENGTH - 2)])
    found = model.encode_texts(
        torch.cat([batch["ids"], empty]), torch.cat([batch["mask"], (empty > 0).long()])
    )
    assert found.isfinite().all()
    assert_close(found[-1], model.clip.encode_text(empty, normalize=True)[0])


def test_the_tiny_size_reads_what_its_tokenizer_gives():
    torch.manual_seed(0)
    model = PIRCLIP(PIRCLIPConfig.tiny()).eval()
    ids, mask = CLIPTokenizer(max_length=model.clip.context_length)(
        ["", "a port", "Two planes. " * 60]
    )
    with torch.no_grad():
        found = model.encode_texts(ids, mask)
        assert_close(found, model.clip.encode_text(ids, normalize=True))
    assert mask.sum(1).tolist() == [2, 4, 40]


@pytest.mark.parametrize("options", [{}, {"freeze_instruction": False}, OPTIONS["baseline"]])
def test_cached_features_take_the_place_of_pixels_and_ids(options):
    model, batch = (
        small("small_compact", **options).eval(),
        pairs() | {"pixels": torch.randn(6, 3, 112, 112)},
    )
    with torch.no_grad():
        cached = model.image_features(batch["pixels"]) | model.text_features(
            batch["ids"], batch["mask"]
        )
    assert cached["vision"].shape == (6, 50, 96) and cached["text"].shape == (6, LENGTH, 64)
    cached |= {name: batch[name] for name in ("mask", "image_index", "scene")}
    assert_close(model.loss(cached)["loss"], model.loss(batch)["loss"])


def test_the_compact_instruction_is_made_of_the_global_token_alone():
    model, vision = small("small_compact").eval(), torch.randn(2, 50, 96)
    changed = vision.clone()
    changed[:, 0] += 1
    (tokens, instruction, _), (same, other, _) = model.instruct(vision), model.instruct(changed)
    assert torch.equal(tokens, same) and not torch.allclose(instruction, other, atol=1e-3)
    assert isinstance(model.res_visual, backbones.SceneHead)


# ---- starting weights
def plain_clip(**changes) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    size = replace(SIZES["small"], **changes)
    return open_clip.CLIP(size.embed_dim, size.vision, size.text).state_dict()


def fill(model: PIRCLIP, folder, **towers: tuple[str, dict[str, torch.Tensor]]) -> None:
    """Fills towers of the model from files of a layout that hold these tensors."""
    found = {}
    for name, (layout, state) in towers.items():
        torch.save(state, folder / f"{name}.pt")
        found[name] = starting_weights.Tower.resolved(str(folder / f"{name}.pt"), layout=layout)
    left = {"res_visual": [starting_weights.NO_LAST_PROJECTION]}
    found = {name: replace(tower, left=left.get(name, [])) for name, tower in found.items()}
    starting_weights.Start(starting_weights.CLIP_WORDS, LENGTH, found).fill(model)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_plain_clip_leaves_the_instruction_alone(prefix, tmp_path):
    model = small()
    before, state = values(model), plain_clip()
    numbers = {
        "input_resolution": torch.tensor(64),
        "context_length": torch.tensor(LENGTH),
        "vocab_size": torch.tensor(WORDS),
    }
    fill(
        model,
        tmp_path,
        clip=("clip", {prefix + name: value for name, value in (state | numbers).items()}),
    )
    left = [name for name in before if name.startswith(("res_visual.", "vision_proj_res."))]
    after = values(model)
    assert len(left) + len(state) == len(before)
    assert all(torch.equal(after[name], before[name]) for name in left)
    assert all(torch.equal(after[f"clip.{name}"], value) for name, value in state.items())
    baseline = small(**OPTIONS["baseline"])
    fill(baseline, tmp_path, clip=("clip", state))
    assert values(baseline).keys() == {f"clip.{name}" for name in state}


def test_other_state_dicts_start_no_clip(tmp_path):
    model = small()
    before, state = values(model), plain_clip()
    cut = {name: value for name, value in state.items() if name != "visual.proj"}
    wide = plain_clip(vision=SIZES["small"].vision | {"width": 32})
    for wrong, message in (
        (cut, "missing in the file .1.:\n  visual.proj"),
        (release_states.pir_clip_state(model), "res_visual.conv1.weight"),
        (state | {"logit_bias": torch.zeros(())}, "unknown to the model .1.:\n  logit_bias"),
        (wide, "of another shape"),
    ):
        with pytest.raises(UserError, match=message):
            fill(model, tmp_path, clip=("clip", wrong))
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def test_the_instruction_encoder_starts_from_another_clip(tmp_path):
    model = small()
    projection = model.res_visual.attnpool.c_proj.weight.clone()
    source = open_clip.CLIP(32, {"layers": (1, 1, 1, 1), "width": 4, "image_size": 64}, TEXT)
    fill(model, tmp_path, res_visual=("clip_resnet", source.state_dict()))
    assert torch.equal(model.res_visual.attnpool.c_proj.weight, projection)
    assert torch.equal(
        model.res_visual.layer4[0].conv2.weight, source.visual.layer4[0].conv2.weight
    )
    assert torch.equal(
        model.res_visual.attnpool.positional_embedding, source.visual.attnpool.positional_embedding
    )
    with pytest.raises(UserError, match="missing in the file"):
        fill(model, tmp_path, res_visual=("clip_resnet", plain_clip()))


# ---- files
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"belief_rule": "pre_fix", "freeze_text": True},
        {"belief": "hard", "filter_size": 3},
        OPTIONS["baseline"],
    ],
)
def test_what_is_written_as_release_is_read_as_the_same_model(tmp_path, changes):
    model = small(**changes)
    write_release(model, tmp_path / "pir_clip.pt")
    content = torch.load(tmp_path / "pir_clip.pt", weights_only=True)
    assert {"state_dict", "epoch", "name"} <= set(content) and "visual.proj" in content[
        "state_dict"
    ]
    again, said = pir_clip.read(tmp_path / "pir_clip.pt")
    assert (
        said == {"system": "pir_clip", "release": True}
        and again.config == model.config
        and not again.training
    )
    assert torch.equal(both(again, pairs()), both(model, pairs()))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_file_is_read_in_the_paper_size(tmp_path, monkeypatch, prefix):
    monkeypatch.setattr(PIRCLIPConfig, "paper", lambda: PIRCLIPConfig(clip="small"))
    model = small()
    state = {prefix + name: value for name, value in release_states.pir_clip_state(model).items()}
    torch.save(
        {"state_dict": state, "epoch": 20, "name": "run", "optimizer": {"state": {}}},
        tmp_path / "PIR-CLIP_RET-3.pt",
    )
    again, said = pir_clip.read(tmp_path / "PIR-CLIP_RET-3.pt")
    assert said["release"] and again.config == PIRCLIPConfig(clip="small")
    official = both(again, pairs())
    assert torch.equal(official, both(model, pairs()))
    again.config = replace(again.config, belief_rule="pre_fix")
    assert_close(both(again, pairs()), both(small(belief_rule="pre_fix"), pairs()))
    assert (both(again, pairs()) - official).abs().max() > 1e-3


def test_our_own_checkpoints_come_back_from_training(tmp_path):
    config, batch = PIRCLIPConfig(clip="small", freeze_instruction=False), pairs()
    settings = loop.TrainConfig(
        epochs=1, lr=1e-3, batch_size=6, schedule="cosine", warmup_fraction=0.0
    )
    model, history, trained = loop.load_or_train(
        "pir_clip",
        lambda: PIRCLIP(config),
        [batch],
        settings,
        tmp_path,
        "k" * 64,
        loop.Options(meta={"system": "pir_clip", "model": asdict(config)}),
    )
    (found,) = tmp_path.glob("pir_clip-*/model.safetensors")
    again, meta = pir_clip.read(found)
    assert trained and again.config == config and not again.training
    assert set(history.rows[0]) >= {"contrastive", "affiliation", "scale"}
    assert_close(both(again, batch), both(model.cpu(), batch))


def test_files_of_other_models_are_refused(tmp_path):
    model = small()
    meta, nothing = (
        {
            "system": "pir_clip",
            "model": asdict(model.config),
        },
        "does not say which PIR-CLIP",
    )
    cut = {
        name: value for name, value in model.state_dict().items() if name != "vision_proj_res.bias"
    }
    made = {
        "pir": (
            checkpoints.save_checkpoint(tmp_path / "pir", model, meta | {"system": "pir"}),
            "something else.*'pir'",
        ),
        "newer": (
            checkpoints.save_checkpoint(tmp_path / "newer", model, meta | {"model": {"magic": 1}}),
            nothing,
        ),
        "silent": (
            checkpoints.save_checkpoint(tmp_path / "silent", model, {"system": "pir_clip"}),
            nothing,
        ),
        "cut": (
            checkpoints.save_checkpoint(tmp_path / "cut", cut, meta),
            "missing in the file .1.:\n  vision_proj_res.bias",
        ),
    }
    torch.save({"state_dict": plain_clip()}, tmp_path / "clip.pt")
    torch.save(
        {"state_dict": release_states.pir_clip_state(model), "nbhelpers": "?"}, tmp_path / "odd.pt"
    )
    made |= {
        "clip": (tmp_path / "clip.pt", "vision_proj_res is missing.*12_starting_weights"),
        "odd": (tmp_path / "odd.pt", nothing),
        "absent": (tmp_path / "absent.pt", "no weight file"),
    }
    for path, message in made.values():
        with pytest.raises(UserError, match=message):
            pir_clip.read(path)


# ---- two processes
GATHERED = {
    "ours": {},
    "local_classes": {"local_classes": True},
    "released": {"local_classes": True, "one_sided_gather": True},
}


def shared_classes() -> dict[str, torch.Tensor]:
    """Eight pairs; two classes have some in either half."""
    return pairs(8) | {"scene": torch.tensor([0, 0, 1, 1, 0, 2, 2, 1])}


def half(rows: slice) -> dict[str, np.ndarray]:
    """Losses and gradients of one step on these rows, for each way of gathering."""
    batch = {name: value[rows] for name, value in shared_classes().items()}
    return {
        f"{name}/{key}": array
        for name, options in GATHERED.items()
        for key, array in two_processes.one_step(small(**options), batch).items()
    }


other = two_processes.fixture(__file__)


def test_two_processes_have_the_loss_and_gradients_of_one(other):
    batch = shared_classes()
    # the same classes, told apart by half
    apart = batch | {"scene": 2 * batch["scene"] + (torch.arange(8) >= 4)}
    whole, local = (two_processes.one_step(small(), given) for given in (batch, apart))
    for part in two_processes.meet(other, half):
        found = {
            name: {
                key.removeprefix(f"{name}/"): array
                for key, array in part.items()
                if key.startswith(f"{name}/")
            }
            for name in GATHERED
        }
        two_processes.assert_alike(found["ours"], whole)
        two_processes.assert_alike(found["local_classes"], local)
        shared = {
            key: (
                array * (0.5 if key.startswith("grad/") and key != "grad/clip.logit_scale" else 1.0)
            )
            for key, array in local.items()
        }
        two_processes.assert_alike(found["released"], shared)
    assert abs(whole["affiliation"] - local["affiliation"]) > 1e-3
    for name in (
        "clip.logit_scale",
        "clip.visual.proj",
        "vision_proj_res.weight",
        "clip.text_projection",
    ):
        assert np.abs(whole[f"grad/{name}"]).max() > 1e-4


if __name__ == "__main__":
    for name, size in SIZES.items():
        backbones.CLIP[name] = size
    backbones.INSTRUCTION["small"] = RESNET
    two_processes.be_the_other(half)

"""PE-RSITR: it starts as its frozen CLIP; options; an adapter fits any CLIP of its widths.

The numbers of the authors' code are in test_reference.py. As a script this file is one of two
processes.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import release_states
import torch
import torch.nn.functional as F
import two_processes
from closeness import assert_close
from release_files import write_release
from torch import nn

from nbhelpers.data import image_input
from nbhelpers.data.tokenization import CLIPTokenizer
from nbhelpers.errors import UserError
from nbhelpers.papers import own_part, pe_rsitr
from nbhelpers.papers.clip import CLIP, CLIPConfig, image_tokens, text_tokens
from nbhelpers.papers.pe_rsitr import PERSITR, FrozenCLIP, MRSAdapter, PERSITRConfig
from nbhelpers.towers import backbones, checkpoints
from nbhelpers.training import loop

WORDS, LENGTH = 40, 9
QUIET = {"adapter_dropout": 0.0, "view_dropout": 0.0}


def size(vision: int, text: int, layers: int = 2) -> backbones.CLIPSize:
    return backbones.CLIPSize(
        16,
        {"layers": layers, "width": vision, "head_width": 8, "patch_size": 8, "image_size": 32},
        {
            "layers": layers,
            "width": text,
            "heads": 4,
            "context_length": LENGTH,
            "vocab_size": WORDS,
        },
        image_input.ImageInput(32),
        quick_gelu=True,
    )


SIZES = {
    "small": size(24, 20),
    "sister": size(24, 20),
    "wide": size(32, 20),
    "deep": size(24, 20, layers=3),
}


@pytest.fixture(scope="module", autouse=True)
def small_sizes():
    with pytest.MonkeyPatch.context() as patch:
        for name, its in SIZES.items():
            patch.setitem(backbones.CLIP, name, its)
        yield


def start(model: CLIP, seed: int = 0) -> CLIP:
    """Fills CLIP with random weights, large enough that every part matters; equal for all models of
    one size.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.clip.named_parameters()):
            if p.ndim:
                p.copy_(
                    ("ln_" in name and "weight" in name)
                    + 0.2 * torch.randn(p.shape, generator=generator)
                )
    return model


def adapter_of(model: PERSITR, seed: int = 5) -> PERSITR:
    """`model` with an adapter that changes what CLIP says."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(model.Uniadapt.named_parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def small(**changes) -> PERSITR:
    """A PE-RSITR of two layers with dropout as released, its adapter as it starts."""
    torch.manual_seed(0)
    return start(
        PERSITR(PERSITRConfig(**{"clip": "small", "bottleneck": 6, "share_dim": 8} | changes))
    )


def pairs(count: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """Captions of 2 (an empty one) to 9 ids, the end token the largest, padded with 0."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(2, LENGTH + 1, (count, 1), generator=generator)
    length[0] = 2
    position = torch.arange(LENGTH)
    ids = torch.randint(1, WORDS - 2, (count, LENGTH), generator=generator).where(
        position > 0, WORDS - 2
    )
    ids = ids.where(position < length - 1, WORDS - 1) * (position < length)
    return {
        "pixels": torch.randn(count, 3, 32, 32, generator=generator),
        "ids": ids,
        "mask": (position < length).long(),
        "image_index": torch.arange(count),
        "scene": torch.arange(count),
    }


def step(model: nn.Module, batch: dict, lr: float = 1e-3) -> dict[str, torch.Tensor]:
    """The terms of one training step with fixed dropout masks."""
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=lr)
    torch.manual_seed(7)
    terms = model.loss(batch)
    terms["loss"].backward()
    optimizer.step()
    return {name: value.detach().clone() for name, value in terms.items()}


def both(model: nn.Module, batch: dict) -> torch.Tensor:
    """(2B, D) embeddings in eval mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat(model.embed_batch(batch))


# ---- the start, and what rests
@pytest.mark.parametrize(
    "changes", [{}, {"per_layer": True}, {"placement": "after"}, {"share_dim": 0}]
)
def test_a_new_adapter_leaves_clip_as_it_is(changes):
    model, plain, batch = small(**changes), start(CLIP(CLIPConfig("small"))), pairs()
    assert torch.equal(both(model, batch), both(plain, batch))
    with torch.no_grad():
        theirs = F.normalize(
            torch.cat(
                [plain.clip.encode_image(batch["pixels"]), plain.clip.encode_text(batch["ids"])]
            ),
            dim=1,
        )
    assert_close(both(model, batch), theirs)
    assert (both(adapter_of(model), batch) - theirs).abs().max() > 0.1


def test_projections_start_as_released():
    torch.manual_seed(0)
    adapter = MRSAdapter(40, 60, 30, 10)
    for name, layer in adapter.named_children():
        assert layer.bias.abs().max() == 0, name
        bound = 0.0 if "up_proj" in name else layer.in_features**-0.5
        assert layer.weight.abs().max() <= bound and layer.weight.abs().max() >= 0.95 * bound, name


def test_clip_rests_in_training_and_only_the_adapter_moves(tmp_path):
    model, batch = small(), pairs()
    model.clip.visual.conv1 = nn.Sequential(
        model.clip.visual.conv1, nn.BatchNorm2d(24), nn.Dropout(0.5)
    ).requires_grad_(False)
    model.eval().train()
    assert (
        model.training
        and model.Uniadapt.training
        and not any(part.training for part in model.clip.modules())
    )
    before = {name: value.clone() for name, value in model.clip.state_dict().items()}
    own = {name: p.detach().clone() for name, p in model.Uniadapt.named_parameters()}
    config = loop.TrainConfig(
        epochs=3, lr=1e-2, batch_size=6, weight_decay=0.1, schedule="constant", warmup_fraction=0.0
    )
    loop.fit(model, [batch], config, tmp_path, progress=False)
    assert all(
        torch.equal(value.cpu(), before[name]) for name, value in model.clip.state_dict().items()
    )
    assert all(p.grad is None and not p.requires_grad for p in model.clip.parameters())
    assert all(not torch.equal(p.cpu(), own[name]) for name, p in model.Uniadapt.named_parameters())


def test_the_scale_of_the_logits_is_left_alone():
    model = small()
    with torch.no_grad():
        model.clip.logit_scale.fill_(9.0)
    model.after_step()
    assert model.clip.logit_scale == 9.0


def test_frozen_towers_below_the_compact_clip_rest_too():
    with torch.device("meta"):
        model = PERSITR(PERSITRConfig.compact()).train()
    for tower in (model.vision_encoder, model.text_encoder, model.clip):
        assert not any(part.training for part in tower.modules()) and not any(
            p.requires_grad for p in tower.parameters()
        )
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "Uniadapt"
    }
    assert model.frozen() == [model.vision_encoder, model.text_encoder]


def test_cached_features_take_the_place_of_pixels_and_ids():
    torch.manual_seed(0)
    model = PERSITR(PERSITRConfig.compact(**QUIET))
    batch = {
        "pixels": torch.randn(2, 3, 224, 224),
        "ids": torch.randint(1, 1000, (2, 32)),
        "mask": torch.ones(2, 32, dtype=torch.long),
    }
    with torch.no_grad():
        cached = model.image_features(batch["pixels"]) | model.text_features(
            batch["ids"], batch["mask"]
        )
    cached["mask"] = batch["mask"]
    assert cached["vision"].shape == (2, 50, 1280)
    terms = step(adapter_of(model), cached)
    assert set(terms) == {"loss", "cross", "intra_image", "intra_text"}
    assert all(p.grad.abs().max() > 0 for p in model.Uniadapt.parameters())
    assert_close(model.loss(cached), model.loss(batch))


# ---- an adapter of one's own
class Wider(MRSAdapter):
    """Adds twice what the package's adapter adds."""

    def forward(self, x, visual):
        return 2 * super().forward(x, visual)


class Plain(nn.Module):
    """The adapter as 22_pe_rsitr writes it: no autocast, always shared channels."""

    def __init__(self, text, image, inner, shared, dropout=0.5, zero_init=True):
        super().__init__()
        self.down_proj, self.visual_down_proj = nn.Linear(text, inner), nn.Linear(image, inner)
        self.up_proj = nn.Linear(inner, text - shared)
        self.visual_up_proj = nn.Linear(inner, image - shared)
        self.share_up_proj, self.dropout = nn.Linear(inner, shared), dropout
        for name, layer in self.named_children():
            nn.init.zeros_(layer.bias)
            if zero_init and "up_proj" in name:
                nn.init.zeros_(layer.weight)

    def forward(self, x, visual):
        down = self.visual_down_proj if visual else self.down_proj
        up = self.visual_up_proj if visual else self.up_proj
        z = F.dropout(down(x).relu(), self.dropout, self.training)
        return torch.cat([up(z), self.share_up_proj(z)], dim=-1)


def of(adapter, **changes) -> PERSITR:
    torch.manual_seed(0)
    config = PERSITRConfig(**{"clip": "small", "bottleneck": 6, "share_dim": 8} | changes)
    return start(PERSITR(config, adapter))


@pytest.mark.parametrize("per_layer", [False, True])
def test_an_adapter_of_ones_own_stands_in_every_block_and_trains(per_layer):
    batch = pairs()
    ours, theirs = (
        adapter_of(of(kind, per_layer=per_layer, **QUIET)) for kind in (Wider, MRSAdapter)
    )
    assert (both(ours, batch) - both(theirs, batch)).abs().max() > 1e-2
    own = {name: p.detach().clone() for name, p in ours.Uniadapt.named_parameters()}
    step(ours.train(), batch)
    assert all(not torch.equal(p, own[name]) for name, p in ours.Uniadapt.named_parameters())


@pytest.mark.parametrize("zero_init", [True, False])
def test_the_plain_adapter_is_the_packages(zero_init):
    for visual, width in ((True, 24), (False, 20)):
        assert own_part.modules_agree(
            lambda: Plain(20, 24, 6, 8, zero_init=zero_init),
            lambda: MRSAdapter(20, 24, 6, 8, zero_init=zero_init),
            torch.randn(2, 5, width),
            visual,
        )
    assert not own_part.modules_agree(
        lambda: Wider(20, 24, 6, 8),
        lambda: MRSAdapter(20, 24, 6, 8),
        torch.randn(2, 5, 24),
        True,
    )
    expected = step(adapter_of(of(MRSAdapter)), pairs())
    assert_close(step(adapter_of(of(Plain)), pairs()), expected)


def test_a_plain_adapter_computes_in_float32_under_autocast():
    model, seen = adapter_of(of(Plain)), []
    model.Uniadapt.share_up_proj.register_forward_hook(
        lambda layer, inputs, output: seen.append(output.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        step(model, pairs())
    assert set(seen) == {torch.float32}


def test_another_adapter_has_another_key():
    def key(*code) -> str:
        return loop.checkpoint_key([PERSITRConfig.tiny()], "data", "start", 0, PERSITR, *code)

    assert len({key(), key(Plain), key(Wider)}) == 3 and key(Plain) == key(Plain)


def test_a_checkpoint_of_an_edited_adapter_is_refused(tmp_path):
    model = adapter_of(of(Wider))
    meta = META | {"model": asdict(model.config)} | own_part.meta("MRSAdapter", False)
    path = checkpoints.save_checkpoint(tmp_path / "edited", model, meta)
    with pytest.raises(UserError, match="edited part, MRSAdapter"):
        pe_rsitr.read(path, fill=start)


# ---- options
OPTIONS = {
    "bottleneck": {"bottleneck": 12},
    "share_0": {"share_dim": 0},
    "share_16": {"share_dim": 16},
    "per_layer": {"per_layer": True},
    "adapter_dropout": {"adapter_dropout": 0.1},
    "after": {"placement": "after"},
    "token": {"view": "token"},
    "view_dropout_0": {"view_dropout": 0.0},
    "view_dropout_half": {"view_dropout": 0.5},
    "no_image": {"intra_image": False},
    "no_text": {"intra_text": False},
    "cross_alone": {"intra_image": False, "intra_text": False},
    "all": {"hardest": False},
    "margin": {"margin": 0.4},
}


@cache
def loss_of_released() -> float:
    return step(adapter_of(small()), pairs())["loss"].item()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_loss_and_trains(name):
    model, batch = adapter_of(small(**OPTIONS[name])), pairs()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    terms = step(model, batch)
    assert abs(terms["loss"] - loss_of_released()) > 1e-4
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(
        torch.isfinite(p.grad).all() for key, p in model.named_parameters() if key in trained
    )
    assert all(
        torch.equal(p, before[key]) != (key in trained) for key, p in model.named_parameters()
    )
    torch.manual_seed(7)
    assert model.loss(batch)["loss"] < terms["loss"]


def test_random_up_projections_break_clip_at_the_start():
    batch = pairs()
    assert (both(small(zero_init=False), batch) - both(small(), batch)).abs().max() > 1e-2


@pytest.mark.parametrize("share_dim", [0, 8])
def test_the_shared_channels_come_last_and_are_the_same_for_both(share_dim):
    adapter = MRSAdapter(20, 24, 6, share_dim, zero_init=False).eval()
    with torch.no_grad():
        adapter.visual_down_proj.weight.zero_(), adapter.down_proj.weight.zero_()
        # both bottlenecks hold the same
        adapter.visual_down_proj.bias.fill_(1.0), adapter.down_proj.bias.fill_(1.0)
        text, visual = (
            adapter(torch.randn(2, 3, 20), visual=False),
            adapter(torch.randn(2, 3, 24), visual=True),
        )
    assert text.shape == (2, 3, 20) and visual.shape == (2, 3, 24)
    equal = (text[..., None, :] == visual[..., None]).all(0).all(0)  # of every two channels
    assert equal.sum() == share_dim and all(equal[24 - 1 - i, 20 - 1 - i] for i in range(share_dim))


def test_per_layer_has_an_adapter_for_each_depth():
    one, each = small(), small(per_layer=True)

    def count(model):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert count(each) == 2 * count(one)
    batch, before = pairs(), both(adapter_of(each), pairs())
    with torch.no_grad():
        each.Uniadapt[1].share_up_proj.bias.add_(1.0)
    changed = (both(each, batch) - before).abs().amax(1)
    assert (changed > 1e-3).all()


@pytest.mark.parametrize("placement", ["parallel", "after"])
def test_the_adapter_reads_the_raw_stream_before_or_after_the_ffn(placement):
    model = adapter_of(small(placement=placement, per_layer=True)).eval()
    tokens = torch.randn(3, 17, 24)
    x = tokens
    with torch.no_grad():
        for block, adapter in zip(
            model.clip.visual.transformer.resblocks, model.Uniadapt, strict=True
        ):
            attended = (
                x + block.attn(block.ln_1(x), block.ln_1(x), block.ln_1(x), need_weights=False)[0]
            )
            fed = block.mlp(block.ln_2(attended))
            read = attended + fed if placement == "after" else attended
            inner = torch.relu(adapter.visual_down_proj(read))
            x = (
                attended
                + fed
                + torch.cat([adapter.visual_up_proj(inner), adapter.share_up_proj(inner)], dim=-1)
            )
        expected = model.clip.visual.ln_post(x[:, 0]) @ model.clip.visual.proj
        assert_close(model.image_vectors(tokens), expected)


@pytest.mark.parametrize("view", ["element", "token"])
def test_views_drop_elements_or_whole_tokens_in_training(view):
    model, tokens = small(view=view, view_dropout=0.3), torch.ones(50, 17, 24)
    torch.manual_seed(0)
    seen = model.view(tokens)
    assert_close(seen.unique(), [0.0, 1 / 0.7])
    assert (seen > 0).float().mean() == pytest.approx(0.7, abs=0.04)
    whole = (seen == seen[..., :1]).all(2)
    assert whole.all() if view == "token" else not whole.any()
    assert torch.equal(model.eval().view(tokens), tokens)


def test_in_eval_mode_nothing_is_drawn_and_both_views_are_one():
    model, batch = adapter_of(small()).eval(), pairs()
    with torch.no_grad():
        patches, words = (
            image_tokens(model.clip, batch["pixels"]),
            text_tokens(model.clip, batch["ids"]),
        )
        assert torch.equal(model.image_vectors(patches), model.image_vectors(model.view(patches)))
        assert torch.equal(
            model.text_vectors(words, batch["mask"]),
            model.text_vectors(model.view(words), batch["mask"]),
        )
        assert set(model.loss(batch)) == {"loss", "cross"}
    assert torch.equal(both(model, batch), both(model, batch))
    first, second = (model.train().loss(batch) for _ in range(2))
    # the clean view is random too
    assert all(first[name] != second[name] for name in ("cross", "intra_image", "intra_text"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bottleneck": 0}, "bottleneck is 0"),
        ({"share_dim": -1}, "share_dim is -1"),
        ({"adapter_dropout": 1.0}, r"lie in \[0, 1\)"),
        ({"view_dropout": -0.1}, r"lie in \[0, 1\)"),
        ({"placement": "before"}, "'parallel' or 'after'"),
        ({"view": "patch"}, "'element' or 'token'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(changes, message):
    with pytest.raises(UserError, match=message) as error:
        PERSITRConfig.paper(**changes)
    assert "\n" not in str(error.value)


def test_shared_channels_must_leave_room_and_the_clip_must_exist():
    with pytest.raises(
        UserError, match="share_dim is 20, but the towers are 24 .image. and 20 .text. wide"
    ):
        small(share_dim=20)
    with pytest.raises(UserError, match="choose one of"):
        small(clip="vit_x")


# ---- the loss
@pytest.mark.parametrize("hardest", [True, False])
def test_ranking_equals_a_plain_loop(hardest):
    a, b = (torch.randn(5, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    scores = [[float(F.cosine_similarity(x, y, dim=0)) for y in b] for x in a]
    total = 0.0
    for i in range(5):
        row = [max(0.0, 0.2 + scores[i][j] - scores[i][i]) for j in range(5) if j != i]
        column = [max(0.0, 0.2 + scores[j][i] - scores[i][i]) for j in range(5) if j != i]
        total += max(row) + max(column) if hardest else sum(row + column)
    assert pe_rsitr.ranking_loss(a, b, 0.2, hardest).item() == pytest.approx(total, rel=1e-5)


def test_rows_of_zeros_are_similar_to_nothing_and_break_no_gradient():
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    a[1] = 0
    a.requires_grad_()
    assert torch.equal((pe_rsitr.unit_rows(a) @ pe_rsitr.unit_rows(b).t())[1], torch.zeros(3))
    pe_rsitr.ranking_loss(a, b, 0.2).backward()
    assert a.grad.isfinite().all()


def test_the_terms_are_the_rankings_of_four_passes():
    model, batch = adapter_of(small(**QUIET)), pairs()
    terms, clean = model.loss(batch), [rows.detach() for rows in model.embed_batch(batch)]
    expected = {
        "cross": clean,
        "intra_image": (clean[0], clean[0]),
        "intra_text": (clean[1], clean[1]),
    }
    for name, pair in expected.items():
        assert_close(terms[name], pe_rsitr.ranking_loss(*pair, 0.2))
    assert_close(terms["loss"], terms["cross"] + terms["intra_image"] + terms["intra_text"])


def test_a_batch_of_one_is_a_batch():
    model, batch = adapter_of(small()), pairs()
    one = {name: value[:1] for name, value in batch.items()}
    assert_close(both(model, one), both(model, batch)[[0, 6]])
    assert step(model.train(), one)["loss"] == 0  # it has no negatives


def test_a_step_in_bfloat16_keeps_adapter_and_losses_in_float32():
    model, batch, seen = adapter_of(small()), pairs(), []
    model.Uniadapt.share_up_proj.register_forward_hook(
        lambda layer, inputs, output: seen.append(output.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        terms = step(model, batch)
    assert set(seen) == {torch.float32}
    assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values())
    assert all(p.grad.isfinite().all() for p in model.Uniadapt.parameters())


@pytest.mark.gpu
def test_the_paper_size_takes_a_bfloat16_step_on_the_gpu():
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = PERSITR(PERSITRConfig.paper())
        batch = {
            "pixels": torch.randn(8, 3, 224, 224),
            "ids": torch.randint(1, 49000, (8, 77)),
            "mask": torch.ones(8, 77, dtype=torch.long),
        }
    with torch.autocast("cuda", torch.bfloat16):
        step(model, batch)
        again = model.loss(batch)
    assert all(value.isfinite() for value in again.values()) and all(
        p.grad.isfinite().all() for p in model.Uniadapt.parameters()
    )


# ---- what comes in
def test_empty_and_long_captions_as_the_tokenizer_gives_them():
    torch.manual_seed(0)
    model = PERSITR(PERSITRConfig.tiny()).eval()
    ids, mask = CLIPTokenizer(40)(["", "a large river " * 30, "a large river"])
    assert mask.sum(1).tolist() == [2, 40, 5]
    with torch.no_grad():
        rows = model.encode_texts(ids, mask)
    assert_close(rows.norm(dim=1), torch.ones(3))
    assert (rows[1] - rows[2]).abs().max() > 1e-4
    with pytest.raises(UserError, match="captions of 40 tokens, not 77"):
        model.encode_texts(*CLIPTokenizer(77)(["a large river " * 30]))


def test_blocks_read_a_batch_up_to_its_longest_caption_tokens_first():
    model, batch, seen = adapter_of(small()), pairs(), []
    batch = {name: rows[batch["mask"].sum(1) < LENGTH] for name, rows in batch.items()}
    for block in (model.clip.transformer.resblocks[0], model.clip.visual.transformer.resblocks[0]):
        block.attn.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model.loss(batch)
    assert {x.shape[1] for x in seen} == {int(batch["mask"].sum(1).max()), 17} and seen[1].shape[
        1
    ] < LENGTH
    # else torch copies a frozen weight for each token
    assert all(x.transpose(0, 1).is_contiguous() for x in seen)


def test_padding_changes_nothing():
    model, batch = adapter_of(small()).eval(), pairs()
    longest = int(batch["mask"][1:3].sum(1).max())
    with torch.no_grad():
        whole = model.encode_texts(batch["ids"], batch["mask"])[1:3]
        short = model.encode_texts(batch["ids"][1:3, :longest], batch["mask"][1:3, :longest])
    assert_close(whole, short)


@pytest.mark.parametrize("height, width", [(32, 40), (64, 64)])
def test_images_of_another_size_are_refused(height, width):
    with pytest.raises(UserError, match=f"images of 32x32, not {height}x{width}"):
        small().encode_images(torch.randn(2, 3, height, width))


# ---- files
META = {"system": "pe_rsitr"}


def saved(model: PERSITR, folder: Path) -> Path:
    return checkpoints.save_checkpoint(
        folder / "adapter", model, META | {"model": asdict(model.config)}
    )


def test_a_checkpoint_of_the_paper_size_is_the_adapter_alone_and_below_a_megabyte(tmp_path):
    with torch.device("meta"):
        model = PERSITR(PERSITRConfig.paper())
    model.Uniadapt.to_empty(device="cpu")
    with torch.no_grad():  # the memory may hold anything, also NaN
        for parameter in model.Uniadapt.parameters():
            parameter.zero_()
    path = saved(model, tmp_path)
    assert 4 * 161_088 < path.stat().st_size < 2**20
    state, _ = checkpoints.load_checkpoint(path)
    assert (
        all(name.startswith("Uniadapt.") for name in state)
        and sum(value.numel() for value in state.values()) == 161_088
    )


@pytest.mark.parametrize("clip", ["small", "sister"])
@pytest.mark.parametrize(
    "changes", [{}, {"per_layer": True, "placement": "after"}, {"share_dim": 0, "hardest": False}]
)
def test_an_adapter_is_read_onto_any_clip_of_its_widths(tmp_path, clip, changes):
    model = adapter_of(small(**changes))
    again, meta = pe_rsitr.read(
        saved(model, tmp_path), fill=lambda fresh: start(fresh, seed=8), clip=clip
    )
    assert (
        meta["system"] == "pe_rsitr"
        and again.config == replace(model.config, clip=clip)
        and not again.training
    )
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )
    expected = start(PERSITR(again.config), seed=8)
    pe_rsitr.load_adapter(expected, model.state_dict())
    assert torch.equal(both(again, pairs()), both(expected, pairs()))
    assert (both(again, pairs()) - both(model, pairs())).abs().max() > 1e-2  # the other CLIP


def test_an_adapter_of_other_widths_or_shape_is_refused_and_nothing_loaded(tmp_path):
    path = saved(adapter_of(small()), tmp_path)
    with pytest.raises(
        UserError, match="24 .image. and 20 .text. wide, but those of wide are 32 and 20"
    ):
        pe_rsitr.read(path, fill=start, clip="wide")
    target = small(bottleneck=7)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError, match=r"share_up_proj.weight: file \(8, 6\), model \(8, 7\)"):
        pe_rsitr.load_adapter(target, checkpoints.load_checkpoint(path)[0])
    with pytest.raises(UserError, match="missing in the file"):
        pe_rsitr.load_adapter(small(), {"Uniadapt.down_proj.weight": torch.zeros(6, 20)})
    with pytest.raises(UserError, match="wide are 32 and 20"):
        pe_rsitr.load_adapter(small(clip="wide"), checkpoints.load_checkpoint(path)[0])
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_one_adapter_for_all_layers_fits_a_deeper_clip_and_one_per_layer_does_not(tmp_path):
    pe_rsitr.read(saved(adapter_of(small()), tmp_path), fill=start, clip="deep")
    with pytest.raises(UserError, match="missing in the file .10.:\n  Uniadapt.2.down_proj.weight"):
        pe_rsitr.read(saved(adapter_of(small(per_layer=True)), tmp_path), fill=start, clip="deep")


def test_our_checkpoints_come_back_from_training_without_clip(tmp_path):
    settings = loop.TrainConfig(
        epochs=1, lr=1e-2, batch_size=6, schedule="constant", warmup_fraction=0.0
    )
    meta = META | {"model": asdict(small().config)}
    model, _, trained = loop.load_or_train(
        "pe_rsitr", small, [pairs()], settings, tmp_path, "k" * 64, loop.Options(meta=meta)
    )
    (found,) = tmp_path.glob("pe_rsitr-*/model.safetensors")
    again, _ = pe_rsitr.read(found, fill=start)
    assert trained and len(checkpoints.load_checkpoint(found)[0]) == 10
    device = next(model.parameters()).device
    theirs = both(model, {name: value.to(device) for name, value in pairs().items()}).cpu()
    assert_close(both(again, pairs()), theirs)


@pytest.mark.parametrize("changes", [{}, {"placement": "after", "view": "token"}, {"share_dim": 0}])
def test_what_is_written_as_release_is_read_as_the_same_model(tmp_path, changes):
    model = adapter_of(small(**changes))
    write_release(model, tmp_path / "best.pth")
    again, said = pe_rsitr.read(tmp_path / "best.pth")
    assert said["release"] and again.config == model.config and not again.training
    assert torch.equal(both(again, pairs()), both(model, pairs()))


def test_the_released_layout_is_that_of_the_authors(tmp_path):
    model = small()
    write_release(model, tmp_path / "best.pth")
    content = torch.load(tmp_path / "best.pth", weights_only=True)
    assert set(content) == {"epoch", "arch", "model", "best_rsum", "options", "Eiters"}
    adapter = {
        f"PE_RSITR.Uniadapt.{part}_proj.{kind}"
        for part in ("down", "visual_down", "up", "visual_up", "share_up")
        for kind in ("weight", "bias")
    }
    clip = {f"PE_RSITR.model.{name}" for name in model.clip.state_dict()}
    assert (
        set(content["model"]) == adapter | clip
        and "PE_RSITR.model.transformer.resblocks.0.attn.in_proj_weight" in clip
    )


@pytest.mark.parametrize("changes", [{}, {"bottleneck": 9, "share_dim": 4}, {"share_dim": 0}])
def test_a_released_file_in_half_precision_says_its_sizes_by_its_tensors(
    tmp_path, monkeypatch, changes
):
    monkeypatch.setitem(backbones.CLIP, PERSITRConfig.clip, SIZES["small"])
    model = adapter_of(small(**changes))
    state = {
        name: value.half() if ".model." in name else value
        for name, value in release_states.pe_rsitr_state(model).items()
    }
    content = {
        "epoch": 3,
        "arch": "x",
        "model": state,
        "best_rsum": 1.0,
        "options": {"lr": 2e-4},
        "Eiters": 9,
    }
    torch.save(content, tmp_path / "best.pth")
    again, said = pe_rsitr.read(tmp_path / "best.pth")
    assert again.config == PERSITRConfig(
        bottleneck=model.config.bottleneck, share_dim=model.config.share_dim
    )
    assert said["config"] == {"lr": 2e-4} and next(again.clip.parameters()).dtype == torch.float32
    torch.testing.assert_close(both(again, pairs()), both(model, pairs()), atol=0.02, rtol=0)
    for spoilt in ("PE_RSITR.model.ln_final.bias", "PE_RSITR.Uniadapt.up_proj.bias"):
        before = {
            name: value.clone() for name, value in release_states.pe_rsitr_state(again).items()
        }
        with pytest.raises(
            UserError, match=f"missing in the file .1.:\n  {spoilt.removeprefix('PE_RSITR.')}"
        ):
            pe_rsitr.load_release(
                again, {name: value for name, value in state.items() if name != spoilt}
            )
        assert all(
            torch.equal(value, before[name])
            for name, value in release_states.pe_rsitr_state(again).items()
        )


def test_files_of_other_models_are_refused(tmp_path):
    model = small()
    meta = META | {"model": asdict(model.config)}
    cut = {name: value for name, value in model.state_dict().items() if "share" not in name}
    torch.save({"model": model.clip.state_dict()}, tmp_path / "clip.pth")
    made = [
        (
            checkpoints.save_checkpoint(tmp_path / "pir", model, meta | {"system": "pir"}),
            "something else.*'pir'",
        ),
        (
            checkpoints.save_checkpoint(tmp_path / "silent", model, META),
            "does not say which PE-RSITR",
        ),
        (
            checkpoints.save_checkpoint(tmp_path / "newer", model, META | {"model": {"magic": 1}}),
            "does not say which PE-RSITR",
        ),
        (
            checkpoints.save_checkpoint(tmp_path / "cut", cut, meta),
            "missing in the file .2.:\n  Uniadapt.share_up_proj",
        ),
        (tmp_path / "absent.pth", "no weight file"),
        (tmp_path / "clip.pth", "holds no PE-RSITR"),
    ]
    for path, message in made:
        with pytest.raises(UserError, match=message):
            pe_rsitr.read(path, fill=start)
    with pytest.raises(UserError, match="give `fill`"):
        pe_rsitr.read(saved(model, tmp_path))


def test_a_frozen_clip_alone_has_nothing_to_save():
    assert not FrozenCLIP(CLIPConfig("small")).state_dict()


# ---- two processes
def half(rows: slice) -> dict[str, np.ndarray]:
    return two_processes.one_step(
        adapter_of(small(**QUIET)), {name: value[rows] for name, value in pairs(8).items()}
    )


other = two_processes.fixture(__file__)


def test_two_processes_have_the_loss_and_gradients_of_one(other):
    whole = half(slice(None))
    for part in two_processes.meet(other, half):
        two_processes.assert_alike(part, whole)
    assert all(whole[term] > 1e-3 for term in ("cross", "intra_image", "intra_text"))
    gradients = {
        key: np.abs(array).max() for key, array in whole.items() if key.startswith("grad/")
    }
    assert set(gradients) == {
        f"grad/Uniadapt.{name}" for name, _ in small().Uniadapt.named_parameters()
    }
    assert min(gradients.values()) > 1e-5


if __name__ == "__main__":
    backbones.CLIP.update(SIZES)
    two_processes.be_the_other(half)

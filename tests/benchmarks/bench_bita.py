"""Compact BITA on a CPU: its frozen towers in bf16 against fp32; the language head over targets
alone, and captions in groups of like length, against all tokens of one padded batch; captions whose
beams share what was read before the first word, against the library alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from thread_seconds import best
from torch.nn.attention import SDPBackend, sdpa_kernel

from nbhelpers.papers import bita
from nbhelpers.papers.bita import BITAConfig, Captioner

PROMPT = 4
pytestmark = pytest.mark.usefixtures("one_thread")


def batch() -> dict[str, torch.Tensor]:
    """32 images and captions of 9 to 24 tokens."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(9, 25, (32,), generator=draw)
    return {
        "vision": torch.randn(32, 50, 1280, generator=draw),
        "ids": torch.randint(5, 1000, (32, 32), generator=draw),
        "mask": (torch.arange(32) < lengths[:, None]).long(),
    }


def plain_loss(model: Captioner, here: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same loss over one padded batch, with the head over every token."""
    longest = int(here["mask"].sum(1).max())
    ids, mask = here["ids"][:, :longest], here["mask"][:, :longest]
    states = model.states(model.prefix(here["vision"]), ids, mask)[
        :, model.config.queries - 1 : -1
    ].contiguous()
    logits = model.opt_model.get_output_embeddings()(states).float()
    return F.cross_entropy(logits.flatten(0, 1), bita.targets(ids, mask, PROMPT).flatten())


def step(loss: Callable[[], torch.Tensor]) -> None:
    """As the training loop takes it in bf16 on a CPU."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        value = loss()
    value.backward()


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="without AMX a CPU may be slower in bf16"
)
def test_frozen_towers_in_bf16_against_fp32():
    here, prompt, took = batch(), torch.arange(1, PROMPT + 1), {}
    for kind in ("float32", "bfloat16"):
        model = Captioner(BITAConfig.compact(frozen_dtype=kind))
        took[kind] = [best(lambda: step(lambda: model.loss(here, PROMPT)["loss"]))]
        model.eval()
        took[kind].append(
            best(lambda: model.generate(here["vision"][:8], prompt, end=9, pad=2, shortest=20))
        )
    for name, plain, half in zip(
        ("a step", "8 captions"), took["float32"], took["bfloat16"], strict=True
    ):
        print(f"{name}: bf16 {half:.2f} s, fp32 {plain:.2f} s, {half / plain:.2f} of it")
        assert half < plain


def test_the_head_over_targets_and_groups_of_like_length_against_all_tokens_padded(monkeypatch):
    here, model = batch(), Captioner(BITAConfig.compact(dropout=0.0))
    assert_close(model.loss(here, PROMPT)["loss"], plain_loss(model, here))
    # as trained in bf16, without a cast of weights for each group
    model = Captioner(BITAConfig.compact(dropout=0.0, frozen_dtype="bfloat16"))
    took = {"all tokens": best(lambda: step(lambda: plain_loss(model, here)))}
    for name, groups in (("targets", 1), ("targets in groups", bita.GROUPS)):
        monkeypatch.setattr(bita, "GROUPS", groups)
        took[name] = best(lambda: step(lambda: model.loss(here, PROMPT)["loss"]))
    print(
        "a step: "
        + ", ".join(
            f"{name} {seconds:.2f} s, {seconds / took['all tokens']:.2f}"
            for name, seconds in took.items()
        )
    )
    assert took["targets in groups"] < took["targets"] < took["all tokens"]


def test_captions_whose_beams_share_the_prompt_against_the_library_alone():
    here, prompt = batch(), torch.arange(1, PROMPT + 1)
    for kind in ("float32", "bfloat16"):
        model = Captioner(BITAConfig.compact(frozen_dtype=kind)).eval()
        options = {
            "num_beams": 5,
            "max_new_tokens": 12,
            "min_new_tokens": 12,
            "do_sample": False,
            "eos_token_id": 9,
            "pad_token_id": 2,
        }

        @torch.inference_mode()
        def plain() -> torch.Tensor:
            words = model.opt_model.get_input_embeddings()(prompt.expand(32, -1))
            start = torch.cat([model.prefix(here["vision"]).to(words.dtype), words], dim=1)
            return model.opt_model.generate(
                inputs_embeds=start,
                attention_mask=torch.ones(start.shape[:2], dtype=torch.long),
                **options,
            )

        took = [
            best(one)
            for one in (
                plain,
                lambda: model.generate(
                    here["vision"], prompt, end=9, pad=2, longest=12, shortest=12
                ),
            )
        ]
        print(
            f"32 captions of 12 tokens, {kind}: {took[1]:.1f} s, {took[1] / took[0]:.2f} of the"
            f" {took[0]:.1f} s"
        )
        assert took[1] < took[0]

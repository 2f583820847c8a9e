"""Blocks that are computed twice, and what a step keeps in memory."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from closeness import assert_close
from kept_bytes import kept_bytes
from torch import nn
from torch.utils.data import DataLoader

from nbhelpers.errors import UserError
from nbhelpers.papers.bita import Aligner, BITAConfig, Captioner
from nbhelpers.papers.clip import CLIP, CLIPConfig
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.towers import backbones
from nbhelpers.training import loop
from nbhelpers.training.device import matrix_products
from nbhelpers.training.loop import fit
from nbhelpers.training.memory import recompute_blocks
from nbhelpers.training.schedule import TrainConfig

PAIRS = 4


MODELS = {
    "pir": lambda: PIR(PIRConfig.tiny(40)),
    "pir_clip": lambda: PIRCLIP(PIRCLIPConfig.tiny()),
    "clip": lambda: CLIP(CLIPConfig.tiny()),
    "bita, stage 1": lambda: Aligner(BITAConfig.tiny(40, 40)),
    "bita, stage 2": lambda: Captioner(BITAConfig.tiny(40, 40)),
}


def pairs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(PAIRS)
    return {
        "pixels": torch.randn(PAIRS, 3, 112, 112, generator=generator),
        "image_index": row,
        "scene": row // 2,
        "row": row,
        "ids": torch.randint(5, 40, (PAIRS, 32), generator=generator),
        "mask": torch.ones(PAIRS, 32, dtype=torch.long),
    }


def step(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of one step with dropout, and the bytes that it keeps."""
    model.zero_grad()
    torch.manual_seed(5)
    terms = {}

    def loss():
        terms.update(model.loss(pairs()))
        return terms["loss"]

    kept = kept_bytes(model, loss)
    terms["loss"].backward()
    return {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }, kept


@pytest.mark.parametrize("name", MODELS)
def test_blocks_computed_twice_give_the_same_gradients_in_less_memory(name):
    model = MODELS[name]()
    plain, kept = step(model)
    assert recompute_blocks(model) >= 2
    again, less = step(model)
    assert_close(again, plain)
    assert less < 0.9 * kept


def test_the_weights_keep_their_names_and_the_class_its_forward():
    model = PIR(PIRConfig.tiny(40))
    names, other = list(model.state_dict()), copy.deepcopy(model)
    recompute_blocks(model)
    assert list(model.state_dict()) == names
    assert not any("forward" in vars(part) for part in other.modules())


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="Linear has no transformer blocks .* set recompute to F"):
        recompute_blocks(nn.Linear(2, 2))


def test_what_is_kept_is_counted_once_and_without_weights():
    model, x = nn.Linear(8, 4, bias=False), torch.randn(16, 8, requires_grad=True)
    # the product keeps x and the weight, the square its input
    assert kept_bytes(model, lambda: model(x).square().sum()) == 16 * 8 * 4 + 16 * 4 * 4


def test_the_paper_decoder_is_built_in_its_dtype_at_once():
    model = backbones.language_model("opt_standin", 64, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---- in the loop
CONFIG = TrainConfig(epochs=1, lr=1e-3, batch_size=PAIRS)


def trained(model: nn.Module, folder, **changes) -> dict[str, torch.Tensor]:
    rows = [{name: value[row] for name, value in pairs().items()} for row in range(PAIRS)]
    fit(model, DataLoader(rows, PAIRS), replace(CONFIG, **changes), folder)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("changes", [{"recompute": True}, {"compile": True}, {"precision": "tf32"}])
def test_a_step_gives_the_same_weights(changes, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "COMPILER", "aot_eager")  # needs no compiler of C++
    model = CLIP(CLIPConfig.tiny())
    start = copy.deepcopy(model.state_dict())
    whole = trained(model, tmp_path / "plain")
    model.load_state_dict(start)
    # Adam divides by the gradient's size, so roundings of small gradients count more
    assert_close(trained(model, tmp_path / "changed", **changes), whole, 1e-4)


def test_tf32_is_on_in_its_precision_alone():
    before = torch.get_float32_matmul_precision()
    for precision, wanted in (("tf32", "high"), ("fp32", "highest"), ("bf16", "highest")):
        with matrix_products(precision):
            assert torch.get_float32_matmul_precision() == wanted
        assert torch.get_float32_matmul_precision() == before


def test_plain_settings_keep_their_keys():
    assert not {"compile", "recompute"} & set(CONFIG.decisive())
    assert replace(CONFIG, compile=True).decisive()["compile"]

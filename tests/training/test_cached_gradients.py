"""Micro-batches give the gradients of the whole batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closeness import assert_close
from torch import nn
from torch.utils.data import DataLoader

from nbhelpers.errors import UserError
from nbhelpers.papers.adaptation import adapted
from nbhelpers.papers.baseline import FrozenConfig, FrozenHeads
from nbhelpers.papers.clip import CLIP, CLIPConfig
from nbhelpers.papers.pe_rsitr import PERSITR, PERSITRConfig
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.training import cached_gradients
from nbhelpers.training.loop import fit
from nbhelpers.training.schedule import TrainConfig

PAIRS = 8
DOUBLE = 1e-9  # of the largest gradient: what the order of sums changes in float64
MODELS = {
    "pir": lambda: PIR(PIRConfig.tiny(40)),
    "pir_clip": lambda: PIRCLIP(PIRCLIPConfig.tiny()),
    "pe_rsitr": lambda: PERSITR(PERSITRConfig.tiny()),
    "clip": lambda: CLIP(CLIPConfig.tiny()),
    "adaptformer": lambda: adapted("adaptformer", CLIPConfig.tiny()),
    "frozen": lambda: FrozenHeads(FrozenConfig.tiny(40)),
}


def pairs(dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(PAIRS)
    return {
        "pixels": torch.randn(PAIRS, 3, 112, 112, generator=generator).to(dtype),
        "image_index": row // 2,
        "scene": row // 4,
        "row": row,
        "ids": torch.randint(5, 40, (PAIRS, 12), generator=generator),
        "mask": torch.ones(PAIRS, 12, dtype=torch.long),
    }


def without_dropout(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("dropout", "attention_dropout", "drop_path", "drop_prob", "attn_drop"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    if hasattr(model.config, "view_dropout"):
        model.config = replace(model.config, view_dropout=0.0)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_parts(model: nn.Module, batch: dict, size: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    terms, found = cached_gradients.whole_loss(model, batch, size, torch.manual_seed)
    for number, (at, part) in enumerate(cached_gradients.parts(batch, size)):
        torch.manual_seed(number)
        share = cached_gradients.stand_in_loss(model, part, found.part(at, at.stop == PAIRS))
        share.backward()
    return terms | gradients(model)


def at_once(model: nn.Module, batch: dict, size: int) -> dict[str, torch.Tensor]:
    """The same draws of dropout, with one graph over all rows."""
    model.zero_grad()
    found = []
    for number, (_, part) in enumerate(cached_gradients.parts(batch, size)):
        torch.manual_seed(number)
        found.append(model.rows(part))
    rows = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    terms = model.losses(rows, batch)
    terms["loss"].backward()
    return terms | gradients(model)


def compare(found: dict, wanted: dict, bound: float):
    """Compare all gradients on the scale of the largest one."""
    assert set(found) == set(wanted)
    largest = max(float(value.detach().abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        difference = float((found[name] - value).detach().abs().max())
        assert difference <= bound * largest, f"{name} differs by {difference:.3g}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, DOUBLE), (torch.float32, 1e-5)])
def test_gradients_are_those_of_the_plain_step(name, dtype, bound):
    model = without_dropout(MODELS[name]()).to(dtype)
    batch = pairs(dtype)
    model.loss(batch)["loss"].backward()  # also fills what the first step may build
    model.zero_grad()
    terms = model.loss(batch)
    terms["loss"].backward()
    compare(in_parts(model, batch, 3), terms | gradients(model), bound)


@pytest.mark.parametrize("name", ["pir", "pir_clip", "pe_rsitr", "frozen"])
def test_dropout_draws_the_same_in_both_passes(name):
    model, batch = MODELS[name]().double(), pairs(torch.float64)
    first = in_parts(model, batch, 3)
    compare(first, at_once(model, batch, 3), DOUBLE)
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules()):
        plain = in_parts(without_dropout(model), batch, 3)
        assert not torch.equal(first["loss"], plain["loss"])


def weights_after(model: nn.Module, folder, **changes) -> dict[str, torch.Tensor]:
    batch = pairs()
    rows = [{name: value[row] for name, value in batch.items()} for row in range(PAIRS)]
    config = TrainConfig(epochs=1, lr=1e-3, batch_size=4, clip_norm=1.0)
    loader = DataLoader(rows, 4, drop_last=True)
    fit(model, loader, replace(config, **changes), folder)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_training_in_micro_batches_gives_the_weights_of_training_at_once(tmp_path):
    model = without_dropout(FrozenHeads(FrozenConfig.tiny(40)))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole = {
        name: value.clone() for name, value in weights_after(model, tmp_path / "whole").items()
    }
    for changes in ({"micro_batch": 2}, {"micro_batch": 3}, {"micro_batch": 4}):
        model.load_state_dict(start)
        folder = tmp_path / str(changes["micro_batch"])
        # Adam divides by the gradient's size, so roundings of small gradients count more
        assert_close(weights_after(model, folder, **changes), whole, 1e-4)
    model.load_state_dict(start)
    assert_close(weights_after(model, tmp_path / "auto", micro_batch="auto"), whole, 0.0)


def test_accumulated_micro_batches_are_the_accumulated_step(tmp_path):
    model = without_dropout(FrozenHeads(FrozenConfig.tiny(40)))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole = weights_after(model, tmp_path / "whole", accumulate=2)
    whole = {name: value.clone() for name, value in whole.items()}
    model.load_state_dict(start)
    found = weights_after(model, tmp_path / "parts", accumulate=2, micro_batch=2)
    assert_close(found, whole, 1e-4)


def test_micro_batches_hold_less_memory():
    model, batch = CLIP(CLIPConfig.tiny()), pairs()
    kept: list[int] = []

    def note(tensor):
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    def held(size: int) -> int:
        """Bytes that the graph of one micro-batch holds; doubles count."""
        kept.clear()
        _, found = cached_gradients.whole_loss(model, batch, size, torch.manual_seed)
        at, part = next(cached_gradients.parts(batch, size))
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            cached_gradients.stand_in_loss(model, part, found.part(at, True))
        weights = {p.untyped_storage().nbytes() for p in model.parameters()}
        return sum(size for size in kept if size not in weights)

    assert held(2) < 0.4 * held(8)


def test_a_micro_batch_that_does_not_fit_is_halved(monkeypatch):
    tried = []

    def attempt(size):
        tried.append(size)
        if size > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert cached_gradients.largest_that_fits(attempt, 128) == 16
    assert tried == [128, 64, 32, 16]

    def nothing_fits(size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="Not even one pair fits"):
        cached_gradients.largest_that_fits(nothing_fits, 4)


class Sum(nn.Module):
    """A model whose loss is not made of rows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def loss(self, batch):
        return {"loss": (self.weight * batch["row"].float()).mean()}


def test_a_model_without_rows_is_refused_and_the_advice_works(tmp_path):
    loader = DataLoader([{"row": row} for row in range(PAIRS)], 4)
    config = TrainConfig(epochs=1, lr=1e-3, batch_size=4, micro_batch=2)
    with pytest.raises(UserError, match="micro_batch is 2, but the loss of Sum"):
        fit(Sum(), loader, config, tmp_path / "refused")
    fit(Sum(), loader, replace(config, micro_batch="whole", accumulate=2), tmp_path / "advised")


@pytest.mark.parametrize("wrong", [-1, 0, 2.5, "all", None])
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(UserError, match="give a number of pairs, 'whole' or 'auto'"):
        TrainConfig(epochs=1, lr=1e-3, micro_batch=wrong)


def test_whole_batches_keep_their_keys():
    config = TrainConfig(epochs=1, lr=1e-3)
    assert "micro_batch" not in config.decisive()
    assert replace(config, micro_batch=4).decisive()["micro_batch"] == 4

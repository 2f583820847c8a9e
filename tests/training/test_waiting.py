"""A training step asks a GPU for no value, so that its next kernels are queued while it works.

The GPU is a fake one (torch's FakeTensorMode): tensors that have a shape and no values, so that
whatever reads a value fails. It computes losses; gradients need a real one (`-m gpu`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nbhelpers.papers.bita import Aligner, BITAConfig, Captioner, ImageReader
from nbhelpers.papers.cfitr import CFITR, Captions, CFITRConfig
from nbhelpers.papers.clip import CLIP, CLIPConfig
from nbhelpers.papers.dual_encoder import unpadded
from nbhelpers.papers.pe_rsitr import PERSITR, PERSITRConfig
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.training import cached_gradients, device

PAIRS, LONG = 4, 32
CUDA = torch.device("cuda", 0)
MASK = np.arange(LONG) < np.array([[3], [7], [5], [2]])


def on_fake_gpu(model: nn.Module, gpu: FakeTensorMode) -> nn.Module:
    """The model with its tensors on the fake GPU."""
    with gpu:
        for part in model.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    fake = torch.empty_like(value, device=CUDA)
                    part._parameters[name] = nn.Parameter(fake, value.requires_grad)
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = torch.empty_like(value, device=CUDA)
    return model


def batch(size: int) -> dict[str, Tensor]:
    """A batch as `device.moved` leaves it, to be made under the fake GPU."""
    integers = {"ids": np.ones((PAIRS, LONG), np.int64), "mask": MASK.astype(np.int64)}
    integers |= {name: np.arange(PAIRS) for name in ("image_index", "scene", "row")}
    found = {"pixels": torch.empty(PAIRS, 3, size, size, device=CUDA)}
    for name, values in integers.items():
        found[name] = torch.empty(values.shape, dtype=torch.int64, device=CUDA)
        device.keep_on_host(found[name], values)
    return found


def cfitr() -> CFITR:
    model = CFITR(CFITRConfig.tiny(40, bits=16, hidden=32))
    tokens = {"ids": np.ones((PAIRS, LONG), np.int64), "mask": MASK.astype(np.int64)}
    model.set_captions(Captions(np.arange(PAIRS), np.arange(PAIRS), tokens))
    # drawn by the CPU, whose tensors would be fake too
    drawn = {
        name: torch.from_numpy(value).repeat(model.config.false_texts, 1)
        for name, value in tokens.items()
    }
    model._false_texts = lambda row: {name: value.to(CUDA) for name, value in drawn.items()}
    model._matches = lambda row: torch.eye(len(row), dtype=torch.bool, device=CUDA)
    return model


def bita(stage: type[ImageReader]) -> ImageReader:
    """A stage of BITA whose words are those of `batch`."""
    return stage(BITAConfig.tiny(400, 400))


MODELS = {
    "bita, stage 1": lambda: bita(Aligner),
    "bita, stages 2 and 3": lambda: bita(Captioner),
    "pir": lambda: PIR(PIRConfig.tiny(40)),
    "pir, masked": lambda: PIR(PIRConfig.tiny(40, use_mask=True)),
    "pir_clip": lambda: PIRCLIP(PIRCLIPConfig.tiny()),
    "clip": lambda: CLIP(CLIPConfig.tiny()),
    "pe_rsitr": lambda: PERSITR(PERSITRConfig.tiny()),
    "cfitr": cfitr,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_waits_for_no_value(name):
    build: Callable[[], nn.Module] = MODELS[name]
    gpu = FakeTensorMode(allow_non_fake_inputs=True)
    model = on_fake_gpu(build().train(), gpu)
    with gpu:
        terms = model.loss(batch(112))
        assert terms["loss"].device == CUDA and terms["loss"].requires_grad


def test_what_waits_is_found():
    with FakeTensorMode():
        here = batch(8)
        unkept = torch.empty_like(here["mask"])  # nothing of it is in host memory
        with pytest.raises((DataDependentOutputException, RuntimeError, AssertionError)):
            unpadded(here["ids"], unkept)


def test_captions_are_cut_by_what_is_kept_on_the_host():
    gpu = FakeTensorMode()
    with gpu:
        here = batch(8)
        ids, mask = unpadded(here["ids"], here["mask"])
        assert ids.shape == mask.shape == (PAIRS, 7)
        parts = [part for _, part in cached_gradients.parts(here, 2)]
        lengths = [unpadded(part["ids"], part["mask"])[0].shape[1] for part in parts]
    assert lengths == [7, 5]


def test_integers_stay_in_host_memory_beside_a_moved_batch():
    here = {"mask": torch.tensor([[1, 0]]), "pixels": torch.ones(1, 2)}
    there = device.moved(here, torch.device("meta"))
    assert there["mask"].device.type == "meta" and device.on_host(there["mask"]).tolist() == [
        [1, 0]
    ]
    assert not hasattr(there["pixels"], "host_values")
    same = device.moved(here, torch.device("cpu"))
    assert device.on_host(same["mask"]).tolist() == [[1, 0]]

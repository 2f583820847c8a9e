"""State dicts of our models with the names of the papers' authors, for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nbhelpers.files import atomic_write
from nbhelpers.papers import bita, cfitr, pe_rsitr, pir, pir_clip
from nbhelpers.towers import checkpoints, vilt_names

TO_PIR = [(rf"^conv_encoder\.{name}\.", f"conv_encoder.{k}.") for k, name in pir._STAGES.items()]
TO_PIR_CLIP = [(r"^clip\.", "")]
TO_VILT = [(rf"^vilt\.{b}(?=\.|$)", a) for a, b in vilt_names._TRUNK.items()]
TO_VILT += [
    (rf"^vilt\.encoder\.layer\.(\d+)\.{b}\.", rf"transformer.blocks.\1.{a}.")
    for a, b in vilt_names._LAYER.items()
]


def pir_names(state: Mapping[str, object]) -> dict:
    """Rename what is named as the tensors of PIR."""
    return checkpoints.rename(pir._shift_downsample(dict(state), -1), TO_PIR)


def pir_state(model: pir.PIR) -> dict[str, Tensor]:
    """The state dict of PIR, the buffers of the released Swin included."""
    buffers = {
        f"vision_encoder.{name}": buffer
        for name, buffer in model.vision_encoder.named_buffers()
        if name.endswith(pir.RECOMPUTED)
    }
    return pir_names({**model.state_dict(), **buffers})


def pir_clip_state(model: pir_clip.PIRCLIP) -> dict[str, Tensor]:
    """The state dict of PIR-CLIP."""
    return checkpoints.rename(model.state_dict(), TO_PIR_CLIP)


def pe_rsitr_state(model: pe_rsitr.PERSITR) -> dict[str, Tensor]:
    """The tensors of CLIP and adapter."""
    state = pe_rsitr.ReleasedPERSITR(model).state_dict()
    return {f"PE_RSITR.{name}": value for name, value in state.items()}


def vilt_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a ViLT of transformers as its authors do."""
    state = checkpoints.rename(state, TO_VILT)
    joined: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".attn.query." in name:
            joined[name.replace("query", "qkv")] = torch.cat(
                [state[name.replace("query", part)] for part in ("query", "key", "value")]
            )
        elif ".attn.key." not in name and ".attn.value." not in name:
            joined[name] = value
    return joined


def cfitr_state(model: cfitr.CFITR) -> dict[str, Tensor]:
    """The state dict of CFITR without the bank."""
    return vilt_state(checkpoints.rename(model.state_dict(), [("^bank$", None)]))


def bita_state(model: bita.ImageReader) -> dict[str, Tensor]:
    """The trained tensors of a stage of BITA, and the buffer."""
    state = dict(model.state_dict())
    if isinstance(model, bita.Aligner):
        decoder = model.Fformer.cls.predictions.decoder
        state |= {
            f"Fformer.cls.predictions.decoder.{name}": getattr(decoder, name)
            for name in ("weight", "bias")
        }
    return state | {bita.POSITION_IDS: torch.arange(model.config.positions)[None]}


def save_pickle(path: Path | str, content: Mapping[str, object]) -> None:
    """Write `content` by torch.save, state dicts one level below on the CPU, without gradients."""
    ready = {name: _on_cpu(part) for name, part in content.items()}
    with atomic_write(Path(path)) as temporary:
        torch.save(ready, temporary)


def _on_cpu(part: object) -> object:
    if not isinstance(part, dict):
        return part
    return {
        name: value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in part.items()
    }

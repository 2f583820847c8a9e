"""Files in the layouts that the papers' authors wrote, made of small models for the tests."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import release_states
from torch import nn

from nbhelpers.papers import bita, cfitr, pe_rsitr, pir, pir_clip


def _pir(model: pir.PIR) -> dict:
    c = model.config
    settings = {
        "embed_dim": c.embed_dim,
        "filter_size": c.filter_size,
        "instru_num": c.instru_num,
        "cycle_num": c.cycle_num,
        "is_baseline": not (c.vir or c.lca),
        "use_affil_loss": c.affiliation,
        "center_factor": c.center_factor,
        "use_triplet_loss": c.triplet,
        "temp1": c.temperature,
        "temp2": c.temperature,
        "nbhelpers": asdict(c),
    }
    return {"model": release_states.pir_state(model), "config": settings}


def _pir_clip(model: pir_clip.PIRCLIP) -> dict:
    state, note = release_states.pir_clip_state(model), asdict(model.config)
    return {"epoch": 0, "name": "PIR", "state_dict": state, "nbhelpers": note}


def _pe_rsitr(model: pe_rsitr.PERSITR) -> dict:
    return {
        "epoch": 0,
        "arch": "PE_RSITR",
        "model": release_states.pe_rsitr_state(model),
        "best_rsum": 0.0,
        "options": {"nbhelpers": asdict(model.config)},
        "Eiters": 0,
    }


def _cfitr(model: cfitr.CFITR) -> dict:
    note = {"nbhelpers": asdict(model.config)}
    return {"state_dict": release_states.cfitr_state(model), "hyper_parameters": note}


def _bita(model: bita.ImageReader) -> dict:
    note = {"nbhelpers": asdict(model.config)}
    state = release_states.bita_state(model)
    return {"model": state, "optimizer": {}, "config": note, "scaler": {}, "epoch": 4}


CONTENTS = {"pir": _pir, "pir_clip": _pir_clip, "pe_rsitr": _pe_rsitr, "cfitr": _cfitr}


def content_of(model: nn.Module) -> dict:
    """The layout of the authors of the model's paper, with a note of its configuration."""
    system = type(model).__module__.rpartition(".")[2]
    return CONTENTS.get(system, _bita)(model)


def write_release(model: nn.Module, path: Path | str) -> None:
    """Write the layout of the authors of the model's paper."""
    release_states.save_pickle(path, content_of(model))

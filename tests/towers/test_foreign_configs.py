"""Configurations that came with a file are checked before anything is built."""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

from nbhelpers.errors import UserError
from nbhelpers.papers import bita, cfitr, pe_rsitr, pir, pir_clip
from nbhelpers.papers.bita import Aligner, BITAConfig
from nbhelpers.papers.cfitr import CFITR, CFITRConfig
from nbhelpers.papers.pe_rsitr import PERSITR, PERSITRConfig
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.towers import checkpoints
from nbhelpers.towers.foreign_configs import built, check_depth, config_of

SYSTEMS = {
    "pir": (pir, PIR, PIRConfig.tiny(40)),
    "pir_clip": (pir_clip, PIRCLIP, PIRCLIPConfig.tiny()),
    "pe_rsitr": (pe_rsitr, PERSITR, PERSITRConfig.tiny()),
    "cfitr": (cfitr, CFITR, CFITRConfig.tiny(40)),
    "bita": (bita, Aligner, BITAConfig.tiny(40, 40)),
}
TRIES = 200 if os.environ.get("NBHELPERS_FUZZ") else 8
WILD = (-1, 10**6 + 1, 10**30, 1.5, float("nan"), float("inf"), -0.5, "x" * 600, "", None, [], {})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of each system."""
    folder = tmp_path_factory.mktemp("files")
    for name, (_, kind, config) in SYSTEMS.items():
        meta = {"system": name, "model": asdict(config)}
        checkpoints.save_checkpoint(folder / f"{name}.safetensors", kind(config), meta)
    return folder


def read(name: str, path) -> torch.nn.Module:
    room = SYSTEMS[name][0]
    options = {"fill": lambda model: model} if name in ("pe_rsitr", "bita") else {}
    return room.read(path, **options)[0]


def changed(files, name: str, model: object, tmp_path):
    """The checkpoint with another configuration."""
    tensors, about = checkpoints.load_checkpoint(files / f"{name}.safetensors")
    path = tmp_path / f"{name}.safetensors"
    save_file(tensors, path, {"meta": json.dumps(about | {"model": model})})
    return path


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_good_checkpoint_is_read(files, name):
    assert asdict(read(name, files / f"{name}.safetensors").config) == asdict(SYSTEMS[name][2])


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_wild_value_of_every_field_is_refused_or_means_something(name):
    """Some wild values are allowed, such as None for a vocabulary; none ends in another error."""
    config = SYSTEMS[name][2]
    fields, refused = asdict(config), 0
    for field, value in product(fields, WILD):
        try:
            config_of(type(config), name, fields | {field: value})
        except UserError as error:
            refused += 1
            assert len(str(error)) < 3000
    assert refused > 0.8 * len(fields) * len(WILD)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_file_with_a_wild_value_is_read_or_refused(files, tmp_path, name):
    fields, rng = asdict(SYSTEMS[name][2]), random.Random(name)
    for _ in range(TRIES):
        field, value = rng.choice(list(fields)), rng.choice(WILD)
        try:
            read(name, changed(files, name, fields | {field: value}, tmp_path))
        except UserError as error:
            assert len(str(error)) < 3000


@pytest.mark.parametrize("model", [None, 5, [], "pir", {"depth": 3}, [[[[]]]]])
@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_no_configuration_is_refused(files, tmp_path, name, model):
    with pytest.raises(UserError, match="does not say which|was refused"):
        read(name, changed(files, name, model, tmp_path))


@pytest.mark.parametrize("field", ["cycle_num", "instru_num", "embed_dim", "vocab_size"])
def test_a_small_file_cannot_ask_for_much_memory(files, tmp_path, field):
    path = changed(files, "pir", asdict(SYSTEMS["pir"][2]) | {field: 10**6}, tmp_path)
    with pytest.raises(UserError, match="was refused|describes|do not fit"):
        read("pir", path)
    for value in (100, 30_000):
        path = changed(files, "pir", asdict(SYSTEMS["pir"][2]) | {field: value}, tmp_path)
        with pytest.raises(UserError):
            read("pir", path)


def test_the_size_of_the_weights_bounds_that_of_the_model():
    def make(width: int) -> torch.nn.Module:
        assert width < 5000 or torch.empty(0).device.type == "meta", "it was built"
        return torch.nn.Linear(width, width)

    state = {"weight": torch.zeros(100, 100)}
    assert built(make, 100, state).weight.shape == (100, 100)
    with pytest.raises(UserError, match="describes 40.0 GB of weights, but the file holds 0.0 GB"):
        built(make, 100_000, state)


def test_fields_of_the_right_type_and_size_pass():
    config = replace(PIRConfig.tiny(40), cycle_num=4, dropout=0.0)
    assert config_of(PIRConfig, "PIR", asdict(config)) == config
    for field, value in (("dropout", True), ("vir", 1), ("heads", 8.0), ("vision", 3)):
        with pytest.raises(
            UserError, match=f"does not say which PIR it is .its {field} is {value}"
        ):
            config_of(PIRConfig, "PIR", asdict(config) | {field: value})


def test_a_configuration_is_not_endlessly_deep():
    check_depth({"text": {"num_hidden_layers": 24}}, "config.json")
    with pytest.raises(UserError, match="config.json asks for 1000000 num_hidden_layers"):
        check_depth({"text": {"num_hidden_layers": 10**6}}, "config.json")

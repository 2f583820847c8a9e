"""A notebook's own part is compared with the package's; checkpoints of edited ones are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbhelpers.errors import UserError
from nbhelpers.papers import own_part, pir
from nbhelpers.towers import checkpoints
from nbhelpers.training import loop

TOKENS, INSTRUCTION = torch.randn(2, 50, 8), torch.randn(2, 1, 8)


def select(tokens, instruction, k):
    """PIR's selection, written otherwise."""
    belief = (tokens * instruction).sum(-1).softmax(1)
    kept = belief.topk(k, dim=1).indices
    return tokens[torch.arange(len(tokens))[:, None], kept]


def edited(tokens, instruction, k):
    """The least believed tokens."""
    belief = (tokens * instruction).sum(-1).softmax(1)
    kept = (-belief).topk(k, dim=1).indices
    return tokens[torch.arange(len(tokens))[:, None], kept]


@pytest.mark.parametrize(
    "own, expected",
    [
        (select, True),
        (edited, False),
        (lambda s, c, k: s[:, : k + 1], False),
        (lambda s, c, k: s @ c, False),
        (lambda s: s, False),
    ],
)
def test_functions_are_compared_by_what_they_give(own, expected):
    assert own_part.agrees(own, pir.select_tokens, TOKENS, INSTRUCTION, 40) is expected


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: nn.Sequential(nn.Linear(8, 4), nn.Tanh()), True),
        (lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU()), False),  # other outputs
        (lambda: nn.Sequential(nn.Linear(8, 4, bias=False), nn.Tanh()), False),  # other names
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()), False),  # other shapes
        (lambda: 1 / 0, False),
    ],
)
def test_modules_are_compared_by_names_starting_values_and_outputs(make, expected):
    package = lambda: nn.Sequential(nn.Linear(8, 4), nn.Tanh())  # noqa: E731
    assert own_part.modules_agree(make, package, torch.randn(3, 8)) is expected


def test_other_starting_values_are_another_module():
    def zeros():
        layer = nn.Linear(8, 4)
        nn.init.zeros_(layer.weight)
        return layer

    assert not own_part.modules_agree(zeros, lambda: nn.Linear(8, 4), torch.randn(3, 8))


def test_the_key_of_a_checkpoint_holds_the_code_of_the_part():
    first, second, again = (
        loop.checkpoint_key([], "data", "start", 0, pir.PIR, part)
        for part in (select, edited, select)
    )
    assert first == again != second


def test_a_checkpoint_of_an_edited_part_is_refused_outside_its_notebook(tmp_path):
    meta = {"system": "pir"} | own_part.meta("select_tokens", agreed=False)
    path = checkpoints.save_checkpoint(tmp_path / "model.safetensors", nn.Linear(1, 1), meta)
    with pytest.raises(UserError, match="an edited part, select_tokens, that only its notebook"):
        pir.read(path)
    assert checkpoints.load_checkpoint(path)[1] == meta  # the notebook itself reads it
    assert own_part.meta("select_tokens", agreed=True) == {}

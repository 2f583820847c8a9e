"""The experiments on the ideas, on a set of coloured squares, one pass and one seed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from coloured_set import coloured

from nbhelpers.results import ideas as results
from nbhelpers.results import records
from nbhelpers.runs.start import Run
from nbhelpers.tasks import ideas


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    values = SimpleNamespace(profile="ideas", set="scenes", seed=0, device="cpu", train=True)
    found = ideas.Bench(Run(results.NOTEBOOK, values, "cpu", folder), seeds=(0,), passes=1)
    data = coloured(folder / "data")
    repeated = replace(data.table, captions=data.table.captions)
    found._known["plain"] = replace(data, table=replace(repeated, name="plain"))
    return found


def record(bench, idea: str, world: str, arm: str) -> dict:
    return records.read_one(
        bench.run.records / f"{results.NOTEBOOK}-seed0-{idea}-{world}-{arm}.json"
    )


def test_the_belief_selects_or_does_not_and_all_else_is_equal(bench):
    start = SimpleNamespace(options={})
    arms = ideas.pir_arms("belief", start, bench.settings(10, 1e-3, 64, 0))
    assert set(arms) == set(results.IDEAS["belief"].arms)
    with torch.device("meta"):
        built = {name: arm.make() for name, arm in arms.items()}
    shapes = {
        name: [tuple(p.shape) for p in model.parameters() if p.requires_grad]
        for name, model in built.items()
    }
    assert shapes["with"] == shapes["without"] != shapes["no_vir"]
    tokens, instruction = torch.arange(6.0).view(1, 6, 1), torch.ones(1, 1, 1)
    assert built["without"].select(tokens, instruction, 3).flatten().tolist() == [0, 1, 2]
    assert built["with"].select(tokens, instruction, 3).flatten().tolist() == [5, 4, 3]


def test_stage_1_of_bita_is_trained_with_both_mixings_and_timed(bench):
    ideas.run(bench, "fourier")
    with_, without = (record(bench, "fourier", "plain", arm) for arm in ("with", "without"))
    assert with_["config"]["mixing"] == "fourier" and without["config"]["mixing"] == "attention"
    assert with_["parameters"]["trainable"] < without["parameters"]["trainable"]
    times = with_["settings"]
    assert times["RATIO_LOW"] <= times["RATIO"] <= times["RATIO_HIGH"] and times["WITH_S"] > 0
    assert times == without["settings"] and with_["protocol"]["selected_on"] == "nothing"


def test_steps_are_timed_in_turn():
    class Slow(torch.nn.Module):
        def __init__(self, turns: int):
            super().__init__()
            self.weight, self.turns, self.calls = torch.nn.Parameter(torch.ones(300, 300)), turns, 0

        def loss(self, batch):
            self.calls += 1
            value = self.weight
            for _ in range(self.turns):
                value = torch.tanh(value @ self.weight)
            return {"loss": value.sum()}

    slow, quick = Slow(60), Slow(1)
    found = ideas.step_ratio([slow, quick], [{}] * 6, 1e-3)
    assert slow.calls == quick.calls == 6
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"] < 1
    assert found["with_s"] < found["without_s"]

"""Each paper's idea, with and without, on a world that is made for it.

The worlds are those of `data.scenes.ideas`. With and without are trained on the same pairs, in the
same batches, with the same settings and seeds; nothing else differs. Every run is a record of its
own, and `finding` compares them by the paired test over seeds and images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from nbhelpers.data.catalog import DataSet
from nbhelpers.data.scenes import ideas as worlds
from nbhelpers.errors import UserError
from nbhelpers.metrics.significance import paired_test
from nbhelpers.papers import pir
from nbhelpers.results import comparisons
from nbhelpers.tasks import retrieval, stand_ins
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import Origin, RetrievalTask
from nbhelpers.towers import backbones
from nbhelpers.towers.starting_weights import Start
from nbhelpers.training import loop

NOTEBOOK = "33_ideas"
SEEDS = (0, 1, 2)
WITH, WITHOUT = "with", "without"


@dataclass(frozen=True)
class Idea:
    """An idea and the experiment on it.

    system   the paper's system
    title    what the idea is, in a few words
    world    what the world has, in a few words
    arms     name of an arm -> what it is; the first two are "without" and "with"
    worlds   names of the worlds, one for each version
    """

    system: str
    title: str
    world: str
    arms: Mapping[str, str]
    worlds: tuple[str, ...]


IDEAS = {
    "belief": Idea(
        "PIR",
        "the belief drops tokens",
        "each scene lies small on clutter that no caption mentions",
        {
            WITHOUT: "VIR, all tokens stay",
            WITH: "VIR, the 17 most believed stay",
            "no_vir": "no VIR: the global token alone",
        },
        ("clutter1",),
    ),
    "lca": Idea(
        "PIR",
        "the caption instructs itself (LCA)",
        "as many office words as words of its own stand in each caption",
        {WITHOUT: "mean of the words", WITH: "LCA, three cycles"},
        ("wordy1", "wordy2"),
    ),
    "affiliation": Idea(
        "PIR",
        "the affiliation loss",
        "ten classes that look alike, 60 images each",
        {WITHOUT: "contrastive loss alone", WITH: "affiliation loss too"},
        ("alike1", "alike2"),
    ),
}


@dataclass(frozen=True)
class Arm:
    """A model of an experiment before its training.

    make  builds it, without weights;  start: the weights of its towers
    """

    make: Callable[[], nn.Module]
    start: Start
    settings: loop.TrainConfig


# ---- the experiments on PIR
def first_in_order(tokens: Tensor, instruction: Tensor, k: int) -> Tensor:
    """Return the first k tokens (B,k,D) of tokens (B,N,D), whatever the instruction says."""
    return tokens[:, :k]


def pir_arms(idea: str, start: Start, settings: loop.TrainConfig) -> dict[str, Arm]:
    """Return the arms of an idea of PIR: its compact size with one part, all towers frozen."""
    still = pir.PIRConfig.compact(tuned_stages=0, **start.options).baseline()
    parts: dict[str, tuple[pir.PIRConfig, Any]] = {WITHOUT: (still, None)}
    if idea == "belief":
        parts[WITHOUT] = replace(still, vir=True, filter_size=50), first_in_order
        parts[WITH] = replace(still, vir=True, filter_size=17), None
        parts["no_vir"] = still, None
    elif idea == "lca":
        parts[WITH] = replace(still, lca=True), None
    else:
        parts[WITH] = replace(still, affiliation=True), None
    return {name: Arm(_maker(*part), start, settings) for name, part in parts.items()}


def _maker(config: pir.PIRConfig, select: Any) -> Callable[[], nn.Module]:
    return lambda: pir.PIR(config, select=select)


# ---- running
@dataclass(frozen=True)
class Bench:
    """Where the experiments run: the notebook's run, the seeds and the passes of a training.

    passes  over the training pairs; None: those of each experiment
    """

    run: Any
    seeds: tuple[int, ...] = SEEDS
    passes: int | None = None
    _known: dict[str, DataSet] = field(default_factory=dict)

    def world(self, name: str) -> DataSet:
        """Return a world by its name, drawn at the first call."""
        if name not in self._known:
            self._known[name] = self._drawn(name)
        return self._known[name]

    def _drawn(self, name: str) -> DataSet:
        cache = self.run.cache
        if name == "plain":
            return worlds.plain(cache)
        kind, version = name[:-1], int(name[-1])
        if kind == "alike":
            return worlds.look_alikes(cache, version)
        base = self.world("plain")
        return (
            worlds.wordy(base, version)
            if kind == "wordy"
            else worlds.cluttered(base, cache, version)
        )

    def settings(self, epochs: int, lr: float, batch: int, seed: int, **more) -> loop.TrainConfig:
        """Return the settings of a training."""
        return loop.TrainConfig(self.passes or epochs, lr, batch, seed=seed, **more)


def run(bench: Bench, idea: str) -> None:
    """Train every arm of an idea in every world and seed, and write a record of each."""
    for world in IDEAS[idea].worlds:
        for seed in bench.seeds:
            _run_pir(bench, idea, world, seed)


def _run_pir(bench: Bench, idea: str, world: str, seed: int) -> None:
    task = stand_ins.compact_task(bench.world(world), bench.run.cache, seed, 1, bench.run.device)
    with tempfile.TemporaryDirectory() as folder:
        start, _ = stand_ins.compact_start(task, Path(folder), 12)
        arms = pir_arms(idea, start, bench.settings(10, 1e-3, 64, seed))
        for name, arm in arms.items():
            model = arm.start.build(arm.make, seed).to(bench.run.device)
            frozen = FrozenTowers.of(model, bench.run.cache)
            image = backbones.image_input("efficientnet_lite0")
            own = RetrievalTask(task.data, task.tokenizer, image, seed, 1, frozen)
            train_and_record(bench, idea, name, (model, own, arm))


def train_and_record(
    bench: Bench, idea: str, name: str, built: tuple[nn.Module, RetrievalTask, Arm]
) -> dict:
    """Train a model of an arm on its task, write its record and return it."""
    model, task, arm = built
    batch = arm.settings.batch_size
    with tempfile.TemporaryDirectory() as folder:
        history = loop.fit(
            model, task.train_loader(batch), arm.settings, folder, task.validate, progress=False
        )
    world = task.data.table.name
    origin = Origin(
        IDEAS[idea].system,
        f"{idea}-{world}-{name}",
        arm.start.record(),
        float(history.table().seconds.sum()),
        notes=IDEAS[idea].arms[name],
    )
    of_seed = replace(
        bench.run,
        parameters=SimpleNamespace(
            **{**vars(bench.run.parameters), "seed": arm.settings.seed, "set": world}
        ),
    )
    record = retrieval.write_record(of_seed, model, task, origin)
    reached = record["metrics"]["expectation"]["mR"]
    print(f"{idea}, {world}, {name}, seed {arm.settings.seed}: mR {reached:.1f}", flush=True)
    return record


# ---- what was found
@dataclass(frozen=True)
class Finding:
    """What the records of an idea in one world say.

    scores      arm -> mR of each seed
    difference  with less than without, in points of mR, with its 95 % interval over seeds and
                images, and its p
    """

    idea: str
    world: str
    scores: dict[str, list[float]]
    difference: dict[str, float]

    @property
    def helps(self) -> bool:
        """Whether the idea helps by more than the interval."""
        return self.difference["low"] > 0

    def sentence(self) -> str:
        """Say it, with the numbers."""
        one = self.difference
        with_, without = (sum(self.scores[arm]) / len(self.scores[arm]) for arm in (WITH, WITHOUT))
        told = "helps" if self.helps else "hurts" if one["high"] < 0 else "makes no difference "
        told += "" if self.helps or one["high"] < 0 else "that can be shown"
        return (
            f"World {self.world}: mR {with_:.1f} with, {without:.1f} without, difference"
            f" {one['difference']:+.1f} (95 % interval {one['low']:+.1f} to {one['high']:+.1f},"
            f" {len(self.scores[WITH])} seeds): the idea {told} here."
        )


def findings(folder: Path | str, idea: str) -> list[Finding]:
    """Return the findings of an idea, one for each world that has records in the folder.

    UserError if there is none.
    """
    found = [one for one in (_finding(folder, idea, world) for world in IDEAS[idea].worlds) if one]
    if not found:
        raise UserError(
            f"{folder} has no record of the idea '{idea}'; run `make run PROFILE=ideas` first."
        )
    return found


def _finding(folder: Path | str, idea: str, world: str) -> Finding | None:
    names = {(NOTEBOOK, f"{idea}-{world}-{arm}"): arm for arm in IDEAS[idea].arms}
    try:
        runs, owner = comparisons.read_runs(folder, names)
    except UserError:
        return None
    scores = {arm: [one.metrics["mR"] for one in seeds.values()] for arm, seeds in runs.items()}
    return Finding(idea, world, scores, paired_test(runs[WITH], runs[WITHOUT], owner))

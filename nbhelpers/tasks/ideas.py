"""Each paper's idea, with and without, on a world that is made for it.

The worlds are those of `data.ideas`. With and without are trained on the same pairs, in the
same batches, with the same settings and seeds; nothing else differs. Every run is a record of its
own, and `results.ideas` compares them by the paired test over seeds and images.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from nbhelpers import figures
from nbhelpers.data import ideas as worlds
from nbhelpers.data.array_store import ArrayStore
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.loaders import FeatureDataset, train_loader
from nbhelpers.data.tokenization import (
    Tokenizer,
    caption_batches,
    distinct_captions,
    train_tokenizer,
)
from nbhelpers.metrics import recall, resampling
from nbhelpers.papers import adaptation, bita, cfitr, pe_rsitr, pir
from nbhelpers.papers.clip import CLIPConfig
from nbhelpers.results import ideas as results
from nbhelpers.results.ideas import IDEAS, WITH, WITHOUT
from nbhelpers.tasks import pretraining, retrieval, search_times, stand_ins, two_stage
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import Origin, RetrievalTask
from nbhelpers.towers.starting_weights import Start, package_start, seeded
from nbhelpers.training import device, loop

SEEDS = (0, 1, 2)
CAPTIONS = 2  # of each training image, so that a training takes seconds


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
    """Return the arms of an idea of PIR: one part of its compact size, half as wide."""
    still = pir.PIRConfig.compact(tuned_stages=0, embed_dim=64, heads=4, **start.options)
    still = still.baseline()
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
            found = pretraining.first_captions(self._drawn(name), CAPTIONS)
            self._known[name] = replace(found, table=replace(found.table, name=name))
        return self._known[name]

    def _drawn(self, name: str) -> DataSet:
        if name == "plain":
            return worlds.plain(self.run.cache)
        base, kind, version = self.world("plain"), name[:-1], int(name[-1])
        if kind == "few":
            return worlds.few_pairs(base, images=2, captions=2)
        if kind == "gallery":
            return worlds.large_gallery(base)
        if kind == "clutter":
            return worlds.cluttered(base, self.run.cache, version)
        return worlds.wordy(base, version) if kind == "wordy" else worlds.look_alikes(base, version)

    def settings(self, epochs: int, lr: float, batch: int, seed: int, **more) -> loop.TrainConfig:
        """Return the settings of a training."""
        return loop.TrainConfig(self.passes or epochs, lr, batch, seed=seed, **more)


def run(bench: Bench, idea: str) -> None:
    """Train every arm of an idea in every world and seed, and write a record of each."""
    known = {
        "adapter": _run_adapter,
        "two_stages": _run_two_stages,
        "fourier": _run_fourier,
    }
    for world in IDEAS[idea].worlds:
        for seed in bench.seeds:
            known.get(idea, _run_pir)(bench, idea, world, seed)


def _run_pir(bench: Bench, idea: str, world: str, seed: int) -> None:
    task = _compact(bench, bench.world(world), seed)
    with tempfile.TemporaryDirectory() as folder:
        start, _ = stand_ins.compact_start(task, Path(folder), 12)
        arms = pir_arms(idea, start, bench.settings(10, 1e-3, 64, seed))
        for name, arm in arms.items():
            _trained(bench, idea, name, arm, task)


def _compact(bench: Bench, data: DataSet, seed: int) -> RetrievalTask:
    return stand_ins.compact_task(data, bench.run.cache, seed, 1, bench.run.device)


def _trained(
    bench: Bench, idea: str, name: str, arm: Arm, task: RetrievalTask
) -> tuple[nn.Module, RetrievalTask]:
    """Train the model of an arm on the data of a task; write its record, and return both."""
    model, own = _fresh(bench, arm, task)
    seconds = _fit(model, own.train_loader(arm.settings.batch_size), arm, own.validate)
    write_record(bench, idea, name, Trained(model, own, arm, seconds))
    return model, own


def _fresh(bench: Bench, arm: Arm, task: RetrievalTask) -> tuple[nn.Module, RetrievalTask]:
    """Return the model of an arm at its start, and the task over its own frozen towers."""
    model = arm.start.build(arm.make, arm.settings.seed).to(bench.run.device)
    frozen = FrozenTowers.of(model, bench.run.cache)
    return model, RetrievalTask(task.data, task.tokenizer, task.image, arm.settings.seed, 1, frozen)


def _fit(model: nn.Module, loader, arm: Arm, validate=None) -> float:
    """Train a model in place, and return the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        found = loop.fit(model, loader, arm.settings, folder, validate, progress=False)
    return float(found.table().seconds.sum())


# ---- PE-RSITR, from a CLIP that learned in another world
def _run_adapter(bench: Bench, idea: str, world: str, seed: int) -> None:
    """Train the adapter, and all of CLIP, each at the learning rate of the default profile."""
    task = _compact(bench, bench.world(world), seed)
    start = pretrained(bench).clip_start("compact")[0]
    plain = {"weight_decay": 0.0, "betas": (0.9, 0.999), "warmup_fraction": 0.0}
    full = partial(adaptation.adapted, "full", CLIPConfig.compact())
    adapter = partial(pe_rsitr.PERSITR, pe_rsitr.PERSITRConfig.compact())
    for name, make, rate in ((WITHOUT, full, 5e-4), (WITH, adapter, 5e-3)):
        arm = Arm(make, start, bench.settings(10, rate, 30, seed, **plain))
        _trained(bench, idea, name, arm, task)


def pretrained(bench: Bench) -> pretraining.Pretraining:
    """Return the pre-training of CLIP and ViLT on another generated world, for all seeds."""
    other = pretraining.other_world(bench.run.cache, 480, 0)
    settings = bench.settings(6, 1e-3, 64, 0)
    folder = Path(bench.run.folder) / "starting"
    data = pretraining.first_captions(other, 2)
    return pretraining.Pretraining(data, settings, folder, bench.run.cache, bench.run.device, 1)


# ---- CFITR
CANDIDATES = 10


def _run_two_stages(bench: Bench, idea: str, world: str, seed: int) -> None:
    """Train one CFITR; its codes alone are the arm without, both stages the arm with."""
    data = bench.world(world)
    start = pretrained(bench).vilt_start("compact", data)[0]
    settings = bench.settings(4, 1e-3, 32, seed)
    config = cfitr.CFITRConfig.compact(false_texts=1, **start.options)
    config = replace(config, beta=config.beta / 4, gamma=config.gamma / 4)  # the release: batch 8
    arm = Arm(partial(cfitr.CFITR, config), start, settings)
    model, task = _fresh(bench, arm, _compact(bench, without_repeats(data), seed))
    model.set_captions(cfitr.Captions.of(task), seed)
    validate = partial(two_stage.validate, task=task)
    seconds = _fit(model, task.train_loader(settings.batch_size), arm, validate)
    trained = Trained(model, task, arm, seconds)
    with tempfile.TemporaryDirectory() as folder:
        stores = two_stage.write_stores(model, task, "test", Path(folder) / "test")
        owner = task.table("test").owner()
        ranking = two_stage.rank(model, stores, owner, CANDIDATES, ways=["Hamming"])
        found = {rule: ranking.results(CANDIDATES, rule) for rule in recall.TIES}
        times = _times(model, stores, task)
    for name, way in ((WITHOUT, "Hamming"), (WITH, "Hamming + fine")):
        rules = {rule: results[way] for rule, results in found.items()}
        write_record(bench, idea, name, trained, rules, times)


def without_repeats(data: DataSet) -> DataSet:
    """Return the set with each distinct caption of a training image once."""
    captions = data.table.captions
    trained = set(data.table.split("train").images.image_id)
    repeated = captions.duplicated() & captions.image_id.isin(trained)
    return replace(data, table=replace(data.table, captions=captions[~repeated]))


def _times(model: nn.Module, stores, task: RetrievalTask) -> dict[str, float]:
    """Milliseconds of an image that asks among all captions: two stages, and all pairs."""
    images_of, _ = two_stage.split_inputs(model, task, "test")
    engine = two_stage.Search(model, stores[1], k=CANDIDATES)
    one = images_of(np.arange(1))
    both = search_times.query_times(engine, one, repeats=5)["total"]
    return {
        "two_stages_ms": both,
        "all_pairs_ms": search_times.exhaustive_times(engine, one, repeats=1)["cached"],
    }


# ---- BITA
QUERIES = 8
BITA_BATCH = 32


def _run_fourier(bench: Bench, idea: str, world: str, seed: int) -> None:
    """Train stage 1 with each mixing; time their steps in turn before."""
    task = _compact(bench, bench.world(world), seed)
    with tempfile.TemporaryDirectory() as folder:
        texts = list(task.table("train").captions.text)
        path = train_tokenizer(texts, Path(folder) / "tokenizer.json")
        words = Tokenizer(path, bita.BITAConfig.text_length, fixed=True, sep=True)
    settings = bita.train_config(
        "stage1",
        epochs=bench.passes or 3,
        lr=1e-3,
        batch_size=BITA_BATCH,
        warmup_steps=16,
        seed=seed,
    )
    arms = {
        name: Arm(partial(_aligner, words.vocab_size, mixing), package_start(), settings)
        for name, mixing in ((WITHOUT, "attention"), (WITH, "fourier"))
    }
    loader = _caption_loader(task, words)
    models = {name: seeded(arm.make, seed).to(bench.run.device) for name, arm in arms.items()}
    ratio = step_ratio(list(models.values()), (list(loader) * 3)[:24], settings.lr)
    for name, arm in arms.items():
        model = seeded(arm.make, seed).to(bench.run.device)
        seconds = _fit(model, loader, arm)
        rules = _aligned(model, task, words)
        write_record(bench, idea, name, Trained(model, task, arm, seconds), rules, ratio)


def _aligner(vocab_size: int, mixing: str) -> nn.Module:
    config = bita.BITAConfig.small(vocab_size, 0, mixing=mixing, queries=QUERIES)
    return bita.Aligner(config, tower=(nn.Identity(), 1280))


def _caption_loader(task: RetrievalTask, words: Tokenizer):
    """Return batches of cached image tokens and the ids of captions, padded to one length."""
    table = task.table("train")
    texts, rows = distinct_captions(table, bita.clean_bita_caption)
    ids, mask = (part.numpy() for part in words(texts))
    seen, read = task.features("train")[0], ArrayStore({}, {"ids": ids, "mask": mask})
    return train_loader(FeatureDataset(table, seen, read, task.seed, rows), BITA_BATCH, 1)


@torch.inference_mode()
def _aligned(model: Any, task: RetrievalTask, words: Tokenizer) -> dict[str, recall.Recall]:
    """Return recalls on the test split; the best query of an image counts."""
    table, place = task.table("test"), next(model.parameters()).device
    texts, rows = distinct_captions(table, bita.clean_bita_caption)
    read = torch.cat(
        [
            model.embed_texts(ids.to(place), mask.to(place))
            for ids, mask in caption_batches(texts, words)
        ]
    )
    vision = torch.from_numpy(np.array(task.features("test")[0]["vision"])).float().to(place)
    seen = model.embed_images(vision)
    found = torch.einsum("bqe,ne->bnq", seen, read).amax(2).cpu().numpy()[:, rows]
    return {rule: recall.evaluate(found, table.owner(), ties=rule) for rule in recall.TIES}


def step_ratio(models: list[Any], batches: list[dict], lr: float) -> dict[str, float]:
    """Time training steps of two models in turn.

    The result has the median seconds of a step of the first ("without") and of the second
    ("with"), and the median of second / first over batches with its 95 % interval (bootstrap).
    """
    steps = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr) for m in models]
    seconds = np.array(
        [
            [_step(model.train(), step, batch) for model, step in zip(models, steps, strict=True)]
            for batch in batches
        ]
    )[2:]  # the first ones warm up
    ratios = seconds[:, 1] / seconds[:, 0]
    blocks = [np.median(ratios[drawn], axis=1) for drawn in resampling.draws(len(ratios), 2000, 0)]
    low, high = resampling.interval(blocks, 0.95)
    return {
        "without_s": float(np.median(seconds[:, 0])),
        "with_s": float(np.median(seconds[:, 1])),
        "ratio": float(np.median(ratios)),
        "ratio_low": float(low),
        "ratio_high": float(high),
    }


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: dict) -> float:
    # on a CPU its own seconds, which others that use the machine do not lengthen
    on_cpu = next(model.parameters()).device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    began = clock()
    optimizer.zero_grad()
    model.loss(batch)["loss"].backward()
    optimizer.step()
    device.wait()
    return clock() - began


# ---- records
@dataclass(frozen=True)
class Trained:
    """A trained model of an arm, its task, and the seconds of its training."""

    model: nn.Module
    task: RetrievalTask
    arm: Arm
    seconds: float


def write_record(
    bench: Bench,
    idea: str,
    name: str,
    trained: Trained,
    rules: dict[str, recall.Recall] | None = None,
    measured: Mapping[str, float] | None = None,
) -> dict:
    """Write the record of an arm, and return it.

    rules     as of `retrieval.write_record`
    measured  further numbers, which the record keeps among its settings
    """
    task, seed = trained.task, trained.arm.settings.seed
    world = task.data.table.name
    origin = Origin(
        IDEAS[idea].system,
        f"{idea}-{world}-{name}",
        trained.arm.start.record(),
        trained.seconds,
        selected_on="nothing" if trained.arm.settings.keep == "last" else "val",
        notes=IDEAS[idea].arms[name],
    )
    values = vars(bench.run.parameters) | {"seed": seed, "set": world} | dict(measured or {})
    of_seed = replace(bench.run, parameters=SimpleNamespace(**values))
    record = retrieval.write_record(of_seed, trained.model, task, origin, rules)
    reached = record["metrics"]["expectation"]["mR"]
    print(f"{idea}, {world}, {name}, seed {seed}: mR {reached:.1f}", flush=True)
    return record


# ---- the figure
def figure(bench: Bench, idea: str) -> Figure:
    """Draw examples of an idea's first world, the recalls of its arms, and the differences."""
    data, arms = bench.world(IDEAS[idea].worlds[0]), IDEAS[idea].arms
    table = data.table.split("test")
    rows = np.linspace(0, len(table) - 1, 6).round().astype(int)[1:-1]
    pixels = data.pixels.resized(224)[data.pixels.rows(table.images.file.iloc[rows])]
    first = table.captions.groupby("image_id", sort=False).text.first()
    texts = [first[name] for name in table.images.image_id.iloc[rows]]
    found = results.findings(bench.run.records, idea)
    return figures.with_and_without(
        list(zip(pixels, texts, strict=True)),
        {one.world: {arms[arm]: one.scores[arm] for arm in arms} for one in found},
        {one.world: one.difference for one in found},
    )

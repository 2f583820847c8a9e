"""Evaluate a trained retrieval system on a data set."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nbhelpers.data import layouts
from nbhelpers.data.archives import open_images
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.metrics import audit, recall
from nbhelpers.metrics.recall import Recall
from nbhelpers.paths import runs_root
from nbhelpers.results import records
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import RetrievalTask, result_fields
from nbhelpers.towers import checkpoints

if TYPE_CHECKING:
    from nbhelpers.data.array_store import ArrayStore
    from nbhelpers.tasks.two_stage import TwoStages
from nbhelpers.systems.trained_systems import NOTEBOOK_OF, System, run_of


# ---- the evaluation
@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found of one split.

    table    every image and every caption of it;  notes: what was decided when they were read
    results  tie rule -> {name: Recall}: the system under its own name, and with two stages also its
             first one alone
    how      its two stages, where it has them
    """

    system: System
    table: CaptionTable
    notes: list[str]
    results: Callable[[str], dict[str, Recall]]
    seconds: float
    how: str = ""

    def recalls(self, ties: str = "expectation") -> pd.DataFrame:
        """Return recalls in percent, one row each for results, chance and ceiling.

        Columns: R@K both ways, mR, and its 95 % interval over images. The ceiling of the captions
        stands there under the expectation rule.
        """
        owner, rows = self.table.owner(), {}
        for name, found in self.results(ties).items():
            low, high = recall.bootstrap(found, owner)["mR"]
            rows[name] = found.metrics | {"mR low": low, "mR high": high}
        rows["chance"] = recall.chance(owner)
        if ties == "expectation":
            rows["ceiling"] = audit.ceilings(self.table)
        frame = pd.DataFrame(rows.values(), index=list(rows))
        return frame[[name for name in frame if "median" not in name]]

    def write_record(self, folder: Path | str, ties: str = "expectation") -> Path:
        """Write a result record and its ranks to `folder`; return its path.

        It has the form of the notebooks' records.
        """
        name, file = self.system.name, self.system.checkpoint
        found = {rule: self.results(rule)[name] for rule in recall.TIES}
        start = {"name": file.name, "source": "file", "kind": "file"}
        start["sha256"] = checkpoints.sha256(file)
        record = records.new(
            self.system.model.config,
            notebook="eval",
            profile="eval",
            set=self.table.name,
            system=name,
            variant=name,
            seed=0,
            seconds=self.seconds,
            weights=[start],
            notes=self.how,
            device=f"{self.system.device.type} ({platform.machine()})",
            **result_fields(self.system.model, self.table, found, ties, "unknown", 0),
        )
        ranks = found[ties].arrays() | {"owner": self.table.owner()}
        return records.write(folder, record, ranks)


def evaluate(
    system: System,
    captions: Path | str,
    pictures: Path | str,
    split: str = "test",
    cache: Path | None = None,
    workers: int = 1,
    two_stages: TwoStages | None = None,
) -> Evaluation:
    """Evaluate a system on a caption file and its images, as its notebook does.

    The caption file may have any layout. The images are a folder or an archive.

    An image that is listed twice counts once, with the captions of both entries; every image and
    every caption of the split is a query and stands in the gallery, however many captions an image
    has. Decoded images are kept in `cache` (default: `cache/` under the run folder).
    two_stages  of CFITR; left away, `two_stages_of` the system
    UserError for captions, images or a split that cannot be used.
    """
    system._must_have(
        "encode_images", "writes captions: `caption` writes them and `score` evaluates them"
    )
    began, cache = time.perf_counter(), cache or runs_root() / "cache"
    reading = layouts.scan(captions, joined=True)
    whole = reading.usable()
    task = _task(system, whole, split, pictures, cache, workers)
    how = ""
    if system.has_two_stages:
        two_stages, banks = two_stages or two_stages_of(system), None
        if two_stages.ppsr == "online":
            banks = _banks(system, whole, pictures, cache, workers)
        results, how = _two_stages(system, task, split, two_stages, banks), str(two_stages)
    elif two_stages is not None:
        raise UserError(f"{system.name} searches in one stage; leave --k and --ppsr to cfitr.")
    else:
        results = _one_stage(system, task, split)
    seconds = time.perf_counter() - began
    return Evaluation(system, task.table(split), reading.notes, results, seconds, how)


def _task(
    system: System, whole: CaptionTable, split: str, pictures: Path | str, cache: Path, workers: int
) -> RetrievalTask:
    """One split of a table; which file of `pictures` an image is depends on all that it lists."""
    table = whole.split(split)
    pixels = DecodedCache.build(
        open_images(pictures), list(table.images.file), cache, whole.images.file
    )
    return RetrievalTask(
        DataSet(table, pixels, None, []),
        system.tokenizer,
        system.image,
        workers=workers,
        frozen=FrozenTowers.of(system.model, cache),
    )


def _one_stage(
    system: System, task: RetrievalTask, split: str
) -> Callable[[str], dict[str, Recall]]:
    embeddings = task.embeddings(system.model, split)
    return lambda ties: {system.name: embeddings.recall(ties)}


def _two_stages(
    system: System,
    task: RetrievalTask,
    split: str,
    two_stages: TwoStages,
    banks: tuple[ArrayStore, ArrayStore] | None,
) -> Callable[[str], dict[str, Recall]]:
    """Evaluate CFITR: coarse scores choose candidates, the single stream ranks them."""
    from nbhelpers.tasks import two_stage as engine  # which needs faiss

    k, way = two_stages.k, two_stages.way
    with tempfile.TemporaryDirectory(dir=task.cache) as folder:
        stores = engine.write_stores(system.model, task, split, folder)
        ranking = engine.rank(system.model, stores, task.table(split).owner(), k, banks, [way])

    def results(ties: str) -> dict[str, Recall]:
        found = ranking.results(k, ties)
        return {f"{system.name}, coarse": found[way], system.name: found[f"{way} + fine"]}

    return results


# ---- what a run knows of its search in two stages
def two_stages_of(system: System) -> TwoStages:
    """Return the settings of the record of this checkpoint, or the published ones."""
    from nbhelpers.tasks import two_stage as engine  # which needs faiss

    record = _record_of(system)
    settings = record.get("settings", {}) if record else {}
    return engine.TwoStages(settings.get("K", engine.K))


def _record_of(system: System) -> records.Record | None:
    """The record, beside a checkpoint, that names it."""
    run = run_of(system.checkpoint)
    for path in sorted((run / "records").glob(f"{NOTEBOOK_OF[system.name]}-seed*.json")):
        record = records.read_one(path)
        if (run / record.get("checkpoint", "")).resolve() == system.checkpoint.resolve():
            return record
    return None


def banks_of_run(system: System) -> tuple[ArrayStore, ArrayStore] | None:
    """Return codes of training images and texts that the run of this checkpoint stored."""
    from nbhelpers.data.array_store import ArrayStore
    from nbhelpers.tasks import two_stage as engine  # which needs faiss

    folder = engine.store_folder(run_of(system.checkpoint), system.model) / "train"
    if not folder.is_dir() or _record_of(system) is None:
        return None
    images, texts = (
        ArrayStore.open(folder / kind, engine.store_key(system.model, kind))
        for kind in ("images", "texts")
    )
    return images, texts


def _banks(
    system: System, whole: CaptionTable, pictures: Path | str, cache: Path, workers: int
) -> tuple[ArrayStore, ArrayStore]:
    """Return codes of training images and texts.

    Those of the run, else of the training split of the evaluated captions. UserError if there is
    neither.
    """
    from nbhelpers.data.array_store import ArrayStore
    from nbhelpers.tasks import two_stage as engine  # which needs faiss

    if (banks := banks_of_run(system)) is not None:
        return banks
    if "train" not in set(whole.images.split):
        raise UserError(
            f"PPSR takes column means from training queries, but {system.checkpoint} lies "
            "in no run that has them, and the captions have no train split; give --ppsr "
            "transductive, as released, or --ppsr none."
        )
    task = _task(system, whole, "train", pictures, cache, workers)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        written = engine.write_stores(system.model, task, "train", folder, states=False)
        images, texts = (
            ArrayStore(bank.key, {"codes": np.array(bank["codes"])}) for bank in written
        )
    return images, texts

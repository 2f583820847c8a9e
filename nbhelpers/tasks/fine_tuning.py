"""Fine-tune any model on a set: one training, one checkpoint, one record."""

from __future__ import annotations

import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from nbhelpers.data.augment import TestTransform
from nbhelpers.data.catalog import DataSet
from nbhelpers.metrics import recall
from nbhelpers.papers import any_clip
from nbhelpers.papers.any_clip import AnyCLIP, AnyCLIPConfig
from nbhelpers.results import records
from nbhelpers.tasks.retrieval import RetrievalTask, result_fields
from nbhelpers.towers import encoders, hugging_face_models, open_clip_models
from nbhelpers.towers.starting_weights import seeded
from nbhelpers.training import loop
from nbhelpers.training.device import resolve
from nbhelpers.training.distributed import process_state

# method -> peak learning rate: new parts start from zero, a whole network must not be spoiled
RATES = {"full": 1e-5, "linear": 1e-3, "lora": 1e-3, "adapter": 1e-3}


@dataclass(frozen=True, eq=False)
class Tuned:
    """What `fine_tune` returns; `trained` tells whether it trained now or loaded the checkpoint."""

    model: AnyCLIP
    checkpoint: Path
    record: Path
    trained: bool


def fine_tune(
    config: AnyCLIPConfig, data: DataSet, training: loop.TrainConfig, folder: Path, profile: str
) -> Tuned:
    """Train a model on the training split of a set, evaluate it on test, and write its record.

    The best epoch by mR on the validation split is kept. Images are not augmented and resized
    without cropping. A stopped training goes on; a finished one is loaded.
    folder  of the run: `checkpoints` and `records` lie in it;  profile  as records name it
    UserError for a model or a method that cannot be used.
    """
    model, began = seeded(lambda: any_clip.build(config), training.seed)
    image = any_clip.image_input(model.encoders)
    words = any_clip.ModelTokenizer(model.encoders)
    task = RetrievalTask(data, words, image, training.seed, training.workers)
    method = [config.method, config.rank, config.bottleneck]
    key = loop.checkpoint_key(
        [method, training, TestTransform(image.size)],
        task.content(),
        began,
        training.seed,
        AnyCLIP,
        encoders,
        open_clip_models,
        hugging_face_models,
    )
    meta = {"system": any_clip.SYSTEM, "model": asdict(config), "began": began}
    loader = task.train_loader(training.batch_size, TestTransform(image.size))
    model, history, trained = loop.load_or_train(
        f"clip-{config.method}",
        lambda: model,
        loader,
        training,
        folder / "checkpoints",
        key,
        loop.Options(validate=task.validate, meta=meta),
    )
    checkpoint = folder / "checkpoints" / f"clip-{config.method}-{key[:16]}" / "model.safetensors"
    seconds = float(history.table().seconds.sum())
    record = write_record(model, task, checkpoint, seconds, profile)
    return Tuned(model, checkpoint, record, trained)


def write_record(
    model: AnyCLIP, task: RetrievalTask, checkpoint: Path, seconds: float, profile: str
) -> Path:
    """Evaluate a model on the test split, and write its record and ranks beside the checkpoints."""
    config, table, found = model.config, task.table("test"), task.embeddings(model, "test")
    rules = {rule: found.recall(rule) for rule in recall.TIES}
    run = checkpoint.parents[2]
    start = {"name": config.model, "source": "file", "kind": "file", "sha256": model.digest}
    record = records.new(
        config,
        notebook="train",
        profile=profile,
        set=table.name,
        system="CLIP",
        variant=variant(config),
        seed=task.seed,
        seconds=seconds,
        weights=[start],
        notes=f"{config.model}, fine-tuned by method {config.method}",
        device=f"{resolve().type} ({platform.machine()})",
        checkpoint=str(checkpoint.relative_to(run)),
        **result_fields(model, table, rules, "expectation", "val", task.seed),
    )
    ranks = rules["expectation"].arrays() | {"owner": table.owner()}
    if process_state().is_main_process:
        return records.write(run / "records", record, ranks)
    return run / "records" / f"{records.file_stem(record)}.json"


def variant(config: AnyCLIPConfig) -> str:
    """Return how the record calls a model and a method."""
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", Path(config.model).name)
    return f"{name}-{config.method}"

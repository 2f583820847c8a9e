"""Train BITA in three stages, each from the checkpoint of the one before."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nbhelpers.errors import UserError
from nbhelpers.papers import bita, own_part
from nbhelpers.papers.bita import Aligner, BITAConfig, Captioner, ImageReader
from nbhelpers.papers.ift import Mix, fourier_mix
from nbhelpers.tasks.captioning import CaptionTask
from nbhelpers.towers.starting_weights import Start, seeded
from nbhelpers.training import loop


@dataclass(frozen=True, eq=False)
class Trained:
    """A stage: its model in eval mode, its history, and the key of its checkpoint."""

    stage: str
    model: ImageReader
    history: loop.History
    key: str


def fill_frozen(start: Start, model: ImageReader) -> ImageReader:
    """Gives the frozen towers of a model their weights, and nothing else."""
    return replace(
        start, towers={name: start.towers[name] for name in ("visual_encoder", "opt_model")}
    ).fill(model)


def build_captioner(
    start: Start,
    config: BITAConfig,
    seed: int,
    before: ImageReader | None = None,
    mix: Mix = fourier_mix,
) -> Captioner:
    """Return a Captioner that goes on from a model of an earlier stage.

    Without one, its transformer starts from BERT. `mix` is as in `bita.ImageReader`.
    """
    if isinstance(before, Captioner):  # the largest part need not be read twice
        model = seeded(lambda: Captioner(config, decoder=before.opt_model, mix=mix), seed)
        replace(start, towers={"visual_encoder": start.towers["visual_encoder"]}).fill(model)
    else:
        model = fill_frozen(start, seeded(lambda: Captioner(config, mix=mix), seed))
    return model.take((before or start.build(lambda: Aligner(config, mix=mix), seed)).state_dict())


def begin_stage(
    stage: str,
    start: Start,
    config: BITAConfig,
    seed: int,
    before: Trained | None,
    mix: Mix = fourier_mix,
) -> ImageReader:
    """The model of a stage before it is trained."""
    if stage == "stage1":
        return start.build(lambda: Aligner(config, mix=mix), seed)
    return build_captioner(start, config, seed, before.model if before else None, mix)


def train_stage(
    stage: str,
    task: CaptionTask,
    start: Start,
    settings: loop.TrainConfig,
    home: Path,
    before: Trained | None = None,
    mix: Mix = fourier_mix,
) -> Trained:
    """Train a stage of bita.STAGES with the task's seed, or load it; a stopped one goes on.

    home    the folder of its checkpoint, without the key that is added to its name
    before  the stage that it begins from: none for stage 1. Without one, stage 2 begins with BERT's
            weights (an ablation)
    mix     the mixing of tokens. Another one than the package's has another key, and its checkpoint
            says so (`own_part.meta`)
    UserError for a stage that cannot begin there.
    """
    _check_order(stage, before)
    config, seed = task.config, task.seed
    loader = task.loader(stage, settings.batch_size)
    finetune = stage == "finetune"
    options = {"prompt_length": task.prompted.prompt_length} if finetune else None
    began = [start.content(), before.key if before else ""]
    key = loop.checkpoint_key(
        [config, settings, stage, options],
        task.content(stage),
        began,
        seed,
        begin_stage,
        fill_frozen,
        mix,
    )
    model, history, _ = loop.load_or_train(
        home.name,
        lambda: begin_stage(stage, start, config, seed, before, mix),
        loader,
        settings,
        home.parent,
        key,
        loop.Options(
            validate=task.validate if finetune else None,
            loss_options=options,
            meta=_meta(stage, config, before, mix),
        ),
    )
    return Trained(stage, model, history, key)


def _check_order(stage: str, before: Trained | None) -> None:
    if (
        stage not in bita.STAGES
        or (stage == "stage1" and before)
        or (stage == "finetune" and not before)
    ):
        raise UserError(
            f"Stage '{stage}' cannot begin from {before.stage if before else 'nothing'}; the stages"
            f" are {', '.join(bita.STAGES)}, each from the one before."
        )


def _meta(stage: str, config: BITAConfig, before: Trained | None, mix: Mix) -> dict[str, Any]:
    """The metadata of a stage's checkpoint."""
    sample = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    same = own_part.agrees(mix, fourier_mix, sample)
    about = {"system": "bita", "stage": stage, "model": asdict(config)}
    return about | {"before": before.key if before else ""} | own_part.meta("fourier_mix", same)

"""Hold the settings, the learning rates and the history of a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from nbhelpers.errors import UserError
from nbhelpers.training.device import PRECISIONS


@dataclass(frozen=True)
class TrainConfig:
    """How to train, with AdamW. UserError on values that cannot be."""

    epochs: int
    lr: float  # peak learning rate
    # pairs per batch over all processes together; the loader is built with it
    batch_size: int = 32
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup_fraction: float = 0.1  # of all optimiser steps
    warmup_steps: int | None = None  # the same in steps; takes the place of the fraction
    schedule: str = "linear"  # linear | cosine | constant | step | epoch_cosine
    step_epochs: int = 20  # of "step": every so many epochs ...
    step_factor: float = 0.7  # ... the rate is multiplied by this
    lr_first: float = 0.0  # of "epoch_cosine": where its warm-up begins ...
    lr_last: float = 0.0  # ... and where its cosine ends
    precision: str = "fp32"  # fp32 | tf32 | bf16 | fp16
    compile: bool = False  # by torch.compile: slow at first, then faster on a GPU
    recompute: bool = False  # keep the inputs of transformer blocks alone; slower, less memory
    # batches per optimiser step; in-batch negatives stay within each batch
    accumulate: int = 1
    # pairs that are embedded together, in each process, with cached gradients
    # (`cached_gradients`); "auto": what fits into the GPU, on a CPU the whole batch
    micro_batch: int | str = "whole"  # whole | auto | a number of pairs
    clip_norm: float | None = None
    seed: int = 0
    workers: int | str = 0  # of the loader, a number or "auto"; changes no result
    # resume state within an epoch; 0: only after each epoch; changes no result
    save_every_steps: int = 0
    monitor: str = "mR"  # validation figure that selects the best epoch; larger is better
    keep: str = "best"  # weights left in the model: best (epoch, where validated) | last

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate", "step_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        pairs = str(self.micro_batch)
        if pairs not in ("whole", "auto") and not (pairs.isdecimal() and int(pairs) > 0):
            raise UserError(
                f"micro_batch is {self.micro_batch!r}; give a number of pairs, 'whole' or 'auto'."
            )
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"warmup_fraction is {self.warmup_fraction}; it lies between 0 and 1.")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(f"warmup_steps is {self.warmup_steps}; it must be at least 0.")
        for name, known in (
            ("schedule", ("linear", "cosine", "constant", "step", "epoch_cosine")),
            ("precision", PRECISIONS),
            ("keep", ("best", "last")),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} '{getattr(self, name)}' is unknown; choose from {', '.join(known)}."
                )

    def decisive(self) -> dict:
        """Return the fields that decide the result."""
        fields = asdict(self)
        del fields["workers"], fields["save_every_steps"]
        for name, plain in (("micro_batch", "whole"), ("compile", False), ("recompute", False)):
            if fields[name] == plain:
                del fields[name]
        return fields


@dataclass
class History:
    """One row per epoch, and the figure that selects the best.

    A row has epoch (from 1), steps, lr, mean loss terms, `val_*`, seconds, images_per_second.
    """

    rows: list[dict]
    monitor: str = "mR"

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the largest validation figure; None without validation."""
        key = f"val_{self.monitor}"
        return max(self.rows, key=lambda row: row[key])["epoch"] if key in self.rows[-1] else None

    def table(self) -> pd.DataFrame:
        """Return the rows as a table."""
        return pd.DataFrame(self.rows)

    def __str__(self) -> str:
        text = (
            f"{len(self.rows)} epochs, loss {self.rows[0]['loss']:.3f} to"
            f" {self.rows[-1]['loss']:.3f}"
        )
        if self.best_epoch is None:
            return text
        best = self.rows[self.best_epoch - 1][f"val_{self.monitor}"]
        return f"{text}, best validation {self.monitor} {best:.2f} after epoch {self.best_epoch}"


def lr_lambda(config: TrainConfig, total: int) -> Callable[[int], float]:
    """Return the factor on the peak learning rate at optimiser step t = 0..total-1.

    Warm-up over the first `warmup_steps`, else int(total * warmup_fraction), steps is t / warm-up,
    so the first step has rate 0. The cosine schedule, like open_clip's, begins at 1 / warm-up. Then
    "linear" and "cosine" fall to 0 at t = total; "step" multiplies by `step_factor` from every
    `step_epochs`-th epoch on, as PE-RSITR does. "epoch_cosine" is that of LAVIS, which BITA uses:
    it warms up from `lr_first` within the first epoch alone, and then jumps to a cosine that is
    constant within each epoch.
    """
    warm = (
        int(total * config.warmup_fraction) if config.warmup_steps is None else config.warmup_steps
    )

    def factor(t: int) -> float:
        if config.schedule == "epoch_cosine":
            return epoch_cosine(config, t * config.epochs // total, t, warm) / config.lr
        if t < warm:
            return (t + (config.schedule == "cosine")) / warm
        if config.schedule == "step":
            epoch = t * config.epochs // total
            return config.step_factor ** ((epoch + 1) // config.step_epochs)
        done = (t - warm) / (total - warm)
        falling = {
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "constant": 1.0,
        }
        return falling[config.schedule]

    return factor


def epoch_cosine(config: TrainConfig, epoch: int, step: int, warm: int) -> float:
    """Return the learning rate at `step` of `epoch`, both from 0.

    `warm` steps of warm-up, as far as the first epoch has them.
    """
    if epoch == 0:
        return min(config.lr, config.lr_first + (config.lr - config.lr_first) * step / max(warm, 1))
    return (
        config.lr_last
        + (config.lr - config.lr_last) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    )


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> np.ndarray:
    """Return the learning rate at each of T = epochs * steps_per_epoch optimiser steps, (T,)."""
    total = config.epochs * steps_per_epoch
    factor = lr_lambda(config, total)
    return np.array([config.lr * factor(t) for t in range(total)])

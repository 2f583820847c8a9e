"""Train a model: one loop for every paper, with precision, several processes, resume and history.

    config = TrainConfig(epochs=20, lr=6e-5, batch_size=64)
    history = fit(model, loader, config, folder, validate=lambda model: {"mR": ...})

A model has `loss(batch) -> {"loss": total, <term>: ...}` (scalar tensors). It may have
`parameter_groups(weight_decay)`, where "rate" is a group's share of the learning rate, and
`after_step()`, called after each update. USES_ALL_PARAMETERS = True says that each step gives every
trainable parameter a gradient. What stays frozen has requires_grad False before `fit`; a model that
keeps frozen parts in eval mode overrides `train()`. Accelerate runs precision and processes.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import skip_first_batches
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from nbhelpers.code_identity import code_digest
from nbhelpers.data.loaders import sent_as_bytes
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.keys import key_digest
from nbhelpers.towers import checkpoints
from nbhelpers.training import cached_gradients
from nbhelpers.training.device import matrix_products
from nbhelpers.training.distributed import (
    accelerator,
    broadcast_from_main,
    check_loader,
    one_run_at_a_time,
    process_state,
)
from nbhelpers.training.memory import recompute_blocks
from nbhelpers.training.prefetch import prefetched
from nbhelpers.training.resume_files import StateWriter
from nbhelpers.training.schedule import History, TrainConfig, learning_rates, lr_lambda

COMPILER = "inductor"  # of torch.compile
# build batches and write states beside the steps, also on a CPU, where they share the cores
AS_ON_A_GPU = False  # for tests
READ_EVERY = 20  # batches between two reads of the losses, which wait for the GPU; 1 on a CPU

__all__ = [
    "History",
    "TrainConfig",
    "checkpoint_key",
    "fit",
    "learning_rates",
    "load_or_train",
    "lr_lambda",
]


def fit(
    model: nn.Module,
    loader: Iterable[dict],
    config: TrainConfig,
    folder: Path | str,
    validate: Callable[[nn.Module], dict] | None = None,
    progress: bool = True,
    loss_options: dict | None = None,
) -> History:
    """Train `model` in place and leave it in eval mode; continue where an earlier call was stopped.

    loader         of dict batches, with len(): a DataLoader that drops its last batch or, in one
                   process, any sequence. If its order depends on nothing but `set_epoch(e)` (called
                   on loader, sampler and data set) and torch's global generator, a continued run is
                   the uninterrupted one, on a CPU bit for bit.
    folder         of all files of this training, also those of the stopped call
    validate       called after every epoch by every process, in eval mode without gradients; gives
                   figures, among them config.monitor. The best epoch is kept in
                   `folder/best.safetensors`.
    loss_options   keyword arguments of `model.loss`, such as the stage of a captioning model.

    Writes `history.csv`, TensorBoard events (counted in batches), `best.*` and `resume.pt`: trained
    weights, optimiser and progress, replaced atomically; on a GPU it is written beside the next
    steps. Randomness in `model.loss` must come from torch, seeded here from (seed, epoch, batch,
    process) before each batch; the caller's generators are left as they were. Several processes
    share every batch evenly; process 0 writes. With `accumulate` > 1 the loss is the mean over the
    batches of a step (the last of an epoch may have fewer); in-batch negatives stay within a batch.

    UserError: no batch, a loss that is not finite (with step and terms), a resume state of another
    training, a micro_batch for a model that has no `rows` and `losses`.
    """
    trainer = _Trainer(model, loader, config, Path(folder), validate, loss_options or {})
    device = trainer.device
    with (
        matrix_products(config.precision),
        torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type),
    ):
        return trainer.run(progress)


@dataclass
class Progress:
    """How far a training is; its resume state holds it.

    epoch, step     finished epochs and optimiser steps
    seen, images    batches and images of the current epoch
    seconds, sums   time of the current epoch, and sums of its loss terms over batches
    rows            of the history
    """

    epoch: int = 0
    step: int = 0
    seen: int = 0
    images: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)

    def next_epoch(self) -> Progress:
        """Return the start of the next epoch."""
        return Progress(self.epoch + 1, self.step, rows=self.rows)


class _Trainer:
    """The state of one training, and its steps."""

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        config: TrainConfig,
        folder: Path,
        validate: Callable[[nn.Module], dict] | None,
        loss_options: dict,
    ):
        self.model, self.config, self.folder, self.validate = model, config, folder, validate
        self.accelerator = accelerator(config.precision, model)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        check_loader(loader, self.accelerator.num_processes)
        cached_gradients.check(model, config.micro_batch)
        self.source, self.batches = loader, len(loader)
        self.loader: Any = loader
        # of a stream, Accelerate reads whole batches in one process and moves the parts itself
        stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
        self.beside = self.device.type == "cuda" or AS_ON_A_GPU
        self.ahead = self.beside and not stream
        if isinstance(loader, DataLoader):
            self.loader = self.accelerator.prepare(loader, device_placement=[stream])
        self.steps = math.ceil(self.batches / config.accumulate)
        self.factor = lr_lambda(config, config.epochs * self.steps)
        model.to(self.device)
        if self.device.type == "cuda":  # where convolutions are fastest so; nothing else changes
            model.to(memory_format=torch.channels_last)
        if config.recompute:
            recompute_blocks(model)
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, config.weight_decay),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self.peaks = [config.lr * group.get("rate", 1.0) for group in optimizer.param_groups]
        loss = _LossOf(model, loss_options)
        if config.compile:
            loss.compile(backend=COMPILER)
        self.network, self.optimizer = self.accelerator.prepare(loss, optimizer)
        self.settings = {
            **config.decisive(),
            "batches per epoch": self.batches,
            "loss options": repr(loss_options),
            "trained weights": _describe(model),
        }
        self.read_every = 1 if self.device.type == "cpu" else READ_EVERY
        self.progress = Progress()
        self.unread: list[Tensor] = []  # loss terms of batches, on the device
        self.micro_batch = 0  # pairs; 0: whole batches

    def run(self, progress: bool) -> History:
        with sent_as_bytes(self.source) as self.finish, StateWriter(self.beside) as self.writer:
            return self._run(progress)

    def _run(self, progress: bool) -> History:
        self._load()
        self.optimizer.zero_grad()  # the caller may have left gradients
        self.micro_batch = self._micro_batch()
        first = self.progress.epoch * self.batches + self.progress.seen
        self.board = (
            SummaryWriter(str(self.folder / "tensorboard"), purge_step=first) if self.main else None
        )
        self.bar = tqdm(
            total=self.config.epochs * self.batches,
            initial=first,
            unit="batch",
            disable=not (progress and self.main and _somebody_looks()),
        )
        try:
            while self.progress.epoch < self.config.epochs:
                self._train_epoch()
                self._end_epoch()
        finally:
            self.bar.close()
            if self.board:
                self.board.close()
            self.accelerator.free_memory()
        history = History(self.progress.rows, self.config.monitor)
        if history.best_epoch and self.config.keep == "best":
            self.accelerator.wait_for_everyone()  # until process 0 has written it
            checkpoints.load_into(
                self.model, checkpoints.load_checkpoint(self.folder / "best.safetensors")[0]
            )
            # until all have read it, as process 0 may remove it now
            self.accelerator.wait_for_everyone()
        self.model.eval()
        return history

    def _train_epoch(self):
        config = self.config
        self.model.train()
        self.bar.set_description(f"epoch {self.progress.epoch + 1}/{config.epochs}", refresh=False)
        self.clock = time.perf_counter() - self.progress.seconds
        for batch in self._remaining():
            last = self.progress.seen + 1 == self.batches
            update = last or (self.progress.seen + 1) % config.accumulate == 0
            group = min(
                config.accumulate,
                self.batches - self.progress.seen // config.accumulate * config.accumulate,
            )
            with self._attention():
                if self.micro_batch and _pairs(batch) > self.micro_batch:
                    self._backward_in_parts(batch, group, update)
                else:
                    self._backward(batch, group, update)
            if update:
                self._update()
                if (
                    config.save_every_steps
                    and self.progress.step % config.save_every_steps == 0
                    and not last
                ):
                    self._settle()
                    self._save()

    def _backward(self, batch: dict[str, Tensor], group: int, update: bool):
        """Add the gradients of one of `group` batches of an optimiser step."""
        self._seed_batch()
        with self._synchronised(update):
            terms = self.network(batch)
            self._note(terms, _pairs(batch))
            self.accelerator.backward(terms["loss"] / group)

    def _backward_in_parts(self, batch: dict[str, Tensor], group: int, update: bool):
        """As `_backward`, with the memory of one micro-batch."""
        with self.accelerator.autocast():
            terms, gradients = cached_gradients.whole_loss(
                self.model, batch, self.micro_batch, self._seed_batch
            )
        parts = list(cached_gradients.parts(batch, self.micro_batch))
        for number, (at, part) in enumerate(parts):
            last = number + 1 == len(parts)
            self._seed_batch(number)
            with self._synchronised(update and last):
                share = self.network(part, gradients.part(at, last))
                self.accelerator.backward(share["loss"] / group)
        self._note(terms, _pairs(batch))

    def _synchronised(self, update: bool):
        """Average gradients over processes in the last backward pass of an optimiser step only."""
        return nullcontext() if update else self.accelerator.no_sync(self.network)

    def _seed_batch(self, *micro_batch: int):
        """Seed torch's generators for the batch, or for one of its micro-batches."""
        place = self.progress.epoch, self.progress.seen, self.accelerator.process_index
        _seed(self.device, self.config.seed, *place, *micro_batch)

    def _micro_batch(self) -> int:
        """Return the pairs of a micro-batch; for "auto" the most that fit into the GPU."""
        wish = self.config.micro_batch
        if wish not in ("whole", "auto"):
            return int(wish)
        if wish == "whole" or self.device.type != "cuda":
            return 0
        batch = self.finish(send_to_device(next(iter(self.loader)), self.device))
        fits = cached_gradients.largest_that_fits(partial(self._try, batch), _pairs(batch))
        smallest = self.accelerator.gather(torch.tensor([fits], device=self.device)).min()
        return int(smallest)

    def _try(self, batch: dict[str, Tensor], size: int):
        """Train on a part of a batch without a step, beside room for the optimiser's state."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        room = [] if self.optimizer.state else [torch.empty_like(p) for p in trained * 2]
        part = next(cached_gradients.parts(batch, size))[1]
        try:
            self.model.train()
            with self.accelerator.autocast():
                rows = self.model.rows(part)
                sum(values.float().sum() for values in rows.values()).backward()
        finally:
            del room
            self.optimizer.zero_grad()

    def _attention(self):
        """Choose attention as plain products in bf16 on a CPU.

        There the fused kernel's backward pass is slow (torch 2.15; bench_training).
        """
        plain = self.device.type == "cpu" and self.config.precision == "bf16"
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    def _remaining(self) -> Iterator[dict]:
        """Return the batches of this epoch that were not yet seen, on the device."""
        parts = [
            getattr(self.source, name, None) for name in ("sampler", "batch_sampler", "dataset")
        ]
        for part in (self.source, *parts):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.progress.epoch)
        # for samplers that draw from torch's generator
        _seed(self.device, self.config.seed, self.progress.epoch)
        batches, seen = self.loader, self.progress.seen
        if isinstance(batches, DataLoader):
            batches.set_epoch(self.progress.epoch)
            batches = skip_first_batches(batches, seen) if seen else batches
        else:
            batches = islice(batches, seen, None)
        if self.ahead:
            arrived = prefetched(batches, self.device)
        else:
            arrived = (send_to_device(batch, self.device) for batch in batches)
        return map(self.finish, arrived)

    def _note(self, terms: dict[str, Tensor], images: int):
        """Keep the terms of one batch on the device until `_read`."""
        if not self.progress.sums:
            self.progress.sums = dict.fromkeys(terms, 0.0)
        self.unread.append(
            torch.stack([terms[name].detach().float() for name in self.progress.sums])
        )
        self.progress.seen += 1
        self.progress.images += images * self.accelerator.num_processes
        self.bar.update()
        if len(self.unread) == self.read_every:
            self._read()

    def _read(self):
        """Add the unread terms, averaged over processes, to the epoch's sums.

        This waits for the GPU.
        """
        if not self.unread:
            return
        table = self.accelerator.reduce(torch.stack(self.unread), "mean").tolist()
        first, self.unread = self.progress.seen - len(table), []
        for number, values in enumerate(table, first):
            terms = dict(zip(self.progress.sums, values, strict=True))
            bad = ", ".join(
                f"{name} {value}" for name, value in terms.items() if not math.isfinite(value)
            )
            if bad:
                step = self.progress.epoch * self.steps + number // self.config.accumulate + 1
                raise self._not_finite("The loss", step, bad)
            for name, value in terms.items():
                self.progress.sums[name] += value
                if self.board:
                    self.board.add_scalar(
                        f"train/{name}", value, self.progress.epoch * self.batches + number
                    )
        if not self.bar.disable:
            speed = self.progress.images / (time.perf_counter() - self.clock)
            shown = {"loss": f"{terms['loss']:.3f}", "images/s": f"{speed:.0f}"}
            self.bar.set_postfix(shown, refresh=False)  # other terms would leave the bar no room

    def _update(self):
        if self.config.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(self.progress.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        if hasattr(self.model, "after_step"):
            self.model.after_step()

    def _settle(self):
        """Check that the weights are finite: a finite loss can have a gradient that is not."""
        self._read()
        self.progress.seconds = time.perf_counter() - self.clock
        norm = torch.nn.utils.get_total_norm(
            [p.detach() for p in self.model.parameters() if p.requires_grad]
        )
        if not norm.isfinite():
            raise self._not_finite("The norm of the weights", self.progress.step, str(norm.item()))

    def _not_finite(self, what: str, step: int, detail: str) -> UserError:
        return UserError(
            f"{what} is not finite at step {step} ({detail}); {self.folder} keeps its last good "
            f"state: in another folder try a smaller lr than {self.config.lr}, clip_norm=1.0 or "
            "precision='fp32'."
        )

    def _end_epoch(self):
        self._settle()
        row = {
            "epoch": self.progress.epoch + 1,
            "steps": self.progress.step,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        row |= {name: value / self.progress.seen for name, value in self.progress.sums.items()}
        if self.validate:
            row |= self._validated(self.validate)
        row |= {
            "seconds": self.progress.seconds,
            "images_per_second": self.progress.images / self.progress.seconds,
        }
        self.progress.rows.append(row)
        if (
            self.main
            and History(self.progress.rows, self.config.monitor).best_epoch == row["epoch"]
        ):
            meta = {"config": asdict(self.config), "history": self.progress.rows}
            checkpoints.save_checkpoint(self.folder / "best.safetensors", self.model, meta)
        if self.board:
            for name in row.keys() - self.progress.sums.keys() - {"epoch", "steps"}:
                self.board.add_scalar(
                    f"epoch/{name}", row[name], (self.progress.epoch + 1) * self.batches - 1
                )
        self.progress = self.progress.next_epoch()
        self._save()
        self._write_table()

    def _validated(self, validate: Callable[[nn.Module], dict]) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            figures = {name: float(value) for name, value in validate(self.model).items()}
        if self.config.monitor not in figures or not all(map(math.isfinite, figures.values())):
            raise UserError(
                f"The validation after epoch {self.progress.epoch + 1} gives {figures}; it must "
                f"give finite numbers, among them {self.config.monitor} (`monitor` names another)."
            )
        return {f"val_{name}": value for name, value in figures.items()}

    def _save(self):
        # accelerator.save_state would write a folder, which cannot be replaced atomically, with
        # every frozen weight in it.
        if not self.main:
            return
        scaler = self.accelerator.scaler
        state = {
            "settings": self.settings,
            "model": _trained_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "progress": asdict(self.progress),
        }
        self.writer.write(self.folder / "resume.pt", state)

    def _load(self):
        path = self.folder / "resume.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a resume state; delete it to train from the start."
            ) from error
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise UserError(
                    f"{path} belongs to another training ({name}: {settings.get(name)} there, "
                    f"{value} here); choose another folder or delete the file."
                )
        # all but the frozen; names were compared
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self._write_table()

    def _write_table(self):
        if self.main and self.progress.rows:
            with atomic_write(self.folder / "history.csv") as temporary:
                pd.DataFrame(self.progress.rows).to_csv(temporary, index=False)


class _LossOf(nn.Module):
    """Compute the loss in `forward`, where DDP and mixed precision have their hooks."""

    def __init__(self, model: nn.Module, options: dict):
        super().__init__()
        self.model, self.options = model, options

    def forward(
        self, batch: dict, gradients: cached_gradients.Gradients | None = None
    ) -> dict[str, Tensor]:
        if gradients is None:
            return self.model.loss(batch, **self.options)
        return {"loss": cached_gradients.stand_in_loss(self.model, batch, gradients)}


def _pairs(batch: dict[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return the model's own groups, or one group of all trainable parameters with decay.

    UserError if the model has no trainable parameter, or its groups leave one out.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError(
            f"No parameter of {type(model).__name__} is trainable; unfreeze a part of it."
        )
    if not hasattr(model, "parameter_groups"):
        return [{"params": list(trained.values()), "weight_decay": weight_decay}]
    groups = [
        {**group, "params": list(group["params"])} for group in model.parameter_groups(weight_decay)
    ]
    grouped = {id(p) for p in chain.from_iterable(group["params"] for group in groups)}
    left_out = [name for name, p in trained.items() if id(p) not in grouped]
    if left_out:
        raise UserError(
            f"parameter_groups of {type(model).__name__} leaves out {len(left_out)} trainable "
            f"parameters (first: {left_out[0]}); freeze them or put them into a group."
        )
    return groups


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return buffers and trainable parameters; the caller's `build` makes the frozen ones."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def _describe(model: nn.Module) -> str:
    shapes = [(name, tuple(value.shape)) for name, value in _trained_state(model).items()]
    return f"{len(shapes)} tensors {hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]}"


def _seed(device: torch.device, *numbers: int) -> None:
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    # the latter takes 0.5 ms
    (torch.default_generator if device.type == "cpu" else torch).manual_seed(seed)


def _somebody_looks() -> bool:
    """Tell whether there is a terminal or a live notebook.

    A headless run of notebooks sets CI or TQDM_DISABLE.
    """
    if os.environ.get("CI") or os.environ.get("TQDM_DISABLE"):
        return False
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stderr.isatty() or (shell is not None and "IPKernelApp" in shell.config)


def checkpoint_key(configs: Iterable, data: object, start: object, seed: int, *code: object) -> str:
    """Return sha256 hex over all that decides the weights: equal keys, equal training.

    configs  dataclasses or JSON values: of the model, the training, the transforms, and what else
             was chosen
    data     what the pairs are made of: `content()` of a task, or a digest of the batches
             themselves
    start    what the training starts from: `Start.content()`, or the key of an earlier stage
    code     what trains, beside `load_or_train`: the class of the model and all that is called from
             here, such as the loss and the validation; as `code_digest` takes it, also as the text
             of cells
    Versions of libraries, device, number of workers and the places of files do not count.
    """
    return key_digest(list(configs), data, start, seed, code_digest(load_or_train, *code))


@dataclass(frozen=True)
class Options:
    """What a training may have beside its settings.

    validate      as in `fit`
    loss_options  as in `fit`
    meta          more metadata of the checkpoint
    """

    validate: Callable[[nn.Module], dict] | None = None
    loss_options: dict | None = None
    meta: dict = field(default_factory=dict)


def load_or_train(
    name: str,
    build: Callable[[], nn.Module],
    loader: Iterable[dict],
    config: TrainConfig,
    folder: Path | str,
    key: str,
    options: Options | None = None,
) -> tuple[nn.Module, History, bool]:
    """Return the trained model in eval mode, its history, and whether it was trained now.

    `build()` gives the model at its starting weights. A finished
    `<folder>/<name>-<key>/model.safetensors` is loaded, else the model is trained there (from where
    a stopped run left off) and saved. What is printed and the state of torch's generators are the
    same then. Of two runs with one key the second waits, then loads. The model is left on the
    device of the run (`device.use`).
    """
    options = options or Options()
    home = Path(folder) / f"{name}-{key[:16]}"
    checkpoint = home / "model.safetensors"
    model = build()
    state = process_state()
    with one_run_at_a_time(Path(f"{home}.lock"), name):
        trained = broadcast_from_main(not checkpoint.exists())
        if trained:
            history = fit(
                model, loader, config, home, options.validate, loss_options=options.loss_options
            )
            if state.is_main_process:
                about: dict[str, Any] = {"name": name, "key": key, "config": asdict(config)}
                about |= {"history": history.rows} | options.meta
                checkpoints.save_checkpoint(checkpoint, model, about)
                for leftover in (home / "resume.pt", *home.glob("best.*"), *home.glob(".*")):
                    leftover.unlink(missing_ok=True)
        else:
            tensors, about = checkpoints.load_checkpoint(checkpoint)
            if about.get("key") != key:
                raise UserError(
                    f"{checkpoint} belongs to another training than its folder says; delete {home}"
                    " and run again."
                )
            checkpoints.load_into(model, tensors)
            history = History(about["history"], config.monitor)
            model.to(state.device).eval()
    if state.is_main_process:
        print(f"{name}: {history}")
    return model, history, trained

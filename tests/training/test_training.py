"""The training loop: schedules, resume, refusals, load-or-train.

As a script this file is what is killed.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import two_processes
from closeness import assert_close
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

import nbhelpers
from nbhelpers.errors import UserError
from nbhelpers.towers import checkpoints
from nbhelpers.training import loop, prefetch
from nbhelpers.training.loop import Options, fit, load_or_train
from nbhelpers.training.resume_files import StateWriter
from nbhelpers.training.schedule import History, TrainConfig, learning_rates

CONFIG = TrainConfig(epochs=3, lr=0.02, batch_size=4, accumulate=2, warmup_fraction=0.2)
# As in the killed processes: the number of threads changes the order of sums, and with it the last
# bits.
pytestmark = pytest.mark.usefixtures("one_thread")


class Toy(nn.Module):
    """Dropout, batch-norm buffers, a frozen part and groups of its own."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.frozen, self.norm = nn.Linear(6, 6).requires_grad_(False), nn.BatchNorm1d(6)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, 1)
        with torch.no_grad():
            for p in (*self.frozen.parameters(), *self.head.parameters()):
                p.copy_(torch.randn(p.shape, generator=generator))

    def loss(self, batch):
        found = self.head(self.drop(self.norm(self.frozen(batch["pixels"]))))[:, 0]
        error = (found - batch["target"]).abs().mean()
        return {"loss": error + 0.5 * error**2, "error": error}

    def parameter_groups(self, weight_decay):
        return [
            {"params": self.norm.parameters(), "weight_decay": 0.0},
            {"params": self.head.parameters(), "weight_decay": weight_decay, "rate": 0.5},
        ]


class Mean(nn.Module):
    """A loss without randomness, the mean over pairs."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((6,), 0.5)), nn.Parameter(torch.zeros(1))

    def loss(self, batch, scale=1.0):
        return {
            "loss": (
                scale
                * (batch["pixels"] @ self.weight + self.bias - batch["target"]).square().mean()
            )
        }


def always(figures: dict):
    """A validation that gives these figures for every model."""

    def validate(model):
        return figures

    return validate


def loader(pairs=30, batch_size=4, shuffle=True):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(pairs, 6, generator=generator)
    rows = [{"pixels": row, "target": row.sum()} for row in pixels]
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, drop_last=True)


def validate(model):
    return {"mR": 100 * float(model.head.bias.sin()), "i2t_R@1": 1.0}


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(history):
    return history.table().drop(columns=["seconds", "images_per_second"])


# ---- schedules
def test_linear_schedule_is_the_released_one():
    with np.load(
        Path(__file__).parents[1] / "reference/pir/lr_linear.npz", allow_pickle=False
    ) as file:
        for name, spec in json.loads(str(file["meta"]))["specs"].items():
            config = TrainConfig(
                spec["epochs"], spec["lr"], warmup_fraction=spec["warmup_fraction"]
            )
            rates = learning_rates(config, spec["step_per_epoch"])
            np.testing.assert_allclose(rates, file[f"output/{name}"], rtol=1e-6)


def test_cosine_schedule_is_that_of_open_clip():
    config = TrainConfig(1, 5e-4, schedule="cosine", warmup_fraction=1 / 3)
    expected = [1 / 3, 2 / 3, 1.0, *(0.5 * (1 + math.cos(math.pi * t / 6)) for t in range(6))]
    np.testing.assert_allclose(learning_rates(config, 9), 5e-4 * np.array(expected))


def test_constant_schedule_warms_up_and_stays():
    config = TrainConfig(1, 2.0, schedule="constant", warmup_fraction=0.5)
    np.testing.assert_allclose(learning_rates(config, 4), [0, 1, 2, 2])


def test_warmup_in_steps_takes_the_place_of_the_fraction():
    config = TrainConfig(1, 2.0, schedule="constant", warmup_fraction=0.5, warmup_steps=3)
    np.testing.assert_allclose(learning_rates(config, 8), [0, 2 / 3, 4 / 3, 2, 2, 2, 2, 2])
    np.testing.assert_allclose(learning_rates(replace(config, warmup_steps=0), 2), [2, 2])
    # than the training: it never reaches its peak
    longer = replace(config, schedule="cosine", warmup_steps=20)
    np.testing.assert_allclose(learning_rates(longer, 4), [0.1, 0.2, 0.3, 0.4])


def test_step_schedule_falls_with_every_twentieth_epoch():
    config = TrainConfig(45, 2e-4, schedule="step", warmup_fraction=0.0)
    expected = 2e-4 * 0.7 ** np.repeat([0, 1, 2], [19 * 3, 20 * 3, 6 * 3])
    np.testing.assert_allclose(learning_rates(config, 3), expected)
    halved = replace(config, epochs=4, lr=1.0, step_epochs=2, step_factor=0.5)
    np.testing.assert_allclose(learning_rates(halved, 1), [1, 0.5, 0.5, 0.25])


def test_the_optimiser_gets_rates_groups_and_settings(tmp_path):
    seen, kept = [], ("lr", "weight_decay", "betas", "eps")
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append(
            [{key: group[key] for key in kept} for group in optimizer.param_groups]
        )
    )
    try:
        fit(
            Toy(), loader(), replace(CONFIG, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3), tmp_path
        )
    finally:
        hook.remove()
    rates = learning_rates(CONFIG, 4)  # 7 batches per epoch, 2 per step, the last step of one batch
    assert len(seen) == len(rates) == 12
    for groups, rate in zip(seen, rates, strict=True):
        assert groups == [
            dict(zip(kept, (rate * share, decay, (0.8, 0.9), 1e-6), strict=True))
            for share, decay in ((1.0, 0.0), (0.5, 0.3))
        ]


# ---- one loop
def test_history_best_checkpoint_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, figures = Mean(), iter([10.0, 30.0, 30.0])
    snapshots = []

    def told(model):
        assert not model.training and not torch.is_grad_enabled()
        snapshots.append(weights_of(model))
        return {"mR": next(figures)}

    history = fit(model, loader(), replace(CONFIG, accumulate=1), tmp_path, told)
    assert history.best_epoch == 2 and [row["val_mR"] for row in history.rows] == [10, 30, 30]
    assert equal(weights_of(model), snapshots[1]) and not equal(snapshots[1], snapshots[2])
    state, meta = checkpoints.load_checkpoint(tmp_path / "best.safetensors")
    assert equal(state, snapshots[1]) and meta["history"] == history.rows[:2]
    table = pd.read_csv(tmp_path / "history.csv")
    pd.testing.assert_frame_equal(table, history.table(), check_dtype=False)
    assert table.steps.tolist() == [7, 14, 21] and table.loss.is_monotonic_decreasing
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == list(range(21))
    assert np.mean([scalar.value for scalar in scalars[:7]]) == pytest.approx(
        table.loss[0], rel=1e-5
    )
    assert [scalar.value for scalar in events.Scalars("epoch/val_mR")] == [10, 30, 30]


def test_keep_last_leaves_the_last_weights(tmp_path):
    figures, snapshots, model = iter([30.0, 10.0, 10.0]), [], Mean()
    fit(
        model,
        loader(),
        replace(CONFIG, keep="last"),
        tmp_path,
        lambda m: snapshots.append(weights_of(m)) or {"mR": next(figures)},
    )
    assert equal(weights_of(model), snapshots[2]) and not equal(snapshots[0], snapshots[2])


def test_accumulated_batches_are_one_large_batch(tmp_path):
    config = TrainConfig(epochs=2, lr=0.1, warmup_fraction=0.0)
    small, large = Mean(), Mean()  # of 28 pairs: three steps of 8, then one of 4
    fit(small, loader(28, 4, shuffle=False), replace(config, accumulate=2), tmp_path / "small")
    fit(large, batches_of(28, 8), config, tmp_path / "large")
    for name, value in weights_of(small).items():
        assert_close(value, weights_of(large)[name])


def batches_of(pairs, size):
    """The rows of `loader` as a plain list of batches, the last one smaller."""
    return list(DataLoader(loader(pairs).dataset, batch_size=size))


def test_gradients_that_the_caller_left_do_not_count(tmp_path):
    clean, used = Mean(), Mean()
    used.loss(batches_of(4, 4)[0])["loss"].backward()
    for name, model in (("clean", clean), ("used", used)):
        fit(model, loader(), CONFIG, tmp_path / name)
    assert equal(weights_of(clean), weights_of(used))


def test_gradients_are_clipped(tmp_path):
    norms = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: norms.append(
            torch.nn.utils.get_total_norm(
                [p.grad for g in optimizer.param_groups for p in g["params"]]
            ).item()
        )
    )
    try:
        fit(Mean(), loader(), replace(CONFIG, clip_norm=0.1), tmp_path / "clipped")
        clipped, norms = norms[:], []
    finally:
        hook.remove()
    assert clipped and max(clipped) <= 0.1 * 1.001


def test_stages_train_their_own_parts(tmp_path):
    class Captioner(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(6, 1)

        def loss(self, batch, stage):
            self.stages = getattr(self, "stages", set()) | {stage}
            found = self.decoder(self.encoder(batch["pixels"]))[:, 0]
            return {"loss": (found - batch["target"]).square().mean()}

    model = Captioner()
    for stage, frozen in ((1, model.decoder), (2, model.encoder)):
        model.requires_grad_(True)
        frozen.requires_grad_(False)
        before = weights_of(model)
        fit(model, loader(), CONFIG, tmp_path / str(stage), loss_options={"stage": stage})
        held = "decoder" if stage == 1 else "encoder"
        for name, value in weights_of(model).items():
            assert torch.equal(value, before[name]) == name.startswith(held)
        saved = torch.load(tmp_path / str(stage) / "resume.pt")["model"]
        assert saved and not any(name.startswith(held) for name in saved)
    assert model.stages == {1, 2}


def test_precisions_follow_one_another_in_one_process(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16", "fp32"):
        model = Toy()
        history = fit(model, loader(), replace(CONFIG, precision=precision), tmp_path / precision)
        losses[precision] = history.rows[0]["loss"]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"] and losses["bf16"] == pytest.approx(
        losses["fp32"], rel=0.02
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_in_bf16_on_a_cpu_goes_without_the_fused_kernel(tmp_path, precision):
    """Its backward pass is slow there (bench_training); afterwards, and in fp32, it serves as
    before.
    """
    model, fused = Toy(), []
    model.loss = lambda batch: (
        fused.append(torch.backends.cuda.flash_sdp_enabled()) or Toy.loss(model, batch)
    )
    fit(model, loader(), replace(CONFIG, precision=precision, epochs=1), tmp_path)
    assert set(fused) == {precision == "fp32"} and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_a_gpu(tmp_path, precision):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    config = replace(CONFIG, precision=precision, epochs=8)
    history = fit(Toy(), loader(), config, tmp_path, validate)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    again = fit(Toy(), loader(), config, tmp_path, validate)
    assert again.rows == history.rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU has fp16")
def test_fp16_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(UserError, match="fp16.*CUDA"):
        fit(Toy(), loader(), replace(CONFIG, precision="fp16"), tmp_path)


def test_the_generators_of_the_caller_are_untouched_and_do_not_matter(tmp_path):
    results = []
    for number in (1, 2):
        torch.manual_seed(number)
        expected = torch.Generator().manual_seed(number)
        model = Toy()
        torch.manual_seed(number)
        fit(model, loader(), CONFIG, tmp_path / str(number))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
        results.append(weights_of(model))
    results = [
        {k: v for k, v in result.items() if not k.startswith("frozen")} for result in results
    ]
    assert equal(*results)
    other = Toy()
    fit(other, loader(), replace(CONFIG, seed=1), tmp_path / "seed")
    assert not torch.equal(other.head.weight, results[0]["head.weight"])


def test_the_bar_shows_the_loss_and_images_per_second_where_somebody_looks(
    tmp_path, monkeypatch, capsys
):
    fit(Toy(), loader(), CONFIG, tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    for name in ("CI", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fit(Toy(), loader(), CONFIG, tmp_path / "shown")
    shown = capsys.readouterr().err
    assert "epoch 3/3" in shown and "loss=" in shown and "images/s=" in shown
    assert "error=" not in shown, "the other terms would leave no room for the bar"
    monkeypatch.setenv("TQDM_DISABLE", "1")
    fit(Toy(), loader(), CONFIG, tmp_path / "headless")
    assert capsys.readouterr() == ("", "")


# ---- what is refused
class TwoTerms(Mean):
    def loss(self, batch):
        loss = super().loss(batch)["loss"]
        return {"loss": loss, "fine": loss}


class Bad(TwoTerms):
    """Its loss, or only its gradient, stops being finite at a batch."""

    def __init__(self, batch, what):
        super().__init__()
        self.batch, self.what, self.count = batch, what, 0

    def loss(self, batch):
        self.count += 1
        terms = super().loss(batch)
        if self.count != self.batch:
            return terms
        # the root of 0 is 0, with a gradient that is not a number
        root = (self.bias * 0).sum().sqrt()
        return {
            **terms,
            "loss": terms["loss"] * torch.inf if self.what == "loss" else terms["loss"] + root,
        }


def test_a_loss_that_is_not_finite_stops_and_the_last_state_stays(tmp_path):
    model, config = Bad(12, "loss"), replace(CONFIG, epochs=2)
    with pytest.raises(
        UserError, match=r"loss is not finite at step 7 \(loss inf\).*smaller lr"
    ) as error:
        fit(model, loader(), config, tmp_path)
    assert "fine" not in str(error.value)
    assert all(p.isfinite().all() for p in model.parameters())
    progress = torch.load(tmp_path / "resume.pt")["progress"]
    assert progress["epoch"] == 1 and len(pd.read_csv(tmp_path / "history.csv")) == 1
    assert fit(TwoTerms(), loader(), config, tmp_path).rows[0] == progress["rows"][0]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    config = TrainConfig(epochs=2, lr=0.01, warmup_fraction=0.0)
    with pytest.raises(UserError, match="norm of the weights is not finite at step 14"):
        fit(Bad(14, "gradient"), loader(), config, tmp_path)
    state = torch.load(tmp_path / "resume.pt")
    assert state["progress"]["epoch"] == 1 and all(
        v.isfinite().all() for v in state["model"].values()
    )


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_is_told_and_the_last_state_stays(tmp_path, monkeypatch, beside):
    monkeypatch.setattr(loop, "AS_ON_A_GPU", beside)
    save, calls = torch.save, []

    def full_at_the_second(state, file):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full_at_the_second)
    with pytest.raises(UserError, match="disk is full.*resume.pt"):
        fit(Toy(), loader(), CONFIG, tmp_path / "full")
    assert torch.load(tmp_path / "full/resume.pt")["progress"]["epoch"] == 1
    assert not list((tmp_path / "full").glob(".*"))


def test_a_resume_state_of_another_training_is_refused(tmp_path):
    fit(Toy(), loader(), CONFIG, tmp_path)
    with pytest.raises(UserError, match="lr: 0.02 there, 0.01 here"):
        fit(Toy(), loader(), replace(CONFIG, lr=0.01), tmp_path)
    with pytest.raises(UserError, match="batches per epoch"):
        fit(Toy(), loader(40), CONFIG, tmp_path)
    with pytest.raises(UserError, match="trained weights"):
        fit(Mean(), loader(), CONFIG, tmp_path)
    (tmp_path / "resume.pt").write_bytes(b"not a state")
    with pytest.raises(UserError, match="not a resume state"):
        fit(Toy(), loader(), CONFIG, tmp_path)


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(UserError, match="no batch"):
        fit(Toy(), loader(3), CONFIG, tmp_path)
    with pytest.raises(UserError, match="No parameter of Toy"):
        fit(Toy().requires_grad_(False), loader(), CONFIG, tmp_path)
    model = Toy()
    model.forgotten = nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="leaves out 1 trainable.*forgotten"):
        fit(model, loader(), CONFIG, tmp_path)
    for figures in ({"mR": math.nan}, {"other": 1.0}):
        with pytest.raises(UserError, match="among them mR"):
            fit(Toy(), loader(), CONFIG, tmp_path / str(len(figures)), always(figures))
    for change in (
        {"epochs": 0},
        {"schedule": "stairs"},
        {"precision": "fp8"},
        {"warmup_fraction": 2.0},
        {"warmup_steps": -1},
        {"step_epochs": 0},
        {"keep": "all"},
    ):
        with pytest.raises(UserError, match=next(iter(change))):
            replace(CONFIG, **change)


# ---- resume
class Killed(Toy):
    """Kills its process at a batch."""

    batch = 0

    def loss(self, batch):
        self.count = getattr(self, "count", 0) + 1
        if self.count == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(batch)


KILLS = {
    "within_an_epoch": 13,
    "without_states_within": 13,
    "in_the_first_epoch": 3,
    "while_saving": 0,
    "after_best": 0,
}


def config_of(kill):
    return replace(CONFIG, save_every_steps=0 if kill == "without_states_within" else 1)


def be_killed(kill: str, folder: Path):
    """Trains until killed: at a batch, half-way through writing the fifth state, or before writing
    one.
    """
    model = Killed()
    model.batch = KILLS[kill]
    if kill == "while_saving":
        save, calls = torch.save, []

        def half(state, file):
            calls.append(1)
            if len(calls) == 5:
                file.write(b"half a state")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            save(state, file)

        torch.save = half
    if kill == "after_best":
        loop._Trainer._save = lambda self: (
            self.progress.epoch == 2 and os.kill(os.getpid(), signal.SIGKILL)
        )
    fit(model, loader(), config_of(kill), folder / kill, validate)


MOMENTS = (
    2,
    5,
    9,
    14,
    18,
    21,
)  # batches at which a training is killed that writes beside its steps


def be_killed_beside(batch: int, folder: Path):
    """Trains until killed in this batch, whatever is being written then."""
    loop.AS_ON_A_GPU = True
    model = Killed()
    model.batch = batch
    fit(model, loader(), config_of("beside"), folder, validate)


def train_a_key(folder: Path, number: int):
    model, history, trained = load_or_train(
        "twice", Toy, loader(), CONFIG, folder, "a" * 64, Options(validate=validate)
    )
    state = {"trained": trained, "rows": history.rows, "model": model.state_dict()}
    torch.save(state, folder / f"twice{number}.pt")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder in which trainings were killed, and two runs trained the same key at once."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | two_processes.ENVIRONMENT
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    model = Toy()
    history = fit(model, loader(), CONFIG, tmp_path_factory.mktemp("uninterrupted"), validate)
    return weights_of(model), without_times(history)


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_training_goes_on_bit_for_bit(killed, uninterrupted, kill):
    folder, signals, _ = killed
    assert signals[kill] == signal.SIGKILL
    state = folder / kill / "resume.pt"
    before = torch.load(state)["progress"] if state.exists() else {"epoch": 0, "seen": 0}
    assert (before["epoch"], before["seen"]) == {
        "within_an_epoch": (1, 4),
        "without_states_within": (1, 0),
        "in_the_first_epoch": (0, 2),
        "while_saving": (1, 0),
        "after_best": (0, 0),
    }[kill]
    model = Killed()
    history = fit(model, loader(), config_of(kill), folder / kill, validate)
    batches = 21 - 7 * before["epoch"] - before["seen"]
    assert model.count == batches  # seen batches are not computed again
    assert equal(weights_of(model), uninterrupted[0])
    pd.testing.assert_frame_equal(without_times(history), uninterrupted[1], check_exact=True)
    table = pd.read_csv(folder / kill / "history.csv")
    pd.testing.assert_frame_equal(table, history.table(), check_dtype=False)
    assert history.rows[1]["seconds"] > 0


def test_a_state_written_beside_the_steps_is_that_of_its_time(tmp_path):
    value, nested = torch.zeros(3), torch.zeros(2)
    began, go = threading.Event(), threading.Event()
    with StateWriter(beside=True) as writer:
        writer._pool.submit(lambda: began.set() or go.wait(10))
        state = {"model": {"a": value}, "list": [nested, 1, (2, None)]}
        writer.write(tmp_path / "resume.pt", state)
        assert began.wait(10) and not (tmp_path / "resume.pt").exists()
        value += 1
        nested += 1
        go.set()
    state = torch.load(tmp_path / "resume.pt")
    assert not state["model"]["a"].any() and not state["list"][0].any()
    assert state["list"][1:] == [1, (2, None)]


@pytest.mark.parametrize("number", range(len(MOMENTS)))
def test_a_training_killed_at_any_moment_leaves_a_whole_state(killed, uninterrupted, number):
    """States are written beside the steps; which one is there depends on the moment."""
    folder, signals, _ = killed
    assert signals[f"beside{number}"] == signal.SIGKILL
    state = folder / f"beside{number}" / "resume.pt"
    before = torch.load(state)["progress"] if state.exists() else {"epoch": 0, "seen": 0}
    assert before["epoch"] * 7 + before["seen"] < MOMENTS[number] and before["seen"] % 2 == 0
    model = Killed()
    history = fit(model, loader(), config_of("beside"), folder / f"beside{number}", validate)
    assert equal(weights_of(model), uninterrupted[0])
    pd.testing.assert_frame_equal(without_times(history), uninterrupted[1], check_exact=True)


def test_two_runs_with_one_key_train_once(killed, uninterrupted):
    folder, _, output = killed
    states = [torch.load(folder / f"twice{number}.pt") for number in (0, 1)]
    assert sorted(state["trained"] for state in states) == [False, True]
    assert states[0]["rows"] == states[1]["rows"]
    assert all(equal(state["model"], uninterrupted[0]) for state in states)
    lines = [line for line in output.splitlines() if line.startswith("twice: ")]
    assert len(lines) == 2 and lines[0] == lines[1]


# ---- load or train
def test_a_run_names_the_file_that_was_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path))
    run = nbhelpers.start("20_pir")
    load_or_train(
        "toy", Toy, loader(), CONFIG, run.checkpoints, "d" * 64, Options(validate=validate)
    )
    assert (run.folder / run.checkpoint("toy", "d" * 64)).is_file()


def test_load_or_train_says_and_leaves_the_same_either_way(tmp_path, capsys):
    outcomes = []
    for _ in range(2):
        torch.manual_seed(0)
        model, history, trained = load_or_train(
            "toy", Toy, loader(), CONFIG, tmp_path, "f" * 64, Options(validate=validate)
        )
        outcomes.append(
            (
                trained,
                capsys.readouterr().out,
                history.rows,
                weights_of(model),
                torch.rand(1).item(),
                model.training,
            )
        )
    (first, *trained), (second, *loaded) = outcomes
    assert (first, second) == (True, False)
    assert trained[0] == loaded[0] and trained[0].startswith("toy: 3 epochs, loss ")
    assert trained[1] == loaded[1] and equal(trained[2], loaded[2]) and trained[3:] == loaded[3:]
    assert sorted(path.name for path in (tmp_path / f"toy-{'f' * 16}").iterdir()) == [
        "history.csv",
        "model.json",
        "model.safetensors",
        "tensorboard",
    ]
    assert load_or_train(
        "toy", Toy, loader(), CONFIG, tmp_path, "e" * 64, Options(validate=validate)
    )[2]


def test_a_checkpoint_of_another_training_is_refused_until_it_is_deleted(tmp_path):
    key, other = "a" * 64, "a" * 16 + "b" * 48
    load_or_train("toy", Toy, loader(), CONFIG, tmp_path, key, Options(validate=validate))
    with pytest.raises(
        UserError, match="belongs to another training than its folder says; delete"
    ) as error:
        load_or_train("toy", Toy, loader(), CONFIG, tmp_path, other, Options(validate=validate))
    shutil.rmtree(str(error.value).split("delete ")[1].removesuffix(" and run again."))
    assert load_or_train("toy", Toy, loader(), CONFIG, tmp_path, other, Options(validate=validate))[
        2
    ]


def test_history_in_words():
    rows = [{"epoch": 1, "loss": 2.0, "val_mR": 5.0}, {"epoch": 2, "loss": 1.0, "val_mR": 7.25}]
    assert (
        str(History(rows)) == "2 epochs, loss 2.000 to 1.000, best validation mR 7.25 after epoch 2"
    )
    assert str(History(rows, "CIDEr")) == "2 epochs, loss 2.000 to 1.000"


if __name__ == "__main__":
    # Each training in a fork, so that one start of Python serves all; nothing is computed before
    # the forks.
    folder, pids = Path(sys.argv[1]), {}
    for name, call in {
        **{kill: lambda kill=kill: be_killed(kill, folder) for kill in KILLS},
        **{
            f"beside{number}": lambda number=number: be_killed_beside(
                MOMENTS[number], folder / f"beside{number}"
            )
            for number in range(len(MOMENTS))
        },
        0: lambda: train_a_key(folder, 0),
        1: lambda: train_a_key(folder, 1),
    }.items():
        pids[name] = os.fork()
        if not pids[name]:
            call()
            sys.stdout.flush()
            os._exit(0)
    print(json.dumps({name: os.WTERMSIG(os.waitpid(pid, 0)[1]) for name, pid in pids.items()}))


# ---- batches built ahead
def test_batches_built_ahead_are_the_same_in_the_same_order():
    batches = [{"row": torch.arange(3) + 3 * number} for number in range(7)]
    found = list(prefetch.prefetched(iter(batches), torch.device("cpu")))
    assert [batch["row"].tolist() for batch in found] == [b["row"].tolist() for b in batches]
    assert list(prefetch.prefetched([], torch.device("cpu"))) == []


def test_an_error_while_building_ahead_is_raised_after_the_good_batches():
    def broken():
        yield {"row": torch.zeros(1)}
        raise UserError("image 7 is damaged")

    found = prefetch.prefetched(broken(), torch.device("cpu"))
    assert next(found)["row"].tolist() == [0.0]
    with pytest.raises(UserError, match="image 7 is damaged"):
        next(found)


def test_a_consumer_that_stops_ends_the_thread():
    built = []

    def endless():
        while True:
            built.append(len(built))
            yield {"row": torch.zeros(1)}

    found = prefetch.prefetched(endless(), torch.device("cpu"))
    next(found)
    found.close()
    assert len(built) <= 1 + 2 * prefetch.AHEAD
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_training_as_on_a_gpu_is_the_same_bit_by_bit(tmp_path, monkeypatch):
    """Batches are built ahead, and states written beside the steps."""
    weights = []
    for ahead in (False, True):
        monkeypatch.setattr(loop, "AS_ON_A_GPU", ahead)
        model = Toy()
        fit(model, loader(), CONFIG, tmp_path / str(ahead))
        weights.append(model.head.weight.detach().clone())
    assert torch.equal(*weights)

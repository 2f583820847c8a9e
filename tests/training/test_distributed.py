"""Two processes on the CPU train as one does.

As a script under torchrun this file is one of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import two_processes
from closeness import SINGLE, assert_close
from filelock import FileLock
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from nbhelpers.data.array_store import ArrayStore
from nbhelpers.errors import UserError
from nbhelpers.files import take
from nbhelpers.papers.bita import Aligner, BITAConfig, Captioner
from nbhelpers.papers.cfitr import CFITR, Captions, CFITRConfig
from nbhelpers.papers.pe_rsitr import PERSITR, PERSITRConfig
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.papers.pir_clip import PIRCLIP, PIRCLIPConfig
from nbhelpers.towers import checkpoints
from nbhelpers.training import distributed, loop
from nbhelpers.training.distributed import gather, rank, world_size
from nbhelpers.training.loop import Options, fit, load_or_train
from nbhelpers.training.schedule import TrainConfig

PAIRS, BATCH = 24, 8
CONFIG = TrainConfig(epochs=2, lr=0.01, batch_size=BATCH, schedule="constant", warmup_fraction=0.0)


class DualEncoder(nn.Module):
    """In-batch negatives with several captions per image, and one parameter that the loss does not
    use.
    """

    def __init__(self, one_sided=False, poison=False):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image, self.text, self.unused = nn.Linear(6, 5), nn.Linear(4, 5), nn.Linear(2, 2)
        self.temp = nn.Parameter(torch.tensor(0.2))
        self.one_sided, self.poison = one_sided, poison
        with torch.no_grad():
            for p in self.parameters():
                if p.dim():
                    p.copy_(torch.randn(p.shape, generator=generator))

    def rows(self, batch):
        image = F.normalize(self.image(batch["pixels"]), dim=1)
        return {"image": image, "text": F.normalize(self.text(batch["words"]), dim=1)}

    def loss(self, batch):
        return self.losses(self.rows(batch), batch)

    def losses(self, rows, batch):
        image, text = (gather(rows[name], self.one_sided) for name in ("image", "text"))
        index = gather(batch["image_index"])
        target = (index[:, None] == index).float()
        target = target / target.sum(1, keepdim=True)
        logits = image @ text.t() / self.temp
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
        if self.poison and rank() == world_size() - 1:
            loss = loss * torch.nan
        # differs between processes; its mean does not
        return {"loss": loss, "local": batch["pixels"].mean()}


class Broken(DualEncoder):
    """Stops in the second process alone."""

    def loss(self, batch):
        if rank() == 1:
            raise RuntimeError("in process 1 alone")
        return super().loss(batch)


def loader():
    generator = torch.Generator().manual_seed(0)
    pixels, words = (
        torch.randn(PAIRS, 6, generator=generator),
        torch.randn(PAIRS, 4, generator=generator),
    )
    pairs = [{"pixels": pixels[i], "words": words[i], "image_index": i // 3} for i in range(PAIRS)]
    return DataLoader(pairs, batch_size=BATCH, drop_last=True)


def trained(folder, config=CONFIG, **options):
    """Gradients at the first optimiser step, and the final weights of one training."""
    model, arrays = DualEncoder(**options), {}

    def note(*_):
        for name, p in model.named_parameters():
            if p.grad is not None:
                arrays.setdefault(f"grad/{name}", p.grad.clone().numpy())

    hook = register_optimizer_step_pre_hook(note)
    try:
        fit(model, loader(), config, folder, validate=lambda m: {"mR": float(-m.temp)})
    finally:
        hook.remove()
    return arrays | {f"weight/{name}": p.detach().numpy() for name, p in model.named_parameters()}


def variants(folder):
    return {
        "full": trained(folder / "full"),
        "one_sided": trained(folder / "one_sided", one_sided=True),
        "accumulated": trained(folder / "accumulated", replace(CONFIG, accumulate=2)),
        "cached": trained(folder / "cached", replace(CONFIG, micro_batch=3)),
        "cached, accumulated": trained(
            folder / "cached, accumulated", replace(CONFIG, micro_batch=3, accumulate=2)
        ),
    }


# ---- the five systems
def whole_pairs(length: int = 32) -> dict[str, torch.Tensor]:
    """Eight pairs of another image and another sentence each, all of them of one length."""
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(BATCH)
    return {
        "pixels": torch.randn(BATCH, 3, 112, 112, generator=generator),
        "image_index": row,
        "scene": row // 2,
        "row": row,
        "ids": torch.randint(5, 40, (BATCH, length), generator=generator),
        "mask": torch.ones(BATCH, length, dtype=torch.long),
    }


def cfitr() -> CFITR:
    pairs, row = whole_pairs(), np.arange(BATCH)
    return CFITR(CFITRConfig.tiny(40)).set_captions(
        Captions(row, row, {name: pairs[name].numpy() for name in ("ids", "mask")})
    )


SYSTEMS = {
    "pir": lambda: PIR(PIRConfig.tiny(40)),
    "pir_clip": lambda: PIRCLIP(PIRCLIPConfig.tiny()),
    "pe_rsitr": lambda: PERSITR(PERSITRConfig.tiny()),
    "cfitr": cfitr,
    "bita, stage 1": lambda: Aligner(BITAConfig.tiny(40, 40)),
    "bita, stage 2": lambda: Captioner(BITAConfig.tiny(40, 40)),
}


def trained_systems(folder: Path) -> dict[str, bool]:
    """Trains three steps of every system; whether its processes looked for parameters without a
    gradient.
    """
    pairs, looked = whole_pairs(), {}
    rows = [{name: value[row] for name, value in pairs.items()} for row in range(BATCH)]
    for name, make in SYSTEMS.items():
        trainer = loop._Trainer(
            make(),
            DataLoader(rows, 4, drop_last=True),
            replace(CONFIG, lr=1e-4),
            folder / name,
            None,
            {},
        )
        trainer.run(progress=False)
        looked[name] = trainer.network.find_unused_parameters
    return looked


# ---- waiting for each other
def meetings_until_the_lock_is_free(lock: Path) -> int:
    """How often the processes of a run meet while another one holds the lock; that one releases it
    before the third time.
    """
    other, count, told = FileLock(lock), 0, distributed.broadcast_from_main
    if rank() == 0:
        other.acquire()
        lock.write_text("process 7 on the moon")

    def counted(answer):
        nonlocal count
        count += 1
        if count == 2:
            other.release()
        return told(answer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "STEP", 0.1)
        patch.setattr(distributed, "broadcast_from_main", counted)
        with distributed.one_run_at_a_time(lock, "the toy"):
            assert not take(FileLock(lock), 0)
    return count


def trained_by_a_slow_reader(folder: Path) -> float:
    """The temperature that is best on validation, where process 1 reads the best epoch later than
    process 0.
    """
    read = checkpoints.load_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "load_checkpoint", lambda path: time.sleep(rank()) or read(path))
        model, _, _ = load_or_train(
            "slow",
            DualEncoder,
            loader(),
            CONFIG,
            folder,
            "k" * 64,
            Options(validate=lambda m: {"mR": float(-m.temp)}),
        )
    assert not list(folder.glob("slow-*/best.*"))
    return float(model.temp)


def features_computed(folder: Path) -> int:
    """Rows of features that this process computes; both ask for the same eight."""
    rows = []

    def function(indices):
        rows.extend(indices)
        return {"vision": np.float32(indices)[:, None]}

    found = ArrayStore.cached(folder, {"of": "both"}, list("abcdefgh"), function, 4)["vision"]
    assert found[:, 0].tolist() == list(range(8))
    return len(rows)


def process(folder: Path):
    """What each of the two processes does; at last one of them fails."""
    arrays = {
        f"{name}/{key}": a for name, found in variants(folder).items() for key, a in found.items()
    }
    arrays["gathered"] = gather(torch.arange(6).reshape(2, 3) + 10 * rank()).numpy()
    np.savez(folder / f"rank{rank()}.npz", **arrays)
    told, odd = {}, DataLoader([0] * 9, 3)
    for name, call in {
        "poison": lambda: trained(folder / "poison", poison=True),
        "list": lambda: fit(DualEncoder(), [{}], CONFIG, folder / "list"),
        "odd": lambda: fit(DualEncoder(), odd, CONFIG, folder / "odd"),
    }.items():
        with pytest.raises(UserError) as error:
            call()
        told[name] = str(error.value)
    for _ in range(2):
        told.setdefault("trained", []).append(
            load_or_train("toy", DualEncoder, loader(), CONFIG, folder, "k" * 64)[2]
        )
    told["meetings"] = meetings_until_the_lock_is_free(folder / "toy.lock")
    told["temperature"] = trained_by_a_slow_reader(folder)
    told["computed"] = features_computed(folder)
    told["looked"] = trained_systems(folder)
    (folder / f"rank{rank()}.json").write_text(json.dumps(told))
    fit(Broken(), loader(), CONFIG, folder / "broken")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of two processes, their standard output and error output."""
    folder = tmp_path_factory.mktemp("two")
    environment = os.environ | two_processes.ENVIRONMENT
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        __file__,
        str(folder),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert len(list(folder.glob("rank*.json"))) == 2, done.stderr[-4000:]
    assert done.returncode == 1  # Broken
    return folder, done.stdout, done.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, variants(folder)


def arrays_of(folder, number):
    with np.load(folder / f"rank{number}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("variant", ["full", "accumulated", "cached", "cached, accumulated"])
def test_gradients_and_weights_are_those_of_one_process(two, one, variant, number):
    found = arrays_of(two[0], number)
    for key, expected in one[1][variant].items():
        assert_close(found[f"{variant}/{key}"], expected, name=key)
    assert "full/grad/temp" in found and np.abs(found["full/grad/image.weight"]).max() > 1e-3


@pytest.mark.parametrize("variant", ["full", "one_sided", "accumulated"])
def test_losses_are_those_of_one_process(two, one, variant):
    found, expected = (pd.read_csv(folder / variant / "history.csv") for folder in (two[0], one[0]))
    # the gradients of the one-sided gather are smaller, so that only its first epoch is close
    rows = slice(0, 1) if variant == "one_sided" else slice(None)
    assert_close(found.loss[rows], expected.loss[rows], 1e-3 if variant == "one_sided" else SINGLE)
    assert_close(found.local, expected.local)
    assert (found.steps == expected.steps).all()


@pytest.mark.parametrize("number", [0, 1])
def test_cached_gradients_are_those_of_the_plain_step(two, number):
    found = arrays_of(two[0], number)
    for plain, cached in (("full", "cached"), ("accumulated", "cached, accumulated")):
        names = [key.removeprefix(f"{plain}/") for key in found if key.startswith(f"{plain}/")]
        for name in names:
            assert_close(found[f"{cached}/{name}"], found[f"{plain}/{name}"], name=name)


def test_one_sided_gather_divides_all_but_the_temperature_by_the_number_of_processes(two, one):
    found = arrays_of(two[0], 0)
    for key, expected in one[1]["full"].items():
        if key.startswith("grad/"):
            share = 1 if key == "grad/temp" else 2
            gradient = share * found[f"one_sided/{key}"]
            assert_close(gradient, expected, name=key)


def test_rows_are_gathered_in_rank_order(two):
    expected = np.concatenate([np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3) + 10])
    for number in (0, 1):
        np.testing.assert_array_equal(arrays_of(two[0], number)["gathered"], expected)


def test_every_process_tells_of_a_loss_that_is_bad_in_one(two):
    for number in (0, 1):
        told = json.loads((two[0] / f"rank{number}.json").read_text())
        assert "not finite at step 1 (loss nan)" in told["poison"]
        assert "torch DataLoader" in told["list"]
        assert "multiple of 2" in told["odd"]


def test_two_processes_train_once_and_print_once_each_time(two):
    folder, output, _ = two
    for number in (0, 1):
        assert json.loads((folder / f"rank{number}.json").read_text())["trained"] == [True, False]
    lines = [line for line in output.splitlines() if line.startswith("toy: 2 epochs")]
    assert len(lines) == 2 and lines[0] == lines[1]


def told_by(two) -> list[dict]:
    return [json.loads((two[0] / f"rank{number}.json").read_text()) for number in (0, 1)]


def test_no_process_waits_for_a_lock_in_one_long_collective(two):
    assert [told["meetings"] for told in told_by(two)] == [3, 3]
    assert two[2].count("Waiting until process 7 on the moon has finished the toy; it holds ") == 1


def test_the_best_epoch_stays_until_all_processes_have_read_it(two):
    first, second = (told["temperature"] for told in told_by(two))
    assert first == second


def test_features_are_computed_by_one_process(two):
    assert sorted(told["computed"] for told in told_by(two)) == [0, 8]


def test_only_the_model_that_leaves_parameters_out_makes_processes_look_for_them(two):
    for told in told_by(two):
        assert told["looked"] == {name: name == "bita, stage 1" for name in SYSTEMS}


def test_an_error_in_one_process_ends_both(two):
    assert two[2].count("RuntimeError: in process 1 alone") == 1


def test_a_single_process_gathers_nothing():
    tensor = torch.ones(2, requires_grad=True)
    assert gather(tensor) is tensor and gather(tensor, one_sided=True) is tensor
    assert world_size() == 1 and rank() == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    process(Path(sys.argv[1]))

"""One training step in two processes, compared with the whole step.

A test module starts its own file as the other process.

other = two_processes.fixture(__file__)               # in the module
first, second = two_processes.meet(other, half)       # in its test; half(rows) is what one of
    them does with its rows
if __name__ == "__main__":                            # what the other one runs
    two_processes.be_the_other(half)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn

from nbhelpers.training.distributed import world_size

Arrays = dict[str, np.ndarray]
HALVES = slice(0, 4), slice(4, 8)
SECONDS = 100  # that either waits for the other
TESTS = Path(__file__).parent
# of a process that runs a test file as a script
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
}


def one_step(model: nn.Module, batch: dict[str, Tensor]) -> Arrays:
    """Loss terms of a batch, and gradients as "grad/..."; over processes the mean of the gradients,
    as DDP takes it.
    """
    terms = model.loss(batch)
    terms["loss"].backward()
    arrays = {name: value.detach().numpy() for name, value in terms.items()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            if world_size() > 1:
                torch.distributed.all_reduce(p.grad)
            arrays[f"grad/{name}"] = (p.grad / world_size()).numpy()
    return arrays


def assert_alike(found: Arrays, expected: Arrays):
    assert set(found) == set(expected)
    # loss terms one by one, gradients and buffers together
    for kind in {key.split("/")[0] for key in expected}:
        part = {key: array for key, array in expected.items() if key.split("/")[0] == kind}
        assert_close({key: found[key] for key in part}, part)


def fixture(file: str):
    """The other process and the folder where both meet.

    It starts while the module's first tests run, and waits there for them.
    """

    @pytest.fixture(scope="module", autouse=True)
    def other(tmp_path_factory) -> Iterator[tuple[subprocess.Popen, Path]]:
        folder = tmp_path_factory.mktemp("two")
        environment = os.environ | ENVIRONMENT
        process = subprocess.Popen([sys.executable, file, str(folder)], env=environment)
        yield process, folder
        process.kill()
        process.wait()

    return other


def meet(
    other: tuple[subprocess.Popen, Path], half: Callable[[slice], Arrays]
) -> tuple[Arrays, Arrays]:
    """What the first and what the second process found."""
    process, folder = other
    (folder / "go").touch()
    first = _work(folder, 0, half)
    assert process.wait(timeout=SECONDS) == 0
    with np.load(folder / "other.npz") as file:
        return first, dict(file)


def be_the_other(half: Callable[[slice], Arrays]):
    folder, parent = Path(sys.argv[1]), os.getppid()
    while not (folder / "go").exists() and os.getppid() == parent:
        time.sleep(0.05)
    np.savez(folder / "other.npz", **_work(folder, 1, half))


def _work(folder: Path, number: int, half: Callable[[slice], Arrays]) -> Arrays:
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meet", timedelta(seconds=SECONDS), rank=number, world_size=2
    )
    try:
        return half(HALVES[number])
    finally:
        torch.distributed.destroy_process_group()

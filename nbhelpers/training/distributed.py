"""Train in several processes: gather negatives across them, share batches, wait for locks."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sized
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nbhelpers.errors import UserError
from nbhelpers.files import take
from nbhelpers.training.device import check_precision, resolve

# seconds between two meetings of processes that wait for a lock; their collectives give up after
# minutes
STEP = 5.0


def world_size() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process in 0..world_size()-1."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(tensor: Tensor, one_sided: bool = False) -> Tensor:
    """Gather (B, ...) of each process to (world * B, ...), rows in rank order.

    Every process has the same shape. By default gradients flow back to the rows of every process.
    When each process computes the same loss from the gathered rows and gradients are averaged over
    processes (as DDP does), the result is the gradient of a single process on the whole batch. With
    `one_sided`, as in PIR's released code, the rows of others are constants: the averaged gradient
    of all that lies before the gather is the true one / world size, while a temperature, which
    enters after it, keeps its full gradient. Any dtype; the identity in a single process.
    """
    if world_size() == 1:
        return tensor
    if not one_sided:
        return _Gather.apply(tensor)
    parts = _all_gather(tensor.detach())
    parts[rank()] = tensor
    return torch.cat(parts)


def _all_gather(tensor: Tensor) -> list[Tensor]:
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return parts


class _Gather(torch.autograd.Function):
    # As torch.distributed.nn.functional.all_gather, which is deprecated.
    @staticmethod
    def forward(ctx, tensor):
        ctx.rows = len(tensor)
        return torch.cat(_all_gather(tensor))

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def process_state() -> PartialState:
    """Return what Accelerate knows of this process, on the device of the run (`device.resolve`)."""
    device = resolve()
    if PartialState._shared_state and PartialState().device.type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes == 1:
        # left to itself, Accelerate takes another one where there are several
        state.device = device
    return state


def accelerator(precision: str, model: nn.Module | None = None) -> Accelerator:
    """Return the Accelerator of one training in a precision, on the device of the run.

    model  with USES_ALL_PARAMETERS = True each step gives all its trainable parameters a gradient;
    for
           another, several processes search in every step for those without
    UserError if the device has no such precision.
    """
    AcceleratorState._reset_state()  # a process may train twice, in different precisions
    state = process_state()
    check_precision(precision, state.device)
    search = not getattr(model, "USES_ALL_PARAMETERS", False)
    return Accelerator(
        mixed_precision=precision if precision in ("bf16", "fp16") else "no",
        cpu=state.device.type == "cpu",
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=search)],
    )


def check_loader(loader: Sized, processes: int) -> None:
    """Raise a UserError if the loader is empty or the processes cannot share its batches evenly."""
    if not len(loader):
        raise UserError(
            "The loader gives no batch: the data set is smaller than one batch; lower batch_size "
            "or take more data."
        )
    if processes == 1:
        return
    if not isinstance(loader, DataLoader):
        raise UserError(
            "Several processes only share a torch DataLoader; give one, or train in one process."
        )
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 0)
    if not size or size % processes:
        raise UserError(
            f"batch_size {size} cannot be shared by {processes} processes; make it a multiple of "
            f"{processes}."
        )


@contextmanager
def one_run_at_a_time(lock: Path, what: str):
    """Let only one run hold the lock; others wait and say for which process.

    It is released when its process dies. Process 0 of a run asks for it. All processes of a waiting
    run meet every STEP seconds: a process that waited for the lock's whole time in one collective
    would meet that one's timeout, and end the run.
    """
    state, held, seconds = process_state(), FileLock(lock), 0.0
    while not broadcast_from_main(state.is_main_process and take(held, seconds)):
        if state.is_main_process and not seconds:
            holder = lock.read_text() or "another process"
            print(
                f"Waiting until {holder} has finished {what}; it holds {lock}.",
                file=sys.stderr,
                flush=True,
            )
        seconds = STEP
    try:
        if state.is_main_process:
            lock.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
        state.wait_for_everyone()
    finally:
        held.release()


def broadcast_from_main(answer: bool) -> bool:
    """Return the answer of process 0, in every process."""
    state = process_state()
    if state.num_processes == 1:
        return answer
    shared = torch.tensor([answer], dtype=torch.uint8, device=state.device)
    dist.broadcast(shared, src=0)
    return bool(shared)

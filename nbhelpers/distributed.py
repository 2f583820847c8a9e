"""Several processes: in-batch negatives gathered across them, and what training needs of Accelerate."""
from __future__ import annotations

from collections.abc import Sized
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader

from nbhelpers.errors import UserError


def world_size() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process in 0..world_size()-1."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(tensor: Tensor, one_sided: bool = False) -> Tensor:
    """(B, ...) of each process -> (world * B, ...), rows in rank order; every process brings the same shape.

    By default gradients flow back to the rows of every process. When each process computes the same loss from
    the gathered rows and gradients are averaged over processes (as DDP does), the result is the gradient of a
    single process on the whole batch. With `one_sided`, as in the released code, the rows of others are
    constants: the averaged gradient of all that lies before the gather is the true one / world size, while a
    temperature, which enters after it, keeps its full gradient (pir.md section 5).
    Any dtype; the identity in a single process.
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
        return gradient[rank() * ctx.rows:(rank() + 1) * ctx.rows]


def accelerator(precision: str) -> Accelerator:
    """For one training in "fp32", "bf16" or "fp16". UserError for fp16 without a CUDA GPU."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision 'fp16' needs a CUDA GPU; use 'bf16' or 'fp32' here.")
    AcceleratorState._reset_state()  # a process may train twice, in different precisions
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision,
                       dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
                       kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])


def check_loader(loader: Sized, processes: int) -> None:
    """UserError if the loader is empty or its batches cannot be shared evenly by the processes."""
    if not len(loader):
        raise UserError("The loader gives no batch: the data set is smaller than one batch; lower batch_size "
                        "or take more data.")
    if processes == 1:
        return
    if not isinstance(loader, DataLoader):
        raise UserError("Several processes only share a torch DataLoader; give one, or train in one process.")
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 0)
    if not size or size % processes:
        raise UserError(f"batch_size {size} cannot be shared by {processes} processes; make it a multiple of "
                        f"{processes}.")


@contextmanager
def one_run_at_a_time(lock: Path):
    """Of several runs one enters, the next waits; a killed run lets go. Process 0 of a run holds the lock."""
    state = PartialState()
    with FileLock(lock) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        yield
        state.wait_for_everyone()

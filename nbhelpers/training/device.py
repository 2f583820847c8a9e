"""Choose where models are trained and used: cpu, cuda or mps (the GPU of an Apple computer)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from nbhelpers.errors import UserError

NAMES = ("auto", "cpu", "cuda", "mps")  # of the parameter DEVICE and of --device
# tf32: numbers of 32 bits, which products of matrices on a CUDA GPU read with 10 bits of mantissa
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
ENCODINGS = ("fp32", "bf16")  # of the parameter EVAL_PRECISION
_of_run: torch.device | None = None  # what `use` chose for this process
_encoding = "fp32"  # what `encode_in` chose for this process


def resolve(wish: str | torch.device = "auto") -> torch.device:
    """Return the device for `wish`, checked.

    wish  auto: what `use` chose for this process, else the first available of cuda, mps and cpu;
    one
          of the other NAMES, or one GPU of several, such as cuda:1
    UserError on an unknown name, and on a device that torch does not see.
    """
    if str(wish) == "auto":
        return _of_run if _of_run is not None and _is_there(_of_run) else _best()
    try:
        device = torch.device(wish)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in NAMES:
        raise UserError(f"The device is '{wish}'; choose one of {', '.join(NAMES)}.")
    if not _is_there(device):
        seen = "CUDA" if device.type == "cuda" else "Apple"
        raise UserError(
            f"The device is '{wish}', but torch sees no {seen} device of that name; "
            f"choose '{_best()}' or 'auto'."
        )
    return device


def use(wish: str | torch.device) -> torch.device:
    """Choose the device of this process, on which all training runs and which `auto` then means.

    Of several processes on CUDA GPUs each takes its own, as Accelerate does. UserError as
    `resolve`, and if Accelerate is set to the CPU and the wish is another device.
    """
    global _of_run
    _of_run = None
    device = resolve(wish)
    if device.type != "cpu" and _cpu_is_forced():
        raise UserError(
            f"The device is '{wish}', but ACCELERATE_USE_CPU asks for the CPU; "
            "choose 'auto', or take that variable out of the environment."
        )
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    _of_run = device
    return device


def check_precision(precision: str, device: torch.device) -> None:
    """Raise a UserError if the device cannot train in "bf16" or "fp16".

    "fp32" works everywhere, and so does "tf32", which is the same where there is no TF32.
    """
    if precision == "fp16" and device.type != "cuda":
        raise UserError(
            f"precision 'fp16' needs a CUDA GPU, and the device is '{device}'; use 'bf16' or 'fp32'"
            " here."
        )
    if (
        precision == "bf16"
        and device.type == "mps"
        and not torch.backends.mps.is_macos_or_newer(14, 0)
    ):
        raise UserError(
            "precision 'bf16' needs macOS 14 or newer on an Apple GPU; use 'fp32' here."
        )


def encode_in(precision: str) -> None:
    """Choose in which of the ENCODINGS this process encodes images and texts for evaluation.

    With "bf16" the networks multiply in 16 bits and add up in 32. Embeddings, their products and
    scores are of 32 bits in any case. UserError for another name, and as `check_precision`.
    """
    global _encoding
    if precision not in ENCODINGS:
        raise UserError(
            f"The precision of evaluation is '{precision}'; choose one of {', '.join(ENCODINGS)}."
        )
    check_precision(precision, resolve())
    _encoding = precision


def encoding() -> str:
    """Return which of the ENCODINGS `encode_in` chose for this process."""
    return _encoding


def encoding_on(device: torch.device) -> AbstractContextManager:
    """Return a context in which networks on the device compute in the precision of `encoding`."""
    if _encoding == "fp32":
        return nullcontext()  # an autocast of the caller stays
    return torch.autocast(device.type, torch.bfloat16)


def moved(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return a batch on the device. Integers, such as masks, are kept in host memory beside it.

    So a model can read how long its captions are without waiting for the GPU (`on_host`).
    """
    there = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
    for name, values in batch.items():
        if device.type != "cpu" and values.dtype == torch.int64:
            keep_on_host(there[name], values.numpy())
    return there


def keep_on_host(values: torch.Tensor, host: np.ndarray) -> None:
    """Let `on_host` find the same values in the memory of the host."""
    values.host_values = host  # type: ignore[attr-defined]


def on_host(values: torch.Tensor) -> np.ndarray:
    """Return integers in host memory; it waits for a GPU only where `moved` has not kept them."""
    kept = getattr(values, "host_values", None)
    return values.cpu().numpy() if kept is None else kept


@contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """Let products of float32 matrices use TF32 for "tf32", for no other precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def at_least_fp32(values: torch.Tensor) -> torch.Tensor:
    """Return 16-bit values in float32, others as they are."""
    return values.float() if values.dtype.itemsize < 4 else values


def empty_cache() -> None:
    """Give memory of a CUDA GPU that torch keeps for later back to the GPU."""
    torch.cuda.empty_cache()


def wait() -> None:
    """Wait until the device of this process has finished its work; for measuring times."""
    torch.get_device_module(resolve()).synchronize()


def _best() -> torch.device:
    """Return the first available of cuda, mps and cpu; the CPU if Accelerate is set to it."""
    names = ["cpu"] if _cpu_is_forced() else ["cuda", "mps", "cpu"]
    return next(device for device in map(torch.device, names) if _is_there(device))


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (
            device.index is None or device.index < torch.cuda.device_count()
        )
    return device.type == "cpu" or torch.backends.mps.is_available()


def _cpu_is_forced() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")

"""Build the next batches while a GPU works on this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from nbhelpers.training.device import moved

AHEAD = 2  # batches that wait for the GPU


def prefetched(batches: Iterable[dict], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield batches on the device, in order. One thread builds them and pins their memory.

    A copy from pinned memory runs beside the work of the GPU. An error in the thread is raised
    here.
    """
    iterator = iter(batches)

    def build() -> dict[str, Tensor] | None:
        batch = next(iterator, None)
        if batch is None or device.type != "cuda":
            return batch
        return {name: values.pin_memory() for name, values in batch.items()}

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        coming = deque(pool.submit(build) for _ in range(AHEAD))
        while (batch := coming.popleft().result()) is not None:
            coming.append(pool.submit(build))
            yield moved(batch, device)

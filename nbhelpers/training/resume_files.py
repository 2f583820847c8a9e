"""Write the states from which a stopped training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nbhelpers.files import atomic_write


class StateWriter:
    """Write states one after the other; a context that waits for the last.

    beside  in a thread, from a copy in the memory of the host, while the training goes on; else in
            `write`. An error of the thread is raised by the next `write`, or at the end
    Each file is replaced as a whole, so that a killed process leaves the new one or the old one.
    """

    def __init__(self, beside: bool):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="states") if beside else None
        self._last: Future[None] | None = None

    def write(self, path: Path, state: dict[str, Any]) -> None:
        """Write a state, after the one before."""
        if self._pool is None:
            return _write(path, state)
        self._wait()
        self._last = self._pool.submit(_write, path, copied(state))

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last:
            last.result()

    def __enter__(self) -> StateWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()  # waits
        if error is None:
            self._wait()


def copied(value: Any) -> Any:
    """Return a copy in the host's memory, of tensors in dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        copy = torch.empty_like(value, device="cpu", requires_grad=False)
        return copy.copy_(value.detach())
    if isinstance(value, dict):
        return {name: copied(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(part) for part in value)
    return value


def _write(path: Path, state: dict[str, Any]) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)

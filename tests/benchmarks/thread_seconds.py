"""What a piece of work costs its thread, so that other load on the machine counts little."""

from __future__ import annotations

import time
from collections.abc import Callable


def best(work: Callable[[], object]) -> float:
    """Seconds of this thread, kernel included: the best of three, after one to warm up."""
    took = []
    for _ in range(4):
        began = time.thread_time()
        work()
        took.append(time.thread_time() - began)
    return min(took[1:])

"""The one comparison of computed numbers that all tests share.

assert_close(found, wanted)          # tensors, arrays, numbers, or a dictionary of them
assert_close(found, wanted, 2e-3)    # another bound, with its reason beside it
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

EPS = torch.finfo(torch.float32).eps
# A float32 sum of n terms in another order differs by about sqrt(n) roundings of its largest terms.
# Another processor, number of threads or size of a batch chooses another order. In these tests n is
# below 2**16, so the bound is 256 roundings.
SINGLE = 256 * EPS
CANCELLED = 4 * EPS


def assert_close(found, wanted, bound: float = SINGLE, name: str = "") -> None:
    """Assert that `found` differs from `wanted` by at most `bound` of its largest absolute value.

    A dictionary holds the tensors of one computation, such as gradients. Some of them are sums that
    cancel: the gradient of a key's bias in attention is zero but for roundings. So each may also
    differ by 4 roundings of the largest value of all.
    """
    if not isinstance(wanted, Mapping):
        _compare(_numbers(found), _numbers(wanted), bound, 0.0, name)
        return
    assert set(found) == set(wanted), f"other names: {sorted(set(found) ^ set(wanted))}"
    wanted = {key: _numbers(values) for key, values in wanted.items()}
    roundings = CANCELLED * max(_largest(values) for values in wanted.values())
    for key, values in wanted.items():
        _compare(_numbers(found[key]), values, bound, roundings, key)


def _compare(
    found: np.ndarray, wanted: np.ndarray, bound: float, roundings: float, name: str
) -> None:
    assert found.shape == wanted.shape, (
        f"{name} has the shape {found.shape}, wanted is {wanted.shape}"
    )
    assert np.isfinite(wanted).all(), f"{name}: what is wanted is not finite"
    allowed = bound * _largest(wanted) + roundings
    difference = _largest(found - wanted)
    assert difference <= allowed, (
        f"{name} differs by {difference:.3g}, where {allowed:.3g} is allowed"
    )


def _numbers(values) -> np.ndarray:
    """In float64, which represents every number of the smaller types."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0.0))

"""The bootstrap: units, such as images with their captions, are drawn again with replacement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nbhelpers.errors import UserError

BLOCK = 250  # resamples drawn at once, which bounds the memory


def draws(units: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield (at most BLOCK, units) numbers of drawn units, `samples` rows in all."""
    rng = np.random.default_rng(seed)
    for start in range(0, samples, BLOCK):
        yield rng.integers(units, size=(min(BLOCK, samples - start), units))


def counts(drawn: np.ndarray) -> np.ndarray:
    """Numbers of drawn units (S, U) -> (S, U) floats: how often each unit was drawn."""
    flat = drawn + drawn.shape[1] * np.arange(len(drawn))[:, None]
    return np.bincount(flat.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)


def interval(blocks: Sequence[np.ndarray], level: float) -> np.ndarray:
    """Blocks (any number, ...) of what resamples give -> (2, ...): the ends of their middle part.

    UserError without resamples, and for a level that is not between 0 and 1.
    """
    samples = sum(map(len, blocks))
    if not samples or not 0 < level < 1:
        raise UserError(
            "An interval needs at least one resample and a level between 0 and 1, not "
            f"{samples} and {level}; give others."
        )
    return np.quantile(np.concatenate(blocks), [(1 - level) / 2, (1 + level) / 2], axis=0)

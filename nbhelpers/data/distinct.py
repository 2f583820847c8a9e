"""Compute equal inputs once, so that equal pairs have equal scores.

The order in which a library sums depends on the place of a row in its batch and on the size of the
batch. Two equal captions would get embeddings that differ in the last bit, or more where a model
attends to padding. Their scores would then not tie.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from nbhelpers.data.tokenization import Tokenizer


class Distinct(NamedTuple):
    """Say which of N items are equal. The D distinct ones are numbered by first appearance.

    first  (D,) the position of the first item of each number;  row  (N,) the number of each item
    """

    first: np.ndarray
    row: np.ndarray


def distinct(keys: Sequence[Hashable]) -> Distinct:
    """Compare N items by their keys."""
    row = pd.factorize(pd.Series(list(keys), dtype=object))[0]
    return Distinct(np.unique(row, return_index=True)[1], row)


def text_keys(texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Join the token ids of each text; equal for texts that a model cannot tell apart."""
    cleaned = [tokenizer.clean(text) for text in texts]
    once = list(dict.fromkeys(cleaned))
    keys = {
        text: " ".join(map(str, ids))
        for text, ids in zip(once, tokenizer.encode(once), strict=True)
    }
    return [keys[text] for text in cleaned]


class Once:
    """Let only the first of equal items pass; `distinct` says which of all items are equal."""

    def __init__(self, key: Callable[[Any], Hashable]):
        self._key = key
        self._numbers: dict[Hashable, int] = {}
        self._row: list[int] = []

    def __call__(self, items: Iterable) -> Iterator:
        """Yield the distinct ones of `items` in their order."""
        for item in items:
            new = len(self._numbers)
            number = self._numbers.setdefault(self._key(item), new)
            self._row.append(number)
            if number == new:
                yield item

    @property
    def distinct(self) -> Distinct:
        """Which of all items that came are equal."""
        return distinct(self._row)


@dataclass(frozen=True, eq=False)
class Rows:
    """Hold N vectors, of which equal ones were computed once.

    vectors (D,C), row (N,): the n-th vector is `vectors[row[n]]`.
    """

    vectors: np.ndarray
    row: np.ndarray

    def all(self) -> np.ndarray:
        """Return all vectors (N,C)."""
        return self.vectors[self.row]

    def products(self, other: Rows) -> np.ndarray:
        """Multiply with the vectors of `other`: (N,M) dot products, equal for equal pairs."""
        return (self.vectors @ other.vectors.T)[np.ix_(self.row, other.row)]

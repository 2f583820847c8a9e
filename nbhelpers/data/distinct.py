"""Equal inputs are computed once, so that equal pairs have equal scores.

How a library sums depends on the place of a row and on the size of its batch. Two equal captions
would get embeddings that differ in the last bit, or by far where a model attends the padding of its
batch, and their scores would not tie.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from nbhelpers.data.tokenization import Tokenizer


class Distinct(NamedTuple):
    """Which of N items are equal, D of them distinct, numbered by first appearance.

    first  (D,) the position of the first item of each number;  row  (N,) the number of each item
    """

    first: np.ndarray
    row: np.ndarray


def distinct(keys: Sequence[Hashable]) -> Distinct:
    """Compare N items by their keys."""
    row = pd.factorize(pd.Series(list(keys), dtype=object))[0]
    return Distinct(np.unique(row, return_index=True)[1], row)


def text_keys(texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """The token ids of each text: equal for texts that a model cannot tell apart."""
    cleaned = [tokenizer.clean(text) for text in texts]
    once = list(dict.fromkeys(cleaned))
    keys = {
        text: " ".join(map(str, ids))
        for text, ids in zip(once, tokenizer.encode(once), strict=True)
    }
    return [keys[text] for text in cleaned]


class Once:
    """Lets the first of equal items pass; `distinct` tells which of all that came are equal."""

    def __init__(self, key: Callable[[object], Hashable]):
        self._key, self._numbers, self._row = key, {}, []

    def __call__(self, items: Iterable) -> Iterator:
        """The distinct ones of `items`, as they come."""
        for item in items:
            new = len(self._numbers)
            number = self._numbers.setdefault(self._key(item), new)
            self._row.append(number)
            if number == new:
                yield item

    @property
    def distinct(self) -> Distinct:
        row = np.array(self._row, np.int64)
        return Distinct(np.unique(row, return_index=True)[1], row)


@dataclass(frozen=True, eq=False)
class Rows:
    """N vectors, of which equal ones were computed once: vectors (D,C), row (N,); the n-th is
    `vectors[row[n]]`.
    """

    vectors: np.ndarray
    row: np.ndarray

    def all(self) -> np.ndarray:
        """(N,C)."""
        return self.vectors[self.row]

    def products(self, other: Rows) -> np.ndarray:
        """(N,M) dot products with those of `other`; equal pairs have equal ones."""
        return (self.vectors @ other.vectors.T)[np.ix_(self.row, other.row)]

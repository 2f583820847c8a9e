"""Compute the recalls of embeddings in blocks, without the whole matrix of scores.

Distinct vectors are compared once, so equal pairs have equal scores. A pass over the blocks with
own pairs reads the scores that decide; a second pass over all blocks counts. A block is computed
from the same rows in both, so its numbers are the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from nbhelpers.errors import UserError
from nbhelpers.metrics.recall import TIES, Recall, _by_rule, _checked_owner, _cutoffs, _recall

ROWS, COLUMNS = 1024, 4096  # of a block; its scores take 16 MiB
KS = (1, 5, 10)
Rules = Sequence[str]


def evaluate(
    images: np.ndarray,
    texts: np.ndarray,
    owner: np.ndarray,
    rules: Rules = TIES,
    normalise: bool = True,
) -> dict[str, Recall]:
    """Return tie rule -> R@1, R@5, R@10 of embeddings (N,D) and (M,D), which may be memory-mapped.

    owner      (M,) the image row of each caption
    normalise  whether vectors are brought to unit length, so that scores are cosines
    It equals `recall.evaluate` of the products of distinct vectors. Beside the embeddings it needs
    about 100 MB and a few numbers a query. UserError for shapes that do not fit, NaN, infinity, and
    where `normalise` is on, rows of zeros.
    """
    owner = _checked_owner(owner, len(images), len(texts))
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise UserError(
            f"The embeddings have shapes {images.shape} and {texts.shape}; give rows of one width."
        )
    unknown = [rule for rule in rules if rule not in TIES]
    if unknown:
        raise UserError(f"Unknown tie rule '{unknown[0]}'; choose one of {', '.join(TIES)}.")
    captions = np.argsort(owner, kind="stable")  # own pairs lie near the diagonal then
    seen = _Side.of(images, np.arange(len(images)), "images", normalise)
    read = _Side.of(texts, captions, "captions", normalise)
    counted = _Counts(seen, read, owner)
    ks = _cutoffs(KS)
    i2t, t2i = counted.counts(released="released" in rules)
    return {rule: recall_by(rule, ks, i2t, t2i) for rule in rules}


def recall_by(rule: str, ks: tuple[int, ...], *counts: tuple) -> Recall:
    """Return the recall by one rule; later tied items count for the released rule alone."""
    i2t, t2i = (
        _by_rule(rule, above, tied, own, after if rule == "released" else 0)
        for above, tied, own, after in counts
    )
    return _recall(rule, ks, i2t, t2i)


@dataclass(frozen=True, eq=False)
class _Side:
    """The vectors of one side, of which equal ones are computed once.

    first (D,) the row of each distinct vector;  items (N,) rows, those of equal vectors together;
    number (N,) the distinct vector of each item, ascending;  norms (D,), or empty
    """

    vectors: np.ndarray
    first: np.ndarray
    items: np.ndarray
    number: np.ndarray
    norms: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, order: np.ndarray, name: str, normalise: bool) -> _Side:
        """Compare the vectors in this order; UserError for rows that are no vectors."""
        digests, norms = _looked_at(vectors, name, normalise)
        _, first, number = np.unique(digests[order], return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        number = rank[number]
        together = np.argsort(number, kind="stable")
        once = order[np.sort(first)]
        return cls(
            vectors, once, order[together], number[together], norms[once] if normalise else norms
        )

    def block(self, start: int, stop: int) -> np.ndarray:
        """Return distinct vectors as float32, of unit length where they are normalised."""
        rows = _float32(self.vectors[self.first[start:stop]])
        return rows / self.norms[start:stop, None] if self.norms.size else rows

    def within(self, start: int, stop: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (items, place in the block) of these distinct vectors, at most `size` at once."""
        low, high = np.searchsorted(self.number, (start, stop))
        for begin in range(low, high, size):
            some = slice(begin, min(begin + size, high))
            yield self.items[some], self.number[some] - start


@dataclass(eq=False)
class _Counts:
    """Count, for every query, the items above its best own one and those equal to it."""

    seen: _Side
    read: _Side
    owner: np.ndarray
    own: np.ndarray = field(init=False)
    best: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.own = np.zeros(len(self.owner), np.float32)
        for rows, columns, scores in self._blocks(self._with_own_pairs()):
            place = np.full(len(self.seen.items), -1)
            place[rows] = np.arange(len(rows))
            mine = np.flatnonzero(place[self.owner[columns]] >= 0)
            self.own[columns[mine]] = scores[place[self.owner[columns[mine]]], mine]
        self.best = np.full(len(self.seen.items), -np.inf, np.float32)
        np.maximum.at(self.best, self.owner, self.own)

    def counts(self, released: bool) -> tuple[tuple, tuple]:
        """((above, tied, own, after) for each image, the same for each caption)."""
        images, captions = len(self.seen.items), len(self.owner)
        at_best = np.flatnonzero(self.own == self.best[self.owner])
        last = np.full(images, -1)
        np.maximum.at(last, self.owner[at_best], at_best)
        i2t, t2i = np.zeros((3, images), np.int64), np.zeros((3, captions), np.int64)
        for rows, columns, scores in self._blocks():
            _count(i2t, rows, scores, self.best[rows, None], 1)
            _count(t2i, columns, scores, self.own[columns], 0)
            if released:
                tied = scores == self.best[rows, None]
                i2t[2, rows] += (tied & (columns > last[rows, None])).sum(1)
                tied = scores == self.own[columns]
                t2i[2, columns] += (tied & (rows[:, None] > self.owner[columns])).sum(0)
        i2t_own = np.bincount(self.owner[at_best], minlength=images)
        return (i2t[0], i2t[1], i2t_own, i2t[2]), (t2i[0], t2i[1], np.ones(captions, int), t2i[2])

    def _with_own_pairs(self) -> set[tuple[int, int]]:
        row, column = np.empty((2, max(len(self.owner), len(self.seen.items))), np.int64)
        row[self.seen.items] = self.seen.number // ROWS
        column[self.read.items] = self.read.number // COLUMNS
        found = np.unique([row[self.owner], column[: len(self.owner)]], axis=1)
        return set(map(tuple, found.T.tolist()))

    def _blocks(
        self, wanted: set[tuple[int, int]] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (image rows, caption rows, scores) of all blocks, or of those that are wanted."""
        for top in range(0, len(self.seen.first), ROWS):
            stop = min(top + ROWS, len(self.seen.first))
            left = self.seen.block(top, stop)
            for start in range(0, len(self.read.first), COLUMNS):
                if wanted is not None and (top // ROWS, start // COLUMNS) not in wanted:
                    continue
                end = min(start + COLUMNS, len(self.read.first))
                scores = left @ self.read.block(start, end).T  # finite, as the lengths are
                yield from self._repeated(scores, (top, stop), (start, end))

    def _repeated(
        self, scores: np.ndarray, rows: tuple[int, int], columns: tuple[int, int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield the scores of all items with these distinct vectors."""
        for some, row in self.seen.within(*rows, ROWS):
            for others, column in self.read.within(*columns, COLUMNS):
                part = scores if _all_of(row, scores.shape[0]) else scores[row]
                whole = _all_of(column, scores.shape[1])
                yield some, others, part if whole else part[:, column]


def _all_of(places: np.ndarray, count: int) -> bool:
    return len(places) == count and bool((places == np.arange(count)).all())


def _count(
    counts: np.ndarray, at: np.ndarray, scores: np.ndarray, own: np.ndarray, axis: int
) -> None:
    """Add how many scores lie above the own one, and how many are equal to it."""
    above = np.count_nonzero(scores > own, axis=axis)
    counts[0, at] += above
    counts[1, at] += np.count_nonzero(scores >= own, axis=axis) - above


def _looked_at(vectors: np.ndarray, name: str, normalise: bool) -> tuple[np.ndarray, np.ndarray]:
    """(digest of each row, its length); UserError for rows that cannot be compared."""
    digests, norms = np.empty(len(vectors), "S32"), np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), COLUMNS):
        rows = _float32(vectors[start : start + COLUMNS])
        norms[start : start + COLUMNS] = lengths(rows, name, start, normalise)
        hashed = [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in rows]
        digests[start : start + COLUMNS] = hashed
    return digests, norms if normalise else np.zeros(0, np.float32)


def unit_rows(vectors: np.ndarray, name: str, first: int = 0) -> np.ndarray:
    """Return vectors (N,D) as float32 rows of unit length.

    UserError for NaN, rows of zeros, and numbers too large or too small for float32; it calls row
    `first` + n a row of the `name`, as "images".
    """
    rows = _float32(vectors)
    return rows / lengths(rows, name, first, True)[:, None]


def lengths(rows: np.ndarray, name: str, start: int, normalise: bool) -> np.ndarray:
    """Return the lengths (N,) of float32 rows; UserError as `unit_rows`.

    normalise  whether rows of zeros are refused, too
    """
    wrong = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(wrong):
        raise UserError(
            f"Row {start + wrong[0]} of the {name} holds NaN or infinity; look for a diverged model"
            " or numbers that overflowed in 16 bits."
        )
    with np.errstate(over="ignore", under="ignore"):
        norms = np.linalg.norm(rows, axis=1)
    long = np.flatnonzero(np.isinf(norms))
    if len(long):
        raise UserError(
            f"Row {start + long[0]} of the {name} is too long for float32; divide all vectors by"
            " one large number."
        )
    empty = np.flatnonzero(norms == 0)
    if normalise and len(empty):
        raise UserError(
            f"Row {start + empty[0]} of the {name} is zero and has no direction; look for an input"
            " that was not encoded."
        )
    return norms


def _float32(rows: np.ndarray) -> np.ndarray:
    """Copy rows as float32, with no negative zero."""
    with np.errstate(over="ignore"):  # the check of lengths refuses what became infinite
        return np.ascontiguousarray(rows, dtype=np.float32) + np.float32(0)

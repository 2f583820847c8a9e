"""Compute R@K both ways from a similarity matrix: tie rules, intervals, a paired test.

Every number follows from a few counts per query. Its best own item is its own item with the highest
score (an image owns several captions, a caption owns one image). Some items score strictly higher
(`above`), some score the same (`tied`), and of those some are its own (`own`). No sorting is
needed, only comparisons with one score per query.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbhelpers.errors import UserError
from nbhelpers.metrics.resampling import counts, draws, interval

TIES = ("expectation", "released", "optimistic")
Counts = tuple[Any, Any, Any]  # above, tied, own: each (Q,) or a number
QUERY_ARRAYS = ("i2t_ranks", "t2i_ranks", "i2t_hits", "t2i_hits")
# rows compared at once; at most 255, so that the sum of a column of booleans fits a byte
ROWS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Recall:
    """What `evaluate` found: N images as queries (i2t) and M captions as queries (t2i), K cut-offs.

    i2t_ranks (N,), t2i_ranks (M,)    0-based rank of the best own item (expected value under
                                      "expectation")
    i2t_hits (N, K), t2i_hits (M, K)  probability that an own item is among the first ks[k]
    """

    ties: str
    ks: tuple[int, ...]
    i2t_ranks: np.ndarray
    t2i_ranks: np.ndarray
    i2t_hits: np.ndarray
    t2i_hits: np.ndarray

    @property
    def metrics(self) -> dict[str, float]:
        """R@K both ways and their mean mR in percent, unrounded; median ranks, 0-based."""
        recalls = _with_mean(np.hstack([self.i2t_hits.mean(0), self.t2i_hits.mean(0)])[None])[0]
        medians = {
            "i2t_median_rank": float(np.median(self.i2t_ranks)),
            "t2i_median_rank": float(np.median(self.t2i_ranks)),
        }
        return {
            key: float(100 * value) for key, value in zip(_keys(self.ks), recalls, strict=True)
        } | medians

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything but the tie rule as named arrays; `from_arrays` restores it."""
        return {"ks": np.array(self.ks)} | {name: getattr(self, name) for name in QUERY_ARRAYS}

    @classmethod
    def from_arrays(cls, ties: str, arrays: Mapping[str, np.ndarray]) -> Recall:
        """Return the recall that `arrays` stored."""
        return cls(
            ties, tuple(int(k) for k in arrays["ks"]), *(arrays[name] for name in QUERY_ARRAYS)
        )


def evaluate(
    similarity: np.ndarray,
    owner: np.ndarray,
    ks: tuple[int, ...] = (1, 5, 10),
    ties: str = "expectation",
) -> Recall:
    """Return R@K of scores (N images, M captions); a higher score is better.

    owner (M,) is the image row of each caption.

    ties  "expectation": the expected value over random orders of the tied items;
          "released": np.argsort(scores, kind="stable")[::-1], of equal scores the later index wins;
          "optimistic": the query's own item first.
    UserError on NaN, on shapes that do not fit, and on an image without a caption.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or not similarity.size or similarity.dtype.kind not in "fiu":
        raise UserError(
            f"The similarity is {similarity.dtype} of shape {similarity.shape}; "
            "give numbers of shape (images, captions)."
        )
    if ties not in TIES:
        raise UserError(f"Unknown tie rule '{ties}'; choose one of {', '.join(TIES)}.")
    ks, owner = _cutoffs(ks), _checked_owner(owner, *similarity.shape)
    i2t, t2i = _counts(similarity, owner, released=ties == "released")
    return _recall(ties, ks, _by_rule(ties, *i2t), _by_rule(ties, *t2i))


def chance(owner: np.ndarray, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """The metrics of scores that say nothing: every query's items all tied.

    owner (M,) as for `evaluate`.
    """
    owner = _checked_owner(owner, int(np.max(owner, initial=-1)) + 1, len(owner))
    captions = np.bincount(owner)
    i2t, t2i = (
        (np.zeros_like(captions), len(owner), captions),
        (
            np.zeros_like(owner),
            len(captions),
            1,
        ),
    )
    return _recall("expectation", _cutoffs(ks), i2t, t2i).metrics


def hit_probability(above, tied, own, ks: tuple[int, ...]) -> np.ndarray:
    """Return (Q, K): the probability that an own item is among the first k.

    `tied` items, `own` of them own, follow `above` others.

    1 - C(tied - own, k - above) / C(tied, k - above), drawn position by position. Counts: (Q,) or a
    number.
    """
    above, tied, own = np.broadcast_arrays(np.atleast_1d(above), tied, own)
    miss, hits = np.ones(len(above)), np.zeros((len(above), len(ks)))
    for position in range(max(ks)):
        drawn = position - above
        others = np.clip(tied - own - drawn, 0, None) / np.maximum(tied - drawn, 1)
        miss = miss * np.where(drawn >= 0, others, 1.0)
        hits[:, np.asarray(ks) == position + 1] = 1 - miss[:, None]
    return hits


def bootstrap(
    recall: Recall, owner: np.ndarray, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Return the interval (low, high), in percent, of every R@K and mR, resampling images.

    The gallery stays as it is: the interval speaks of other queries of the same kind, not of
    another gallery.
    """
    tally = _Tally(recall, owner)
    drawn = map(counts, draws(tally.images, samples, seed))
    low, high = interval([_with_mean(tally.means(each)) for each in drawn], level)
    return {
        key: (float(100 * a), float(100 * b))
        for key, a, b in zip(_keys(recall.ks), low, high, strict=True)
    }


def paired_test(
    a: Recall, b: Recall, owner: np.ndarray, samples: int = 5000, seed: int = 0, level: float = 0.95
) -> dict[str, dict[str, float]]:
    """Is `a` better than `b` on the same queries?

    Per R@K and mR: difference (a - b, points), low, high, p.

    p is two-sided: whole images (the image query and its captions together) swap the two runs at
    random. The interval is a paired bootstrap over images. UserError if the runs differ in queries,
    cut-offs or tie rule.
    """
    check_paired(a, b)
    first, second = _Tally(a, owner), _Tally(b, owner)
    drawn = map(counts, draws(first.images, samples, seed))
    differences = [_with_mean(first.means(each) - second.means(each)) for each in drawn]
    low, high = interval(differences, level)
    shares = first.shares() - second.shares()
    columns = zip(
        100 * shares.sum(0), 100 * low, 100 * high, swapped(shares, samples, seed), strict=True
    )
    names = ("difference", "low", "high", "p")
    return {
        key: dict(zip(names, map(float, column), strict=True))
        for key, column in zip(_keys(a.ks), columns, strict=True)
    }


def verdict(what: str, test: Mapping[str, float]) -> str:
    """Say a difference in points, its 95 % interval, and what it shows, in one line.

    test  one entry of `paired_test`. An interval that holds zero shows nothing.
    """
    shown = "no difference can be shown"
    if test["low"] > 0 or test["high"] < 0:
        shown = "higher" if test["low"] > 0 else "lower"
    interval = f"{test['low']:+.1f} to {test['high']:+.1f}"
    return f"{what}: {test['difference']:+.1f}, 95 % interval {interval}: {shown}"


def swapped(shares: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Return two-sided p-values (C,) of a sign-swap test.

    shares (N, C) is what each image adds to C differences. p is how often random signs of the
    images give a sum at least as large as the observed one, which counts as one draw.
    """
    rng, as_extreme = np.random.default_rng([seed, 1]), np.ones(shares.shape[1])
    for start in range(0, samples, ROWS_AT_ONCE):
        signs = rng.choice((-1.0, 1.0), size=(min(ROWS_AT_ONCE, samples - start), len(shares)))
        as_extreme += (np.abs(signs @ shares) >= np.abs(shares.sum(0)) - 1e-12).sum(0)
    return as_extreme / (samples + 1)


def image_shares(recall: Recall, owner: np.ndarray, metric: str = "mR") -> np.ndarray:
    """Return what each image adds to a metric (N,), as a query and with its captions.

    The sum is the metric in percent.
    """
    if metric not in _keys(recall.ks):
        raise UserError(
            f"There is no metric '{metric}' here; choose one of {', '.join(_keys(recall.ks))}."
        )
    return 100 * _Tally(recall, owner).shares()[:, _keys(recall.ks).index(metric)]


def check_paired(a: Recall, b: Recall) -> None:
    """UserError if two runs differ in cut-offs, tie rule or number of queries."""
    if (a.ks, a.ties, len(a.i2t_hits), len(a.t2i_hits)) != (
        b.ks,
        b.ties,
        len(b.i2t_hits),
        len(b.t2i_hits),
    ):
        raise UserError(
            "The two runs differ in cut-offs, tie rule or number of queries; "
            "compare runs evaluated on the same split by the same rule."
        )


class _Tally:
    """Hits summed per image, so that a resample of images is one matrix product."""

    def __init__(self, recall: Recall, owner: np.ndarray):
        self.images = len(recall.i2t_hits)
        owner = _checked_owner(owner, self.images, len(recall.t2i_hits))
        self.captions = np.bincount(owner).astype(float)
        self.i2t = recall.i2t_hits
        self.t2i = np.stack([np.bincount(owner, hits) for hits in recall.t2i_hits.T], axis=1)

    def shares(self) -> np.ndarray:
        """Return what each image adds to every R@K and to mR (N, 2K + 1).

        The sums over images are the metrics, as fractions.
        """
        return _with_mean(np.hstack([self.i2t / self.images, self.t2i / self.captions.sum()]))

    def means(self, weights: np.ndarray) -> np.ndarray:
        """Weights (S, N), how often each image was drawn -> (S, 2K) mean hits, i2t then t2i."""
        captions = weights @ self.captions
        return np.hstack([weights @ self.i2t / self.images, weights @ self.t2i / captions[:, None]])


def _with_mean(columns: np.ndarray) -> np.ndarray:
    """(S, 2K) -> (S, 2K + 1): mR is the plain mean over cut-offs and directions."""
    return np.hstack([columns, columns.mean(1, keepdims=True)])


def _keys(ks: tuple[int, ...]) -> list[str]:
    return [*(f"i2t_R@{k}" for k in ks), *(f"t2i_R@{k}" for k in ks), "mR"]


def _by_rule(ties: str, above, tied, own, after) -> tuple:
    if ties == "expectation":
        return above, tied, own
    return above + after, 1, 1  # the best own item has one certain rank


def _recall(ties: str, ks: tuple[int, ...], i2t: Counts, t2i: Counts) -> Recall:
    """i2t and t2i are (above, tied, own) counts per query."""
    i2t_ranks, t2i_ranks = (
        np.asarray(above + (tied - own) / (own + 1), dtype=float) for above, tied, own in (i2t, t2i)
    )
    i2t_hits, t2i_hits = (hit_probability(*counts, ks) for counts in (i2t, t2i))
    return Recall(ties, ks, i2t_ranks, t2i_ranks, i2t_hits, t2i_hits)


def _cutoffs(ks) -> tuple[int, ...]:
    if not len(ks) or len(set(ks)) != len(ks) or any(int(k) != k or k < 1 for k in ks):
        raise UserError(f"The cut-offs are {ks}; give different whole numbers from 1 up.")
    return tuple(int(k) for k in ks)


def _checked_owner(owner: np.ndarray, images: int, captions: int) -> np.ndarray:
    owner = np.asarray(owner)
    if owner.shape != (captions,) or owner.dtype.kind not in "iu":
        raise UserError(
            f"owner is {owner.dtype} of shape {owner.shape}; "
            f"give one image row (a whole number) for each of the {captions} captions."
        )
    if captions and not 0 <= owner.min() <= owner.max() < images:
        raise UserError(
            f"owner names image rows {owner.min()} to {owner.max()}, "
            f"but there are {images} images; give rows of this similarity."
        )
    owner = owner.astype(np.int64)
    lonely = np.flatnonzero(np.bincount(owner, minlength=images) == 0)
    if len(lonely):
        raise UserError(
            f"{len(lonely)} images have no caption (first: row {lonely[0]}); "
            "leave them out of the evaluation."
        )
    return owner


def _counts(similarity: np.ndarray, owner: np.ndarray, released: bool) -> tuple[tuple, tuple]:
    """((above, tied, own, after) per image, the same per caption), each integer arrays.

    after: tied items with a later index than the last tied own one; counted for the released rule,
    else 0.
    """
    images, captions = similarity.shape
    row, position = np.arange(images, dtype=np.int32)[:, None], np.arange(captions, dtype=np.int32)
    own = _comparable(similarity[owner, position])
    order = np.argsort(owner, kind="stable")
    best = np.maximum.reduceat(own[order], np.searchsorted(owner[order], np.arange(images)))[
        :, None
    ]
    at_best = own == best[owner, 0]
    last = np.full((images, 1), -1, np.int32)
    np.maximum.at(last[:, 0], owner[at_best], position[at_best])

    i2t, t2i = np.zeros((3, images), np.int64), np.zeros((3, captions), np.int64)
    for start in range(0, images, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        block = _comparable(similarity[rows])
        if np.isnan(block.min()):
            raise UserError(
                "The similarity holds NaN; look for a zero-length embedding or a diverged model."
            )
        tied_rows, tied_columns = block == best[rows], block == own
        i2t[0, rows], i2t[1, rows] = _row_sums(block > best[rows]), _row_sums(tied_rows)
        t2i[0] += _column_sums(block > own)
        t2i[1] += _column_sums(tied_columns)
        if released:
            i2t[2, rows] = _row_sums(tied_rows & (position > last[rows]))
            some = tied_columns.any(axis=0)
            t2i[2, some] += _column_sums(tied_columns[:, some] & (row[rows] > owner[some]))
    i2t_own = np.bincount(owner[at_best], minlength=images)
    return (i2t[0], i2t[1], i2t_own, i2t[2]), (t2i[0], t2i[1], np.ones_like(owner), t2i[2])


def _comparable(scores: np.ndarray) -> np.ndarray:
    """float16 as float32, which is exact and much faster to compare."""
    return scores.astype(np.float32) if scores.dtype == np.float16 else scores


def _row_sums(mask: np.ndarray) -> np.ndarray:
    # twice as fast as np.count_nonzero
    return np.add.reduce(mask.view(np.uint8), axis=1, dtype=np.uint32)


def _column_sums(mask: np.ndarray) -> np.ndarray:
    return np.add.reduce(mask.view(np.uint8), axis=0, dtype=np.uint8)

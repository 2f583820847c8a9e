"""The ranking of a whole split, its recalls, and the validation.

N images, M texts, Q queries, G gallery items, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import gammaln
from torch import nn

from nbhelpers.data.array_store import ArrayStore
from nbhelpers.errors import UserError
from nbhelpers.metrics import recall
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.tasks.two_stage.candidates import (
    K,
    at_least_one,
    candidate_pairs,
    chosen,
    chosen_optimistically,
    coarse_scores,
    eligible,
    last_score,
    negative_hamming,
)
from nbhelpers.tasks.two_stage.reranking import PAIRS, fine_scores
from nbhelpers.tasks.two_stage.stores import encode, split_inputs


def two_stage(
    coarse: np.ndarray,
    fine: np.ndarray,
    owner: np.ndarray,
    k: int = K,
    t2i: np.ndarray | None = None,
    ks: tuple[int, ...] = (1, 5, 10),
    ties: str = "expectation",
) -> recall.Recall:
    """Return recalls after reranking each query's best k of `coarse` (N,M) by `fine` (N,M).

    owner is as in `recall.evaluate`.
    t2i  (N,M) coarse scores where texts are the queries, if they differ from those where images are
    A query whose own items all miss the best k fails, as released; its rank is an expected one
    behind them. Of items that tie for the last of the best k, by expectation any may be among them,
    by the released rule the first ones are, by the optimistic one those that serve the query best.
    UserError if `fine` lacks a possible candidate.
    """
    t2i = coarse if t2i is None else t2i
    if not np.isfinite(fine[eligible(coarse, k) | eligible(t2i.T, k).T]).all():
        raise UserError(
            f"The fine scores lack some of the best {k}; let `fine_scores` score all "
            "that are `eligible`."
        )
    own = owner[None, :] == np.arange(len(fine))[:, None]
    masks = chosen(coarse, k), chosen(t2i.T, k).T
    if ties == "optimistic":
        masks = (
            chosen_optimistically(coarse, fine, own, k),
            chosen_optimistically(t2i.T, fine.T, own.T, k).T,
        )
    by_image, by_text = (
        recall.evaluate(np.where(mask, fine, -np.inf), owner, ks, ties) for mask in masks
    )
    of_images = by_image.i2t_ranks, by_image.i2t_hits * (masks[0] & own).any(axis=1)[:, None]
    of_texts = by_text.t2i_ranks, by_text.t2i_hits * (masks[1] & own).any(axis=0)[:, None]
    if ties == "expectation":
        of_images = over_orders(*of_images, coarse, fine, own, k, ks)
        of_texts = over_orders(*of_texts, t2i.T, fine.T, own.T, k, ks)
    return recall.Recall(ties, by_image.ks, of_images[0], of_texts[0], of_images[1], of_texts[1])


def over_orders(
    ranks: np.ndarray,
    hits: np.ndarray,
    coarse: np.ndarray,
    fine: np.ndarray,
    right: np.ndarray,
    k: int,
    ks: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Return ranks (Q,) and hits (Q,K), averaged over the orders of tied last items.

    This concerns queries with more than k `eligible` items. All others keep theirs.
    coarse, fine, right  (Q,G) scores of both stages, and which items are right
    """
    ranks, hits = ranks.copy(), hits.copy()
    for query in np.flatnonzero(eligible(coarse, k).sum(axis=1) > k):
        ranks[query], hits[query] = _over_orders(coarse[query], fine[query], right[query], k, ks)
    return ranks, hits


def _over_orders(
    coarse: np.ndarray, fine: np.ndarray, right: np.ndarray, k: int, ks: tuple[int, ...]
) -> tuple[float, np.ndarray]:
    """Rank and hits (K,) of one query, its scores and right items (G,).

    Of the right items among the candidates, those of the highest fine score decide.
    """
    last = last_score(coarse[None], k)[0, 0]
    sure, tied = coarse > last, coarse == last
    drawn, total, rank, hits = k - int(sure.sum()), 0.0, 0.0, np.zeros(len(ks))
    for score in np.unique(fine[right & (sure | tied)])[::-1]:
        kinds = right & (fine == score), ~right & (fine > score), ~right & (fine == score)
        fixed = [int((sure & kind).sum()) for kind in kinds]
        barred = int((tied & right & (fine > score)).sum())  # else these would decide
        sizes = [int((tied & kind).sum()) for kind in kinds]
        chances, counts = _draws(sizes, int(tied.sum()), barred, drawn)
        own, above, level = (count + number for count, number in zip(fixed, counts, strict=True))
        chances, own, above, level = (part[own > 0] for part in (chances, own, above, level))
        total += chances.sum()
        rank += chances @ (above + level / (own + 1))
        hits += chances @ recall.hit_probability(above, level + own, own, ks)
        if fixed[0]:
            break
    behind = len(coarse) - k - int(right.sum())  # wrong items where no right one is a candidate
    return rank + (1 - total) * (k + behind / (int(right.sum()) + 1)), hits


def _draws(sizes: list[int], items: int, barred: int, drawn: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all ways to draw `drawn` of `items`: chances (S,), counts (3,S) of each kind.

    Three kinds have these sizes; `barred` items are not drawn.
    """
    grid = np.meshgrid(*(np.arange(min(size, drawn) + 1) for size in sizes), indexing="ij")
    counts = np.stack([part.ravel() for part in grid])
    others, rest = drawn - counts.sum(axis=0), items - barred - sum(sizes)
    possible = (others >= 0) & (others <= rest)
    counts, others = counts[:, possible], others[possible]
    log_ways = _log_choose(rest, others) - _log_choose(items, drawn)
    for size, count in zip(sizes, counts, strict=True):
        log_ways = log_ways + _log_choose(size, count)
    return np.exp(log_ways), counts


def _log_choose(items: int, drawn: int | np.ndarray) -> np.ndarray:
    return gammaln(items + 1) - gammaln(drawn + 1) - gammaln(items - drawn + 1)


def stages(
    coarse: Mapping[str, tuple[np.ndarray, np.ndarray]],
    fine: np.ndarray,
    owner: np.ndarray,
    k: int = K,
    ties: str = "expectation",
) -> dict[str, recall.Recall]:
    """Return recalls of every stage over a whole split.

    Of each of the `coarse_scores` alone; as "<name> + fine" after reranking the best k; and of
    "exhaustive" reranking if `fine` (N,M) knows all pairs.
    """
    results = {}
    for name, (i2t, t2i) in coarse.items():
        by_text = recall.evaluate(t2i, owner, ties=ties)
        results[name] = replace(
            recall.evaluate(i2t, owner, ties=ties),
            t2i_ranks=by_text.t2i_ranks,
            t2i_hits=by_text.t2i_hits,
        )
        results[f"{name} + fine"] = two_stage(i2t, fine, owner, k, t2i, ties=ties)
    return results | (
        {"exhaustive": recall.evaluate(fine, owner, ties=ties)} if np.isfinite(fine).all() else {}
    )


WAYS = {
    "online": ("PPSR online", "column means of PPSR from training queries"),
    "transductive": ("PPSR", "column means of PPSR from all test queries, as released"),
    "none": ("Hamming", "no PPSR"),
}


@dataclass(frozen=True)
class TwoStages:
    """How a search in two stages is evaluated.

    k     candidates;  ppsr: one of WAYS, whose queries give PPSR its column means
    UserError for other values.
    """

    k: int = K
    ppsr: str = "online"

    def __post_init__(self):
        at_least_one(self.k, "candidate")
        if self.ppsr not in WAYS:
            raise UserError(f"PPSR is '{self.ppsr}'; choose one of {', '.join(WAYS)}.")

    @property
    def way(self) -> str:
        """Its name among the `coarse_scores`."""
        return WAYS[self.ppsr][0]

    def __str__(self) -> str:
        return f"{self.k} candidates, {WAYS[self.ppsr][1]}"


@dataclass(frozen=True, eq=False)
class Ranking:
    """How a search in two stages ranks a split.

    It has `coarse_scores`, fine scores (N,M), and the image row of each text (M,).
    """

    coarse: dict[str, tuple[np.ndarray, np.ndarray]]
    fine: np.ndarray
    owner: np.ndarray

    def results(self, k: int, ties: str = "expectation") -> dict[str, recall.Recall]:
        """As `stages` gives them."""
        return stages(self.coarse, self.fine, self.owner, k, ties)


def rank(
    model: nn.Module,
    stores: tuple[ArrayStore, ArrayStore],
    owner: np.ndarray,
    k: int | None,
    banks: tuple[ArrayStore, ArrayStore] | None = None,
    ways: Iterable[str] | None = None,
    kept: Path | None = None,
) -> Ranking:
    """Rank the images and texts of a split, as notebooks, `eval` and the analysis of misses do.

    stores  of images and texts;  owner (M,) as in `recall.evaluate`
    k       most candidates that `results` will be asked for, which alone are read; None: all pairs
    banks   of training queries;  ways: only these of the `coarse_scores`;  kept as in `fine_scores`
    """
    coarse = coarse_scores(*stores, banks=banks)
    coarse = {way: coarse[way] for way in ways or coarse}
    wanted = None if k is None else candidate_pairs(coarse, k)
    return Ranking(coarse, fine_scores(model, *stores, wanted, kept=kept), owner)


def validate(model: nn.Module, task: RetrievalTask, k: int = 10) -> dict[str, float]:
    """Return recalls after reranking Hamming candidates on the validation split.

    They select the best epoch. Each image has its first caption alone. All pairs, as in the
    release, would take longer than the epoch.
    """
    table, (images_of, texts_of) = task.table("val"), split_inputs(model, task, "val")
    first = np.unique(table.owner(), return_index=True)[1]
    images = ArrayStore.in_memory(
        {},
        task.distinct_images("val").row.tolist(),
        lambda rows: encode(model, images_of(rows)),
        PAIRS,
    )
    texts = ArrayStore.in_memory(
        {},
        task.distinct_texts("val").row[first].tolist(),
        lambda rows: encode(model, texts_of(first[rows])),
        PAIRS,
    )
    hamming = negative_hamming(images["codes"], texts["codes"])
    fine = fine_scores(model, images, texts, candidate_pairs({"Hamming": (hamming, hamming)}, k))
    return two_stage(hamming, fine, np.arange(len(table)), k).metrics

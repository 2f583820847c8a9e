"""The first stage: candidates by Hamming distance of hash codes, post-processed by PPSR.

N images, M texts, Q queries, G gallery items, K candidates, W bytes of a code.
"""

from __future__ import annotations

from collections.abc import Mapping

import faiss
import numpy as np

from nbhelpers.data.array_store import ArrayStore
from nbhelpers.errors import UserError

K = 70  # candidates that are reranked, in both directions
NEIGHBOURS = 10  # best scores that PPSR averages


def negative_hamming(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Return minus the number of differing bits (Q,G), float32, of packed codes.

    The codes are (Q,W) and (G,W).
    """
    signs = [
        2 * np.unpackbits(codes, axis=1).astype(np.float32) - 1 for codes in (queries, gallery)
    ]
    return (signs[0] @ signs[1].T - signs[0].shape[1]) / 2


def post_process(
    scores: np.ndarray, columns: np.ndarray | None = None, neighbours: int = NEIGHBOURS
) -> np.ndarray:
    """Return PPSR of scores (Q,G): twice the scores, less two means of the best scores.

    The means are over the best `neighbours` of the row and of the column.
    The paper's search post-processes coarse scores; of fine ones it would change the ranking
    itself.
    columns  (G,) the column means that a bank of other queries gave (`bank_means`), which is what
             an online search can know; None: those of these scores, as released, where every query
             depends on all others (transductive)
    """
    scores = np.asarray(scores, dtype=np.float32)
    if columns is None:
        columns = _best_mean(scores.T, neighbours)
    return 2 * scores - _best_mean(scores, neighbours)[:, None] - columns


def _best_mean(scores: np.ndarray, neighbours: int) -> np.ndarray:
    """Return the mean (Q,) of the best `neighbours` of each row, or of all if fewer."""
    kept = min(at_least_one(neighbours, "neighbour"), scores.shape[1])
    return np.partition(scores, -kept, axis=1)[:, -kept:].mean(1)


def bank_means(gallery: np.ndarray, bank: np.ndarray, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Return the column means (G,) float32 of PPSR, from the codes of training queries.

    gallery (G,W) and bank (any number,W) are packed codes.
    """
    index, kept = code_index(bank), min(at_least_one(neighbours, "neighbour"), len(bank))
    means = np.empty(len(gallery), dtype=np.float32)
    for start in range(0, len(gallery), 4096):
        block = slice(start, start + 4096)
        means[block] = -index.search(np.ascontiguousarray(gallery[block]), kept)[0].mean(
            1, dtype=np.float32
        )
    return means


def chosen(scores: np.ndarray, k: int) -> np.ndarray:
    """(Q,G) booleans: the best k of each row, of equal scores the first ones. UserError on NaN."""
    return _first_k(np.argsort(-_without_nan(scores), axis=1, kind="stable"), k)


def chosen_optimistically(
    coarse: np.ndarray, fine: np.ndarray, right: np.ndarray, k: int
) -> np.ndarray:
    """Choose as `chosen` does, but of tied last items those that serve the query best.

    These are right items from the highest fine score down, then wrong ones from the lowest up.
    """
    served = np.where(right, -fine, fine)
    return _first_k(np.lexsort((served, ~right, -_without_nan(coarse)), axis=1), k)


def _first_k(order: np.ndarray, k: int) -> np.ndarray:
    """(Q,G) column numbers, best first -> (Q,G) booleans, true for the first k."""
    mask = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(mask, order[:, : at_least_one(k, "candidate")], True, axis=1)
    return mask


def eligible(scores: np.ndarray, k: int) -> np.ndarray:
    """(Q,G) booleans: the best k of each row and all that tie with the last of them.

    UserError on NaN.
    """
    return scores >= last_score(_without_nan(scores), k)


def last_score(scores: np.ndarray, k: int) -> np.ndarray:
    """(Q,G) -> (Q,1): the score of the last of the best k."""
    kept = min(at_least_one(k, "candidate"), scores.shape[1])
    return np.partition(scores, -kept, axis=1)[:, -kept, None]


def _without_nan(scores: np.ndarray) -> np.ndarray:
    if np.isnan(scores).any():
        raise UserError("The coarse scores hold NaN; look for a diverged model.")
    return scores


def at_least_one(number: int, what: str) -> int:
    """Return the same number. UserError if it is below 1."""
    if number < 1:
        raise UserError(f"A search takes at least one {what}, not {number}.")
    return number


def code_index(codes: np.ndarray) -> faiss.IndexBinaryFlat:
    """Return an exact index of packed codes (G,W) by Hamming distance."""
    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    # it counts by distance instead, which costs less the more candidates are asked for
    index.use_heap = False  # type: ignore[attr-defined] # of its C++ class
    index.add(np.ascontiguousarray(codes))
    return index


def coarse_scores(
    images: ArrayStore,
    texts: ArrayStore,
    neighbours: int = NEIGHBOURS,
    banks: tuple[ArrayStore, ArrayStore] | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return coarse scores (N,M) of a split, for images and for texts as queries.

    Names: "Hamming", "PPSR" as released and, with `banks` of training images and texts, "PPSR
    online" with the column means of these banks.
    """
    hamming = negative_hamming(images["codes"], texts["codes"])
    coarse = {
        "Hamming": (hamming, hamming),
        "PPSR": (post_process(hamming, neighbours=neighbours),) * 2,
    }
    if banks is not None:
        of_texts = bank_means(texts["codes"], banks[0]["codes"], neighbours)
        of_images = bank_means(images["codes"], banks[1]["codes"], neighbours)
        coarse["PPSR online"] = (
            post_process(hamming, of_texts, neighbours),
            post_process(hamming.T, of_images, neighbours).T,
        )
    return coarse


def candidate_pairs(coarse: Mapping[str, tuple[np.ndarray, np.ndarray]], k: int) -> np.ndarray:
    """Return which pairs (N,M) any of the `coarse_scores` may rerank, in either direction."""
    wanted = [eligible(i2t, k) | eligible(t2i.T, k).T for i2t, t2i in coarse.values()]
    return np.logical_or.reduce(wanted)

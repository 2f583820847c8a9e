"""One direction of the search online: a query, its candidates, their order.

Q queries, G gallery items, K candidates, W bytes of a code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from nbhelpers.data.array_store import ArrayStore
from nbhelpers.errors import UserError
from nbhelpers.tasks.two_stage.candidates import NEIGHBOURS, K, at_least_one, bank_means, code_index
from nbhelpers.tasks.two_stage.reranking import PAIRS, pair_scores
from nbhelpers.tasks.two_stage.stores import check_eval_mode, store_key

# nearest codes that PPSR looks at first, which spares most queries a second pass over all codes
POOL = 1000


class Found(NamedTuple):
    """The best gallery rows (Q,K) of each query, best first, and their scores (Q,K)."""

    rows: np.ndarray
    scores: np.ndarray


class Search:
    """One direction of the search: `gallery` is a store, queries are of the other kind.

    bank        codes of training queries, for PPSR; None: plain Hamming distance
    k           candidates that are reranked, at most the gallery
    neighbours  of PPSR;  batch: pairs that pass the fine stage at once
    Queries are what `encode` gave for them. Of equal scores the first row wins. UserError if the
    gallery is empty, holds no states, or was encoded by another model, and if the bank holds no
    queries of this model.
    """

    def __init__(
        self,
        model: nn.Module,
        gallery: ArrayStore,
        bank: ArrayStore | None = None,
        k: int = K,
        neighbours: int = NEIGHBOURS,
        batch: int = PAIRS,
    ):
        check_eval_mode(model)
        if "states" not in gallery.arrays or not len(gallery):
            raise UserError(
                "The gallery is empty or holds only codes; write a store with states"
                " (`write_stores`)."
            )
        self.images = gallery.key.get("kind") == "images"
        ours, queries = (
            store_key(model, "images" if self.images else "texts"),
            ("texts" if self.images else "images"),
        )
        for store, wanted in ((gallery, ours), (bank, ours | {"kind": queries})):
            if store is not None and not wanted.items() <= store.key.items():
                raise UserError(
                    f"The search wants a store under {wanted}, not {store.key}; encode it with this"
                    " model."
                )
        self.model, self.gallery, self.k, self.batch = (
            model,
            gallery,
            min(at_least_one(k, "candidate"), len(gallery)),
            batch,
        )
        self.neighbours = min(at_least_one(neighbours, "neighbour"), len(gallery))
        self.index = code_index(gallery["codes"])
        self.columns: Any = (
            None if bank is None else bank_means(gallery["codes"], bank["codes"], neighbours)
        )
        self.lowest: Any = None if self.columns is None else self.columns.min()

    def coarse(self, codes: np.ndarray) -> Found:
        """Return the K candidates of each query code (Q,W), exactly.

        By Hamming distance or, with a bank, by PPSR.
        """
        if self.columns is None:
            distances, rows = self.index.search(codes, self.k)
            return Found(rows, -distances.astype(np.float32))
        pool = min(max(self.k, self.neighbours, POOL), len(self.gallery))
        found = [
            self._post_processed(*query)
            for query in zip(codes, *self.index.search(codes, pool), strict=True)
        ]
        return Found(*(np.stack(part) for part in zip(*found, strict=True)))

    def _post_processed(
        self, code: np.ndarray, distances: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the K candidates of one query by PPSR.

        They come from its nearest rows or, if better ones may lie beyond, from all.
        """
        own = -distances[: self.neighbours].mean(dtype=np.float32)
        scores = -2 * distances.astype(np.float32) - own - self.columns[rows]
        bound = np.partition(scores, -self.k)[-self.k]
        # an item farther away scores less than `bound`, whatever its column mean
        reach = (-own - self.lowest - bound) / 2
        if distances[-1] <= reach + 1:
            _, distances, rows = self.index.range_search(code[None], math.floor(reach) + 2)
            scores = -2 * distances.astype(np.float32) - own - self.columns[rows]
        rows, scores = rows[scores >= bound], scores[scores >= bound]
        best = np.lexsort((rows, -scores))[: self.k]
        return rows[best], scores[best]

    def rerank(self, query: Mapping[str, object], rows: np.ndarray) -> np.ndarray:
        """Encoded queries and gallery rows (Q,any number) -> fine scores of the same shape."""
        own = np.repeat(np.arange(len(rows)), rows.shape[1])
        sides = (self.gallery, rows.ravel()), (query, own)
        (images, image), (texts, text) = sides if self.images else sides[::-1]
        return pair_scores(self.model, images, image, texts, text, self.batch).reshape(rows.shape)

    def __call__(self, query: Mapping[str, Any]) -> Found:
        """Return the candidates of encoded queries in the order of the fine scores.

        Of equal scores the better candidate leads.
        """
        if ("mask" in query) != self.images:
            raise UserError(
                f"This search finds {self.gallery.key['kind']}; give it queries of the other kind."
            )
        rows = self.coarse(query["codes"]).rows
        scores = self.rerank(query, rows)
        order = np.argsort(-scores, axis=1, kind="stable")
        return Found(np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))

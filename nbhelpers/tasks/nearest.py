"""Find the nearest vectors of a large gallery, by faiss.

Up to FLAT vectors, a question is compared with all of them (flat). A larger gallery is split into
√N lists of near vectors, and a question is compared with the nearest lists alone: IVF, of Sivic and
Zisserman, "Video Google", ICCV 2003. The number of lists that are read is the smallest power of two
that finds TARGET of what comparing with all finds; that share is the recall. It is measured with
vectors of the gallery as questions. Questions of another kind, as sentences to images, may find
less. N vectors, D numbers each, Q questions, K answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write, one_writer
from nbhelpers.keys import key_digest
from nbhelpers.metrics.blocks import unit_rows
from nbhelpers.tasks.two_stage.search import Found

FLAT = 100_000  # vectors up to which all are compared
TARGET = 0.99  # share of the flat answers that lists must find
FIRST = 10  # answers of a question that are counted for it
SAMPLES = 200  # vectors of the gallery that serve as questions
PER_LIST = 64  # vectors from which the middle of each list is learnt
BLOCK = 50_000  # vectors in memory at once, as float32
SEED = 0
ABOUT, LISTS = "about.json", "lists.faiss"


@dataclass(frozen=True, eq=False)
class Nearest:
    """A gallery of vectors, ready for questions.

    vectors  (N,D), of a flat one unit rows, else perhaps memory-mapped; scores are cosines
    lists    the IVF index; None: flat
    read     how many lists are read for a question
    recall   share of the flat answers that it finds, over SAMPLES vectors of the gallery
    """

    vectors: np.ndarray
    lists: Any = None  # faiss has no types for its search parameters
    read: int = 0
    recall: float = 1.0

    @classmethod
    def of(cls, vectors: np.ndarray, folder: Path | None = None) -> Nearest:
        """Prepare a gallery (N,D) by the rule above.

        folder  where its lists are kept, and found the next time; it must belong to these vectors
        UserError for NaN, and for rows of zeros.
        """
        if len(vectors) <= FLAT:
            return cls(unit_rows(vectors, "gallery"))
        if folder is None:
            return _with_lists(vectors)
        with one_writer(folder):
            if not (folder / ABOUT).is_file():
                _write(_with_lists(vectors), folder)
        return _opened(vectors, folder)

    def search(self, questions: np.ndarray, k: int = FIRST) -> Found:
        """Return rows and cosines (Q,K) of the nearest vectors of questions (Q,D), best first.

        Of equal cosines the first row leads. K is at most N. UserError for another width.
        """
        if self.lists is None:
            return self.flat(questions, k)
        k = self._check(questions, k)
        asked = unit_rows(questions, "questions")
        chosen = faiss.SearchParametersIVF(nprobe=self.read)  # type: ignore[call-arg]
        scores, rows = self.lists.search(asked, k, params=chosen)
        if (rows < 0).any():  # the lists that were read hold fewer than K
            return self.flat(questions, k)
        return _in_order(rows, scores)

    def flat(self, questions: np.ndarray, k: int = FIRST) -> Found:
        """Return what `search` returns, from comparing with all vectors."""
        k = self._check(questions, k)
        asked = unit_rows(questions, "questions")
        rows = np.zeros((len(asked), 0), np.int64)
        scores = np.zeros((len(asked), 0), np.float32)
        for start, block in self._blocks():
            found, place = faiss.knn(asked, block, min(k, len(block)), faiss.METRIC_INNER_PRODUCT)
            rows = np.hstack([rows, place + start])
            scores = np.hstack([scores, found])
            best = _in_order(rows, scores)
            rows, scores = best.rows[:, :k], best.scores[:, :k]
        return Found(rows, scores)

    def how(self) -> str:
        """Say how questions are answered, with the recall against the flat search."""
        if self.lists is None:
            return f"The question was compared with all {len(self.vectors):,} vectors."
        return (
            f"{len(self.vectors):,} vectors lie in {self.lists.nlist:,} lists; a question reads"
            f" {self.read:,} of them. With {SAMPLES} vectors of the gallery as questions, this"
            f" finds {100 * self.recall:.1f} % of what comparing with all finds."
        )

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        if len(self.vectors) <= FLAT:
            yield 0, self.vectors
        else:
            yield from _blocks(self.vectors)

    def _check(self, questions: np.ndarray, k: int) -> int:
        if questions.ndim != 2 or questions.shape[1] != self.vectors.shape[1]:
            raise UserError(
                f"The question has {questions.shape[-1]} numbers and the gallery has"
                f" {self.vectors.shape[1]} a vector; give vectors of one model."
            )
        if k < 1:
            raise UserError(f"The search is to find {k} vectors; ask for at least 1.")
        return min(k, len(self.vectors))


def share_found(found: Found, right: Found) -> float:
    """Return which share of the right answers (Q,K) was found.

    The first answer is left out: to a vector of the gallery it is the vector itself. An answer as
    near as the last right one counts as right.
    """
    least = right.scores[:, -1:] - 1e-6
    near = (found.scores[:, 1:] >= least).sum(1)
    return float(near.mean() / (right.scores.shape[1] - 1))


def _with_lists(vectors: np.ndarray) -> Nearest:
    """Learn the lists, put all vectors into them, and choose how many are read."""
    random = np.random.default_rng(SEED)
    count = round(math.sqrt(len(vectors)))
    some = np.sort(random.choice(len(vectors), min(PER_LIST * count, len(vectors)), replace=False))
    width = vectors.shape[1]
    middle = faiss.IndexFlatIP(width)
    lists = faiss.IndexIVFFlat(middle, width, count, faiss.METRIC_INNER_PRODUCT)
    lists.cp.spherical, lists.cp.seed = True, SEED
    lists.cp.min_points_per_centroid = 1  # it warns of fewer, also where there are no more
    lists.train(np.vstack(list(_picked(vectors, some))))
    for _, block in _blocks(vectors):
        lists.add(block)
    plain = Nearest(vectors)
    questions = vectors[np.sort(random.choice(len(vectors), SAMPLES, replace=False))]
    right = plain.flat(questions, FIRST + 1)
    read = 1
    while True:
        found = Nearest(vectors, lists, read)
        recall = share_found(found.search(questions, FIRST + 1), right)
        if recall >= TARGET or read >= count:
            return Nearest(vectors, lists, read, recall)
        read = min(2 * read, count)


def folder_of(cache: Path, *content: object) -> Path:
    """Return the folder of the cache for the lists of a gallery with this content."""
    rule = [faiss.__version__, FLAT, TARGET, FIRST, SAMPLES, PER_LIST, SEED]
    return cache / f"nearest-{key_digest(rule, *content)[:16]}"


def _write(found: Nearest, folder: Path) -> None:
    with atomic_write(folder / LISTS) as temporary:
        faiss.write_index(found.lists, str(temporary))
    with atomic_write(folder / ABOUT) as temporary:  # last: it says that the lists are whole
        about = {"read": found.read, "recall": found.recall}
        temporary.write_text(json.dumps(about) + "\n", encoding="utf-8")


def _opened(vectors: np.ndarray, folder: Path) -> Nearest:
    """Open lists; they stay on the disk, and only those that a question reads are loaded."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        lists = faiss.read_index(str(folder / LISTS), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        if (lists.ntotal, lists.d) != vectors.shape:
            raise ValueError(f"it has {lists.ntotal} vectors of {lists.d} numbers")
        return Nearest(vectors, lists, int(about["read"]), float(about["recall"]))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(
            f"The lists in {folder} are damaged ({error}); delete that folder, and they are made"
            " again."
        ) from error


def _blocks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(vectors), BLOCK):
        yield start, unit_rows(vectors[start : start + BLOCK], "gallery", start)


def _picked(vectors: np.ndarray, some: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the unit rows of these numbers, ascending, block by block."""
    for start, block in _blocks(vectors):
        low, high = np.searchsorted(some, (start, start + len(block)))
        yield block[some[low:high] - start]


def _in_order(rows: np.ndarray, scores: np.ndarray) -> Found:
    order = np.lexsort((rows, -scores), axis=1)
    return Found(np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))

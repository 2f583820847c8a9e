"""Count one set of scores under each protocol that the field uses, and show the differences.

expectation   tied items stand in random order: how this project reports
released      the loops of PIR, HarMA and X-VLM: argsort, reversed
optimistic    a query's own item wins every tie
any-owner     a caption is right for every image that has an equal one (SkyScript)
unique-texts  repeated captions are removed first, and any owner counts (SkyScript)
prefix, capitalize  the captions themselves change, so a model must encode them again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from nbhelpers.errors import UserError
from nbhelpers.metrics.blocks import KS, recall_by
from nbhelpers.metrics.recall import Recall

PREFIX = "a satellite image. {}"
PROTOCOLS = {
    "expectation": "Tied items stand in random order, so a tie neither helps nor hurts.",
    "released": "Scores are sorted and reversed, so of equal scores the later index wins.",
    "optimistic": "The own item wins every tie, so equal scores for all are a perfect recall.",
    "any-owner": "A caption is right for every image that has the same one, spaces and case aside.",
    "unique-texts": "Repeated captions are removed, which makes the gallery and the task smaller.",
    "prefix": "'a satellite image. ' stands before each caption, which asks another question.",
    "capitalize": "Captions begin with a capital letter; only tokenizers that keep case see it.",
}
AGAIN = {"prefix": PREFIX.format, "capitalize": str.capitalize}  # captions are encoded again
RESPLIT = (
    "The re-splits of PIR and HarMA change what a model is trained on, which no scores of one model"
    " can show. In the public file of RSITMD, 'harma_split' moves 856 images from train to val, and"
    " the 452 images of test are the same. Of RSICD only the sizes are published, 7,862, 1,966 and"
    " 1,093; `data check --against` counts which images move between two caption files."
)
MOST = 250_000_000  # scores that the bridge keeps


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores in both directions: i2t (N,M) and t2i (M,N); a higher score is better."""

    i2t: np.ndarray
    t2i: np.ndarray

    @classmethod
    def of(cls, similarity: np.ndarray) -> Scores:
        """Take one matrix (N,M) for both directions."""
        return cls(similarity, similarity.T)


def name_of(protocol: str) -> str:
    """Return the name of a protocol; UserError for an unknown one."""
    if protocol not in PROTOCOLS:
        raise UserError(
            f"Unknown protocol '{protocol}'; choose one of {', '.join(PROTOCOLS)}, or all."
        )
    return protocol


def text_numbers(texts: Sequence[str]) -> np.ndarray:
    """(M,): captions that are equal, spaces and case aside, share a number."""
    from nbhelpers.metrics import audit  # which needs scipy

    return pd.factorize(pd.Series(list(texts)).map(audit.NORMALISE["spaces"]))[0]


def evaluate(
    protocol: str, scores: Scores, texts: Sequence[str], owner: np.ndarray
) -> tuple[Recall, np.ndarray]:
    """Return (recall, owner of its captions) under a protocol.

    texts, owner (M,): the captions, and the image row of each. Under prefix and capitalize the
    scores must be those of the changed captions. UserError for an unknown protocol.
    """
    name_of(protocol)
    rule = protocol if protocol in ("released", "optimistic") else "expectation"
    kept = np.arange(len(owner))
    right = owner == np.arange(len(scores.i2t))[:, None]
    if protocol in ("any-owner", "unique-texts"):
        number = text_numbers(texts)
        has = np.zeros((len(scores.i2t), number.max() + 1), bool)
        has[owner, number] = True
        right = has[:, number]
        if protocol == "unique-texts":
            kept = np.sort(np.unique(number, return_index=True)[1])
    part = Scores(scores.i2t[:, kept], scores.t2i[kept])
    return relevant(part, right[:, kept], rule), owner[kept]


def relevant(scores: Scores, right: np.ndarray, rule: str) -> Recall:
    """Return R@1, R@5, R@10 where right (N,M) says which pairs count. UserError on NaN."""
    return recall_by(rule, KS, _counts(scores.i2t, right), _counts(scores.t2i, right.T))


def bridge(
    scores: Scores,
    texts: Sequence[str],
    owner: np.ndarray,
    again: Mapping[str, Scores] | None = None,
) -> pd.DataFrame:
    """Return one row a protocol: recalls, mR, the difference from expectation, and a sentence.

    again  protocol -> scores of the changed captions; a protocol of `AGAIN` without has no numbers
    """
    again, rows = again or {}, {}
    for protocol, said in PROTOCOLS.items():
        rows[protocol] = {"captions": np.nan, "mR": np.nan, "what it does": said}
        if protocol in AGAIN and protocol not in again:
            rows[protocol]["what it does"] = f"{said} It needs a model (--model)."
            continue
        found, kept = evaluate(protocol, again.get(protocol, scores), texts, owner)
        rows[protocol] |= found.metrics | {"captions": len(kept)}
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame["difference"] = frame.mR - frame.mR["expectation"]
    recalls = [f"{way}_R@{k}" for way, k in product(("i2t", "t2i"), KS)]
    return frame[["captions", *recalls, "mR", "difference", "what it does"]]


def _counts(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, ...]:
    """(above, tied, own, after) for each query, as `recall._counts` has them."""
    found = np.zeros((4, len(scores)), np.int64)
    position = np.arange(scores.shape[1])
    for start in range(0, len(scores), 256):
        rows = slice(start, start + 256)
        block, own = _comparable(scores[rows]), right[rows]
        best = np.where(own, block, block.min()).max(1, keepdims=True)
        tied = block == best
        mine = tied & own
        last = np.where(mine, position, -1).max(1, keepdims=True)
        found[0, rows] = (block > best).sum(1)
        found[1, rows], found[2, rows] = tied.sum(1), mine.sum(1)
        found[3, rows] = (tied & (position > last)).sum(1)
    return tuple(found)


def _comparable(block: np.ndarray) -> np.ndarray:
    if block.dtype.kind == "f" and np.isnan(block.min()):
        raise UserError(
            "The scores hold NaN; look for a zero-length embedding or a diverged model."
        )
    return block.astype(np.float32) if block.dtype == np.float16 else block

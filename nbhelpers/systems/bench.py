"""Evaluate any outputs under a protocol: recalls, intervals, paired tests, and one record each.

Needs no torch. `bench_models` makes outputs of models, `given_outputs` reads those of others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd

from nbhelpers.data.distinct import Rows, distinct
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.metrics import audit, blocks, protocols, recall, significance, trec
from nbhelpers.metrics.protocols import AGAIN, MOST, Scores
from nbhelpers.metrics.recall import TIES, Recall
from nbhelpers.results import records
from nbhelpers.results.published import CALIBRATION
from nbhelpers.results.records import safe_name
from nbhelpers.systems.given_outputs import Given

RECALLS = [f"{way}_R@{k}" for way, k in product(("i2t", "t2i"), blocks.KS)]
NEAR = 0.2  # points of mR by which a calibrated harness may differ


@dataclass(frozen=True, eq=False)
class Result:
    """How one model did on one split under one protocol.

    found  tie rule -> recall; the protocol's own rule is first
    owner  of the captions that the protocol keeps;  scores: the whole matrices, if they are few
    """

    given: Given
    table: CaptionTable
    protocol: str
    found: dict[str, Recall]
    owner: np.ndarray
    scores: Scores | None
    seconds: float

    @property
    def recall(self) -> Recall:
        """The recall by the protocol's own tie rule."""
        return next(iter(self.found.values()))

    def row(self, ranking: bool = True) -> dict[str, float]:
        """Return recalls, mR and its 95 % interval, and nDCG@10 and MRR of the plain scores."""
        low, high = recall.bootstrap(self.recall, self.owner)["mR"]
        metrics = {name: self.recall.metrics[name] for name in (*RECALLS, "mR")}
        found = metrics | {"mR low": low, "mR high": high}
        if ranking and self.scores is not None:
            found |= trec.measures(self.names(), self.scores)
        return found

    def names(self) -> trec.Names:
        """Return how TREC files call the images and captions."""
        return trec.Names.of(list(self.table.images.image_id), self.table.owner())


def evaluate(
    given: Given, table: CaptionTable, protocol: str = "expectation", normalise: bool = True
) -> Result:
    """Evaluate outputs of a split under a protocol of `protocols.PROTOCOLS`.

    The captions of prefix and capitalize must be those that the outputs are of (`changed`).
    UserError as `blocks.evaluate` and `protocols.evaluate`; for any-owner and unique-texts also
    where the scores are too many to be kept.
    """
    protocols.name_of(protocol)
    table.refuse_bare()
    began, owner = time.perf_counter(), table.owner()
    scores = given.scores or _scores(given, normalise)
    plain = protocol in TIES or protocol in AGAIN
    rule = protocol if protocol in TIES else "expectation"
    if given.images is not None and given.texts is not None and plain:
        rules = (rule, *(other for other in TIES if other != rule))
        found, kept = blocks.evaluate(given.images, given.texts, owner, rules, normalise), owner
    elif scores is None:
        raise UserError(
            f"{len(table):,} images x {len(owner):,} captions are too many scores for the protocol"
            f" {protocol}; choose one of {', '.join(TIES)}."
        )
    else:
        found, kept = _by_scores(protocol, scores, list(table.captions.text), owner)
    return Result(given, table, protocol, found, kept, scores, time.perf_counter() - began)


def changed(table: CaptionTable, protocol: str) -> CaptionTable:
    """Return the table with the captions that a model reads under a protocol."""
    if protocol not in AGAIN:
        return table
    texts = [AGAIN[protocol](text) for text in table.captions.text]
    return replace(table, captions=table.captions.assign(text=texts))


def bounds(table: CaptionTable) -> dict[str, dict[str, float]]:
    """Return recalls of chance, of classes alone where they are known, and of the ceiling.

    Classes alone: all images of a class and their captions score the same, so this is what
    knowing nothing but the class reaches.
    """
    owner = table.owner()
    found = {"chance": recall.chance(owner)}
    scenes = pd.factorize(table.images.scene)[0]
    if table.images.scene.nunique() > 1 and len(table) * len(owner) <= MOST:
        same = (scenes[:, None] == scenes[owner]).astype(np.int8)
        found["classes alone"] = recall.evaluate(same, owner).metrics
    return found | {"ceiling": audit.ceilings(table)}


def warnings(result: Result) -> list[str]:
    """Return what looks wrong with outputs.

    That is a wrong order, equal scores, one vector for all, and equal captions with other
    vectors.
    """
    said, given = [], result.given
    chance, mean = recall.chance(result.table.owner())["mR"], result.recall.metrics["mR"]
    if result.scores is not None and _all_equal(result.scores.i2t):
        said.append(
            f"{given.name}: all scores are equal, so the recalls are those of guessing; look for a"
            " model that gives every pair the same."
        )
    elif len(result.table) >= 20 and mean < 1.5 * chance:
        said.append(
            f"{given.name}: mR is {mean:.1f} and guessing reaches {chance:.1f}, so the rows are"
            " probably not in the order of the captions file; give ids (.npz, .safetensors,"
            " .parquet)."
        )
    for kind, rows in (("images", given.images), ("captions", given.texts)):
        if rows is not None and len(rows) > 1 and (rows == rows[:1]).all():
            said.append(
                f"{given.name}: all {kind} have one embedding; look for an input that never"
                " reaches the model, such as a prompt that fills its context."
            )
    unequal = 0 if given.texts is None else _unequal(given.texts, result.table.captions.text)
    if unequal:
        said.append(
            f"{given.name}: {unequal} captions repeat a sentence but not its embedding, so they do"
            " not tie as they should; encode each sentence once."
        )
    return said


def _all_equal(scores: np.ndarray) -> bool:
    return all((row == scores[0, 0]).all() for row in scores)


def _unequal(vectors: np.ndarray, texts: pd.Series) -> int:
    """Count captions that are equal to an earlier one and have another vector."""
    first = texts.groupby(texts).transform(lambda same: same.index[0]).to_numpy()
    later = np.flatnonzero(first != np.arange(len(texts)))
    return sum(not np.array_equal(vectors[row], vectors[first[row]]) for row in later)


def tests(results: Sequence[Result], seed: int = 0) -> pd.DataFrame:
    """Compare each pair of results on one split: difference of mR, interval, p after Holm."""
    rows = [
        {"model": one.given.name, "against": other.given.name}
        | recall.paired_test(one.recall, other.recall, one.owner, seed=seed)["mR"]
        for one, other in _pairs(results)
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(p=significance.holm(list(frame.p))) if rows else frame


def calibrate(result: Result) -> str:
    """Compare CLIP ViT-B/32, zero-shot, with what the field measures on a set."""
    known = CALIBRATION.get(result.table.name.lower())
    mean = result.recall.metrics["mR"]
    if known is None:
        raise UserError(
            f"Nobody published CLIP ViT-B/32 on {result.table.name}; calibrate on"
            f" {', '.join(CALIBRATION)}."
        )
    off = mean - known
    said = f"{result.given.name}: mR {mean:.2f}, the field's {known:.1f} ({off:+.2f})."
    if abs(off) <= NEAR:
        return f"{said} This harness uses the field's protocol."
    if off < -5:
        why = "images or captions may be in a wrong order, or another model was given"
    elif off < 0:
        why = (
            "the activation may be GELU instead of QuickGELU, or the image transform or the prompt"
            " another one"
        )
    else:
        why = "the weights may be tuned, equal texts may count, or the split may be another one"
    return f"{said} It differs by more than {NEAR}: {why}."


def record_of(result: Result, seed: int = 0) -> dict:
    """Return the record of a result; `write_record` writes it."""
    given, table = result.given, result.table
    rule = result.recall.ties
    weight = {"name": given.name, "source": "bench", "sha256": given.digest, "kind": "file"}
    return records.new(
        {"outputs": given.name, "digest": given.digest, "protocol": result.protocol},
        notebook="bench",
        profile="bench",
        set=safe_name(table.name),
        system=given.name,
        variant=f"{safe_name(given.name)}-{given.digest[:8]}-{result.protocol}",
        seed=seed,
        seconds=result.seconds,
        weights=[weight],
        notes=" ".join(given.notes),
        data_fingerprint=table.fingerprint(),
        protocol={
            "split": table.images.split.iloc[0],
            "ties": rule,
            "selected_on": "unknown",
            "name": result.protocol,
        },
        metrics={name: found.metrics for name, found in result.found.items()},
        intervals=recall.bootstrap(result.recall, result.owner, seed=seed),
        ceiling=audit.ceilings(table) if rule == result.protocol else {},
        chance=recall.chance(result.owner),
    )


def write_record(result: Result, folder: Path | str) -> Path:
    """Write the record of a result and its ranks below a folder, in a folder for the set."""
    ranks = result.recall.arrays() | {"owner": result.owner}
    return records.write(Path(folder) / safe_name(result.table.name), record_of(result), ranks)


def _pairs(results: Sequence[Result]) -> list[tuple[Result, Result]]:
    return [
        pair
        for pair in combinations(results, 2)
        if pair[0].protocol == pair[1].protocol
        and pair[0].table.fingerprint() == pair[1].table.fingerprint()
    ]


def _by_scores(
    protocol: str, scores: Scores, texts: list[str], owner: np.ndarray
) -> tuple[dict[str, Recall], np.ndarray]:
    if protocol not in TIES:
        found, kept = protocols.evaluate(protocol, scores, texts, owner)
        return {found.ties: found}, kept
    rules = (protocol, *(other for other in TIES if other != protocol))
    return {rule: protocols.evaluate(rule, scores, texts, owner)[0] for rule in rules}, owner


def _scores(given: Given, normalise: bool) -> Scores | None:
    """Return the scores of embeddings, equal for equal pairs; None if they are too many."""
    if given.images is None or given.texts is None:
        return None
    if len(given.images) * len(given.texts) > MOST:
        return None
    seen, read = (
        _rows(each, name, normalise)
        for each, name in ((given.images, "images"), (given.texts, "captions"))
    )
    return Scores.of(seen.products(read))


def _rows(vectors: np.ndarray, name: str, normalise: bool) -> Rows:
    """Return the vectors as float32; equal ones once, as `blocks` compares them."""
    if normalise:
        rows = blocks.unit_rows(vectors, name)
    else:
        rows = np.ascontiguousarray(vectors, np.float32)
        blocks.lengths(rows, name, 0, normalise)
    whole = np.ascontiguousarray(vectors, np.float32) + np.float32(0)
    once = distinct([row.tobytes() for row in whole])
    return Rows(rows[once.first], once.row)

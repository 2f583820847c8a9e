"""Read and write rankings as TREC runs and qrels; nDCG@10 and MRR by ir_measures.

An image is called by its id, a caption by `IMAGE#K`: the K-th caption, from 0, of that image.
Spaces in ids become `%20`. A run holds the queries of both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from nbhelpers.errors import UserError, of_system, printable, reason
from nbhelpers.files import atomic_write
from nbhelpers.metrics.protocols import Scores

DEPTH = 100  # items of a query that are written, and that MRR looks at
MEASURES = ("nDCG@10", f"MRR@{DEPTH}")


@dataclass(frozen=True, eq=False)
class Names:
    """How the images (N) and captions (M) of a split are called in TREC files."""

    images: list[str]
    captions: list[str]
    owner: np.ndarray

    @classmethod
    def of(cls, image_ids: Sequence[str], owner: np.ndarray) -> Names:
        """Name the captions by the images that they belong to."""
        images = [quote(name, safe="/+-_.") for name in image_ids]
        seen = [0] * len(images)
        captions = []
        for row in owner.tolist():
            captions.append(f"{images[row]}#{seen[row]}")
            seen[row] += 1
        return cls(images, captions, owner)

    def qrels(self) -> Iterator[str]:
        """Yield the lines of the qrels of both directions."""
        for caption, row in zip(self.captions, self.owner.tolist(), strict=True):
            yield f"{self.images[row]} 0 {caption} 1"
            yield f"{caption} 0 {self.images[row]} 1"


def write(folder: Path | str, name: str, names: Names, scores: Scores) -> tuple[Path, Path]:
    """Write `NAME.trec` and `qrels.txt` into a folder; return their paths.

    The first items of each query stand in the order of the expectation's scores, equal ones in the
    order of their index.
    """
    run, qrels = Path(folder) / f"{name}.trec", Path(folder) / "qrels.txt"
    run.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(run) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for queries, items, part in _directions(names, scores):
            for query, best in enumerate(top(part)):
                file.writelines(
                    f"{queries[query]} Q0 {items[item]} {rank} {part[query, item]:.9g} {name}\n"
                    for rank, item in enumerate(best, 1)
                )
    with atomic_write(qrels) as temporary:
        temporary.write_text("\n".join(names.qrels()) + "\n", encoding="utf-8")
    return run, qrels


def read(path: Path | str, names: Names) -> tuple[Scores, list[str]]:
    """Read a run of both directions; return its scores and what was found.

    Items that a query does not list score -inf, so they tie behind all others.
    UserError for lines that are none, names that no image or caption has, an item that a query
    lists twice, and queries that are missing.
    """
    images = {name: row for row, name in enumerate(names.images)}
    captions = {name: row for row, name in enumerate(names.captions)}
    i2t = np.full((len(images), len(captions)), -np.inf)
    t2i = np.full((len(captions), len(images)), -np.inf)
    lines = 0
    for number, query, item, score in _lines(path):
        lines += 1
        if query in images and item in captions:
            place, part = (images[query], captions[item]), i2t
        elif query in captions and item in images:
            place, part = (captions[query], images[item]), t2i
        else:
            unknown = item if query in images or query in captions else query
            raise UserError(
                f"Line {number} of {path} names {printable(unknown)}, which the captions do not"
                f" have; call images by their id, such as {printable(names.images[0])}, and"
                f" captions such as {printable(names.captions[0])}."
            )
        if part[place] > -np.inf:
            raise UserError(
                f"Line {number} of {path} lists {printable(item)} twice for {printable(query)};"
                " keep one line of each pair."
            )
        part[place] = score
    listed = [np.isfinite(part).sum(1) for part in (i2t, t2i)]
    for kind, called, found in zip(
        ("image", "caption"), (names.images, names.captions), listed, strict=True
    ):
        missing = np.flatnonzero(found == 0)
        if len(missing):
            raise UserError(
                f"{path} has no line for {len(missing)} of the {len(found)} {kind} queries (first:"
                f" {printable(called[missing[0]])}); a run needs the queries of both directions."
            )
    notes = [f"{lines:,} lines for {len(images):,} image and {len(captions):,} caption queries"]
    least = min(int(found.min()) for found in listed)
    if least < min(10, len(images)):
        notes.append(f"some query lists only {least} items, so its R@10 may count an unlisted one")
    return Scores(i2t, t2i), notes


def measures(names: Names, scores: Scores) -> dict[str, float]:
    """Return nDCG@10 and MRR@100 of each direction in percent, by ir_measures.

    Equal scores stand in the order of their index; a caption query has one right image.
    """
    import ir_measures

    found = {}
    asked = [ir_measures.nDCG @ 10, ir_measures.RR @ DEPTH]
    for direction, (queries, items, part) in zip(
        ("i2t", "t2i"), _directions(names, scores), strict=True
    ):
        run = {
            queries[query]: {items[item]: -float(rank) for rank, item in enumerate(best)}
            for query, best in enumerate(top(part))
        }
        values = ir_measures.calc_aggregate(asked, _right(names, direction), run)
        for name, measure in zip(MEASURES, asked, strict=True):
            found[f"{direction}_{name}"] = 100 * values[measure]
    return found


def top(scores: np.ndarray) -> Iterator[np.ndarray]:
    """Yield for each query its first items, at most DEPTH; equal scores by their index."""
    count = min(DEPTH, scores.shape[1])
    for row in scores:
        least = np.partition(row, -count)[-count]
        some = np.flatnonzero(row >= least)
        yield some[np.argsort(-row[some], kind="stable")][:count]


def _right(names: Names, direction: str) -> dict[str, dict[str, int]]:
    right: dict[str, dict[str, int]] = {}
    for caption, row in zip(names.captions, names.owner.tolist(), strict=True):
        pair = (names.images[row], caption)
        query, item = pair if direction == "i2t" else pair[::-1]
        right.setdefault(query, {})[item] = 1
    return right


def _directions(
    names: Names, scores: Scores
) -> tuple[tuple[list[str], list[str], np.ndarray], ...]:
    return (
        (names.images, names.captions, scores.i2t),
        (names.captions, names.images, scores.t2i),
    )


def _lines(path: Path | str) -> Iterator[tuple[int, str, str, float]]:
    """Yield (line number, query, item, score)."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                parts = line.split()
                if not parts:
                    continue
                if len(parts) != 6 or not _is_finite(parts[4]):
                    raise UserError(
                        f"Line {number} of {path} is no line of a TREC run; write: query Q0 item"
                        " rank score name, with a finite score."
                    )
                yield number, parts[0], parts[2], float(parts[4])
    except OSError as error:
        raise of_system(error, path) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); name a TREC run.") from error


def _is_finite(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False

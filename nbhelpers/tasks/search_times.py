"""Measure what a query of the two-stage search costs, also in larger galleries."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nbhelpers.data.array_store import ArrayStore, Computed
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.tasks.two_stage import Search, encode
from nbhelpers.training import device


def tiled(gallery: ArrayStore, count: int) -> ArrayStore:
    """Return a gallery of `count` rows, for timing alone.

    The same rows repeat. Only codes are copied, and each row is read as if it differed from all
    others.
    """
    arrays = {name: Computed(partial(_repeated, array)) for name, array in gallery.arrays.items()}
    codes = np.resize(gallery["codes"], (count, gallery["codes"].shape[1]))
    return ArrayStore(gallery.key, {**arrays, "codes": codes})  # type: ignore[dict-item]


def _repeated(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Row r is row r mod N."""
    return array[rows % len(array)]


def milliseconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Median time of a call, after one that warms up; waits for the GPU where there is one."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        function()
        device.wait()
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times[1:]))


def query_times(search: Search, inputs: Mapping[str, Tensor], repeats: int = 5) -> dict[str, float]:
    """Return milliseconds of one query, by part.

    `encode` reads it, `coarse` finds candidates (distance, post-processing, best K), `fine` reranks
    K pairs, `total` is all in one go. The gallery is encoded before.

    inputs  of the query alone, as `split_inputs` gives them for one row
    """
    query = encode(search.model, inputs)
    candidates = search.coarse(query["codes"]).rows
    return {
        "encode": milliseconds(lambda: encode(search.model, inputs), repeats),
        "coarse": milliseconds(lambda: search.coarse(query["codes"]), repeats),
        "fine": milliseconds(lambda: search.rerank(query, candidates), repeats),
        "total": milliseconds(lambda: search(encode(search.model, inputs)), repeats),
    }


def exhaustive_times(
    search: Search,
    inputs: Mapping[str, Tensor],
    gallery_inputs: Callable | None = None,
    repeats: int = 1,
) -> dict[str, float]:
    """Return milliseconds of the same query against every item.

    `cached` encodes it and passes the remaining layers with all stored states. With
    `gallery_inputs` (row numbers (B,) -> inputs), `scratch` passes all layers with each item, as a
    single-stream model without a store must.
    """
    everything = np.arange(len(search.gallery))[None]
    times = {
        "cached": milliseconds(
            lambda: search.rerank(encode(search.model, inputs), everything), repeats
        )
    }
    if gallery_inputs is not None:
        times["scratch"] = milliseconds(
            lambda: from_scratch(search, inputs, gallery_inputs), repeats
        )
    return times


@torch.inference_mode()
def from_scratch(
    search: Search, inputs: Mapping[str, Tensor], gallery_inputs: Callable
) -> np.ndarray:
    """(G,) fine scores of one query without any store."""
    model, scores = search.model, []
    for start in range(0, len(search.gallery), search.batch):
        item = gallery_inputs(np.arange(start, min(start + search.batch, len(search.gallery))))
        count = len(next(iter(item.values())))
        query = {name: part.expand(count, *part.shape[1:]) for name, part in inputs.items()}
        image, text = (item, query) if search.images else (query, item)
        pairs = model.score_pairs(
            model.image_states(**image), model.text_states(**text), text["mask"]
        )
        scores.append(pairs.float().cpu().numpy())
    return np.concatenate(scores)


def by_gallery_size(
    search: Callable[[int], Search],
    inputs: Mapping[str, Tensor],
    gallery_inputs: Callable,
    sizes: Sequence[int],
    limit: float = 2000.0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (milliseconds of one query, whether each was measured), a row for each gallery size.

    Columns: coarse, fine, two stages, and the exhaustive searches from the cache and from scratch.
    An exhaustive search that should take more than `limit` ms is calculated in proportion.

    search          size -> the two-stage search in a gallery of so many items
    inputs          of the query, as for `query_times`
    gallery_inputs  row numbers (B,) -> inputs, as for `exhaustive_times`
    sizes           in rising order
    """
    rows: list[dict[str, float]] = []
    known: list[dict[str, bool]] = []
    for number, size in enumerate(sizes):
        engine = search(size)
        times = query_times(engine, inputs, repeats=3)
        row = {"coarse": times["coarse"], "fine": times["fine"], "two stages": times["total"]}
        measured = dict.fromkeys(row, True)
        for name, given in (("cached", None), ("scratch", gallery_inputs)):
            column = f"exhaustive, {name}"
            expected = rows[-1][column] * size / sizes[number - 1] if rows else 0.0
            measured[column] = expected < limit
            row[column] = expected
            if measured[column]:
                row[column] = _exhaustive(engine, inputs, given)
        rows.append(row)
        known.append(measured)
    return pd.DataFrame(rows, sizes), pd.DataFrame(known, sizes)


def _exhaustive(search: Search, inputs: Mapping[str, Tensor], given: Callable | None) -> float:
    """Milliseconds of a query against every item: from the cache or, if inputs are given, anew."""
    if given is None:
        return exhaustive_times(search, inputs)["cached"]
    return milliseconds(lambda: from_scratch(search, inputs, given), 1)


# ---- the trade-off, for who compares systems
def write_tradeoff(path: Path, points: list[dict[str, float]], **about: object) -> Path:
    """Write a JSON file with `about` and `points`, one for each number of candidates.

    about: profile, set, seed, device and more. A point has "k", the recalls in percent, and
    milliseconds of a query "<direction>_<part>_ms". UserError on NaN and infinity.
    """
    try:
        text = json.dumps(about | {"points": points}, indent=1, allow_nan=False)
    except ValueError as error:
        raise UserError(
            f"The trade-off for {path} holds NaN or infinity; look for a diverged model."
        ) from error
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n")
    return Path(path)


def read_tradeoff(path: Path) -> tuple[pd.DataFrame, dict]:
    """(points, one row each; what they are about) as `write_tradeoff` wrote them.

    UserError if there is no such file.
    """
    try:
        about = json.loads(Path(path).read_text())
        return pd.DataFrame(about.pop("points")), about
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} holds no trade-off ({error!r}); run 25_two_stage_search again."
        ) from error

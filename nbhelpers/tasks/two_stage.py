"""Search in two stages with CFITR: candidates by Hamming distance, then reranking.

Offline, the states at which the layers are split and the packed hash codes of a gallery are written
once into an ArrayStore. Online, a query is compared with all codes, the best K items pass the
remaining layers together with it, and their scores alone decide the ranking. B batch, N images,
M texts, Q queries, G gallery items, K candidates, P pairs, W bytes of a code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from scipy.special import gammaln
from torch import Tensor, nn

from nbhelpers.code_identity import code_digest
from nbhelpers.data.array_store import ArrayStore
from nbhelpers.data.distinct import distinct
from nbhelpers.data.loaders import PIXEL_CODE
from nbhelpers.data.tokenization import Tokenizer
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.keys import key_digest, tensors_digest
from nbhelpers.metrics import recall
from nbhelpers.papers.dual_encoder import unpadded
from nbhelpers.tasks import retrieval
from nbhelpers.tasks.retrieval import RetrievalTask

K = 70  # candidates that are reranked, in both directions (spec 6.4)
NEIGHBOURS = 10  # best scores that PPSR averages (spec 6.3)
# nearest codes that PPSR looks at first, which spares most queries a second pass over all codes
POOL = 1000
PAIRS = 128  # pairs that pass the fine stage at once
FORM = 2  # of a store; others are not read


# ---- offline: what is stored of an image or a text
def store_key(model: nn.Module, kind: str) -> dict[str, object]:
    """Return what the rows of a store depend on, for kind "images" or "texts".

    The model, its settings and code, and the hash length.
    """
    # which only training reads
    state = {name: value for name, value in model.state_dict().items() if name != "bank"}
    read = (RetrievalTask, "features", "pixels_of"), Tokenizer, *PIXEL_CODE
    digest = key_digest(
        FORM,
        model.config,
        tensors_digest(state),
        code_digest(type(model), encode, split_inputs, *read),
    )
    return {"system": "cfitr", "kind": kind, "bits": model.config.bits, "model": digest[:16]}


def store_folder(run: Path | str, model: nn.Module) -> Path:
    """Return where a run keeps the stores of a trained model.

    It has a folder for each split, as `write_stores` fills it.
    """
    return Path(run) / "stores" / f"23_cfitr-{store_key(model, 'images')['model']}"


@torch.inference_mode()
def encode(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, object]:
    """Return codes, states and, of texts, the mask of encoded inputs.

    Inputs of images have `vision`, of texts `text` and `mask`. Codes (B,W) are uint8, states
    (B,n,d), mask (B,L) uint8. UserError in training mode and on NaN.
    """
    _check_resting(model)
    if "mask" in inputs:
        states = model.text_states(**inputs)
        h, mask = model.text_codes(states), {"mask": inputs["mask"].to(torch.uint8)}
    else:
        states = model.image_states(**inputs)
        h, mask = model.image_codes(states), {}
    if not (states.isfinite().all() and h.isfinite().all()):
        raise UserError(
            "The states or codes of the model hold NaN or infinity; look for a diverged model or"
            " broken pixels."
        )
    return {"codes": pack(model.binary(h)), "states": states} | mask


def _check_resting(model: nn.Module) -> None:
    if model.training:
        raise UserError(
            "The model is in training mode, where dropout and batch statistics change all it gives;"
            " call model.eval()."
        )


def pack(signs: Tensor) -> np.ndarray:
    """Pack signs (B,bits), booleans or -1 and +1, into (B,W) uint8.

    The first bit is the highest. Missing bits of the last byte are 0.
    """
    return np.packbits(signs.cpu().numpy() > 0, axis=1)


def split_inputs(model: nn.Module, task: RetrievalTask, split: str) -> tuple[Callable, Callable]:
    """Return two functions of row numbers (B,): inputs of images, inputs of captions.

    Rows are those of a split in file order.
    They give what `encode` takes, on the model's device: features of the task's cache, or pixels
    and ids.
    """
    table, device = task.table(split), next(model.parameters()).device
    if task.towers is not None:
        task._check_towers(model)
        (seen, read), row = task.features(split), task.distinct_texts(split).row
        first = (0,) if task.views and split == "train" else ()  # of several views of an image
        vision, words = model.IMAGE_FEATURES, (*model.TEXT_FEATURES, "mask")
        return (
            lambda rows: retrieval.taken(seen, vision, (rows, *first), device),
            lambda rows: retrieval.taken(read, words, row[rows], device),
        )
    cleaned = [task.tokenizer.clean(text) for text in table.captions.text]

    def images(rows):
        return model.image_features(task.pixels_of(table, rows).to(device))

    def texts(rows):
        ids, mask = (part.to(device) for part in task.tokenizer([cleaned[row] for row in rows]))
        return model.text_features(ids, mask) | {"mask": mask}

    return images, texts


def write_stores(
    model: nn.Module, task: RetrievalTask, split: str, folder: Path | str, states: bool = True
) -> tuple[ArrayStore, ArrayStore]:
    """Write the stores <folder>/images and <folder>/texts of a split, in file order.

    Equal images and captions are encoded once.
    Without `states` only codes, and of captions that an image repeats only the first, as a bank of
    training queries needs them. A store of other images or captions is replaced; see
    ArrayStore.build for what else an existing folder means.
    """
    images, texts = split_inputs(model, task, split)
    repeated = task.table(split).captions.duplicated().to_numpy()
    kept = np.flatnonzero(~repeated | states)

    def stored(kind: str, items: list[str], inputs: Callable, read_by: str) -> ArrayStore:
        def rows_of(rows: np.ndarray) -> dict[str, object]:
            encoded = encode(model, inputs(rows))
            return encoded if states else {"codes": encoded["codes"]}

        key = store_key(model, kind) | {"inputs": read_by}
        return ArrayStore.build(Path(folder) / kind, key, items, rows_of, renew=True)

    keys = task.text_keys(split)
    text_keys, read_by = [keys[row] for row in kept], task.tokenizer.sha256[:16]
    return (
        stored("images", task.image_keys(split), images, repr(task.image)),
        stored("texts", text_keys, lambda rows: texts(kept[rows]), read_by),
    )


# ---- coarse scores
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
    kept = min(_at_least_one(neighbours, "neighbour"), scores.shape[1])
    return np.partition(scores, -kept, axis=1)[:, -kept:].mean(1)


def bank_means(gallery: np.ndarray, bank: np.ndarray, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Return the column means (G,) float32 of PPSR, from the codes of training queries.

    gallery (G,W) and bank (any number,W) are packed codes.
    """
    index, kept = _index(bank), min(_at_least_one(neighbours, "neighbour"), len(bank))
    means = np.empty(len(gallery), dtype=np.float32)
    for start in range(0, len(gallery), 4096):
        block = slice(start, start + 4096)
        means[block] = -index.search(np.ascontiguousarray(gallery[block]), kept)[0].mean(
            1, dtype=np.float32
        )
    return means


def chosen(scores: np.ndarray, k: int) -> np.ndarray:
    """(Q,G) booleans: the best k of each row, of equal scores the first ones. UserError on NaN."""
    best = np.argsort(-_known(scores), axis=1, kind="stable")[:, : _at_least_one(k, "candidate")]
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, best, True, axis=1)
    return mask


def _kindest(coarse: np.ndarray, fine: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """Choose as `chosen` does, but of tied last items those that serve the query best.

    These are right items from the highest fine score down, then wrong ones from the lowest up.
    """
    served = np.where(right, -fine, fine)
    best = np.lexsort((served, ~right, -_known(coarse)), axis=1)[:, : _at_least_one(k, "candidate")]
    mask = np.zeros(coarse.shape, dtype=bool)
    np.put_along_axis(mask, best, True, axis=1)
    return mask


def eligible(scores: np.ndarray, k: int) -> np.ndarray:
    """(Q,G) booleans: the best k of each row and all that tie with the last of them.

    UserError on NaN.
    """
    return scores >= _last(_known(scores), k)


def _last(scores: np.ndarray, k: int) -> np.ndarray:
    """(Q,G) -> (Q,1): the score of the last of the best k."""
    kept = min(_at_least_one(k, "candidate"), scores.shape[1])
    return np.partition(scores, -kept, axis=1)[:, -kept, None]


def _known(scores: np.ndarray) -> np.ndarray:
    if np.isnan(scores).any():
        raise UserError("The coarse scores hold NaN; look for a diverged model.")
    return scores


def _at_least_one(number: int, what: str) -> int:
    if number < 1:
        raise UserError(f"A search takes at least one {what}, not {number}.")
    return number


def _index(codes: np.ndarray) -> faiss.IndexBinaryFlat:
    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    # it counts by distance instead, which costs less the more candidates are asked for
    index.use_heap = False  # type: ignore[attr-defined] # of its C++ class
    index.add(np.ascontiguousarray(codes))
    return index


# ---- fine scores
@torch.inference_mode()
def pair_scores(
    model: nn.Module,
    images,
    image_rows: np.ndarray,
    texts,
    text_rows: np.ndarray,
    batch: int = PAIRS,
) -> np.ndarray:
    """Return single-stream scores (P,) float32 of pairs of rows of `images` and `texts`.

    Each is an ArrayStore or encoded queries.
    Equal pairs are read once. Texts of like length are read together, with no more padding than
    they need. UserError if a score is NaN or infinite.
    """
    device, scores = next(model.parameters()).device, []

    def taken(values, rows):
        part = (
            values[torch.from_numpy(rows)]
            if isinstance(values, Tensor)
            else torch.from_numpy(values[rows])
        )
        return part.to(device)

    image_rows, text_rows = _first_equal(images)[image_rows], _first_equal(texts)[text_rows]
    pairs = image_rows * (text_rows.max() + 1) + text_rows
    _, first, pair = np.unique(pairs, return_index=True, return_inverse=True)
    image_rows, text_rows = image_rows[first], text_rows[first]
    masks = taken(texts["mask"], text_rows)
    order = np.argsort(masks.sum(1).cpu().numpy(), kind="stable")
    for some in np.split(order, range(batch, len(order), batch)):
        text = unpadded(taken(texts["states"], text_rows[some]).float(), masks[some].long())
        scores.append(
            model.score_pairs(taken(images["states"], image_rows[some]).float(), *text)
            .float()
            .cpu()
            .numpy()
        )
    found = np.concatenate(scores)[np.argsort(order)]
    if not np.isfinite(found).all():
        raise UserError("The single stream gave NaN or infinite scores; look for a diverged model.")
    return found[pair]


def _first_equal(items: ArrayStore | Mapping[str, Any]) -> np.ndarray:
    """Return for each row the first row that is known to be equal."""
    return items.same if isinstance(items, ArrayStore) else np.arange(len(items["states"]))


def fine_scores(
    model: nn.Module,
    images: ArrayStore,
    texts: ArrayStore,
    wanted: np.ndarray | None = None,
    batch: int = PAIRS,
    kept: Path | None = None,
) -> np.ndarray:
    """Return scores (N,M) float32 of all pairs, or of those `wanted` (N,M), else -inf.

    Equal pairs are read once.
    kept  the folder of these stores, as opened from there: scores found before are taken from a
          file in it, of these rows and of the code that scores them alone, and new ones are added
          there
    UserError if that file is damaged.
    """
    wanted = np.ones((len(images), len(texts)), dtype=bool) if wanted is None else wanted
    (first_image, row), (first_text, column) = (
        distinct(images.same.tolist()),
        distinct(texts.same.tolist()),
    )
    asked = np.zeros((len(first_image), len(first_text)), dtype=bool)
    pairs = np.nonzero(wanted)
    asked[row[pairs[0]], column[pairs[1]]] = True
    path = None if kept is None else kept / _scores_name(model, images, texts)
    scores = (
        np.full(asked.shape, -np.inf, dtype=np.float32)
        if path is None
        else _kept_scores(path, asked.shape)
    )
    missing = asked & ~np.isfinite(scores)
    if missing.any():
        image_rows, text_rows = np.nonzero(missing)
        rows = first_image[image_rows], first_text[text_rows]
        scores[missing] = pair_scores(model, images, rows[0], texts, rows[1], batch)
        if path:
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.save(file, scores)
    return np.where(wanted, scores[np.ix_(row, column)], -np.inf)


def _scores_name(model: nn.Module, images: ArrayStore, texts: ArrayStore) -> str:
    """The name of the file of fine scores: it changes with the stored rows and with the code."""
    code = code_digest(pair_scores, type(model))
    return f"fine-{key_digest(images.manifest, texts.manifest, code)[:16]}.npy"


def _kept_scores(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The scores that a file holds, -inf where it has none."""
    if not path.exists():
        return np.full(shape, -np.inf, dtype=np.float32)
    try:
        return np.load(path).reshape(shape)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it, and the scores are computed again."
        ) from error


# ---- a whole split
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
        masks = _kindest(coarse, fine, own, k), _kindest(t2i.T, fine.T, own.T, k).T
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
    last = _last(coarse[None], k)[0, 0]
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
        _at_least_one(self.k, "candidate")
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


# ---- online
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
        _check_resting(model)
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
            min(_at_least_one(k, "candidate"), len(gallery)),
            batch,
        )
        self.neighbours = min(_at_least_one(neighbours, "neighbour"), len(gallery))
        self.index = _index(gallery["codes"])
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

"""Search or describe the images of a folder with a trained system, or search embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from nbhelpers.code_identity import code_digest
from nbhelpers.data import layouts
from nbhelpers.data.archives import open_images
from nbhelpers.data.array_store import ArrayStore
from nbhelpers.data.distinct import Distinct, distinct
from nbhelpers.data.images import ImageStore
from nbhelpers.data.rows import image_ids
from nbhelpers.errors import UserError
from nbhelpers.paths import runs_root
from nbhelpers.systems import bench_models, given_outputs
from nbhelpers.systems.evaluation import banks_of_run, two_stages_of
from nbhelpers.systems.trained_systems import System
from nbhelpers.tasks.retrieval import BATCH
from nbhelpers.towers import any_model


# ---- a folder of images
def search(system: System, pictures: Path | str, query: str | Path, top: int = 10) -> pd.DataFrame:
    """The images of a folder, zip or tar that fit a query best: columns file and score, best first.

    query  a sentence, or the Path of an image, to which similar ones are found
    The score is the cosine of the embeddings. They are kept in the cache, so a second question to
    the same model and files encodes no image. `attrs["how"]` says how they were compared. CFITR
    answers a sentence in two stages, as `searched` tells, with the score of the second; of the
    images it keeps the codes.
    """
    _check(system, query, top)
    store = open_images(pictures)
    if isinstance(query, str) and system.has_two_stages:
        rows, scores = _read_together(system, store, query, top)
        return _table(store.names, rows[:top], scores[:top], searched(system, top))
    key = _key("images of a search", system, bench_models.CODE) | {
        "model": any_model.content(bench_models.of_system(system.name, system))
    }
    digests = [store.digest(file) for file in store.names]
    bits, found = _kept(store, digests, key, "bits", lambda pictures: _bits(system, pictures))
    vectors, content = bits.view(np.float32), [key, digests]
    return _nearest(system, query, vectors, content, store.names, found.row, top)


def search_embeddings(
    system: System, path: Path | str, query: str | Path, top: int = 10
) -> pd.DataFrame:
    """As `search`, among the embeddings of a file: .npy, .npz, .safetensors or .parquet.

    The column file holds the ids of the file, without them the numbers of its rows, from 0.
    UserError if the system does not compare embeddings, or has others.
    """
    _check(system, query, top)
    if isinstance(query, str) and system.has_two_stages:
        raise UserError(
            f"{system.name} reads an image together with a sentence, which embeddings cannot give;"
            " search --images with it."
        )
    vectors, ids = given_outputs.read_matrix(path)
    names = ids or [str(row) for row in range(len(vectors))]
    row = np.arange(len(vectors))
    content = [given_outputs.digest(path)]
    return _nearest(system, query, vectors, content, names, row, top)


def searched(system: System, top: int = 10) -> str:
    """How `search` answers a sentence in two stages."""
    ppsr = "no PPSR"
    if banks_of_run(system) is not None:
        ppsr = "column means of PPSR from the training queries of its run"
    k = max(two_stages_of(system).k, top)
    return f"{system.name} reads the sentence with {k} candidates, chosen by hash code; {ppsr}."


def _check(system: System, query: str | Path, top: int) -> None:
    if top < 1:
        raise UserError(f"The search is to show {top} images; ask for at least 1.")
    if isinstance(query, str) and not system.tokenizer.clean(query).strip():
        raise UserError("The sentence is empty; say what the image shows.")


def _nearest(
    system: System,
    query: str | Path,
    vectors: np.ndarray,
    content: Sequence[object],
    names: Sequence[str],
    row: np.ndarray,
    top: int,
) -> pd.DataFrame:
    """Return the best of the named items, of which item n has the vector `row[n]`.

    content  what tells this gallery from others, for its lists in the cache
    """
    from nbhelpers.tasks import nearest  # which needs faiss

    asked = system.text_rows([query]) if isinstance(query, str) else system.image_rows([query])
    gallery = nearest.Nearest.of(vectors, nearest.folder_of(runs_root() / "cache", *content))
    best = gallery.search(asked.all(), top)
    scores = pd.Series(best.scores[0], best.rows[0]).reindex(row).to_numpy()
    items = np.flatnonzero(~np.isnan(scores))
    items = items[np.argsort(-scores[items], kind="stable")][:top]
    how = gallery.how()
    return _table(names, items, scores[items], how)


def _table(names: Sequence[str], rows: np.ndarray, scores: np.ndarray, how: str) -> pd.DataFrame:
    found = pd.DataFrame({"file": np.array(names)[rows], "score": scores})
    found.attrs["how"] = how
    return found


def _bits(system: System, pictures: Iterable) -> np.ndarray:
    """Return embeddings as whole numbers, since a store keeps floats in 16 bits."""
    return np.ascontiguousarray(system.image_rows(pictures).all(), np.float32).view(np.int32)


def _key(kind: str, system: System, code: Iterable) -> dict[str, object]:
    return {"kind": kind, "device": system.device.type, "code": code_digest(*code)}


def _kept(
    store: ImageStore,
    digests: list[str],
    key: dict[str, object],
    name: str,
    compute: Callable[[Iterable], np.ndarray],
) -> tuple[np.ndarray, Distinct]:
    """Return (rows of the distinct files, which file is which), from the cache where it has them.

    compute  decoded images -> their rows;  name: of the array in the store;  digests: of the files
    """
    found = distinct(digests)
    files = [store.names[row] for row in found.first]
    with tqdm(total=len(files), desc="encode images", disable=None) as bar:

        def rows_of(rows: np.ndarray) -> dict[str, np.ndarray]:
            values = compute(store.read(files[row]) for row in rows)
            bar.update(len(rows))
            return {name: values}

        items = [digests[row] for row in found.first]
        kept = ArrayStore.cached(runs_root() / "cache", key, items, rows_of, BATCH)
        bar.leave = bar.n > 0  # a second question shows no bar
    return kept[name], found


@torch.inference_mode()
def _read_together(
    system: System, store: ImageStore, sentence: str, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of the candidates among the images of a store, best first.

    They are chosen as in the evaluation: as many as the record of the checkpoint says, or `top`,
    and by PPSR where its run holds training queries. Only the codes of all images are kept; the
    candidates are opened a second time, no more than a batch of them at once.
    """
    from nbhelpers.data.array_store import Computed, as_stored
    from nbhelpers.tasks import two_stage as engine  # which needs faiss

    model = system.model

    def codes_of(pictures: Iterable) -> np.ndarray:
        return engine.encode(model, model.image_features(system.pixels(pictures)))["codes"]

    def states_of(rows: np.ndarray) -> np.ndarray:
        pixels = system.pixels(store.read(store.names[number]) for number in rows)
        return as_stored(engine.encode(model, model.image_features(pixels)))["states"]

    key = _key("codes of a search", system, ()) | {"model": engine.store_key(model, "images")}
    digests = [store.digest(file) for file in store.names]
    kept, (first, row) = _kept(store, digests, key, "codes", codes_of)
    arrays = {"codes": np.array(kept)[row], "states": Computed(states_of)}
    gallery = ArrayStore(engine.store_key(model, "images"), arrays, first[row])
    ids, mask = system.words(sentence)
    query = engine.encode(model, model.text_features(ids, mask) | {"mask": mask})
    banks = banks_of_run(system) or (None, None)
    k = max(two_stages_of(system).k, top)
    found = engine.Search(model, gallery, banks[1], k, batch=BATCH)(query)
    return found.rows[0], found.scores[0]


def caption_folder(
    system: System,
    pictures: Path | str,
    listed: Path | str | None = None,
    split: str = "test",
    **options,
) -> dict[str, str]:
    """Image id -> caption of the images of a folder, zip or tar; options as `System.caption`.

    listed  a file of captions of any layout: only the images of its `split`, by its ids. Without it
            all, by their file names
    """
    store = open_images(pictures)
    if listed is None:
        ids, members = image_ids(store.names), store.names
    else:
        whole = layouts.read(listed)
        part = whole.split(split).images
        ids, members = list(part.image_id), store.members(part.file, whole.images.file)
    return dict(
        zip(ids, system.caption((store.read(member) for member in members), **options), strict=True)
    )

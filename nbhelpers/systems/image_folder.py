"""Search or describe the images of a folder with a trained system."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from nbhelpers.code_identity import code_digest
from nbhelpers.data import layouts
from nbhelpers.data.archives import open_images
from nbhelpers.data.array_store import ArrayStore
from nbhelpers.data.distinct import Once, Rows, distinct
from nbhelpers.data.images import ImageStore
from nbhelpers.data.rows import image_ids
from nbhelpers.errors import UserError
from nbhelpers.paths import runs_root
from nbhelpers.systems import bench_models
from nbhelpers.tasks.retrieval import BATCH
from nbhelpers.towers import any_model

if TYPE_CHECKING:
    pass
from nbhelpers.systems.evaluation import banks_of_run, two_stages_of
from nbhelpers.systems.trained_systems import System, picture_digest


# ---- a folder of images
def search(system: System, pictures: Path | str, query: str | Path, top: int = 10) -> pd.DataFrame:
    """The images of a folder, zip or tar that fit a query best: columns file and score, best first.

    query  a sentence, or the Path of an image, to which similar ones are found
    The score is the cosine of the embeddings. They are kept in the cache, so a second question to
    the same model and files encodes no image. CFITR answers a sentence in two stages, as `searched`
    tells, with the score of the second.
    """
    if top < 1:
        raise UserError(f"The search is to show {top} images; ask for at least 1.")
    store = open_images(pictures)
    if isinstance(query, str) and not system.tokenizer.clean(query).strip():
        raise UserError("The sentence is empty; say what the image shows.")
    if isinstance(query, str) and system.has_two_stages:
        order, scores = _read_together(system, store, query, top)
    else:
        asked = system.text_rows([query]) if isinstance(query, str) else system.image_rows([query])
        scores = _kept_rows(system, store).products(asked)[:, 0]
        order = np.argsort(-scores, kind="stable")
        scores = scores[order]
    return pd.DataFrame({"file": np.array(store.names)[order[:top]], "score": scores[:top]})


def searched(system: System, top: int = 10) -> str:
    """How `search` answers a sentence, where that is in two stages; else ""."""
    if not system.has_two_stages:
        return ""
    ppsr = "no PPSR"
    if banks_of_run(system) is not None:
        ppsr = "column means of PPSR from the training queries of its run"
    k = max(two_stages_of(system).k, top)
    return f"{system.name} reads the sentence with {k} candidates, chosen by hash code; {ppsr}."


def _kept_rows(system: System, store: ImageStore) -> Rows:
    """Return the embeddings of all images, from the cache where model and files are known."""
    found = distinct([store.digest(name) for name in store.names])
    names = [store.names[row] for row in found.first]
    with tqdm(total=len(names), desc="encode images", disable=None) as bar:

        def bits(rows: np.ndarray) -> dict[str, np.ndarray]:
            vectors = system.image_rows(store.read(names[row]) for row in rows).all()
            bar.update(len(rows))
            # stored as whole numbers, since a store keeps floats in 16 bits
            return {"bits": np.ascontiguousarray(vectors, np.float32).view(np.int32)}

        key = {
            "kind": "images of a search",
            "model": any_model.content(bench_models.of_system(system.name, system)),
            "device": system.device.type,
            "code": code_digest(*bench_models.CODE),
        }
        items = [store.digest(name) for name in names]
        kept = ArrayStore.cached(runs_root() / "cache", key, items, bits, BATCH)
    return Rows(np.array(kept["bits"]).view(np.float32), found.row)


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

    model, once = system.model, Once(picture_digest)
    encoded = [
        engine.encode(model, model.image_features(pixels))["codes"]
        for pixels in system.batches((store.read(name) for name in store.names), once)
    ]
    first, row = once.distinct

    def states_of(rows: np.ndarray) -> np.ndarray:
        pixels = system.pixels(store.read(store.names[number]) for number in rows)
        return as_stored(engine.encode(model, model.image_features(pixels)))["states"]

    codes = np.concatenate(encoded)[row]
    arrays = {"codes": codes, "states": Computed(states_of)}
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

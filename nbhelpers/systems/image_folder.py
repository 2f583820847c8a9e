"""Search or describe the images of a folder with a trained system, or search embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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

if TYPE_CHECKING:
    from nbhelpers.tasks.nearest import Nearest


# ---- a folder of images
def search(system: System, pictures: Path | str, query: str | Path, top: int = 10) -> pd.DataFrame:
    """Answer one question, as `FolderSearch.ask` does."""
    return FolderSearch(system, pictures).ask(query, top)


def search_embeddings(
    system: System, path: Path | str, query: str | Path, top: int = 10
) -> pd.DataFrame:
    """Answer one question, as `EmbeddingSearch.ask` does."""
    return EmbeddingSearch(system, path).ask(query, top)


class FolderSearch:
    """The images of a folder, zip or tar, open for many questions to one system.

    Embeddings are kept in the cache, so a second question to the same model and files encodes no
    image. Further questions to this object read no file.
    """

    def __init__(self, system: System, pictures: Path | str):
        self.system, self.pictures = system, pictures

    def ask(self, query: str | Path, top: int = 10) -> pd.DataFrame:
        """The images that fit a query best: columns file and score, best first.

        query  a sentence, or the Path of an image, to which similar ones are found
        The score is the cosine of the embeddings. `attrs["how"]` says how they were compared. CFITR
        answers a sentence in two stages, as `searched` tells, with the score of the second; of the
        images it keeps the codes. UserError for an empty sentence, and for images that cannot be
        read.
        """
        _check(self.system, query, top)
        if isinstance(query, str) and self.system.has_two_stages:
            rows, scores = self._two_stages.ask(query, top)
            how = searched(self.system, top)
            return _table(self._store.names, rows[:top], scores[:top], how)
        return self._vectors.ask(self.system, query, top)

    @cached_property
    def _store(self) -> ImageStore:
        return open_images(self.pictures)

    @cached_property
    def _digests(self) -> list[str]:
        return [self._store.digest(file) for file in self._store.names]

    @cached_property
    def _vectors(self) -> _Vectors:
        system, digests = self.system, self._digests
        key = _key("images of a search", system, bench_models.CODE) | {
            "model": any_model.content(bench_models.of_system(system.name, system))
        }
        bits, found = _kept(self._store, digests, key, "bits", lambda some: _bits(system, some))
        gallery = _gallery(bits.view(np.float32), [key, digests])
        return _Vectors(gallery, self._store.names, found.row)

    @cached_property
    def _two_stages(self) -> _TwoStages:
        return _TwoStages.of(self.system, self._store, self._digests)


class EmbeddingSearch:
    """As `FolderSearch`, among the embeddings of a file: .npy, .npz, .safetensors or .parquet."""

    def __init__(self, system: System, path: Path | str):
        self.system, self.path = system, path

    def ask(self, query: str | Path, top: int = 10) -> pd.DataFrame:
        """As `FolderSearch.ask`.

        The column file holds the ids of the file, without them the numbers of its rows, from 0.
        UserError if the system does not compare embeddings, or has others.
        """
        _check(self.system, query, top)
        if isinstance(query, str) and self.system.has_two_stages:
            raise UserError(
                f"{self.system.name} reads an image together with a sentence, which embeddings"
                " cannot give; search --images with it."
            )
        return self._vectors.ask(self.system, query, top)

    @cached_property
    def _vectors(self) -> _Vectors:
        vectors, ids = given_outputs.read_matrix(self.path)
        names = ids or [str(row) for row in range(len(vectors))]
        gallery = _gallery(vectors, [given_outputs.digest(self.path)])
        return _Vectors(gallery, names, np.arange(len(vectors)))


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


def _gallery(vectors: np.ndarray, content: Sequence[object]) -> Nearest:
    """Prepare vectors; `content` tells them from others, for their lists in the cache."""
    from nbhelpers.tasks import nearest  # which needs faiss

    return nearest.Nearest.of(vectors, nearest.folder_of(runs_root() / "cache", *content))


class _Vectors(NamedTuple):
    """Named items, of which item n has the vector `row[n]` of a gallery."""

    gallery: Nearest
    names: Sequence[str]
    row: np.ndarray

    def ask(self, system: System, query: str | Path, top: int) -> pd.DataFrame:
        asked = system.text_rows([query]) if isinstance(query, str) else system.image_rows([query])
        best = self.gallery.search(asked.all(), top)
        scores = pd.Series(best.scores[0], best.rows[0]).reindex(self.row).to_numpy()
        items = np.flatnonzero(~np.isnan(scores))
        items = items[np.argsort(-scores[items], kind="stable")][:top]
        return _table(self.names, items, scores[items], self.gallery.how())


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


class _TwoStages(NamedTuple):
    """The codes of all images of a store; the candidates are opened a second time.

    They are chosen as in the evaluation: as many as the record of the checkpoint says, or `top`,
    and by PPSR where its run holds training queries. No more than a batch of them is read at once.
    """

    system: System
    gallery: ArrayStore

    @classmethod
    @torch.inference_mode()
    def of(cls, system: System, store: ImageStore, digests: list[str]) -> _TwoStages:
        from nbhelpers.data.array_store import Computed, as_stored
        from nbhelpers.tasks import two_stage as engine  # which needs faiss

        model = system.model

        def codes_of(pictures: Iterable) -> np.ndarray:
            return engine.encode(model, model.image_features(system.pixels(pictures)))["codes"]

        @torch.inference_mode()
        def states_of(rows: np.ndarray) -> np.ndarray:
            pixels = system.pixels(store.read(store.names[number]) for number in rows)
            return as_stored(engine.encode(model, model.image_features(pixels)))["states"]

        content = engine.store_key(model, "images")
        key = _key("codes of a search", system, ()) | {"model": content}
        kept, (first, row) = _kept(store, digests, key, "codes", codes_of)
        arrays = {"codes": np.array(kept)[row], "states": Computed(states_of)}
        return cls(system, ArrayStore(content, arrays, first[row]))

    @torch.inference_mode()
    def ask(self, sentence: str, top: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and scores of the candidates, best first."""
        from nbhelpers.tasks import two_stage as engine  # which needs faiss

        system = self.system
        ids, mask = system.words(sentence)
        query = engine.encode(system.model, system.model.text_features(ids, mask) | {"mask": mask})
        banks = banks_of_run(system) or (None, None)
        k = max(two_stages_of(system).k, top)
        found = engine.Search(system.model, self.gallery, banks[1], k, batch=BATCH)(query)
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

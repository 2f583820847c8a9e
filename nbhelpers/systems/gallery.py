"""Search the images of a split with one trained system: a sentence or picture in, a list out.

This is the logic of the interactive search, without widgets (those are in widgets.py). N images, S
distinct sentences of a split, K items of a list.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nbhelpers.data.array_store import ArrayStore
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.distinct import Rows
from nbhelpers.data.tokenization import CLIPTokenizer, Tokenizer
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.systems.trained_systems import System
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.training import device

LONGEST = 20_000  # characters of a sentence; far more than any system reads


class Stage(NamedTuple):
    """A list of a search, best first: rows (K,), scores (K,), and milliseconds of each part.

    The last stage of a search is its answer. Of equal scores the first row leads.
    """

    name: str
    rows: np.ndarray
    scores: np.ndarray
    milliseconds: dict[str, float]

    def place(self, rows: np.ndarray) -> int | None:
        """Return the place (1 is best) of the first of these rows in the list, or None."""
        found = np.flatnonzero(np.isin(self.rows, rows))
        return int(found[0]) + 1 if len(found) else None


# ---- what a system reads of a sentence
def reading(sentence: str, tokenizer: Tokenizer, example: str = "") -> list[str]:
    """Return notes on what is lost when `tokenizer` reads the sentence.

    That is unknown words, and words behind its longest input.
    UserError if nothing is left to search with; it suggests the sentence `example`.
    """
    if len(sentence) > LONGEST:
        raise UserError(
            f"The sentence has {len(sentence):,} characters; give at most {LONGEST:,}, a dozen"
            " words are plenty."
        )
    words = [
        word
        for word in sentence.split()
        if tokenizer.clean(word).strip() and any(map(str.isalnum, word))
    ]
    if not words:
        such = f", for example: {example}" if example else ""
        raise UserError(f"There is nothing to search for; type a sentence{such}.")
    unknown = [word for word in dict.fromkeys(words) if _unknown(word, tokenizer)]
    if len(unknown) == len(set(words)):
        raise UserError(
            f"The system knows none of the words ({', '.join(unknown[:5])}); describe what is seen"
            " from above."
        )
    notes = []
    if unknown:
        notes.append(f"unknown here: {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}")
    read = _words_read(words, tokenizer)
    if read < len(words):
        notes.append(f"only the first {read} of {len(words)} words were read")
    return notes


def _unknown(word: str, tokenizer: Tokenizer) -> bool:
    if isinstance(tokenizer, CLIPTokenizer):  # byte pairs spell everything
        return False
    plain, unknown = tokenizer.encode([tokenizer.clean(word), "[UNK]"])
    return unknown[1] in plain


def _words_read(words: list[str], tokenizer: Tokenizer) -> int:
    """How many words count: the fewest from the front that are encoded as all of them are."""

    def encoded(count: int) -> list[int]:
        return tokenizer.encode([tokenizer.clean(" ".join(words[:count]))])[0]

    whole, low, high = encoded(len(words)), 1, len(words)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if encoded(middle) == whole else (middle + 1, high)
    return low


# ---- galleries
class Gallery:
    """Images and distinct sentences of a split, encoded once by a dual encoder.

    table      of the split;  sentences: (S,) as they stand in the captions
    images     (N,D) and texts (S,D) float32 unit rows; equal images and sentences have equal ones
    cache      folder of cached tower features, as training and evaluation use it
    """

    def __init__(
        self, system: System, data: DataSet, split: str = "test", cache: Path | None = None
    ):
        self.system, self.table, self.pixels = system, data.table.split(split), data.pixels
        frozen = FrozenTowers.of(system.model, cache)
        task = RetrievalTask(data, system.tokenizer, system.image, workers=1, frozen=frozen)
        found = task.embeddings(system.model, split)
        first = ~self.table.captions.text.duplicated().to_numpy()
        self.sentences = self.table.captions.text.to_numpy()[first]
        self._image_rows = found.image_rows
        self._text_rows = Rows(found.text_rows.vectors, found.text_rows.row[first])
        self.images, self.texts = self._image_rows.all(), self._text_rows.all()
        self._pixel_rows = data.pixels.rows(self.table.images.file)

    @property
    def example(self) -> str:
        """A sentence to suggest: a test caption of middle length."""
        by_length = sorted(self.sentences, key=len)
        return str(by_length[len(by_length) // 2]).rstrip(" .")

    def notes(self, sentence: str) -> list[str]:
        """What is lost of a sentence, as `reading` says it. UserError if nothing is left."""
        return reading(sentence, self.system.tokenizer, self.example)

    def __len__(self) -> int:
        return len(self.table)

    def similarity(self) -> np.ndarray:
        """(N,S) cosines; equal pairs have equal ones."""
        return self._image_rows.products(self._text_rows)

    def picture(self, row: int) -> np.ndarray:
        """(H,W,3) uint8 of an image of the split."""
        return self.pixels[self._pixel_rows[row]]

    def captions(self, row: int) -> list[str]:
        """The captions of an image, repeated ones once."""
        own = self.table.captions.image_id == self.table.images.image_id[row]
        return list(dict.fromkeys(self.table.captions.text[own]))

    def described_by(self, sentence: str) -> np.ndarray:
        """Rows of the images that have this very caption; none for a sentence of one's own."""
        same = self.table.captions.text.str.casefold() == sentence.strip().casefold()
        return np.unique(self.table.owner()[same])

    def find_images(self, sentence: str) -> Iterator[Stage]:
        """Yield the images of the split in the order in which they fit a sentence.

        Each stage comes as soon as it is known; here there is one. UserError as `reading`, before
        anything is encoded.
        """
        self.notes(sentence)
        yield self._nearest(self._image_rows, lambda: self.system.text_rows([sentence]))

    def find_sentences(self, picture: np.ndarray) -> Stage:
        """Return the sentences of the split in the order in which they fit a picture.

        picture (H,W,3) uint8.
        """
        return self._nearest(self._text_rows, lambda: self.system.image_rows([picture]))

    def similar(self, picture: np.ndarray) -> Stage:
        """The images of the split, nearest vectors to that of a picture (H,W,3) uint8 first."""
        return self._nearest(self._image_rows, lambda: self.system.image_rows([picture]))

    @staticmethod
    def _nearest(vectors: Rows, encode: Callable[[], Rows]) -> Stage:
        clock = _Clock()
        query = encode()
        clock.note("encode")
        scores = vectors.products(query)[:, 0]
        rows = np.argsort(-scores, kind="stable")
        clock.note("compare")
        return Stage("cosine", rows, scores[rows], clock.milliseconds)


class TwoStageGallery(Gallery):
    """As Gallery, for CFITR: hash codes choose candidates, the upper layers rerank them.

    folder      what 23_cfitr stored of this model: test/images, test/texts with states and codes,
                train/* with codes
    candidates  that are read, in both directions
    UserError if the stores are missing or another model's. `similar` compares the continuous
    vectors before the codes.
    """

    def __init__(
        self,
        system: System,
        data: DataSet,
        folder: Path,
        candidates: int,
        split: str = "test",
        cache: Path | None = None,
    ):
        from nbhelpers.tasks import two_stage  # which needs faiss

        super().__init__(system, data, split, cache)
        stores = {
            f"{part}/{kind}": ArrayStore.open(folder / part / kind)
            for part, kind in product((split, "train"), ("images", "texts"))
        }
        counts = len(stores[f"{split}/images"]), len(stores[f"{split}/texts"])
        if counts != (len(self.table), len(self.table.captions)):
            raise UserError(
                f"The stores in {folder / split} hold {counts[0]} images and {counts[1]} captions,"
                f" the {split} split has {len(self.table)} and {len(self.table.captions)}; run"
                " 23_cfitr again."
            )
        self._search = two_stage
        self._images = two_stage.Search(
            system.model, stores[f"{split}/images"], stores["train/texts"], candidates
        )
        self._texts = two_stage.Search(
            system.model, stores[f"{split}/texts"], stores["train/images"], candidates
        )
        self._sentence_of = self.table.captions.text.map(
            {text: row for row, text in enumerate(self.sentences)}
        ).to_numpy()

    def find_images(self, sentence: str) -> Iterator[Stage]:
        """Yield two stages: "coarse" candidates by code, then the same ones "reranked"."""
        self.notes(sentence)
        yield from self._stages(self._images, lambda: self._text(sentence))

    def find_sentences(self, picture: np.ndarray) -> Stage:
        """The candidates among the sentences after reading, repeated ones once."""
        *_, found = self._stages(self._texts, lambda: self._image(picture))
        rows, first = np.unique(self._sentence_of[found.rows], return_index=True)
        order = np.argsort(first)
        return found._replace(rows=rows[order], scores=found.scores[first[order]])

    def _stages(self, engine, inputs) -> Iterator[Stage]:
        clock = _Clock()
        query = self._search.encode(self.system.model, inputs())
        clock.note("encode")
        coarse = engine.coarse(query["codes"])
        clock.note("coarse")
        yield Stage("coarse", coarse.rows[0], coarse.scores[0], dict(clock.milliseconds))
        clock.go_on()
        scores = engine.rerank(query, coarse.rows)[0]
        order = np.argsort(-scores, kind="stable")
        clock.note("fine")
        yield Stage("reranked", coarse.rows[0, order], scores[order], clock.milliseconds)

    @torch.inference_mode()
    def _text(self, sentence: str) -> Mapping[str, torch.Tensor]:
        ids, mask = self.system.words(sentence)
        return self.system.model.text_features(ids, mask) | {"mask": mask}

    @torch.inference_mode()
    def _image(self, picture: np.ndarray) -> Mapping[str, torch.Tensor]:
        return self.system.model.image_features(self.system.pixels([picture]))


def of_run(run, data: DataSet, system: System, candidates: int) -> Gallery:
    """Return the gallery of a system of a run, over the test split of its data.

    `candidates` concerns CFITR alone.
    """
    if not system.has_two_stages:
        return Gallery(system, data, cache=run.cache)
    from nbhelpers.tasks.two_stage import store_folder

    return TwoStageGallery(
        system, data, store_folder(run.folder, system.model), candidates, cache=run.cache
    )


class _Clock:
    """Milliseconds of the parts of a search, each from the end of the one before.

    It waits for the GPU where there is one.
    """

    def __init__(self):
        self.milliseconds: dict[str, float] = {}
        self.go_on()

    def go_on(self) -> None:
        self._began = time.perf_counter()

    def note(self, part: str) -> None:
        device.wait()
        self.milliseconds[part] = 1000 * (time.perf_counter() - self._began)
        self.go_on()


# ---- what a query costs
def write_times(path: Path, systems: Mapping[str, Mapping[str, float]], **about: object) -> Path:
    """Write a JSON file: `about` and, for each system, milliseconds of each part.

    about: profile, set, device, images and more.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps(about | {"milliseconds": systems}, indent=1, allow_nan=False) + "\n"
        )
    return Path(path)

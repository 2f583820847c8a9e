"""Make batches from a caption table with cached pixels or cached features.

Threads build the batches, not worker processes. Images are decoded once (DecodedCache), and the
rest runs in C without Python's lock. No batch is copied through shared memory, and threads start
safely after CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nbhelpers.data.array_store import ArrayStore
from nbhelpers.data.augment import (
    CLIP_MEAN,
    CLIP_STD,
    Normalizer,
    TestTransform,
    TrainTransform,
    as_bytes,
)
from nbhelpers.data.image_input import ImageInput
from nbhelpers.data.images import ImageStore
from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import Tokenizer
from nbhelpers.errors import UserError

PIXEL_CODE = (DecodedCache, (ImageStore, "read"))  # what makes pixels of files, for `code_digest`


def image_batch(
    pixels: DecodedCache,
    table: CaptionTable,
    rows: np.ndarray,
    image: ImageInput,
    workers: int | str = 1,
    augmented: TrainTransform | None = None,
    seed: tuple[int, ...] = (),
) -> Tensor:
    """Return normalised pixels (B, 3, S, S) float32 of these rows of the table.

    Images are resized as for testing. With `augmented`, each is one augmented view, drawn from
    default_rng([*seed, row]).
    """
    found = image_bytes(pixels, table, rows, image.size, workers, augmented, seed)
    return Normalizer(image.mean, image.std)(found)


def image_bytes(
    pixels: DecodedCache,
    table: CaptionTable,
    rows: np.ndarray,
    size: int,
    workers: int | str = 1,
    augmented: TrainTransform | None = None,
    seed: tuple[int, ...] = (),
) -> Tensor:
    """Return what `image_batch` normalises: pixels (B, 3, S, S) uint8."""
    place = pixels.rows(table.images.file.iloc[rows])
    source = pixels if augmented else pixels.resized(size)

    def view(i: int) -> np.ndarray:
        whole = source[place[i]]
        return augmented(whole, np.random.default_rng([*seed, rows[i]])) if augmented else whole

    return as_bytes(view, len(rows), size, workers)


@contextmanager
def sent_as_bytes(loader: Any) -> Iterator[Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    """Let the batches of a loader hold their pixels as bytes, if its data set has pixels.

    Give what normalises the pixels of such a batch, on its device, and leaves others as they are.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if not hasattr(dataset, "as_bytes"):
        yield lambda batch: batch
        return
    dataset.as_bytes = True
    try:
        yield lambda batch: _normalised(batch, dataset.normalizer)
    finally:
        dataset.as_bytes = False


def _normalised(batch: dict[str, Tensor], normalizer: Normalizer) -> dict[str, Tensor]:
    if "pixels" not in batch or batch["pixels"].dtype != torch.uint8:
        return batch
    return batch | {"pixels": normalizer(batch["pixels"])}


class _Pairs(Dataset):
    """Give pairs as dictionaries: row r is caption r of the table with its image.

    Every random draw of a row comes from `default_rng([seed, epoch, row])`, so neither threads nor
    a resumed run change it.
    """

    def __init__(self, table: CaptionTable, seed: int):
        self.seed, self.epoch = seed, 0
        self.workers: int | str = 1
        self.owner = table.owner()
        self.scene = pd.factorize(table.images.scene)[0]

    def __len__(self) -> int:
        return len(self.owner)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def draw(self, row: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, row])

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """Make a whole batch; a DataLoader calls this method."""
        captions = np.asarray(rows)
        image = self.owner[captions]
        return {
            **self._fields(captions, image),
            "image_index": torch.from_numpy(image),
            "scene": torch.from_numpy(self.scene[image]),
            "row": torch.from_numpy(captions),
        }

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}


class PairDataset(_Pairs):
    """Give pairs as pixels and token ids.

    A batch has
    pixels         (B,3,S,S) float32, normalised; uint8 in `sent_as_bytes`
    ids, mask      (B,L) int64
    image_index    (B,) int64, the row of the image in table.images
    scene          (B,) int64, the number of its class, by first appearance
    row            (B,) int64, the row of the caption in table.captions

    transform  augment.TrainTransform or TestTransform
    pixels     the cache of the table, or of one it was split from

    Captions are cleaned and encoded once. UserError if an image of the table was not cached.
    """

    def __init__(
        self,
        table: CaptionTable,
        pixels: DecodedCache,
        transform,
        tokenizer: Tokenizer,
        seed: int = 0,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    ):
        super().__init__(table, seed)
        self.transform, self.tokenizer = transform, tokenizer
        self.normalizer, self.as_bytes = Normalizer(mean, std), False
        tested = isinstance(transform, TestTransform)
        self.pixels = pixels.resized(transform.size) if tested else pixels
        self.pixel_rows = pixels.rows(table.images.file)
        self.encoded = tokenizer.encode([tokenizer.clean(text) for text in table.captions.text])

    def _fields(self, rows, image):
        def view(i: int) -> np.ndarray:
            return self.transform(self.pixels[self.pixel_rows[image[i]]], self.draw(rows[i]))

        pixels = as_bytes(view, len(rows), self.transform.size, self.workers)
        if not self.as_bytes:
            pixels = self.normalizer(pixels)
        ids, mask = self.tokenizer.pad([self.encoded[row] for row in rows])
        return {"pixels": pixels, "ids": ids, "mask": mask}


class FeatureDataset(_Pairs):
    """Give pairs as cached features.

    A batch has image_features[name][image] and text_features[name][row] under the model's own
    names, floats as float32. It also has image_index, scene and row as in PairDataset.

    views  V > 0: every image array is (N, V, ...), and each pair draws one of its V augmented views
           in each epoch

    UserError if the numbers of images or captions differ from the table's.
    """

    def __init__(
        self,
        table: CaptionTable,
        image_features: ArrayStore,
        text_features: ArrayStore,
        seed: int = 0,
        text_rows: np.ndarray | None = None,
        views: int = 0,
    ):
        super().__init__(table, seed)
        self.views = views
        self.text_rows = np.arange(len(self)) if text_rows is None else text_rows
        for kind, features, count in (
            ("image", image_features, len(table)),
            ("text", text_features, self.text_rows.max() + 1),
        ):
            for name, array in features.arrays.items():
                if len(array) != count:
                    raise UserError(
                        f"The cached {kind} features '{name}' have {len(array)} rows for {count} in"
                        " the table; build them from this table."
                    )
        if shared := set(image_features.arrays) & set(text_features.arrays):
            raise UserError(f"Image and text features share the name '{min(shared)}'; rename one.")
        self.image_features, self.text_features = image_features, text_features

    def _fields(self, rows, image):
        view = tuple(self.draw(row).integers(self.views) for row in rows) if self.views else ...
        parts = [(name, array[image, view]) for name, array in self.image_features.arrays.items()]
        texts = self.text_rows[rows]
        parts += [(name, array[texts]) for name, array in self.text_features.arrays.items()]
        return {
            name: torch.from_numpy(part.astype(np.float32) if part.dtype == np.float16 else part)
            for name, part in parts
        }


class EpochSampler(Sampler):
    """Give the rows of a dataset in an order that depends on (seed, epoch) alone."""

    def __init__(self, dataset: _Pairs):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of which order and random draws are."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.dataset.seed, self.dataset.epoch]).permutation(
            len(self)
        )
        return iter(order.tolist())


def train_loader(
    dataset: PairDataset | FeatureDataset, batch_size: int, workers: int | str = 1
) -> DataLoader:
    """Load shuffled full batches of the dataset, built by `workers` threads, a number or "auto".

    `loader.sampler.set_epoch(e)` sets the order and all random draws. UserError if the dataset does
    not fill one batch.
    """
    refuse_too_few(dataset, batch_size)
    dataset.workers = workers
    sampler = EpochSampler(dataset)
    return DataLoader(dataset, batch_size, sampler=sampler, drop_last=True, collate_fn=_as_it_is)


def refuse_too_few(pairs: Sized, batch_size: int) -> None:
    """Raise UserError if there are fewer pairs than one batch has."""
    if len(pairs) < batch_size:
        raise UserError(
            f"{len(pairs)} pairs do not fill a batch of {batch_size}; set the batch "
            f"size to at most {len(pairs)}, or train on more pairs."
        )


def _as_it_is(batch):
    return batch

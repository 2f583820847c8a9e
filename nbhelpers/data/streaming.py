"""Read training pairs from WebDataset shards, for sets too large for a cache (PIR-CLIP, RS5M)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from nbhelpers.code_identity import code_digest
from nbhelpers.data import shards
from nbhelpers.data.augment import CLIP_MEAN, CLIP_STD, Normalizer, as_bytes
from nbhelpers.data.decoding import decode
from nbhelpers.data.distinct import distinct
from nbhelpers.data.images import checksum
from nbhelpers.data.loaders import refuse_too_few
from nbhelpers.data.shards import Sample
from nbhelpers.data.tokenization import Tokenizer
from nbhelpers.errors import UserError

BUFFER = 5000  # samples, still encoded, among which the next one is drawn


def numbered(values: list[str]) -> Tensor:
    """Number values by first appearance, equal ones alike: (B,) int64."""
    return torch.from_numpy(distinct(values).row)


@dataclass(frozen=True)
class Sampling:
    """Say which samples of the shards an epoch has.

    split   train, val or test
    drawn   0: every sample once; else this many, from shards drawn with replacement, as in
            PIR-CLIP's released code
    buffer  samples that are read ahead, and from which the next is drawn
    """

    split: str = "train"
    drawn: int = 0
    buffer: int = BUFFER


class ShardDataset(IterableDataset):
    """Give the pairs of one split of the shards at `path`, a tar or a folder of tars.

    A sample is one pair. If it has several captions, each epoch draws one of them. `collate` makes
    batches as PairDataset does, but without `row`, since other captions are not known. image_index
    and scene are numbers within their batch, which only say what is equal. Different images of one
    name have different numbers. As in PIR-CLIP's released code, the class of an image is its name
    up to the first '_'; a name without one is a class of its own.

    transform  augment.TrainTransform or TestTransform
    sampling   which samples an epoch has

    The order and all random draws depend on (seed, epoch) alone. UserError, with shard and sample,
    for data that cannot be read.
    """

    def __init__(
        self,
        path: Path | str,
        transform,
        tokenizer: Tokenizer,
        seed: int = 0,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        sampling: Sampling = Sampling(),
    ):
        self.transform, self.tokenizer, self.mean, self.std = transform, tokenizer, mean, std
        self.normalizer, self.as_bytes = Normalizer(mean, std), False
        self.seed, self.epoch, self.sampling = seed, 0, sampling
        self.workers: int | str = 1
        self.files = shards.shard_files(path, sampling.split)
        self.count = sampling.drawn or sum(shards.sizes(self.files).values())

    def content(self) -> dict[str, object]:
        """Return all that decides the batches, for keys, with a checksum of every shard."""
        sums = []
        for path in self.files:
            with open(path, "rb") as file:
                sums.append(hashlib.file_digest(file, "sha256").hexdigest())
        kinds: tuple[Any, ...] = (type(self), type(self.transform), type(self.tokenizer))
        return {
            "shards": sums,
            "transform": self.transform,
            "tokenizer": self.tokenizer.sha256,
            "seed": self.seed,
            "mean": self.mean,
            "std": self.std,
            "drawn": self.sampling.drawn,
            "buffer": self.sampling.buffer,
            "code": code_digest(*kinds),
        }

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of which order and random draws are."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, Sample]]:
        """Yield (place in the epoch, sample)."""
        order, picks = map(int, np.random.SeedSequence([self.seed, self.epoch]).generate_state(2))
        urls = [str(path) for path in self.files]
        source = webdataset.SimpleShardList(urls, seed=order)
        if self.sampling.drawn:
            source = webdataset.ResampledShards(
                urls, seed=order, deterministic=True, worker_seed=lambda: 0
            )
        buffer = self.sampling.buffer
        mix = webdataset.shuffle(buffer, initial=buffer, rng=random.Random(picks))
        return islice(enumerate(webdataset.DataPipeline(source, self._samples, mix)), len(self))

    def _samples(self, urls: Iterator[dict]) -> Iterator[Sample]:
        """Yield the samples of each shard, as a stage of the pipeline.

        UserError if it is damaged or not of its size.
        """
        for url in urls:
            shard, count = Path(url["url"]), 0
            expected = shards.sizes([shard])[shard]
            for sample, _ in shards.samples(shard, []):
                yield sample
                count += 1
            if count != expected:
                raise UserError(
                    f"The shard {shard} gives {count} samples and should hold {expected}; "
                    "its sizes.json is of other shards: remove that file."
                )

    def collate(self, drawn: list[tuple[int, Sample]]) -> dict[str, Tensor]:
        """Make a batch of what `__iter__` gave.

        It has pixels (B,3,S,S) float32, or uint8 in `sent_as_bytes`, ids and mask (B,L),
        image_index and scene (B,) int64.
        """
        texts = ["" for _ in drawn]

        def view(row: int) -> np.ndarray:
            number, sample = drawn[row]
            rng = np.random.default_rng([self.seed, self.epoch, number])
            pixels = self.transform(decode(sample.image, f"{sample.file} ({sample.place})"), rng)
            captions = sample.captions()
            texts[row] = self.tokenizer.clean(captions[rng.integers(len(captions))])
            return pixels

        pixels = as_bytes(view, len(drawn), self.transform.size, self.workers)
        if not self.as_bytes:
            pixels = self.normalizer(pixels)
        names = [sample.file for _, sample in drawn]
        images = [f"{sample.file} {checksum(sample.image)}" for _, sample in drawn]
        ids, mask = self.tokenizer(texts)
        return {
            "pixels": pixels,
            "ids": ids,
            "mask": mask,
            "image_index": numbered(images),
            "scene": numbered([name.split("_")[0] for name in names]),
        }


def stream_loader(dataset: ShardDataset, batch_size: int, workers: int | str = 1) -> DataLoader:
    """Load full batches of the dataset, decoded by `workers` threads.

    With several processes, the first reads for all. UserError if the dataset does not fill one
    batch.
    """
    refuse_too_few(dataset, batch_size)
    dataset.workers = workers
    return DataLoader(dataset, batch_size, drop_last=True, collate_fn=dataset.collate)

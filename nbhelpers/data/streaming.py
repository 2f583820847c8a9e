"""Training pairs straight from WebDataset shards, for sets that are too large to decode into a
cache (PIR-CLIP, RS5M).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from nbhelpers.code_identity import code_digest
from nbhelpers.data import shards
from nbhelpers.data.augment import CLIP_MEAN, CLIP_STD, Normalizer
from nbhelpers.data.decoding import decode
from nbhelpers.data.images import checksum
from nbhelpers.data.shards import Sample
from nbhelpers.data.tokenization import Tokenizer
from nbhelpers.errors import UserError

BUFFER = 5000  # samples, still encoded, among which the next one is drawn


def numbered(values: list[str]) -> Tensor:
    """(B,) int64: equal values get equal numbers, in the order of their first appearance."""
    return torch.from_numpy(pd.factorize(np.array(values, object))[0])


class ShardDataset(IterableDataset):
    """Pairs of one split of the shards at `path`, a tar or a folder of tars; `collate` makes batches as PairDataset does, but without `row`, since nothing is known of the other captions. A sample is one pair: of several captions in it one is drawn, in each epoch anew.

    image_index and scene are numbers within their batch, which only say what is equal. As released,
    the class of an image is its name up to the first '_'; a name without one is a class of its own
    (PIR-CLIP, spec 3). Different images of one name have different numbers.

    transform  augment.TrainTransform or TestTransform
    drawn      0: every sample once an epoch; else so many, from shards drawn with replacement (as
               released)
    buffer     samples that are read ahead, and from which the next is drawn
    The order and all random draws depend on (seed, epoch) alone. UserError, with shard and sample,
    on what cannot be read.
    """

    def __init__(
        self,
        path: Path | str,
        transform,
        tokenizer: Tokenizer,
        seed: int = 0,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        split: str = "train",
        drawn: int = 0,
        buffer: int = BUFFER,
    ):
        self.transform, self.tokenizer, self.mean, self.std = transform, tokenizer, mean, std
        self.normalizer = Normalizer(mean, std)
        self.seed, self.epoch, self.workers, self.resampled, self.buffer = (
            seed,
            0,
            1,
            drawn > 0,
            buffer,
        )
        self.files = shards.shard_files(path, split)
        self.count = drawn or sum(shards.sizes(self.files).values())

    def content(self) -> dict[str, object]:
        """All that decides the batches, for `training.checkpoint_key`, with a checksum of every
        shard.
        """
        sums = []
        for path in self.files:
            with open(path, "rb") as file:
                sums.append(hashlib.file_digest(file, "sha256").hexdigest())
        drawn = self.count if self.resampled else 0
        code = code_digest(type(self), type(self.transform), type(self.tokenizer))
        return {
            "shards": sums,
            "transform": self.transform,
            "tokenizer": self.tokenizer.sha256,
            "seed": self.seed,
            "mean": self.mean,
            "std": self.std,
            "drawn": drawn,
            "buffer": self.buffer,
            "code": code,
        }

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, Sample]]:
        """(place in the epoch, sample)."""
        order, picks = map(int, np.random.SeedSequence([self.seed, self.epoch]).generate_state(2))
        urls = [str(path) for path in self.files]
        source = (
            webdataset.ResampledShards(urls, seed=order, deterministic=True, worker_seed=lambda: 0)
            if self.resampled
            else webdataset.SimpleShardList(urls, seed=order)
        )
        mix = webdataset.shuffle(self.buffer, initial=self.buffer, rng=random.Random(picks))
        return islice(enumerate(webdataset.DataPipeline(source, self._samples, mix)), len(self))

    def _samples(self, urls: Iterator[dict]) -> Iterator[Sample]:
        """A stage of the pipeline: the samples of each shard.

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
        """The batch of what `__iter__` gave: pixels (B,3,S,S) float32, ids and mask (B,L),
        image_index and scene (B,) int64.
        """
        out = np.empty((len(drawn), 3, self.transform.size, self.transform.size), np.float32)
        texts = [""] * len(drawn)

        def fill(row):
            number, sample = drawn[row]
            rng = np.random.default_rng([self.seed, self.epoch, number])
            image = decode(sample.image, f"{sample.file} ({sample.place})")
            self.normalizer.into(self.transform(image, rng), out[row])
            captions = sample.captions()
            texts[row] = self.tokenizer.clean(captions[rng.integers(len(captions))])

        with ThreadPoolExecutor(max(1, min(self.workers, len(drawn)))) as pool:
            list(pool.map(fill, range(len(drawn))))
        names = [sample.file for _, sample in drawn]
        images = [f"{sample.file} {checksum(sample.image)}" for _, sample in drawn]
        ids, mask = self.tokenizer(texts)
        return {
            "pixels": torch.from_numpy(out),
            "ids": ids,
            "mask": mask,
            "image_index": numbered(images),
            "scene": numbered([name.split("_")[0] for name in names]),
        }


def stream_loader(dataset: ShardDataset, batch_size: int, workers: int = 1) -> DataLoader:
    """Full batches of the dataset, decoded by `workers` threads; under several processes the first reads for all of them.

    UserError if there is not one full batch.
    """
    if len(dataset) < batch_size:
        raise UserError(
            f"{len(dataset)} pairs do not fill a batch of {batch_size}; set the batch "
            f"size to at most {len(dataset)}, or pack more pairs."
        )
    dataset.workers = workers
    return DataLoader(dataset, batch_size, drop_last=True, collate_fn=dataset.collate)

"""Bring a data set and a captioning model together: batches, what the tower sees, captions.

The counterpart of retrieval.py. `caption_tokens` reads the captions, `caption_stages` trains.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from nbhelpers.code_identity import code_digest
from nbhelpers.data.array_store import ArrayStore, as_stored, in_batches
from nbhelpers.data.augment import Normalizer, TrainTransform
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.distinct import distinct
from nbhelpers.data.image_input import ImageInput
from nbhelpers.data.loaders import (
    PIXEL_CODE,
    FeatureDataset,
    PairDataset,
    image_bytes,
    train_loader,
)
from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import Tokenizer, distinct_captions
from nbhelpers.files import atomic_write
from nbhelpers.keys import modules_digest
from nbhelpers.metrics import caption_scores
from nbhelpers.papers.bita import BITAConfig, Captioner, ImageReader
from nbhelpers.tasks.caption_tokens import DecoderTokenizer, Tokenizers
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.towers import backbones
from nbhelpers.training import loop
from nbhelpers.training.device import resolve

BATCH = 64  # images that pass the image tower, or are described, at once


class CaptionTask:
    """One data set as the three stages of BITA see it.

    frozen   a model whose frozen image tower every image passes once; its tokens are cached.
             Without it, images are cropped and mirrored as in the release, and pass the tower in
             every epoch
    others   further sets whose training pairs join in stages 1 and 2; the authors pre-train on
             three sets together
    """

    def __init__(
        self,
        data: DataSet,
        config: BITAConfig,
        tokenizers: Tokenizers,
        seed: int = 0,
        workers: int | str = 2,
        frozen: FrozenTowers | None = None,
        others: Iterable[DataSet] = (),
    ):
        self.data, self.config = data, config
        self.words, self.decoder = tokenizers.alignment, tokenizers.decoder
        self.prompted = self.decoder.prompted(config.prompt, config.prompt_space)
        self.image = image_input(config.image)
        self.seed, self.workers = seed, workers
        self.views = frozen.views if frozen else 0
        # None, or a model whose frozen tower fills the cache
        self.reader: Any = frozen.model if frozen else None
        self.cache: Any = frozen.cache if frozen else None
        self.tower_sha256 = modules_digest(frozen.model.towers()) if frozen else ""
        self.others = list(others)

    def table(self, split: str) -> CaptionTable:
        """Return the table of one split."""
        return self.data.table.split(split)

    def content(self, stage: str) -> dict[str, object]:
        """Return what decides the batches of a stage and its validation, for `checkpoint_key`."""
        tokenizer = self._tokenizer(stage)
        code = code_digest(type(self), type(tokenizer), PairsOfAll)
        return {
            "data": [data.content() for data in self._sets(stage)],
            "tokenizer": tokenizer.sha256,
            "image": self.image,
            "seed": self.seed,
            "views": self.views,
            "tower": self.tower_sha256,
            "code": code,
        }

    def _tokenizer(self, stage: str) -> Tokenizer | DecoderTokenizer:
        if stage == "stage1":
            return self.words
        return self.decoder if stage == "stage2" else self.prompted

    def _sets(self, stage: str) -> list[DataSet]:
        return [self.data] if stage == "finetune" else [self.data, *self.others]

    def loader(self, stage: str, batch_size: int) -> DataLoader:
        """Return shuffled full batches of a stage's training pairs.

        A batch has `vision` or `pixels`, ids and mask.
        """
        parts = [self._pairs(data, self._tokenizer(stage)) for data in self._sets(stage)]
        return train_loader(
            parts[0] if len(parts) == 1 else PairsOfAll(parts), batch_size, self.workers
        )

    def _pairs(self, data: DataSet, tokenizer) -> Dataset:
        table = data.table.split("train")
        if self.reader is None:
            transform = TrainTransform(self.image.size, randaugment=None)
            return PairDataset(
                table, data.pixels, transform, tokenizer, self.seed, self.image.mean, self.image.std
            )
        texts, rows = distinct_captions(table, tokenizer.clean)
        ids, mask = (part.numpy() for part in tokenizer(texts))
        seen = self.vision("train", data, self.views)
        read = ArrayStore({}, {"ids": ids, "mask": mask})
        return FeatureDataset(table, seen, read, self.seed, rows, self.views)

    # ---- what the frozen tower sees
    def vision(self, split: str, data: DataSet | None = None, views: int = 0) -> ArrayStore:
        """`vision` (N,V,C), or (N,views,V,C) with views, computed once."""
        data = data or self.data
        table = data.table.split(split)
        code = code_digest(
            backbones,
            (type(self.reader), "image_features"),
            (type(self), "_seen"),
            ArrayStore,
            *PIXEL_CODE,
        )
        key = {
            "kind": "vision",
            "dtype": self.config.frozen_dtype,
            "tower": self.tower_sha256,
            "image": repr(self.image),
            "views": views,
            "seed": self.seed if views else 0,
            "pixels": data.pixels.key,
            "code": code,
        }
        compute = partial(self._seen, data, table, views)
        return ArrayStore.cached(self.cache, key, list(table.images.file), compute, BATCH)

    @torch.inference_mode()
    def _seen(
        self, data: DataSet, table: CaptionTable, views: int, rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        draws: list[TrainTransform | None] = [None]
        if views:
            draws = [TrainTransform(self.image.size, randaugment=None) for _ in range(views)]
        parts = (self._pixels(data, table, rows, draw, view) for view, draw in enumerate(draws))
        seen = [vision_of(self.reader, pixels).cpu().numpy() for pixels in parts]
        return {"vision": np.stack(seen, axis=1) if views else seen[0]}

    def _pixels(
        self,
        data: DataSet,
        table: CaptionTable,
        rows: np.ndarray,
        draw: TrainTransform | None = None,
        view: int = 0,
    ) -> Tensor:
        size, draws = self.image.size, (self.seed, view)
        found = image_bytes(data.pixels, table, rows, size, self.workers, draw, draws)
        return Normalizer(self.image.mean, self.image.std)(found.to(resolve()))

    def seen(
        self, model: ImageReader, split: str, rows: np.ndarray | None = None
    ) -> Iterator[Tensor]:
        """Yield batches (B,V,C) float32 of a split's images, or of these rows, in order.

        They lie on the model's device and pass the test transform. (The release evaluates under the
        training transform.)
        """
        device = next(model.parameters()).device
        table = self.table(split)
        rows = np.arange(len(table)) if rows is None else rows
        cached = None if self.reader is None else self.vision(split)["vision"]
        for some in in_batches(rows, BATCH):
            if cached is None:
                yield vision_of(model, self._pixels(self.data, table, some))
            else:
                yield torch.from_numpy(np.array(cached[some])).float().to(device)

    # ---- captions
    @torch.inference_mode()
    def describe(
        self, model: Captioner, split: str, progress: bool = True, prompt: bool = True, **options
    ) -> Described:
        """Return a caption for every image of a split, by beam search.

        It is the same in every run on one machine, and for equal images.

        prompt   False: no prompt, for a model that has not been fine-tuned
        options  beams, longest, shortest, as Captioner.generate has them
        """
        table, began, texts = self.table(split), time.perf_counter(), []
        words, pixels = self.prompted if prompt else self.decoder, self.data.pixels
        first, row = distinct([pixels.digests[image] for image in pixels.rows(table.images.file)])
        training_mode = model.training
        model.eval()
        silent = not (progress and loop._somebody_looks())
        with tqdm(total=len(first), unit="image", disable=silent) as bar:
            for vision in self.seen(model, split, first):
                texts += say(model, vision, words, **options)
                bar.update(len(vision))
        model.train(training_mode)
        captions = dict(zip(table.images.image_id, (texts[number] for number in row), strict=True))
        return Described(captions, self.references(split), time.perf_counter() - began)

    def references(self, split: str) -> dict[str, list[str]]:
        """The raw sentences of each image of a split."""
        found: dict[str, list[str]] = {image: [] for image in self.table(split).images.image_id}
        for image, text in self.table(split).captions.itertuples(index=False):
            found[image].append(text)
        return found

    def validate(self, model: Captioner) -> dict[str, float]:
        """Return CIDEr + BLEU-4 on the validation split, which selects the epoch.

        Words are split by rules, without Java.
        """
        return self.describe(model, "val", progress=False).scores()


def say(model: Captioner, vision: Tensor, words: DecoderTokenizer, **options) -> list[str]:
    """Return a caption for each image of vision (B,V,C), after the prompt of `words`.

    The options are those of `Captioner.generate`.
    """
    start = torch.tensor(words.prompt_ids(), device=vision.device)
    return words.decode(model.generate(vision, start, words.end, words.pad_id, **options))


def image_input(name: str) -> ImageInput:
    """What the image tower `name` is fed."""
    return (
        backbones.CLIP_VISION[name][1]
        if name in backbones.CLIP_VISION
        else backbones.image_input(name)
    )


def vision_of(model: ImageReader, pixels: Tensor) -> Tensor:
    """Return (B,V,C) float32 of pixels (B,3,S,S), on the model's device.

    Values are rounded to 16 bits, as in the cache of a task.
    """
    device = next(model.parameters()).device
    vision = model.image_features(pixels.to(device))["vision"].float()
    return torch.from_numpy(as_stored({"vision": vision})["vision"]).float().to(device)


ALIKE = ("workers", "as_bytes", "normalizer")  # of the data sets that `PairsOfAll` joins


class PairsOfAll(Dataset):
    """The pairs of several data sets, one set after the other.

    `image_index`, `scene` and `row` count within each set.
    """

    def __init__(self, parts: list):
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)])
        self.seed, self.epoch = parts[0].seed, 0

    def __len__(self) -> int:
        return int(self.starts[-1])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, of which all random draws depend."""
        self.epoch = epoch
        for part in self.parts:
            part.set_epoch(epoch)

    def __getattr__(self, name: str) -> Any:
        """Return what all parts have alike."""
        if name not in ALIKE:
            raise AttributeError(name)
        return getattr(self.parts[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it for all parts."""
        if name not in ALIKE:
            return super().__setattr__(name, value)
        for part in self.parts:
            setattr(part, name, value)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """A whole batch, in the order of `rows`."""
        places = np.asarray(rows)
        part_of = np.searchsorted(self.starts, places, side="right") - 1
        found = [
            self.parts[n].__getitems__(places[part_of == n] - self.starts[n])
            for n in np.unique(part_of)
        ]
        place = torch.from_numpy(np.argsort(np.argsort(part_of, kind="stable")))
        return {name: torch.cat([batch[name] for batch in found])[place] for name in found[0]}


@dataclass(frozen=True)
class Described:
    """Generated captions, the references, and the seconds that generation took.

    captions: image id -> caption; references: image id -> raw sentences.
    """

    captions: dict[str, str]
    references: dict[str, list[str]]
    seconds: float

    @property
    def per_second(self) -> float:
        """Return captions per second."""
        return len(self.captions) / self.seconds

    def scores(self) -> dict[str, float]:
        """Return CIDEr, BLEU4 and their sum, times 100, for selection and curves.

        Tokens are those of `tokenize_by_rules`, so no Java is needed. 50_score_captions computes
        what tables show.
        """
        cider, bleu = self._score(Cider())[0], self._score(Bleu(4), verbose=0)[0][3]
        return {
            "CIDEr": 100 * float(cider),
            "BLEU4": 100 * bleu,
            "CIDEr_BLEU4": 100 * float(cider + bleu),
        }

    def cider_of_each(self) -> dict[str, float]:
        """Image id -> CIDEr, times 100, as in `scores`."""
        return dict(zip(self.captions, 100 * np.asarray(self._score(Cider())[1]), strict=True))

    def _score(self, scorer, **options):
        found = {image: [_tokens(text)] for image, text in self.captions.items()}
        wanted = {
            image: [_tokens(text) for text in texts] for image, texts in self.references.items()
        }
        return scorer.compute_score(wanted, found, **options)

    def write(
        self,
        path: Path,
        system: str,
        variant: str,
        split: str,
        data: str,
        checkpoint: str = "",
        about: Mapping[str, object] | None = None,
    ) -> Path:
        """Write the file that 50_score_captions reads.

        `checkpoint` is as in a record; `about` has further fields of its record: config, weights,
        seconds, parameters.
        """
        content = {
            "system": system,
            "variant": variant,
            "split": split,
            "data": data,
            "checkpoint": checkpoint,
            "about": dict(about or {}),
            "captions": self.captions,
            "references": self.references,
        }
        with atomic_write(path) as temporary:
            temporary.write_text(
                json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        return Path(path)


def _tokens(text: str) -> str:
    return caption_scores.tokenize_by_rules(caption_scores.clean(text))

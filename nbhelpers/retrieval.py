"""From a data set and a dual encoder to batches, embeddings and recalls."""
from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nbhelpers import recall, records
from nbhelpers.backbones import ImageInput
from nbhelpers.data import audit
from nbhelpers.data.augment import TrainTransform
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.loading import (FeatureCache, FeatureDataset, PairDataset, Tokenizer, caption_batches, clean_caption,
                                    distinct_captions, image_batches, train_loader)
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError

BATCH = 128  # the papers encode the gallery in batches of 128; padding makes embeddings depend on it where it is attended


@dataclass(frozen=True)
class Embeddings:
    """images (N,D) and texts (M,D) float32 unit rows; owner (M,) the image row of each text."""

    images: np.ndarray
    texts: np.ndarray
    owner: np.ndarray

    def similarity(self) -> np.ndarray:
        """(N,M) cosine similarities."""
        return self.images @ self.texts.T

    def recall(self, ties: str = "expectation") -> recall.Recall:
        return recall.evaluate(self.similarity(), self.owner, ties=ties)


class RetrievalTask:
    """One data set as one dual encoder sees it.

    With `towers`, a model whose towers are frozen, every image and caption passes its towers once (test transform, no
    augmentation); the features are cached in `cache` under a key of everything they depend on, and training and
    evaluation read those; the tokenizer must pad to a fixed length. Without it, images are augmented and pass the
    towers in every epoch.

    starting_weights  sha256 of what fills the towers; not given, it is taken from their tensors
    UserError if `towers` are not frozen, or if a model with others is evaluated on their features.
    """

    def __init__(self, data: DataSet, tokenizer: Tokenizer, image: ImageInput, seed: int = 0, workers: int = 2,
                 towers: nn.Module | None = None, starting_weights: tuple[str, ...] = (), cache: Path | None = None):
        self.data, self.tokenizer, self.image, self.seed, self.workers = data, tokenizer, image, seed, workers
        if towers is not None and not towers.config.freeze_towers:
            raise UserError("Only frozen towers can be cached; build the model with freeze_towers=True or give no towers.")
        self.towers, self.cache = towers, cache
        self.starting_weights = starting_weights or (_sha256(towers) if towers is not None else ())

    def table(self, split: str) -> CaptionTable:
        return self.data.table.split(split)

    def train_loader(self, batch_size: int, randaugment: str | None = "fixed") -> DataLoader:
        """Shuffled full batches of the training pairs. `randaugment` as in augment.TrainTransform; unused with `towers`."""
        table = self.table("train")
        if self.towers is not None:
            dataset = FeatureDataset(table, *self.features("train"), self.seed, distinct_captions(table)[1])
        else:
            transform = TrainTransform(self.image.size, randaugment=randaugment)
            dataset = PairDataset(table, self.data.pixels, transform, self.tokenizer, self.seed, self.image.mean, self.image.std)
        return train_loader(dataset, batch_size, self.workers)

    def features(self, split: str) -> tuple[FeatureCache, FeatureCache]:
        """(image features, text features) of the frozen towers for one split, computed once.

        A row for each image of the split, and for each of its `distinct_captions`.
        """
        table = self.table(split)
        images = self._cached("images", split, table, len(table), self._image_features)
        texts = self._cached("texts", split, table, len(distinct_captions(table)[0]), self._text_features)
        return images, texts

    def _cached(self, kind: str, split: str, table: CaptionTable, count: int, compute) -> FeatureCache:
        model = self.towers
        key = json.dumps([kind, split, table.fingerprint(), self.data.pixels.key, self.tokenizer.sha256, repr(self.image),
                          self.starting_weights, type(model).__name__, repr(model.config)])
        batches = compute(table)
        return FeatureCache.build(lambda indices: next(batches), count, BATCH, key, self.cache)

    @torch.inference_mode()
    def _image_features(self, table: CaptionTable):
        model, device = self.towers.eval(), next(self.towers.parameters()).device
        for pixels in self.pixels(table):
            yield {name: value.cpu().numpy() for name, value in model.image_features(pixels.to(device)).items()}

    @torch.inference_mode()
    def _text_features(self, table: CaptionTable):
        model, device = self.towers.eval(), next(self.towers.parameters()).device
        for ids, mask in caption_batches(distinct_captions(table)[0], self.tokenizer, BATCH):
            found = model.text_features(ids.to(device), mask.to(device))
            yield {"mask": mask.numpy()} | {name: value.cpu().numpy() for name, value in found.items()}

    def pixels(self, table: CaptionTable):
        """Batches (B,3,S,S) of the normalised test-transform pixels of every image of the table, in its order."""
        return image_batches(table, self.data.pixels, self.image.size, BATCH, self.image.mean, self.image.std, self.workers)

    @torch.inference_mode()
    def embeddings(self, model: nn.Module, split: str) -> Embeddings:
        """All images and captions of a split through `model`, in file order."""
        table, device = self.table(split), next(model.parameters()).device
        if self.towers is not None:
            self._check_towers(model)
        training = model.training
        model.eval()
        if self.towers is None:
            images = [model.encode_images(pixels.to(device)) for pixels in self.pixels(table)]
            cleaned = [clean_caption(text) for text in table.captions.text]
            texts = _rows([model.encode_texts(ids.to(device), mask.to(device))
                           for ids, mask in caption_batches(cleaned, self.tokenizer, BATCH)])
        else:
            seen, read = self.features(split)
            images = [model.embed_images(**part) for part in _parts(seen, model.IMAGE_FEATURES, device)]
            distinct = _rows([model.embed_texts(**part) for part in _parts(read, (*model.TEXT_FEATURES, "mask"), device)])
            texts = distinct[distinct_captions(table)[1]]
        model.train(training)
        return Embeddings(_rows(images), texts, table.owner())

    def _check_towers(self, model: nn.Module) -> None:
        ours, theirs = _frozen_state(self.towers), _frozen_state(model)
        same = theirs.keys() <= ours.keys() and all(torch.equal(value, ours[name].to(value)) for name, value in theirs.items())
        if not same or model.config.use_mask != self.towers.config.use_mask:
            raise UserError(f"The towers of this {type(model).__name__} are not those whose features are cached; "
                            "evaluate it with a RetrievalTask of its own.")

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Recalls on the validation split, ties by expectation: what selects the best epoch."""
        return self.embeddings(model, "val").recall().metrics


def compare(results: dict[str, recall.Recall], owner: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """One row per system and metric: system, metric, value, low, high (95 % bootstrap over images), in percent."""
    rows = [{"system": name, "metric": metric, "value": result.metrics[metric], "low": low, "high": high}
            for name, result in results.items() for metric, (low, high) in recall.bootstrap(result, owner, seed=seed).items()]
    return pd.DataFrame(rows)


def write_record(run, system: str, variant: str, model: nn.Module, task: RetrievalTask, weights: list[dict], seconds: float,
                 notes: str = "", selected_on: str = "val") -> dict:
    """Evaluates `model` on the test split, writes its record and per-query ranks, and returns the record.

    variant      "" for the notebook's main run
    weights      what the model started from, as `Start.record` tells it
    selected_on  split that chose the epoch; "test" for the authors' checkpoints
    """
    table, found = task.table("test"), task.embeddings(model, "test")
    rules = {rule: found.recall(rule) for rule in recall.TIES}
    count = {"all": sum(p.numel() for p in model.parameters()),
             "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    path = run.write_record(
        model.config, rules["expectation"].arrays() | {"owner": found.owner}, system=system, variant=variant,
        data_fingerprint=table.fingerprint(), weights=weights, seconds=seconds, parameters=count,
        protocol={"split": "test", "ties": "expectation", "selected_on": selected_on},
        metrics={rule: result.metrics for rule, result in rules.items()},
        intervals=recall.bootstrap(rules["expectation"], found.owner, seed=run.parameters.seed),
        ceiling=audit.ceilings(table), chance=recall.chance(found.owner), notes=notes)
    return records.read([path])[0]


def _frozen_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the frozen parts of a dual encoder, by their names in it."""
    frozen = tuple(f"{name}." for name, part in model.named_children() if part in model.frozen())
    return {name: value for name, value in model.state_dict().items() if name.startswith(frozen)}


def _sha256(towers: nn.Module) -> tuple[str]:
    digest = hashlib.sha256()
    for name, value in _frozen_state(towers).items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return (digest.hexdigest(),)


def _parts(cache: FeatureCache, names: tuple[str, ...], device):
    """Batches of cached features as float32 (the mask as integers) on the device."""
    count = len(next(iter(cache.arrays.values())))
    for start in range(0, count, BATCH):
        part = {name: torch.from_numpy(np.array(cache[name][start:start + BATCH])) for name in names}
        yield {name: (value.float() if value.is_floating_point() else value).to(device) for name, value in part.items()}


def _rows(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).float().cpu().numpy()

"""From a data set and a dual encoder to batches, embeddings and recalls."""
from __future__ import annotations

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
from nbhelpers.data.loading import (FeatureCache, FeatureDataset, PairDataset, Tokenizer, caption_batches, image_batches,
                                    train_loader)
from nbhelpers.data.table import CaptionTable

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
    evaluation read those; the tokenizer must pad to a fixed length. Without it, images are augmented and pass the towers in every epoch.
    """

    def __init__(self, data: DataSet, tokenizer: Tokenizer, image: ImageInput, seed: int = 0, workers: int = 2,
                 towers: nn.Module | None = None, starting_weights: tuple[str, ...] = (), cache: Path | None = None):
        self.data, self.tokenizer, self.image, self.seed, self.workers = data, tokenizer, image, seed, workers
        self.towers, self.cache = towers, cache
        self.starting_weights = starting_weights

    def table(self, split: str) -> CaptionTable:
        return self.data.table.split(split)

    def train_loader(self, batch_size: int, randaugment: str | None = "fixed") -> DataLoader:
        """Shuffled full batches of the training pairs. `randaugment` as in augment.TrainTransform; unused with `towers`."""
        table = self.table("train")
        if self.towers is not None:
            dataset = FeatureDataset(table, *self.features("train"), seed=self.seed)
        else:
            transform = TrainTransform(self.image.size, randaugment=randaugment)
            dataset = PairDataset(table, self.data.pixels, transform, self.tokenizer, self.seed, self.image.mean, self.image.std)
        return train_loader(dataset, batch_size, self.workers)

    def features(self, split: str) -> tuple[FeatureCache, FeatureCache]:
        """(image features, text features) of the frozen towers for one split, computed once."""
        table = self.table(split)
        images = self._cached("images", split, table, len(table), self._image_features)
        texts = self._cached("texts", split, table, len(table.captions), self._text_features)
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
        for pixels in self._pixels(table):
            yield {name: value.cpu().numpy() for name, value in model.image_features(pixels.to(device)).items()}

    @torch.inference_mode()
    def _text_features(self, table: CaptionTable):
        model, device = self.towers.eval(), next(self.towers.parameters()).device
        for ids, mask in caption_batches(table, self.tokenizer, BATCH):
            found = model.text_features(ids.to(device), mask.to(device))
            yield {"mask": mask.numpy()} | {name: value.cpu().numpy() for name, value in found.items()}

    def _pixels(self, table: CaptionTable):
        return image_batches(table, self.data.pixels, self.image.size, BATCH, self.image.mean, self.image.std, self.workers)

    @torch.inference_mode()
    def embeddings(self, model: nn.Module, split: str) -> Embeddings:
        """All images and captions of a split through `model`, in file order."""
        table, device = self.table(split), next(model.parameters()).device
        training = model.training
        model.eval()
        if self.towers is None:
            images = [model.encode_images(pixels.to(device)) for pixels in self._pixels(table)]
            texts = [model.encode_texts(ids.to(device), mask.to(device))
                     for ids, mask in caption_batches(table, self.tokenizer, BATCH)]
        else:
            seen, read = self.features(split)
            images = [model.embed_images(**part) for part in _parts(seen, model.IMAGE_FEATURES, device)]
            texts = [model.embed_texts(**part) for part in _parts(read, (*model.TEXT_FEATURES, "mask"), device)]
        model.train(training)
        return Embeddings(_rows(images), _rows(texts), table.owner())

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Recalls on the validation split, ties by expectation: what selects the best epoch."""
        return self.embeddings(model, "val").recall().metrics


def compare(results: dict[str, recall.Recall], owner: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """One row per system and metric: system, metric, value, low, high (95 % bootstrap over images), in percent."""
    rows = [{"system": name, "metric": metric, "value": result.metrics[metric], "low": low, "high": high}
            for name, result in results.items() for metric, (low, high) in recall.bootstrap(result, owner, seed=seed).items()]
    return pd.DataFrame(rows)


def write_record(run, system: str, variant: str, model: nn.Module, task: RetrievalTask, weights: list[dict], seconds: float,
                 notes: str = "") -> dict:
    """Evaluates `model` on the test split, writes its record and per-query ranks, and returns the record.

    variant  "" for the notebook's main run;  weights  what the model started from, as `Start.record` tells it
    """
    table, found = task.table("test"), task.embeddings(model, "test")
    rules = {rule: found.recall(rule) for rule in recall.TIES}
    count = {"all": sum(p.numel() for p in model.parameters()),
             "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    record = records.new(
        model.config, notebook=run.notebook, system=system, variant=variant, profile=run.parameters.profile,
        set=run.parameters.set, data_fingerprint=table.fingerprint(), weights=weights, seed=run.parameters.seed,
        device=run.device, seconds=seconds, parameters=count,
        protocol={"split": "test", "ties": "expectation", "selected_on": "val"},
        metrics={rule: result.metrics for rule, result in rules.items()},
        intervals=recall.bootstrap(rules["expectation"], found.owner, seed=run.parameters.seed),
        ceiling=audit.ceilings(table), chance=recall.chance(found.owner), notes=notes)
    path = records.write(run.records, record, rules["expectation"].arrays() | {"owner": found.owner})
    return records.read([path])[0]


def _parts(cache: FeatureCache, names: tuple[str, ...], device):
    """Batches of cached features as float32 (the mask as integers) on the device."""
    count = len(next(iter(cache.arrays.values())))
    for start in range(0, count, BATCH):
        part = {name: torch.from_numpy(np.array(cache[name][start:start + BATCH])) for name in names}
        yield {name: (value.float() if value.is_floating_point() else value).to(device) for name, value in part.items()}


def _rows(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).float().cpu().numpy()

"""From a data set and a dual encoder to batches, embeddings and recalls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nbhelpers.code_identity import code_digest
from nbhelpers.data.array_store import ArrayStore, Compute, in_batches
from nbhelpers.data.augment import Normalizer, TestTransform, TrainTransform
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.distinct import Distinct, Rows, distinct, text_keys
from nbhelpers.data.image_input import ImageInput
from nbhelpers.data.loaders import (
    PIXEL_CODE,
    FeatureDataset,
    PairDataset,
    image_bytes,
    train_loader,
)
from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import Tokenizer, caption_batches
from nbhelpers.errors import UserError
from nbhelpers.keys import modules_digest
from nbhelpers.metrics import audit, recall
from nbhelpers.papers.dual_encoder import TURNS, OnFrozenTowers, turned
from nbhelpers.papers.pir import PIR
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.towers import backbones
from nbhelpers.training.device import check_precision, encoding, encoding_on

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = 128  # as in the papers; where padding is attended, embeddings depend on the batch


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Unit rows of N images and M texts, float32; equal ones are computed once.

    owner (M,) is the image row of each text.
    """

    image_rows: Rows
    text_rows: Rows
    owner: np.ndarray

    @property
    def images(self) -> np.ndarray:
        """(N,D)."""
        return self.image_rows.all()

    @property
    def texts(self) -> np.ndarray:
        """(M,D)."""
        return self.text_rows.all()

    def similarity(self) -> np.ndarray:
        """(N,M) cosine similarities; equal pairs have equal ones."""
        return self.image_rows.products(self.text_rows)

    def recall(self, ties: str = "expectation") -> recall.Recall:
        """Return R@K both ways under a tie rule."""
        return recall.evaluate(self.similarity(), self.owner, ties=ties)


class RetrievalTask:
    """One data set as one dual encoder sees it.

    With `frozen`, every image and caption passes the frozen towers once; the features are cached
    under a key of everything they depend on, so that systems on the same towers share them, and
    training and evaluation read those; the tokenizer must pad to a fixed length. Without it, images
    are augmented and pass the towers in every epoch.

    frozen     the towers, their cache and the number of views. If the configuration of the towers
               has `turns`, views are turned at random, and what is evaluated is cached in all turns
    precision  fp32, bf16 or fp16, in which the frozen towers see the images of the training split:
               EfficientNet-Lite0 is twice as fast in bf16 on a CPU that has instructions for it;
               what is evaluated is seen in fp32

    Without cached towers, what is evaluated is encoded in the precision of `device.encode_in`.

    UserError if the towers are not frozen, or if a model with others is evaluated on their
    features.
    """

    def __init__(
        self,
        data: DataSet,
        tokenizer: Tokenizer,
        image: ImageInput,
        seed: int = 0,
        workers: int | str = 2,
        frozen: FrozenTowers | None = None,
        precision: str = "fp32",
    ):
        self.data, self.tokenizer, self.image = data, tokenizer, image
        self.seed, self.workers = seed, workers
        towers = frozen.model if frozen else None
        if towers is not None and not towers.config.freeze_towers:
            raise UserError(
                "Only frozen towers can be cached; build the model with freeze_towers=True or give"
                " no towers."
            )
        if towers is not None:
            check_precision(precision, next(towers.parameters()).device)
        self.towers: Any = towers  # None, or a model of frozen towers; then there is a cache
        self.cache: Any = frozen.cache if frozen else None
        self.views = frozen.views if frozen else 0
        self.precision = "fp32" if precision == "tf32" else precision  # features are read once
        self.turns = TURNS if getattr(getattr(towers, "config", None), "turns", False) else 0
        self.towers_sha256 = modules_digest(towers.towers()) if towers is not None else ""
        self._known: dict[tuple[str, str], Distinct] = {}

    def content(self) -> dict[str, object]:
        """Return what decides a model's batches and its validation, for `checkpoint_key`.

        The transform of `train_loader` is not part of it.
        """
        code = code_digest(type(self), type(self.tokenizer))
        evaluated = {} if encoding() == "fp32" else {"evaluated in": encoding()}
        return evaluated | {
            "data": self.data.content(),
            "tokenizer": self.tokenizer.sha256,
            "image": self.image,
            "seed": self.seed,
            "views": self.views,
            "turns": self.turns,
            "precision": self.precision,
            "towers": self.towers_sha256,
            "code": code,
        }

    def table(self, split: str) -> CaptionTable:
        """Return the table of one split."""
        return self.data.table.split(split)

    def train_loader(
        self, batch_size: int, transform: TrainTransform | TestTransform | None = None
    ) -> DataLoader:
        """Return shuffled full batches of the training pairs.

        `transform` is PIR's TrainTransform by default. It is unused with `towers`.
        """
        table = self.table("train")
        if self.towers is not None:
            dataset = FeatureDataset(
                table,
                *self.features("train"),
                self.seed,
                self.distinct_texts("train").row,
                self.views,
            )
        else:
            transform = transform or TrainTransform(self.image.size)
            dataset = PairDataset(
                table,
                self.data.pixels,
                transform,
                self.tokenizer,
                self.seed,
                self.image.mean,
                self.image.std,
            )
        return train_loader(dataset, batch_size, self.workers)

    def distinct_pairs(self, batch: dict[str, Tensor], count: int = 16) -> np.ndarray:
        """Return rows of a training batch, at most `count`, that a model can learn by heart.

        Their images and sentences all differ.
        """
        string = self.distinct_texts("train").row[batch["row"]]
        rows = np.unique(string, return_index=True)[1]
        return rows[np.unique(batch["image_index"].numpy()[rows], return_index=True)[1]][:count]

    def features(self, split: str) -> tuple[ArrayStore, ArrayStore]:
        """(image features, text features) of the frozen towers for one split, computed once.

        A row for each image of the split, and for each of its `distinct_texts`.
        """
        table = self.table(split)
        if split == "train":
            kind = f"images, {self.views} views, seed {self.seed}" if self.views else "images"
            kind += ("" if self.precision == "fp32" else f", {self.precision}") + (
                ", turned" if self.views and self.turns else ""
            )
        else:
            kind = f"images, {self.turns} turns" if self.turns else "images"
        images = self._cached(
            kind,
            self.towers.IMAGE_FEATURES,
            list(table.images.file),
            partial(self._image_features, table, split == "train"),
        )
        distinct = self._cleaned(split)
        texts = self._cached(
            "texts", self.towers.TEXT_FEATURES, distinct, partial(self._text_features, distinct)
        )
        return images, texts

    def distinct_images(self, split: str) -> Distinct:
        """Which images of a split are equal, pixel by pixel."""
        return self._distinct(split, self.image_keys)

    def distinct_texts(self, split: str) -> Distinct:
        """Which captions of a split are equal to a model: those of equal token ids."""
        return self._distinct(split, self.text_keys)

    def _distinct(self, split: str, keys_of: Callable[[str], list[str]]) -> Distinct:
        """Computed at the first call."""
        if (keys_of.__name__, split) not in self._known:
            self._known[keys_of.__name__, split] = distinct(keys_of(split))
        return self._known[keys_of.__name__, split]

    def image_keys(self, split: str) -> list[str]:
        """A digest of the decoded pixels of each image of a split."""
        pixels = self.data.pixels
        return [pixels.digests[row] for row in pixels.rows(self.table(split).images.file)]

    def text_keys(self, split: str) -> list[str]:
        """The token ids of each caption of a split."""
        return text_keys(self.table(split).captions.text, self.tokenizer)

    def _cleaned(self, split: str) -> list[str]:
        """The `distinct_texts` of a split, as the tokenizer reads them."""
        texts = self.table(split).captions.text.to_numpy()[self.distinct_texts(split).first]
        return [self.tokenizer.clean(text) for text in texts]

    def _cached(
        self, kind: str, names: tuple[str, ...], items: list[str], compute: Compute
    ) -> ArrayStore:
        """Return a row of features for each item, from the cache.

        Items are files of images, or texts. Tables with the same items share them.
        """
        code = code_digest(  # of all systems, since those on the same towers share the features
            *(
                (kind, "image_features", "text_features")
                for kind in (OnFrozenTowers, PIR, type(self.towers))
            ),
            backbones,
            (type(self), "_image_features", "_text_features"),
            (type(self.tokenizer), "__call__"),
            ArrayStore,
            *PIXEL_CODE,
        )
        key = {
            "kind": kind,
            "names": list(names),
            "pixels": self.data.pixels.key,
            "tokenizer": self.tokenizer.sha256,
            "image": repr(self.image),
            "towers": self.towers_sha256,
            "mask": self.towers.config.use_mask,
            "code": code,
        }
        return ArrayStore.cached(self.cache, key, items, compute, BATCH)

    @torch.inference_mode()
    def _image_features(
        self, table: CaptionTable, training: bool, rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Name -> (B,...) of these rows of a table, or (B,V,...) of V views or turns."""
        model, device = self.towers.eval(), next(self.towers.parameters()).device
        several = self.views if training else self.turns
        augmented = None
        if training and self.views:
            augmented = TrainTransform(self.image.size, turn=bool(self.turns))
        precision, turns = (self.precision, 0) if training else ("fp32", self.turns)
        drawn = [
            self.pixels_of(table, rows, augmented, view, device)
            for view in range(self.views if augmented else 1)
        ]
        views = [turned(pixels, turn) for pixels, turn in product(drawn, range(max(turns, 1)))]
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            seen = [model.image_features(pixels) for pixels in views]
        arrays = [
            {name: value.float().cpu().numpy() for name, value in one.items()} for one in seen
        ]
        if not several:
            return arrays[0]
        return {name: np.stack([one[name] for one in arrays], axis=1) for name in arrays[0]}

    @torch.inference_mode()
    def _text_features(self, texts: list[str], rows: np.ndarray) -> dict[str, np.ndarray]:
        model, device = self.towers.eval(), next(self.towers.parameters()).device
        ids, mask = self.tokenizer([texts[row] for row in rows])
        found = model.text_features(ids.to(device), mask.to(device))
        return {"mask": mask.numpy()} | {name: value.cpu().numpy() for name, value in found.items()}

    def pixels(self, table: CaptionTable) -> Iterator[Tensor]:
        """Yield batches (B,3,S,S) of normalised pixels of every image of the table, in order.

        Images pass the test transform.
        """
        return map(partial(self.pixels_of, table), in_batches(np.arange(len(table)), BATCH))

    def pixels_of(
        self,
        table: CaptionTable,
        rows: np.ndarray,
        augmented: TrainTransform | None = None,
        view: int = 0,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return pixels (B,3,S,S) of these rows of a table, on the device.

        Images pass the test transform, or one draw of `augmented` for this view.
        """
        size, draws = self.image.size, (self.seed, view)
        found = image_bytes(self.data.pixels, table, rows, size, self.workers, augmented, draws)
        return Normalizer(self.image.mean, self.image.std)(found.to(device))

    @torch.inference_mode()
    def embeddings(self, model: nn.Module, split: str) -> Embeddings:
        """Return the embeddings of all images and captions of a split, in file order.

        Equal ones pass the model once.
        The distinct captions pass in batches of BATCH, each padded to its longest one unless the
        tokenizer pads to a fixed length. UserError for the training split where its images are
        cached as augmented views.
        """
        if split == "train" and self.towers is not None and self.views:
            raise UserError(
                "The images of the training split are cached as augmented views; embed them with a"
                " RetrievalTask whose FrozenTowers have views=0."
            )
        if self.towers is not None:
            self._check_towers(model)
        training = model.training
        model.eval()
        encode = self._encoded if self.towers is None else self._from_features
        images, texts = encode(model, split)
        model.train(training)
        return Embeddings(
            Rows(images, self.distinct_images(split).row),
            Rows(texts, self.distinct_texts(split).row),
            self.table(split).owner(),
        )

    def _encoded(self, model: nn.Module, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of the distinct images and texts of a split, from pixels and ids."""
        device = next(model.parameters()).device
        pixels = partial(self.pixels_of, self.table(split), device=device)
        rows = in_batches(self.distinct_images(split).first, BATCH)
        read = caption_batches(self._cleaned(split), self.tokenizer, BATCH)
        with encoding_on(device):
            images = [model.encode_images(pixels(some)) for some in rows]
            texts = [model.encode_texts(ids.to(device), mask.to(device)) for ids, mask in read]
        return _rows(images), _rows(texts)

    def _from_features(self, model: nn.Module, split: str) -> tuple[np.ndarray, np.ndarray]:
        """As `_encoded`, from what is cached of the towers."""
        device = next(model.parameters()).device
        seen, read = self.features(split)
        pictures = _parts(seen, model.IMAGE_FEATURES, self.distinct_images(split).first, device)
        every = np.arange(len(self.distinct_texts(split).first))
        texts = _parts(read, (*model.TEXT_FEATURES, "mask"), every, device)
        return (
            _rows([model.embed_views(self._views(part)) for part in pictures]),
            _rows([model.embed_texts(**part) for part in texts]),
        )

    def _views(self, part: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Cached features of the images of a split, one dict for each turn."""
        if not self.turns:
            return [part]
        turns = zip(*(value.unbind(1) for value in part.values()), strict=True)
        return [dict(zip(part, turned, strict=True)) for turned in turns]

    def _check_towers(self, model: nn.Module) -> None:
        ours, theirs = self.towers.frozen_state(), model.frozen_state()
        same = theirs.keys() <= ours.keys() and all(
            torch.equal(value, ours[name].to(value)) for name, value in theirs.items()
        )
        same = same and bool(self.turns) == getattr(model.config, "turns", False)
        if not same or model.config.use_mask != self.towers.config.use_mask:
            raise UserError(
                f"The towers of this {type(model).__name__} are not those whose features are"
                " cached; evaluate it with a RetrievalTask of its own."
            )

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Recalls on the validation split, ties by expectation: what selects the best epoch."""
        return self.embeddings(model, "val").recall().metrics


def compare(results: dict[str, recall.Recall], owner: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Return one row per system and metric, in percent, with a 95 % interval.

    Columns: system, metric, value, low, high (bootstrap over images).
    """
    rows = []
    for name, result in results.items():
        for metric, (low, high) in recall.bootstrap(result, owner, seed=seed).items():
            rows.append((name, metric, result.metrics[metric], low, high))
    return pd.DataFrame(rows, columns=["system", "metric", "value", "low", "high"])


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: what its record says beside its results.

    variant      "" for the notebook's main run
    weights      what the model started from, as `Start.record` gives it
    seconds      that the training took
    checkpoint   the model's file, as `Run.checkpoint` names it; "" if the run trained none
    selected_on  split that chose the epoch; "test" for the authors' checkpoints
    """

    system: str
    variant: str
    weights: list[dict]
    seconds: float
    checkpoint: str = ""
    selected_on: str = "val"
    notes: str = ""

    @classmethod
    def again(cls, record: Mapping[str, Any], variant: str, notes: str) -> Origin:
        """Return the origin of another evaluation of the model that a record tells of."""
        return cls(
            record["system"],
            variant,
            record["weights"],
            record.get("seconds", 0.0),
            record.get("checkpoint", ""),
            record["protocol"]["selected_on"],
            notes,
        )


def write_record(
    run,
    model: nn.Module,
    task: RetrievalTask,
    origin: Origin,
    rules: dict[str, recall.Recall] | None = None,
) -> dict:
    """Evaluate `model` on the test split, write its record and ranks, return the record.

    rules  what each tie rule gives, where the ranking is not that of the embeddings, as in a
           two-stage search
    """
    table = task.table("test")
    if rules is None:
        found = task.embeddings(model, "test")
        rules = {rule: found.recall(rule) for rule in recall.TIES}
    seed = run.parameters.seed
    fields = result_fields(model, table, rules, "expectation", origin.selected_on, seed)
    if origin.checkpoint:
        fields["checkpoint"] = origin.checkpoint
    ranks = rules["expectation"].arrays() | {"owner": table.owner()}
    return run.write_record(
        model.config,
        ranks,
        system=origin.system,
        variant=origin.variant,
        weights=origin.weights,
        seconds=origin.seconds,
        notes=origin.notes,
        **fields,
    )


def result_fields(
    model: nn.Module,
    table: CaptionTable,
    rules: dict[str, recall.Recall],
    ties: str,
    selected_on: str,
    seed: int,
) -> dict:
    """Return what a record says of the model, the split in the table, and the results.

    rules        tie rule -> result; the intervals, drawn from `seed`, are those of the rule `ties`
    selected_on  split that chose the epoch
    """
    owner = table.owner()
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trainable = sum(size for size, trained in sizes if trained)
    classes_known = (table.images.scene != table.images.file).any()
    return {
        "data_fingerprint": table.fingerprint(),
        "parameters": {"all": sum(size for size, _ in sizes), "trainable": trainable},
        "protocol": {"split": table.images.split.iloc[0], "ties": ties, "selected_on": selected_on},
        "metrics": {rule: result.metrics for rule, result in rules.items()},
        "intervals": recall.bootstrap(rules[ties], owner, seed=seed),
        "ceiling": audit.ceilings(table),
        "chance": recall.chance(owner),
        **({"class_only": audit.class_only(table)} if classes_known else {}),
    }


def _parts(cache: ArrayStore, names: tuple[str, ...], rows: np.ndarray, device):
    """Batches of these rows of cached features as float32 (the mask as integers) on the device."""
    return (taken(cache, names, some, device) for some in in_batches(rows, BATCH))


def taken(
    cache: ArrayStore, names: Iterable[str], at: np.ndarray | tuple, device: torch.device
) -> dict[str, Tensor]:
    """What lies in a store `at` these rows, floats as float32, on the device."""
    part = {name: torch.from_numpy(np.array(cache[name][at])) for name in names}
    return {
        name: (value.float() if value.is_floating_point() else value).to(device)
        for name, value in part.items()
    }


def _rows(parts: list[Tensor]) -> np.ndarray:
    rows = torch.cat(parts)
    if rows.dtype != torch.float32:  # 16 bits leave lengths that differ from 1 by their rounding
        rows = F.normalize(rows.float(), dim=1)
    return finite(rows.cpu(), "The embeddings").numpy()


def finite(values: Tensor, what: str) -> Tensor:
    """The same values. UserError on NaN and infinity, of which no ranking can be made."""
    if not values.isfinite().all():
        raise UserError(
            f"{what} hold NaN or infinity, so nothing can be ranked; the weights or the pixels are"
            " broken, or 16 bits are too few: give another checkpoint, or compute in fp32, outside"
            " torch.autocast."
        )
    return values

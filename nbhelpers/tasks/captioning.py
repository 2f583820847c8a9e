"""Bring a data set and a captioning model together: batches, stages, captions.

The counterpart of retrieval.py.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from nbhelpers.code_identity import code_digest
from nbhelpers.data.array_store import ArrayStore, as_stored, in_batches
from nbhelpers.data.augment import TrainTransform
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.distinct import distinct
from nbhelpers.data.image_input import ImageInput
from nbhelpers.data.loaders import (
    PIXEL_CODE,
    FeatureDataset,
    PairDataset,
    image_batch,
    train_loader,
)
from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import Tokenizer, distinct_captions, padded
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.keys import modules_digest
from nbhelpers.metrics import caption_scores
from nbhelpers.papers import bita, own_part
from nbhelpers.papers.bita import Aligner, BITAConfig, Captioner, ImageReader
from nbhelpers.papers.ift import Mix, fourier_mix
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.towers import backbones
from nbhelpers.towers.starting_weights import Start, seeded
from nbhelpers.training import loop

BATCH = 64  # images that pass the image tower, or are described, at once
END = "Ċ"  # a line break, as byte pairs write it: what ends a caption


# ---- words
class AlignmentTokenizer(Tokenizer):
    """BERT's words for stage 1: [CLS] ...

    [SEP], every caption padded to exactly 32, as Fourier mixing needs it.
    """

    clean = staticmethod(bita.clean_bita_caption)

    def __init__(self, path: Path | str):
        super().__init__(path, BITAConfig.text_length, fixed=True, sep=True)


class DecoderTokenizer:
    """Byte pairs of a language model, padded on the right to `max_length`.

    A text becomes: first token, prompt, caption, line break.
    path           a tokenizer.json, or the folder that holds one, or vocab.json and merges.txt
    name           in backbones.LANGUAGE, which knows the first token and that of padding
    prompt, space  what stands before each caption, and whether a space stands between; the release
                   forgot the space
    prompt_length  ids that are the same in all captions: the first token and those of the prompt
    A caption that is cut loses its line break, as in the release.
    """

    clean = staticmethod(bita.clean_bita_caption)

    def __init__(
        self,
        path: Path | str,
        name: str,
        prompt: str = "",
        space: bool = True,
        max_length: int = BITAConfig.text_length,
    ):
        self.path, self.name, self.prompt, self.space, self.max_length = (
            Path(path),
            name,
            prompt,
            space,
            max_length,
        )
        self._model = _byte_pairs(self.path)
        _, first, pad = backbones.LANGUAGE[name]
        self.first, self.pad_id, self.end = (self._id(token) for token in (first, pad, END))
        self.vocab_size, self.prompt_length = self._model.get_vocab_size(), len(self.prompt_ids())
        content = repr((self._model.to_str(), name, prompt, space, max_length))
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()

    def _id(self, token: str) -> int:
        if (found := self._model.token_to_id(token)) is None:
            raise UserError(
                f"The tokenizer in {self.path} has no {token!r}; take that of '{self.name}'."
            )
        return found

    def prompted(self, prompt: str, space: bool = True) -> DecoderTokenizer:
        """Return the same tokenizer with another prompt."""
        return DecoderTokenizer(self.path, self.name, prompt, space, self.max_length)

    def prompt_ids(self) -> list[int]:
        """Return the ids of the first token and the prompt."""
        return [self.first, *self._model.encode(self.prompt, add_special_tokens=False).ids]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, not padded."""
        start = self.prompt + (" " if self.prompt and self.space else "")
        encoded = self._model.encode_batch(
            [f"{start}{text}\n" for text in texts], add_special_tokens=False
        )
        return [[self.first, *text.ids][: self.max_length] for text in encoded]

    def pad(self, encoded: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Encoded texts -> ids and mask (B,max_length) int64, 1 where a token stands."""
        return padded(encoded, self.max_length, self.pad_id)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask (B, L) of the texts."""
        return self.pad(self.encode(texts))

    def decode(self, ids: Tensor) -> list[str]:
        """Generated ids (B,n) -> captions, without what follows the line break."""
        rows = [row[: row.index(self.end)] if self.end in row else row for row in ids.tolist()]
        special = {self.first, self.pad_id}
        return [
            text.strip()
            for text in self._model.decode_batch(
                [[i for i in row if i not in special] for row in rows]
            )
        ]


def _byte_pairs(path: Path) -> tokenizers.Tokenizer:
    single = path if path.is_file() else path / "tokenizer.json"
    try:
        if single.is_file():
            return tokenizers.Tokenizer.from_file(str(single))
        model = tokenizers.Tokenizer(
            tokenizers.models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
        )
    # the library raises bare exceptions for what is missing and for what is broken
    except Exception as error:
        raise UserError(
            f"{path} holds no tokenizer of byte pairs ({error}); it needs tokenizer.json, or"
            " vocab.json and merges.txt."
        ) from error
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return model


def decoder_tokenizer(start: Start, config: BITAConfig) -> DecoderTokenizer:
    """That of the start's language model, beside whose weights it lies."""
    path = Path(start.towers["opt_model"].path)
    return DecoderTokenizer(path if path.is_dir() else path.parent, config.decoder)


@dataclass(frozen=True, eq=False)
class Tokenizers:
    """What reads captions: `alignment` in stage 1, `decoder` in stage 2.

    In fine-tuning the decoder's has the configuration's prompt.
    """

    alignment: Tokenizer
    decoder: DecoderTokenizer


# ---- the task
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
        workers: int = 2,
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
        return image_batch(
            data.pixels, table, rows, self.image, self.workers, draw, (self.seed, view)
        )

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

    @property
    def workers(self) -> int:
        """Return the number of threads that prepare batches."""
        return self.parts[0].workers

    @workers.setter
    def workers(self, workers: int) -> None:
        """Return the number of threads that prepare batches."""
        for part in self.parts:
            part.workers = workers

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


# ---- three stages, each from the checkpoint of the one before
@dataclass(frozen=True, eq=False)
class Trained:
    """A stage: its model in eval mode, its history, and the key of its checkpoint."""

    stage: str
    model: ImageReader
    history: loop.History
    key: str


def fill_frozen(start: Start, model: ImageReader) -> ImageReader:
    """Gives the frozen towers of a model their weights, and nothing else."""
    return replace(
        start, towers={name: start.towers[name] for name in ("visual_encoder", "opt_model")}
    ).fill(model)


def build_captioner(
    start: Start,
    config: BITAConfig,
    seed: int,
    before: ImageReader | None = None,
    mix: Mix = fourier_mix,
) -> Captioner:
    """Return a Captioner that goes on from a model of an earlier stage.

    Without one, its transformer starts from BERT. `mix` is as in `bita.ImageReader`.
    """
    if isinstance(before, Captioner):  # the largest part need not be read twice
        model = seeded(lambda: Captioner(config, decoder=before.opt_model, mix=mix), seed)
        replace(start, towers={"visual_encoder": start.towers["visual_encoder"]}).fill(model)
    else:
        model = fill_frozen(start, seeded(lambda: Captioner(config, mix=mix), seed))
    return model.take((before or start.build(lambda: Aligner(config, mix=mix), seed)).state_dict())


def begin_stage(
    stage: str,
    start: Start,
    config: BITAConfig,
    seed: int,
    before: Trained | None,
    mix: Mix = fourier_mix,
) -> ImageReader:
    """The model of a stage before it is trained."""
    if stage == "stage1":
        return start.build(lambda: Aligner(config, mix=mix), seed)
    return build_captioner(start, config, seed, before.model if before else None, mix)


def train_stage(
    stage: str,
    task: CaptionTask,
    start: Start,
    settings: loop.TrainConfig,
    home: Path,
    before: Trained | None = None,
    mix: Mix = fourier_mix,
) -> Trained:
    """Train a stage of bita.STAGES with the task's seed, or load it; a stopped one goes on.

    home    the folder of its checkpoint, without the key that is added to its name
    before  the stage that it begins from: none for stage 1. Without one, stage 2 begins with BERT's
            weights (an ablation)
    mix     the mixing of tokens. Another one than the package's has another key, and its checkpoint
            says so (`own_part.meta`)
    UserError for a stage that cannot begin there.
    """
    _check_order(stage, before)
    config, seed = task.config, task.seed
    loader = task.loader(stage, settings.batch_size)
    finetune = stage == "finetune"
    options = {"prompt_length": task.prompted.prompt_length} if finetune else None
    began = [start.content(), before.key if before else ""]
    key = loop.checkpoint_key(
        [config, settings, stage, options],
        task.content(stage),
        began,
        seed,
        begin_stage,
        fill_frozen,
        mix,
    )
    model, history, _ = loop.load_or_train(
        home.name,
        lambda: begin_stage(stage, start, config, seed, before, mix),
        loader,
        settings,
        home.parent,
        key,
        loop.Options(
            validate=task.validate if finetune else None,
            loss_options=options,
            meta=_meta(stage, config, before, mix),
        ),
    )
    return Trained(stage, model, history, key)


def _check_order(stage: str, before: Trained | None) -> None:
    if (
        stage not in bita.STAGES
        or (stage == "stage1" and before)
        or (stage == "finetune" and not before)
    ):
        raise UserError(
            f"Stage '{stage}' cannot begin from {before.stage if before else 'nothing'}; the stages"
            f" are {', '.join(bita.STAGES)}, each from the one before."
        )


def _meta(stage: str, config: BITAConfig, before: Trained | None, mix: Mix) -> dict[str, Any]:
    """The metadata of a stage's checkpoint."""
    sample = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    same = own_part.agrees(mix, fourier_mix, sample)
    about = {"system": "bita", "stage": stage, "model": asdict(config)}
    return about | {"before": before.key if before else ""} | own_part.meta("fourier_mix", same)


# ---- what was said, and a quick score
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

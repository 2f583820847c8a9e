"""Pre-train a CLIP (for PIR-CLIP and PE-RSITR) and a ViLT (for CFITR) on another set.

No package has such models. What they learn there must transfer to the set under study.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nbhelpers.data import catalog
from nbhelpers.data.augment import TestTransform
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.scenes import generate
from nbhelpers.data.tokenization import (
    Tokenizer,
    caption_batches,
    distinct_captions,
    train_tokenizer,
)
from nbhelpers.errors import UserError
from nbhelpers.papers import clip
from nbhelpers.papers.cfitr import CFITR, Captions, CFITRConfig, rerank_loss
from nbhelpers.papers.clip import CLIP, CLIPConfig, clip_loss
from nbhelpers.papers.dual_encoder import DualEncoder
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import BATCH, RetrievalTask
from nbhelpers.towers import backbones, checkpoints
from nbhelpers.towers.starting_weights import Start, Tower, package_start
from nbhelpers.training import loop
from nbhelpers.training.device import resolve
from nbhelpers.training.distributed import gather

OTHER_WORLD = "scenes_b"  # the name of that generated set, and of its table


# ---- the other set
def other_world(cache: Path, images: int, seed: int) -> DataSet:
    """A data set of the generated world "b": other palette, other sun, other sentences.

    Drawn once into `cache`.
    """
    folder = Path(cache) / f"{OTHER_WORLD}-{images}-seed{seed}"
    generate.write_dataset(folder / "scenes", images, seed, world="b")
    found = catalog.open_dataset("scenes", folder, cache)
    return replace(found, table=replace(found.table, name=OTHER_WORLD))


def another_set(
    names: list[str],
    under_study: str,
    data_folder: str,
    cache: Path,
    images: int,
    seed: int,
    captions: int = 0,
) -> DataSet:
    """Return the first of the sets `names` that is there, and print which.

    "scenes" stands for `other_world`.
    captions  as `first_captions` takes them
    UserError if the set under study is named, which would be no transfer, or if none of them can be
    had.
    """
    lacking = []
    for name in names:
        if name == under_study != "scenes":
            raise UserError(
                f"PRETRAIN_SETS names {name}, the set under study; pre-train on another one."
            )
        if name != "scenes" and not _is_there(name, data_folder):
            lacking.append(f"{name} is not in DATA")
            continue
        found = (
            other_world(cache, images, seed)
            if name == "scenes"
            else catalog.open_dataset(name, data_folder, cache)
        )
        found = first_captions(found, captions)
        print(
            "; ".join(
                [f"pre-training set: {found.table.name}, {len(found.table)} images", *lacking]
            )
        )
        return found
    raise UserError(
        f'None of PRETRAIN_SETS can be had ({"; ".join(lacking) or "it is empty"}); add "scenes",'
        " which is generated."
    )


def first_captions(data: DataSet, count: int) -> DataSet:
    """The set with at most `count` captions of each training image, the first ones; 0: all.

    The other splits keep theirs.
    """
    if not count:
        return data
    table = data.table
    trained = table.captions.image_id.isin(table.images.image_id[table.images.split == "train"])
    place = table.captions.groupby("image_id").cumcount()
    return replace(
        data,
        table=replace(
            table, captions=table.captions[~trained | (place < count)].reset_index(drop=True)
        ),
    )


def some_images(data: DataSet, split: str, count: int) -> DataSet:
    """Return the set with `count` images of a split, evenly spread over it.

    0, or a count above the number of images, keeps all.
    """
    table = data.table
    rows = np.flatnonzero(table.images.split == split)
    if not 0 < count < len(rows):
        return data
    left_out = np.setdiff1d(rows, rows[np.linspace(0, len(rows) - 1, count).round().astype(int)])
    images = table.images.drop(table.images.index[left_out]).reset_index(drop=True)
    captions = table.captions[table.captions.image_id.isin(images.image_id)].reset_index(drop=True)
    return replace(data, table=replace(table, images=images, captions=captions))


def _is_there(name: str, data_folder: str) -> bool:
    try:
        return bool(data_folder) and bool(catalog.find(name, data_folder))
    except UserError:
        return False


# ---- what is trained on it
class MatchingViLT(CFITR):
    """Pre-train the trunk and the rank head of a CFITR, without code bank.

    LFEM and hash heads are left out or stay frozen.

    First the lower layers, which read image and caption apart: the means of their tokens are
    compared as in CLIP. Then also the upper ones, which read both together: the own caption against
    FALSE others of the batch, as in CFITR's reranking. ViLT's authors mask words and match pairs
    from the start, on four million images; in a minute that teaches nothing.
    """

    FALSE = 2

    def __init__(self, config: CFITRConfig):
        # dropout is slow on a CPU, and the passes are few
        super().__init__(replace(config, lfem=False, dropout=0.0))
        self.requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def learn(self, captions: Captions, matching: bool) -> MatchingViLT:
        """Choose what trains: the lower layers, or with `matching` all layers.

        `captions` are those of the training split.
        """
        self.captions, trunk = captions, self.vilt
        lower = [trunk.embeddings, trunk.encoder.layer[: self.config.split], trunk.layernorm]
        for part in [*lower, trunk.encoder, trunk.pooler, self.rank_output] if matching else lower:
            part.requires_grad_(True)
        return self

    def mean(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return unit rows (B,d) of the states (B,n,d) behind the lower layers.

        States are normalised, then averaged over the words, where mask (B,n) is 1.
        """
        words = (
            torch.ones_like(states[:, :, :1])
            if mask is None
            else mask.unsqueeze(2).to(states.dtype)
        )
        return F.normalize((self.vilt.layernorm(states) * words).sum(1) / words.sum(1), dim=1)

    def embed_images(self, vision: Tensor) -> Tensor:
        """Return unit rows (B,d) of images."""
        return self.mean(self.image_states(vision))

    def embed_texts(self, text: Tensor, mask: Tensor) -> Tensor:
        """Return unit rows (B,d) of captions."""
        return self.mean(self.text_states(text, mask), mask)

    def loss(self, batch: dict[str, Tensor], matching: bool = False) -> dict[str, Tensor]:
        """Return the loss of a batch and its terms.

        The batch has pixels and ids, or cached features, with mask and row (B,).
        """
        image = self.image_states(
            self.image_features(batch["pixels"])["vision"] if "pixels" in batch else batch["vision"]
        )
        text = self.text_states(self._text(batch), batch["mask"])
        image_rows = gather(self.mean(image).float())
        text_rows = gather(self.mean(text, batch["mask"]).float())
        with torch.autocast(image.device.type, enabled=False):  # as in CLIP
            terms = {"aligned": clip_loss(image_rows, text_rows, self.logit_scale.exp())}
        if matching:
            choices = self.choices(batch["row"].cpu()).to(image.device)
            terms["matched"] = rerank_loss(
                self.score_choices(image, text, batch["mask"], choices).float()
            )
        return {"loss": sum(terms.values()), **terms}

    def choices(self, row: Tensor) -> Tensor:
        """Return places (B,1+FALSE) in the batch: the own caption, then false ones.

        False captions are drawn uniformly from those that do not describe the image, or from all
        where all do. row (B,) are rows of captions.
        """
        assert self.captions is not None, "learn() gives the captions"
        true = self.captions.describe(row, row.expand(len(row), -1))
        drawn = torch.multinomial((~true).float().clamp(min=1e-9), self.FALSE, replacement=True)
        return torch.cat([torch.arange(len(row))[:, None], drawn], dim=1)

    def score_choices(self, image: Tensor, text: Tensor, mask: Tensor, choices: Tensor) -> Tensor:
        """Return scores (B,C) of the chosen texts for each image.

        image (B,1+N,d); text (T,L,d), mask (T,L); choices (B,C) are rows of text. Text, mask and
        choices may lie on the CPU: only chosen rows move to the device of the images.
        """
        count, chosen = choices.shape[1], choices.flatten()
        read, kept = (values[chosen].to(image.device) for values in (text, mask))
        return self.score_pairs(image.repeat_interleave(count, 0), read, kept).unflatten(
            0, (-1, count)
        )

    def after_step(self) -> None:
        """Clamp the scale of the logits."""
        clip.clamp_scale(self)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Return the groups of the optimizer, as for a CLIP."""
        return clip.parameter_groups(self, weight_decay)


@dataclass(frozen=True)
class Pretraining:
    """Settings and files for training a CLIP and a ViLT on the training split of `other`.

    Images are not augmented.
    config   for CLIP, where the validation split of `other` chooses the epoch. A ViLT, whose
             weights start smaller, learns at twice the rate, one half of the epochs without and one
             with matching; it keeps the last epoch
    folder   of the checkpoints;  cache  of frozen features
    """

    other: DataSet
    config: loop.TrainConfig
    folder: Path
    cache: Path
    device: str = "auto"
    workers: int = 2

    def clip_start(self, size: str) -> tuple[Start, CLIP]:
        """Return the start of PIR-CLIP and PE-RSITR in size "tiny" or "compact", and the CLIP."""
        name = "clip_standin" if size == "tiny" else "clip_compact"
        start = package_start() if size == "compact" else Start.for_checkpoint(name, Path())
        return self._run(
            name,
            replace(start, options={"clip": name}),
            ("clip",),
            self.config,
            lambda task: CLIP(CLIPConfig(clip=name)),
        )

    def vilt_start(self, size: str, data: DataSet) -> tuple[Start, MatchingViLT]:
        """Return the start of CFITR and the trained model.

        In the tiny size its tokenizer knows the training captions of both sets.
        """
        if size == "compact":
            config, start = CFITRConfig.compact(), package_start()
        else:
            tables = data.table.split("train"), self.other.table.split("train")
            texts = list(chain.from_iterable(table.captions.text for table in tables))
            words = train_tokenizer(
                texts,
                Path(self.folder) / f"{data.table.name}-{self.other.table.name}-tokenizer.json",
            )
            longest = backbones.vilt_size("vilt_standin").vilt["max_position_embeddings"]
            start = Start(str(words), longest, {}, fixed=True, sep=True)
            config = CFITRConfig.tiny(start.read_tokenizer().vocab_size)
        start = replace(start, options={"vilt": config.vilt})
        half = replace(
            self.config, lr=2 * self.config.lr, epochs=max(1, self.config.epochs // 2), keep="last"
        )
        aligned, _ = self._run(
            f"{config.vilt}-aligned",
            start,
            ("vilt",),
            half,
            lambda task: MatchingViLT(config).learn(Captions.of(task), matching=False),
        )
        return self._run(
            config.vilt,
            aligned,
            ("vilt", "rank_output"),
            half,
            lambda task: MatchingViLT(config).learn(Captions.of(task), matching=True),
            {"matching": True},
        )

    def _run(
        self,
        name: str,
        start: Start,
        parts: tuple[str, ...],
        config: loop.TrainConfig,
        make: Callable[[RetrievalTask], DualEncoder],
        loss_options: dict | None = None,
    ) -> tuple[Start, DualEncoder]:
        """Train the model of `make` that `start` builds, or load it.

        Its `parts` join the towers of the start.
        """
        task = task_of(self.other, start, config.seed, self.cache, self.device, self.workers)
        key = loop.checkpoint_key(
            [config, loss_options],
            task.content(),
            start.content(),
            config.seed,
            (Pretraining, "clip_start" if parts == ("clip",) else "vilt_start"),
            (Captions, "of", "draw", "describe", "texts"),
        )
        model, _, _ = loop.load_or_train(
            name,
            lambda: start.build(lambda: make(task), config.seed),
            loader(task, config.batch_size),
            config,
            self.folder,
            key,
            loop.Options(validate=task.validate, loss_options=loss_options),
        )
        source, towers = (
            f"pre-trained on the training split of {self.other.table.name}",
            dict(start.towers),
        )
        for part in parts:
            path = Path(self.folder) / f"{name}-{key[:16]}" / f"{part}.safetensors"
            towers[part] = Tower.stand_in(
                name,
                checkpoints.save_checkpoint(path, getattr(model, part), {"name": name}),
                source,
            )
        return replace(start, towers=towers), model


def task_of(
    data: DataSet, start: Start, seed: int, cache: Path, device: str = "auto", workers: int = 2
) -> RetrievalTask:
    """Return `data` as the CLIP or ViLT of a start reads it.

    Features are cached where towers are frozen.
    """
    size = (
        backbones.clip_size(start.options["clip"])
        if "clip" in start.options
        else backbones.vilt_size(start.options["vilt"])
    )
    frozen = None
    if size.towers:
        towers = start.build(lambda: CLIP(CLIPConfig.compact()), seed).to(resolve(device))
        frozen = FrozenTowers(towers, cache)
    return RetrievalTask(data, start.read_tokenizer(), size.image, seed, workers, frozen)


def loader(task: RetrievalTask, batch_size: int) -> DataLoader:
    """Return shuffled full batches of the training pairs, without augmentation.

    In a crop or a mirror image, captions that say "upper" or "left" are wrong.
    """
    return task.train_loader(batch_size, TestTransform(task.image.size))


@torch.inference_mode()
def matched(model: MatchingViLT, task: RetrievalTask, split: str, others: int = 15) -> float:
    """Return how many images, in percent, score their first caption above `others` texts.

    The texts are drawn from the split, without those that describe the image. Guessing gives 100 /
    (1 + others).
    """
    table, device = task.table(split), next(model.parameters()).device
    texts, string = distinct_captions(table, task.tokenizer.clean)
    text, mask = (
        torch.cat(parts) for parts in zip(*_texts_read(model, texts, task.tokenizer), strict=True)
    )
    image = torch.cat(
        [
            model.image_states(**model.image_features(pixels.to(device))).cpu()
            for pixels in task.pixels(table)
        ]
    )
    captions = Captions(table.owner(), string, {"mask": mask})
    own_image, own = (torch.from_numpy(x) for x in np.unique(table.owner(), return_index=True))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(task.seed)
        choices = captions.string[torch.cat([own[:, None], captions.draw(own, others)], dim=1)]
    scores = torch.cat(
        [
            model.score_choices(image[i].to(device), text, mask, chosen).cpu()
            for i, chosen in zip(own_image.split(8), choices.split(8), strict=True)
        ]
    )
    return 100 * (scores[:, 1:] < scores[:, :1]).all(1).float().mean().item()


def _texts_read(
    model: MatchingViLT, texts: list[str], tokenizer: Tokenizer
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of states (B,L,d) behind the lower layers and mask (B,L), on the CPU."""
    device = next(model.parameters()).device
    for ids, mask in caption_batches(texts, tokenizer, BATCH):
        here = mask.to(device)
        yield model.text_states(model.text_features(ids.to(device), here)["text"], here).cpu(), mask

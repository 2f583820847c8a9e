"""Fit scene recognition where nobody publishes the weights.

It gives PIR's prior, PIR-CLIP's instruction encoder, and the image towers of the tiny size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers.data.augment import normalize
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.image_input import ImageInput
from nbhelpers.data.scene_labels import scene_classes
from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import train_tokenizer
from nbhelpers.files import atomic_write
from nbhelpers.papers.bita import clean_bita_caption, targets
from nbhelpers.papers.clip import CLIP, CLIPConfig
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.towers import backbones, checkpoints
from nbhelpers.towers.starting_weights import BERT_WORDS, Start, Tower, package_start, seeded
from nbhelpers.training import loop
from nbhelpers.training.device import resolve

STAND_IN = "fitted to the scene classes of another generated world"


class SceneBatches:
    """Shuffled batches of images or feature rows with scene classes.

    Images are turned at random by quarters.
    inputs  (N,S,S,3) uint8 or (N,W) float32;  scene (N,) int. `set_epoch` draws a new order from
            (seed, epoch).
    """

    def __init__(
        self,
        inputs: np.ndarray,
        scene: np.ndarray,
        batch_size: int,
        seed: int,
        image: ImageInput | None = None,
    ):
        self.inputs, self.scene, self.batch_size, self.seed, self.image = (
            inputs,
            scene,
            batch_size,
            seed,
            image,
        )
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw a new order from (seed, epoch)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.inputs) // self.batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.inputs))
        for step in range(len(self)):
            rows = np.sort(order[step * self.batch_size : (step + 1) * self.batch_size])
            inputs = np.array(self.inputs[rows])
            if self.image is not None:
                turned = np.stack(
                    [
                        np.rot90(x, turns)
                        for x, turns in zip(inputs, rng.integers(4, size=len(rows)), strict=True)
                    ]
                )
                inputs = normalize(turned, self.image.mean, self.image.std)
            yield {"inputs": torch.as_tensor(inputs), "scene": torch.from_numpy(self.scene[rows])}


class SceneClassifier(nn.Module):
    """`body` with a linear classifier over the vectors of `pooled(body, inputs)`, (B,width).

    width  None: the body's `num_features`
    """

    USES_ALL_PARAMETERS = True

    def __init__(
        self,
        body: nn.Module,
        classes: int,
        pooled=lambda body, inputs: body(inputs),
        width: int | None = None,
    ):
        super().__init__()
        self.body, self.pooled = body, pooled
        self.classifier = nn.Linear(width or body.num_features, classes)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        return self.classifier(self.pooled(self.body, inputs))

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the cross-entropy of a batch."""
        return {"loss": F.cross_entropy(self.logits(batch["inputs"]), batch["scene"])}

    @torch.inference_mode()
    def predict(self, inputs: np.ndarray, image: ImageInput | None = None) -> np.ndarray:
        """(N,) class index of each image (N,S,S,3) uint8 or feature row (N,W)."""
        device = next(self.parameters()).device
        parts = (
            normalize(part, image.mean, image.std) if image else torch.from_numpy(part)
            for part in np.array_split(inputs, max(1, len(inputs) // 64))
        )
        return torch.cat([self.logits(part.to(device)).argmax(1).cpu() for part in parts]).numpy()


def global_token(body: nn.Module, pixels: Tensor) -> Tensor:
    """What a vision tower knows of the whole image: the first of its `image_tokens`."""
    return backbones.image_tokens(body, pixels)[:, 0]


def fit_scenes(
    name: str,
    build,
    batches: SceneBatches,
    config: loop.TrainConfig,
    folder: Path,
    data: object,
    start: object = None,
) -> tuple[SceneClassifier, Path]:
    """Fit the SceneClassifier of `build()` at config.seed, or load it.

    Return it and the file of its body.

    data, start  what the batches are made of and what the classifier starts from, as
                 `training.checkpoint_key` takes them
    """
    code = type(batches), classifier_of, scene_classes, _pictures, _global_tokens, seeded
    key = loop.checkpoint_key([config, name, batches.image], data, start, config.seed, *code)
    classifier, _, _ = loop.load_or_train(
        name, lambda: seeded(build, config.seed), batches, config, folder, key
    )
    path = checkpoints.save_checkpoint(
        Path(folder) / f"{name}-{key[:16]}" / "body.safetensors", classifier.body, {"name": name}
    )
    return classifier, path


# ---- the tiny size: everything is learned in another generated world
def fitted(name: str, other: DataSet, folder: Path, seed: int, epochs: int) -> tuple[Tower, float]:
    """Return a stand-in of `classifier_of`, fitted to the training classes of `other`.

    Also its accuracy on the other two splits, in percent.
    """
    image, classes = backbones.image_input("swin_standin"), scene_classes(other.table)
    train, train_scene = _pictures(other, image.size, classes, "train")
    held, held_scene = _pictures(other, image.size, classes, "val", "test")
    config = loop.TrainConfig(epochs, lr=2e-3, batch_size=min(32, len(train)), seed=seed)
    batches = SceneBatches(train, train_scene, config.batch_size, seed, image)
    classifier, path = fit_scenes(
        name,
        lambda: classifier_of(name, len(classes)),
        batches,
        config,
        folder,
        other.content(),
    )
    return Tower.stand_in(name, path, STAND_IN), percent_right(
        classifier.predict(held, image), held_scene
    )


def percent_right(found: np.ndarray, truth: np.ndarray) -> float:
    """Percent of the class indices (N,) that are right; NaN where there is none."""
    return 100 * float((found == truth).mean()) if len(truth) else float("nan")


def classifier_of(name: str, classes: int, width: int = 0) -> SceneClassifier:
    """Return a body with a head for so many classes.

    name: "scene_head" over vectors of `width`, "instruction_standin" (PIR-CLIP's), or a prior or
    image tower of `backbones`.
    """
    if name == "scene_head":
        return SceneClassifier(backbones.SceneHead(width), classes)
    if name == "instruction_standin":
        width = backbones.clip_size("clip_standin").embed_dim
        return SceneClassifier(backbones.instruction_encoder("clip_standin"), classes, width=width)
    if name in backbones.PRIOR:
        return SceneClassifier(backbones.prior_tower(name), classes)
    return SceneClassifier(backbones.vision_tower(name), classes, global_token)


def stand_in_start(
    data: DataSet, other: DataSet, folder: Path, seed: int, epochs: int
) -> tuple[Start, dict[str, float]]:
    """Return PIR's start in the tiny size, and the accuracy of each tower in percent.

    Image tower and prior are fitted to the scene classes of `other`. The tokenizer comes from the
    training captions. BERT starts at random.
    """
    tokenizer = train_tokenizer(
        list(data.table.split("train").captions.text),
        Path(folder) / f"{data.table.name}-tokenizer.json",
    )
    names = {"vision_encoder": "swin_standin", "conv_encoder": "resnet_standin"}
    found = {
        attribute: fitted(name, other, folder, seed, epochs) for attribute, name in names.items()
    }
    towers = {attribute: tower for attribute, (tower, _) in found.items()}
    return Start(str(tokenizer), BERT_WORDS["bert_base"][0], towers), {
        names[a]: percent for a, (_, percent) in found.items()
    }


# ---- real data: a prior of its training classes
def compact_task(
    data: DataSet,
    cache: Path,
    seed: int,
    workers: int = 2,
    device: str = "auto",
    precision: str = "fp32",
) -> RetrievalTask:
    """Return the task on EfficientNet-Lite0 and MiniLM, both frozen, as their packages hold them.

    All systems on these towers share its features (see RetrievalTask, also for `precision`).
    """
    start = package_start()
    towers = start.build(lambda: CLIP(CLIPConfig.compact()), seed).to(resolve(device))
    image = backbones.image_input("efficientnet_lite0")
    frozen = FrozenTowers(towers, cache)
    return RetrievalTask(data, start.read_tokenizer(), image, seed, workers, frozen, precision)


def compact_start(task: RetrievalTask, folder: Path, epochs: int) -> tuple[Start, dict[str, float]]:
    """Return PIR's start in the compact size, and the accuracy of its scene head.

    The towers are those of `compact_task`. The scene head reads their global tokens and is fitted
    on the training classes of the task's set.
    Its accuracy is that on the validation split, in percent. UserError if no training class is
    large enough for a fit.
    """
    data, seed = task.data, task.seed
    start, classes = package_start(), scene_classes(data.table)
    parts = []
    for split in ("train", "val"):
        parts.append(_global_tokens(task, split, classes))
    (train, train_scene), (val, val_scene) = parts
    config = loop.TrainConfig(epochs, lr=1e-3, batch_size=min(64, len(train)), seed=seed)
    batches = SceneBatches(train, train_scene, config.batch_size, seed)
    name = f"scene_head-{data.table.name}"
    classifier, path = fit_scenes(
        name,
        lambda: classifier_of("scene_head", len(classes), train.shape[1]),
        batches,
        config,
        folder,
        task.content(),
        start.content(),
    )
    head = Tower.stand_in(name, path, f"fitted on the training classes of {data.table.name}")
    accuracy = {"scene_head": percent_right(classifier.predict(val), val_scene)}
    return replace(start, towers=start.towers | {"conv_encoder": head}, classes=classes), accuracy


def _labelled(table: CaptionTable, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images of these classes, and the index of the class of each."""
    rows = np.flatnonzero(table.images.scene.isin(classes))
    return rows, np.array([classes.index(name) for name in table.images.scene.iloc[rows]], int)


def _pictures(
    data: DataSet, size: int, classes: list[str], *splits: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N,size,size,3) of these classes in these splits, and their classes."""
    table = data.table.split(*splits)
    rows, scene = _labelled(table, classes)
    return data.pixels.resized(size)[data.pixels.rows(table.images.file)[rows]], scene


def _global_tokens(
    task: RetrievalTask, split: str, classes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return global tokens (N,W) float32 of the images of these classes, and their classes."""
    rows, scene = _labelled(task.table(split), classes)
    return task.features(split)[0]["vision"][:, 0].astype(np.float32)[rows], scene


def fitted_prior(
    data: DataSet, folder: Path, seed: int, epochs: int, resnet: Tower
) -> tuple[Tower, dict[str, float]]:
    """Return the ResNet-50 of ImageNet, fitted to the training classes (PRIOR=fit).

    It reads the same input as the Swin beside it.
    Also its accuracy on the validation split, in percent.
    """
    image, classes = backbones.image_input("swin_t"), scene_classes(data.table)
    (train, train_scene), (val, val_scene) = (
        _pictures(data, image.size, classes, split) for split in ("train", "val")
    )
    config = loop.TrainConfig(epochs, lr=1e-4, batch_size=min(64, len(train)), seed=seed)
    batches = SceneBatches(train, train_scene, config.batch_size, seed, image)
    start = Start("", 0, {"body": resnet})
    name = f"resnet50-{data.table.name}"
    classifier, path = fit_scenes(
        name,
        lambda: start.fill(classifier_of("resnet50", len(classes))),
        batches,
        config,
        folder,
        data.content(),
        start.content(),
    )
    source = f"ImageNet, then fitted on the training classes of {data.table.name}"
    return Tower.stand_in(name, path, source), {
        "resnet50": percent_right(classifier.predict(val, image), val_scene)
    }


# ---- BITA: a language model that has read nothing but captions
def bita_start(
    data: DataSet, other: DataSet, image: Tower, folder: Path, seed: int, epochs: int, prompt: str
) -> tuple[Start, nn.Module]:
    """Return BITA's start with a stand-in language model, and that model.

    It has the tower `image`, a small OPT, and the words of the training captions of both sets. The
    transformer starts at random.
    """
    tables = [one.table.split("train") for one in (data, other)]
    texts = list(chain.from_iterable(table.captions.text for table in tables))
    words = train_tokenizer(
        texts, Path(folder) / f"bita-{data.table.name}-{other.table.name}-tokenizer.json"
    )
    reader, tower = fitted_language(tables, folder, seed, epochs, prompt)
    towers = {"visual_encoder": image, "opt_model": tower}
    return Start(str(words), 32, towers, fixed=True, sep=True), reader


def fitted_language(
    tables: list[CaptionTable], folder: Path, seed: int, epochs: int, prompt: str
) -> tuple[nn.Module, Tower]:
    """Return a small OPT and its byte pairs, fitted to captions.

    A real one has read the web. This one knows how captions are worded, and that a text continues
    what stands before it. It has seen no image.
    Captions of the set under study are among them, of the training split: what stays frozen later
    must know the words.
    """
    from nbhelpers.tasks.caption_tokens import DecoderTokenizer  # which imports the papers

    said = chain.from_iterable(table.captions.text for table in tables)
    texts = [clean_bita_caption(text) for text in said]
    name = "-".join(table.name for table in tables)
    pairs = train_byte_pairs(
        [*texts, *(f"{prompt} {text}" for text in texts)], Path(folder) / f"{name}-byte-pairs.json"
    )
    reader = DecoderTokenizer(pairs, "opt_standin", max_length=DOCUMENT)
    config = loop.TrainConfig(epochs, lr=3e-3, batch_size=64, seed=seed)
    code = (
        LanguageModel,
        TextBatches,
        DecoderTokenizer,
        backbones,
        documents,
        train_byte_pairs,
        seeded,
    )
    key = loop.checkpoint_key(
        [config, prompt, reader.sha256], [table.content() for table in tables], None, seed, *code
    )
    model, _, _ = loop.load_or_train(
        "opt_standin",
        lambda: seeded(
            lambda: LanguageModel(backbones.language_model("opt_standin", reader.vocab_size)), seed
        ),
        TextBatches(*reader.pad(documents(tables, reader, prompt, seed)), config.batch_size, seed),
        config,
        folder,
        key,
    )
    home = Path(folder) / f"opt_standin-{key[:16]}"
    path = checkpoints.save_checkpoint(
        home / "decoder.safetensors", model.decoder, {"name": "opt_standin"}
    )
    with atomic_write(home / "tokenizer.json") as temporary:
        temporary.write_bytes(pairs.read_bytes())
    return model, Tower.stand_in("opt_standin", path, f"read the training captions of {name}")


DOCUMENT = 64  # ids of a document at most


def documents(tables: list[CaptionTable], reader, prompt: str, seed: int) -> list[list[int]]:
    """Return two documents for every image: its captions in a random order.

    Half of the captions stand after the prompt. Each goes from the first token to the line break.
    Real text has such a thread too, and only a model that follows one can be led by a prefix.
    """
    rng, readers = np.random.default_rng(seed), (reader, reader.prompted(prompt))
    made = []
    for table in tables:
        for _, texts in table.captions.groupby("image_id", sort=False).text:
            encoded = [one.encode([clean_bita_caption(text) for text in texts]) for one in readers]
            for _ in range(2):
                lines = [encoded[rng.integers(2)][row] for row in rng.permutation(len(texts))]
                made.append(list(chain.from_iterable(lines))[:DOCUMENT])
    return made


class LanguageModel(nn.Module):
    """A causal language model that learns to continue texts."""

    USES_ALL_PARAMETERS = True

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of the next token."""
        logits = self.decoder(input_ids=batch["ids"], attention_mask=batch["mask"]).logits[:, :-1]
        loss = F.cross_entropy(
            logits.flatten(0, 1), targets(batch["ids"], batch["mask"])[:, 1:].flatten()
        )
        return {"loss": loss, "perplexity": loss.detach().exp()}


class TextBatches:
    """Shuffled batches of ids and mask (N,L); `set_epoch` draws a new order from (seed, epoch)."""

    def __init__(self, ids: Tensor, mask: Tensor, batch_size: int, seed: int):
        self.ids, self.mask, self.batch_size, self.seed, self.epoch = ids, mask, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw a new order from (seed, epoch)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.ids) // self.batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.from_numpy(
            np.random.default_rng([self.seed, self.epoch]).permutation(len(self.ids))
        )
        for rows in order[: len(self) * self.batch_size].split(self.batch_size):
            longest = int(self.mask[rows].sum(1).max())
            yield {"ids": self.ids[rows, :longest], "mask": self.mask[rows, :longest]}


def train_byte_pairs(texts: list[str], path: Path, vocab_size: int = 512) -> Path:
    """Write a tokenizer.json of byte pairs with OPT's special tokens.

    Equal texts give an equal file.
    """
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(texts, trainer)
    with atomic_write(path) as temporary:
        temporary.write_text(model.to_str(pretty=True), encoding="utf-8")
    return Path(path)

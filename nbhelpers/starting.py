"""What a system starts from: which weights fill which tower, and which tokenizer reads its captions.

`12_starting_weights` writes one `Start` per system; the training notebooks read it. Nothing is filled silently.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers import backbones, training, weights
from nbhelpers.backbones import ImageInput
from nbhelpers.data import scenes
from nbhelpers.data.augment import normalize
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.images import resize
from nbhelpers.data.loading import FeatureCache, Tokenizer, image_batches, train_tokenizer
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError, atomic_write

# In published files and not in our towers: classifiers, and the buffers of Swin that timm computes.
DROPPED = ("classifier.*", "head.*", "fc.*", "head_dist.*", "pre_logits.*", "*.relative_position_index", "*.attn_mask")
SMALLEST_CLASS = 5  # training images; smaller classes (numeric names that stand for no class) teach no prior
BERT_LENGTH, MINILM_LENGTH = 47, 32  # longest caption in tokens


@dataclass(frozen=True)
class Tower:
    """One tower's weights: file, its sha256, where it came from, and the kind that records know."""

    name: str
    path: str
    source: str
    sha256: str
    kind: str      # package | hub | file | stand-in | random

    @classmethod
    def stand_in(cls, name: str, path: Path, source: str) -> Tower:
        """Weights that this project trained itself."""
        return cls(name, str(path), source, weights.sha256(path), "stand-in")

    @classmethod
    def resolved(cls, name: str, folder: Path | None = None) -> Tower:
        """Public weights by name or path, as `weights.resolve` finds them. UserError if they are missing."""
        found = weights.resolve(name, folder)
        return cls(found.name, str(found.path), found.source, found.sha256, found.kind)

    def state(self) -> dict[str, Tensor]:
        """The tensors under the names of the module that `backbones` builds. UserError if the file changed since."""
        if weights.sha256(self.path) != self.sha256:
            raise UserError(f"{self.path} changed since 12_starting_weights took it for '{self.name}'; run that notebook again.")
        if self.name == "efficientnet_lite0":
            return weights.lite0_state(self.path)
        if self.name in ("minilm", "bert_base"):
            return weights.bert_state(self.path)
        return weights.read_state_dict(self.path)


@dataclass(frozen=True)
class Start:
    """towers: attribute of the model ("vision_encoder", ...) -> Tower. What is not named there starts at random.

    tokenizer   path of a tokenizer.json or of its folder, with the longest caption in tokens
    classes     scene classes the prior was fitted on, in its order; empty without a fitted prior
    options     fields of the model's configuration that follow from these weights
    """

    tokenizer: str
    max_length: int
    towers: dict[str, Tower]
    fixed: bool = False
    classes: list[str] = field(default_factory=list)
    options: dict = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Start:
        """UserError if `12_starting_weights` has not written it yet."""
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist; run 12_starting_weights first, it says what each system starts from.")
        try:
            content = json.loads(Path(path).read_text())
            return cls(**{**content, "towers": {name: Tower(**tower) for name, tower in content["towers"].items()}})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} does not say what a system starts from ({error}); run 12_starting_weights again.") from error

    def read_tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer, self.max_length, self.fixed)

    def fill(self, model: nn.Module) -> nn.Module:
        """Loads every tower that `model` has. UserError, with that tower as it was, if a file does not fit it."""
        for attribute, tower in self.towers.items():
            if module := getattr(model, attribute, None):
                weights.load_into(module, tower.state(), allow_unexpected=DROPPED)
        return model

    @classmethod
    def for_checkpoint(cls, text_tower: str, path: Path) -> Start:
        """What evaluating a whole model needs: a tokenizer and no weights. BERT-base and MiniLM share one vocabulary, which
        comes with MiniLM's package; a stand-in reads with the tokenizer of the `Start` at `path`."""
        if text_tower == "bert_standin":
            return replace(cls.read(path), towers={})
        found = weights.resolve("minilm").path
        compact = text_tower == "minilm"
        return cls(str(found), MINILM_LENGTH if compact else BERT_LENGTH, {}, fixed=compact)

    def build(self, make: Callable[[], nn.Module], seed: int) -> nn.Module:
        """`make()` with the random part of its weights drawn from `seed`, then filled."""
        return self.fill(seeded(make, seed))

    def sha256s(self) -> list[str]:
        return [tower.sha256 for tower in self.towers.values()]

    def record(self) -> list[dict]:
        """The `weights` entry of a record."""
        return [{"name": f"{attribute}: {t.name}", "source": t.source, "sha256": t.sha256, "kind": t.kind}
                for attribute, t in self.towers.items()]


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """`make()` with its random weights drawn from `seed`, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


# ---- scene recognition: what a prior, or a stand-in tower, is fitted to ---------------------------------------------
class SceneBatches:
    """Shuffled batches of images or feature rows with their scene classes; images are turned by random quarters.

    inputs  (N,S,S,3) uint8 or (N,W) float32;  scene (N,) int. `set_epoch` draws a new order from (seed, epoch).
    """

    def __init__(self, inputs: np.ndarray, scene: np.ndarray, batch_size: int, seed: int, image: ImageInput | None = None):
        self.inputs, self.scene, self.batch_size, self.seed, self.image = inputs, scene, batch_size, seed, image
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.inputs) // self.batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.inputs))
        for step in range(len(self)):
            rows = np.sort(order[step * self.batch_size:(step + 1) * self.batch_size])
            inputs = np.array(self.inputs[rows])
            if self.image is not None:
                turned = np.stack([np.rot90(x, turns) for x, turns in zip(inputs, rng.integers(4, size=len(rows)))])
                inputs = normalize(turned, self.image.mean, self.image.std)
            yield {"inputs": torch.as_tensor(inputs), "scene": torch.from_numpy(self.scene[rows])}


class SceneClassifier(nn.Module):
    """`body` with a linear classifier over the (B,W) vector that `pooled(body, inputs)` makes of a batch."""

    def __init__(self, body: nn.Module, classes: int, pooled=lambda body, inputs: body(inputs)):
        super().__init__()
        self.body, self.pooled = body, pooled
        self.classifier = nn.Linear(body.num_features, classes)

    def logits(self, inputs: Tensor) -> Tensor:
        return self.classifier(self.pooled(self.body, inputs))

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.logits(batch["inputs"]), batch["scene"])}

    @torch.inference_mode()
    def predict(self, inputs: np.ndarray, image: ImageInput | None = None) -> np.ndarray:
        """(N,) class index of each image (N,S,S,3) uint8 or feature row (N,W)."""
        device = next(self.parameters()).device
        parts = [normalize(part, image.mean, image.std) if image else torch.from_numpy(part)
                 for part in np.array_split(inputs, max(1, len(inputs) // 64))]
        return torch.cat([self.logits(part.to(device)).argmax(1) for part in parts]).cpu().numpy()


def global_token(body: nn.Module, pixels: Tensor) -> Tensor:
    """What a vision tower knows of the whole image: the first of its `image_tokens`."""
    return backbones.image_tokens(body, pixels)[:, 0]


def fit_scenes(name: str, build, batches: SceneBatches, config: training.TrainConfig, folder: Path, fingerprint: str,
               starting_weights: tuple[str, ...] = (), source: str = "") -> tuple[SceneClassifier, Tower]:
    """Fits the SceneClassifier that `build()` gives at config.seed, or loads it, and saves its body as a tower's weights."""
    towers = {"towers": Path(backbones.__file__).read_text(encoding="utf-8")}
    key = training.checkpoint_key([config, towers], fingerprint, starting_weights, config.seed, sys.modules[__name__])
    classifier, _, _ = training.load_or_train(name, lambda: seeded(build, config.seed), batches, config, folder, key)
    path = weights.save_checkpoint(Path(folder) / f"{name}-{key[:16]}" / "body.safetensors", classifier.body, {"name": name})
    return classifier, Tower.stand_in(name, path, source)


# ---- the starts of PIR in its three sizes -----------------------------------------------------------------------------
def stand_in_start(data: DataSet, folder: Path, seed: int, images: int, epochs: int) -> tuple[Start, dict[str, float]]:
    """Towers of the tiny size, fitted to the scene classes of *another* generated world, and a tokenizer of the training
    captions; BERT starts at random. Also the accuracy of each tower on a held-out fifth of that world, in percent."""
    tokenizer = train_tokenizer(list(data.table.split("train").captions.text), Path(folder) / f"{data.table.name}-tokenizer.json")
    pictures, scene = other_world(images, seed)
    fingerprint = f"world b, {images} images, {scenes.fingerprint()}"
    held = np.arange(len(pictures)) % 5 == 0
    config = training.TrainConfig(epochs, lr=2e-3, batch_size=32, seed=seed)
    towers, accuracy = {}, {}
    for attribute, name in (("vision_encoder", "swin_standin"), ("conv_encoder", "resnet_standin")):
        image = backbones.image_input("swin_standin")
        batches = SceneBatches(pictures[~held], scene[~held], config.batch_size, seed, image)

        def build():
            body, pooled = (backbones.vision_tower(name), global_token) if name in backbones.VISION else (
                backbones.prior_tower(name), lambda body, inputs: body(inputs))
            return SceneClassifier(body, int(scene.max()) + 1, pooled)

        classifier, towers[attribute] = fit_scenes(name, build, batches, config, folder, fingerprint,
                                                   source="fitted to the scene classes of another generated world")
        accuracy[name] = 100 * float((classifier.predict(pictures[held], image) == scene[held]).mean())
    return Start(str(tokenizer), BERT_LENGTH, towers), accuracy


def other_world(images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,112,112,3) uint8 pictures and (N,) class of the generated world "b": other palette, other sentences."""
    made = list(scenes.generate(images, seed=seed, world="b"))
    pixels = np.stack([resize(scene.pixels, backbones.image_input("swin_standin").size) for scene in made])
    return pixels, np.array([scenes.CLASSES.index(scene.spec.scene) for scene in made])


def compact_start(data: DataSet, folder: Path, cache: Path, seed: int, epochs: int, workers: int = 2
                  ) -> tuple[Start, dict[str, float]]:
    """EfficientNet-Lite0 and MiniLM from their packages, and a scene head fitted on the training classes of this set.

    UserError if no training class is large enough for a fit.
    """
    vision, text = Tower.resolved("efficientnet_lite0"), Tower.resolved("minilm")
    folder_of_text = str(Path(text.path) if Path(text.path).is_dir() else Path(text.path).parent)
    body = Start(folder_of_text, MINILM_LENGTH, {"vision_encoder": vision}).fill(_Holder(backbones.vision_tower("efficientnet_lite0")))
    classes, parts = scene_classes(data.table), []
    for split in ("train", "val"):
        table = data.table.split(split)
        rows, scene = _labelled(table, classes)
        parts.append((_global_features(body.vision_encoder, table, data, cache, vision.sha256, workers)[rows], scene))
    (train, train_scene), (val, val_scene) = parts
    config = training.TrainConfig(epochs, lr=1e-3, batch_size=min(64, len(train)), seed=seed)
    batches = SceneBatches(train, train_scene, config.batch_size, seed)
    classifier, head = fit_scenes(
        f"scene_head-{data.table.name}", lambda: SceneClassifier(backbones.SceneHead(train.shape[1]), len(classes)),
        batches, config, folder, data.table.fingerprint(), (vision.sha256,),
        source=f"fitted on the training classes of {data.table.name}")
    accuracy = {"scene_head": 100 * float((classifier.predict(val) == val_scene).mean())}
    towers = {"vision_encoder": vision, "text_encoder": text, "conv_encoder": head}
    return Start(folder_of_text, MINILM_LENGTH, towers, fixed=True, classes=classes), accuracy


def scene_classes(table: CaptionTable) -> list[str]:
    """The classes with at least SMALLEST_CLASS training images, sorted. UserError without two of them."""
    counts = table.split("train").images.scene.value_counts()
    classes = sorted(counts.index[counts >= SMALLEST_CLASS])
    if len(classes) < 2:
        raise UserError(f"{table.name} has {len(classes)} scene classes of {SMALLEST_CLASS} or more training images, too few to fit "
                        "a scene prior; name the classes in the file names or in the captions' JSON.")
    return classes


def _labelled(table: CaptionTable, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images of these classes, and the index of the class of each."""
    rows = np.flatnonzero(table.images.scene.isin(classes))
    return rows, np.array([classes.index(name) for name in table.images.scene.iloc[rows]], int)


class _Holder(nn.Module):
    def __init__(self, vision_encoder: nn.Module):
        super().__init__()
        self.vision_encoder = vision_encoder.eval()


@torch.inference_mode()
def _global_features(body: nn.Module, table: CaptionTable, data: DataSet, cache: Path, sha256: str, workers: int) -> np.ndarray:
    """(N,W) float32 global tokens of every image of the table, computed once per weights and images."""
    image = backbones.image_input("efficientnet_lite0")
    batches = image_batches(table, data.pixels, image.size, 128, image.mean, image.std, workers)
    key = json.dumps(["global token", sha256, table.fingerprint(), data.pixels.key])
    cached = FeatureCache.build(lambda rows: {"global": global_token(body, next(batches)).numpy()}, len(table), 128, key, cache)
    return np.asarray(cached["global"], np.float32)


def fitted_prior(data: DataSet, folder: Path, seed: int, epochs: int, resnet: Tower) -> tuple[Tower, dict[str, float]]:
    """PRIOR=fit: the ResNet-50 of ImageNet fitted to the training classes of this set, fed as the Swin beside it is.

    Also its accuracy on the validation split, in percent.
    """
    image, classes = backbones.image_input("swin_t"), scene_classes(data.table)
    resized, parts = data.pixels.resized(image.size), []
    for split in ("train", "val"):
        table = data.table.split(split)
        rows, scene = _labelled(table, classes)
        parts.append((resized[data.pixels.rows(table.images.file)[rows]], scene))
    (train, train_scene), (val, val_scene) = parts
    config = training.TrainConfig(epochs, lr=1e-4, batch_size=min(64, len(train)), seed=seed)
    batches = SceneBatches(train, train_scene, config.batch_size, seed, image)
    start = Start("", 0, {"body": resnet})
    classifier, tower = fit_scenes(
        f"resnet50-{data.table.name}",
        lambda: start.fill(SceneClassifier(backbones.prior_tower("resnet50"), len(classes))),
        batches, config, folder, data.table.fingerprint(), (resnet.sha256,),
        source=f"ImageNet, then fitted on the training classes of {data.table.name}")
    return tower, {"resnet50": 100 * float((classifier.predict(val, image) == val_scene).mean())}


def paper_start(prior: str, folder: Path | None = None, fit: Callable[[Tower], Tower] | None = None) -> Start:
    """The published towers. UserError if one is missing, before anything is trained.

    prior  "aid" (the authors' ResNet-50, which no hub has), "imagenet", "fit" (what `fit` makes of imagenet's, see
           `fitted_prior`), or "random" (what the released loader leaves of an ordinary file, pir.md 8.1)
    """
    names = {"aid": "resnet50_aid", "imagenet": "resnet50", "fit": "resnet50", "random": None}
    if prior not in names or (prior == "fit" and fit is None):
        raise UserError(f"PRIOR is '{prior}'; at paper size choose aid (the authors' file), imagenet, fit or random.")
    towers = {"vision_encoder": "swin_t", "text_encoder": "bert_base", "conv_encoder": names[prior]}
    found = {attribute: Tower.resolved(name, folder) for attribute, name in towers.items() if name}
    if prior == "fit":
        found["conv_encoder"] = fit(found["conv_encoder"])
    text = Path(found["text_encoder"].path)
    return Start(str(text if text.is_dir() else text.parent), BERT_LENGTH, found)

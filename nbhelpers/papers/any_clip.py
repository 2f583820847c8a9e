"""Fine-tune any dual encoder that opens by a name: fully, by a linear probe, LoRA or adapters.

Probe and LoRA are those of `adaptation`, the adapter is that of `pe_rsitr`. Each method starts as
the model it is given: a probe starts as an isometry, LoRA and adapters as zero. The loss is CLIP's,
also for models that were trained by another, such as SigLIP. B is the batch, D the embedding width,
L the length of a caption.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nbhelpers.data.image_input import ImageInput
from nbhelpers.data.tokenization import Tokenizer, padded
from nbhelpers.errors import UserError
from nbhelpers.papers import adaptation, clip
from nbhelpers.papers.dual_encoder import DualEncoder, keep_trained
from nbhelpers.papers.pe_rsitr import MRSAdapter
from nbhelpers.towers import checkpoints, foreign_configs
from nbhelpers.towers.any_model import AnyModel, content, open_model
from nbhelpers.towers.encoders import Encoders
from nbhelpers.training.device import at_least_fp32
from nbhelpers.training.distributed import gather

METHODS = ("full", "linear", "lora", "adapter")
SYSTEM = "clip"  # how checkpoints call it


@dataclass(frozen=True)
class AnyCLIPConfig:
    """Choose a model and what of it is trained."""

    model: str  # a name that `any_model.open_model` takes
    method: str = "full"  # full | linear | lora | adapter
    activation: str | None = None  # gelu | quickgelu, as `open_model` takes it
    rank: int = 4  # of LoRA
    bottleneck: int = 64  # width inside the adapter
    use_mask: ClassVar[bool] = True
    freeze_towers: ClassVar[bool] = False

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(
                f"There is no method '{self.method}'; choose one of {', '.join(METHODS)}."
            )
        for name in ("rank", "bottleneck"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")


class ModelTokenizer(Tokenizer):
    """The tokenizer of any model, as batches want it."""

    def __init__(self, encoders: Encoders):
        self._tokens = encoders.tokens
        found = self._tokens(["a", "a a a a"])
        self.name = next(iter(found))  # of the ids
        self.masked = "attention_mask" in found
        self.max_length = encoders.settings["context"]
        self.fixed = found[self.name].shape[1] == self.max_length
        self._pad = int(found[self.name][0, -1])  # the first text is the shorter one
        self.vocab_size = 0
        about = repr((encoders.settings["tokenizer"], self.max_length, self.masked))
        self.sha256 = hashlib.sha256(about.encode()).hexdigest()

    @staticmethod
    def clean(text: str) -> str:
        """Return the caption unchanged, since `encode` cleans it."""
        return text

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text; without padding where the model is told of it by a mask."""
        found = self._tokens(list(texts))
        rows = found[self.name].tolist()
        if not self.masked:
            return rows
        words = found["attention_mask"].sum(1).tolist()
        return [row[:count] for row, count in zip(rows, words, strict=True)]

    def pad(self, encoded: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Pad encoded texts to ids (B,L) and mask (B,L)."""
        longest = self.max_length if self.fixed else max(map(len, encoded))
        return padded(encoded, longest, self._pad)


def image_input(encoders: Encoders) -> ImageInput:
    """Return edge length, mean and std that a model's image transform works out to.

    They are read off black, white and grey images. UserError unless its images are square and
    normalised channel by channel.
    """
    plain = [Image.new("RGB", (256, 256), (value,) * 3) for value in (0, 255, 51)]
    black, white, grey = (encoders.pixels(picture).float() for picture in plain)
    straight = torch.allclose(grey, black + (white - black) / 5, atol=1e-3)
    if black.shape[1] != black.shape[2] or not straight or bool((white == black).any()):
        raise UserError(
            f"The images of this model become {tuple(black.shape)} and are not normalised channel"
            " by channel; fine-tune a model with square images."
        )
    std = 1 / (white - black)[:, 0, 0]
    mean = -black[:, 0, 0] * std
    return ImageInput(black.shape[2], _three(mean), _three(std))


def _three(values: Tensor) -> tuple[float, float, float]:
    red, green, blue = np.round(values.tolist(), 6).tolist()
    return red, green, blue


class AnyCLIP(DualEncoder):
    """A dual encoder of others, made ready for one method.

    UserError for functions, which have no network here, and where a method finds nothing to adapt.
    """

    USES_ALL_PARAMETERS = False  # a scale or a pooler of the network may be unused

    def __init__(self, config: AnyCLIPConfig, opened: AnyModel):
        super().__init__()
        if opened.encoders is None:
            raise UserError(f"{config.model} is a function, and nothing of it can be trained here.")
        self.config, self.encoders = config, opened.encoders
        self.network = opened.encoders.module
        self.network.requires_grad_(config.method == "full")
        for name, own in self.network.named_parameters():
            if name in ("logit_scale", "logit_bias"):
                own.requires_grad_(False)  # the scale below takes its place
        self.logit_scale = nn.Parameter(self._scale(), config.method == "full")
        self.text_name = next(iter(self.encoders.tokens(["a"])))
        self.masked = "attention_mask" in self.encoders.tokens(["a"])
        self.digest = opened.digest
        adds = {"linear": self._probe, "lora": self._lora, "adapter": self._adapter}
        if config.method in adds:
            adds[config.method]()
            self.register_state_dict_post_hook(keep_trained)
        self.train()

    def _scale(self) -> Tensor:
        """Return the logarithm of the model's own scale of logits, else that of CLIP's start."""
        own = getattr(self.network, "logit_scale", None)
        if own is None:
            return torch.tensor(math.log(1 / 0.07))
        return own.detach().clone().float().reshape(())

    def _probe(self) -> None:
        """Add a matrix (D,2D) over the embeddings of each modality."""
        with torch.no_grad():
            width = self.network_texts(self.encoders.tokens(["a"])).shape[1]
        adaptation.add_probes(self, width)

    def _lora(self) -> None:
        """Add LoRA to the matrices of the feed-forward networks."""
        if not adaptation.add_lora(self.network, self.config.rank):
            raise UserError(f"{self.config.model} has no feed-forward network; use method linear.")

    def _adapter(self) -> None:
        """Add PE-RSITR's MRS-Adapter beside every feed-forward network, one for all of them.

        It reads what the network reads, behind the norm.
        """
        found = list(feed_forward(self.network))
        widths = {visual: width for _, visual, width in found}
        several = len({(visual, width) for _, visual, width in found}) > len(widths)
        if set(widths) != {True, False} or several:
            raise UserError(
                f"{self.config.model} has no feed-forward networks of one width in each of its"
                " towers; use method lora."
            )
        text, image = widths[False], widths[True]
        inner = self.config.bottleneck
        shared = min(inner, min(text, image) // 2)
        self.adapter = MRSAdapter(text, image, inner, shared)
        for part, visual, _ in found:
            part.register_forward_hook(self._added(visual))

    def _added(self, visual: bool) -> Any:
        return lambda part, given, out: out + self.adapter(given[0], visual)

    def train(self, mode: bool = True) -> AnyCLIP:
        """Set the mode; a network that is not trained itself stays in eval mode."""
        super().train(mode)
        if self.config.method != "full":
            self.network.eval()
        return self

    def image_features(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return `vision`, the pixels (B,3,S,S)."""
        return {"vision": pixels}

    def text_features(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return `text`, the ids (B,L)."""
        return {"text": ids}

    def embed_images(self, vision: Tensor) -> Tensor:
        """Embed pixels as unit rows (B,D), of a probe (B,2D)."""
        rows = F.normalize(self.encoders.image_rows(vision), dim=1)
        return adaptation.probed(rows, self.image_probe) if self._probes else rows

    def embed_texts(self, text: Tensor, mask: Tensor) -> Tensor:
        """Embed ids and mask (B,L) as unit rows (B,D), of a probe (B,2D)."""
        tokens = {self.text_name: text} | ({"attention_mask": mask} if self.masked else {})
        rows = F.normalize(self.network_texts(tokens), dim=1)
        return adaptation.probed(rows, self.text_probe) if self._probes else rows

    def network_texts(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return what the network makes of tokens (B,L): (B,D), not normalised."""
        return self.encoders.text_rows(tokens)

    @property
    def _probes(self) -> bool:
        return self.config.method == "linear"

    def losses(self, rows: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute CLIP's loss and the scale of the logits."""
        image, text = gather(at_least_fp32(rows["image"])), gather(at_least_fp32(rows["text"]))
        scale = self.logit_scale.exp()
        with torch.autocast(image.device.type, enabled=False):  # as in CLIP
            loss = clip.clip_loss(image, text, scale)
        return {"loss": loss, "contrastive": loss, "scale": scale.detach()}

    def after_step(self) -> None:
        """Keep the scale of the logits in its range where it is trained."""
        if self.config.method == "full":
            clip.clamp_scale(self)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Group the trainable parameters as open_clip does."""
        return clip.parameter_groups(self, weight_decay)


def feed_forward(network: nn.Module) -> Iterator[tuple[nn.Module, bool, int]]:
    """Give each feed-forward network, whether it sees images, and its width."""
    for name, part in network.named_modules():
        if name.rsplit(".", 1)[-1] == "mlp":
            first = next(each for each in part.modules() if isinstance(each, nn.Linear))
            yield part, name.startswith(("visual", "vision")), first.in_features


def build(config: AnyCLIPConfig, device: str | torch.device = "cpu") -> tuple[AnyCLIP, str]:
    """Open the model of a configuration and make it ready; also return its `content`."""
    opened = open_model(config.model, config.activation, device)
    return AnyCLIP(config, opened), content(opened)


def read(path: Path | str) -> tuple[AnyCLIP, dict[str, Any]]:
    """Return the model of a checkpoint that `train --system clip` wrote, and its metadata.

    UserError if it is of something else, or the model that it was trained on has changed.
    """
    tensors, header = checkpoints.read_checkpoint(path)
    about = checkpoints.meta_of(header, path, {"system": SYSTEM})
    config = foreign_configs.config_of(AnyCLIPConfig, SYSTEM, about.get("model"))
    model, began = build(config)
    if began != about.get("began"):
        raise UserError(
            f"{path} was trained on {config.model} with other weights than those that lie there"
            " now; put the former ones back."
        )
    checkpoints.load_into(model, tensors)
    return model.eval(), about

"""CLIP, on which PIR-CLIP and PE-RSITR are built: an open_clip model, open to changes of its parts.

It is not one of the five systems. Radford et al., "Learning Transferable Visual Models From Natural
Language Supervision", ICML 2021. B is the batch, N patches, L caption length, W width of a tower, D
embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers.errors import UserError
from nbhelpers.papers.dual_encoder import OnFrozenTowers, decay_groups, unpadded
from nbhelpers.towers import backbones
from nbhelpers.training.device import at_least_fp32
from nbhelpers.training.distributed import gather


@dataclass(frozen=True)
class CLIPConfig:
    """Choose a CLIP; its sizes stand in backbones.CLIP."""

    clip: str = "vit_b32"  # a name in backbones.CLIP
    # where frozen towers read captions, padding is not attended
    use_mask: ClassVar[bool] = True

    @property
    def freeze_towers(self) -> bool:
        """Whether this CLIP stands on frozen package towers, whose features can be cached."""
        return backbones.clip_size(self.clip).towers is not None

    @classmethod
    def tiny(cls, **changes) -> CLIPConfig:
        """Return a stand-in at 112 px: seven by seven patches, like ViT-B/32 at 224 px."""
        return replace(cls(clip="clip_standin"), **changes)

    @classmethod
    def compact(cls, **changes) -> CLIPConfig:
        """Return small towers over frozen EfficientNet-Lite0 maps and frozen MiniLM states."""
        return replace(cls(clip="clip_compact"), **changes)

    @classmethod
    def paper(cls, **changes) -> Self:
        """Return ViT-B/32."""
        return replace(cls(), **changes)


class CLIP(OnFrozenTowers):
    """A dual encoder over one CLIP.

    `clip` is the open_clip model. `vision_encoder` and `text_encoder` are the frozen towers below
    it, in the compact size only.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.clip = backbones.clip(config.clip)
        if towers := backbones.clip_size(config.clip).towers:
            self.add_frozen_towers(*towers)
        self.train()

    def embed_images(self, vision: Tensor) -> Tensor:
        """Embed the feature `vision` as unit rows (B,D)."""
        states = self.clip.visual.transformer(image_tokens(self.clip, vision))
        return F.normalize(pool_image(self.clip, states), dim=1)

    def embed_texts(self, text: Tensor, mask: Tensor) -> Tensor:
        """Embed the feature `text` with its mask (B,L) as unit rows (B,D)."""
        text, mask = unpadded(text, mask)
        tokens = text_tokens(self.clip, text)
        states = self.clip.transformer(tokens, attn_mask=causal_mask(self.clip, tokens.shape[1]))
        return F.normalize(pool_text(self.clip, states, mask), dim=1)

    def losses(self, rows: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute CLIP's loss and the scale of the logits."""
        image, text = gather(at_least_fp32(rows["image"])), gather(at_least_fp32(rows["text"]))
        scale = self.clip.logit_scale.exp()
        with torch.autocast(image.device.type, enabled=False):  # 16-bit logits would be too coarse
            loss = clip_loss(image, text, scale)
        return {"loss": loss, "contrastive": loss, "scale": scale.detach()}

    def after_step(self) -> None:
        """Keep the scale of the logits in its range."""
        clamp_scale(self.clip)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Group the trainable parameters as open_clip does.

        See `parameter_groups` of this module.
        """
        return parameter_groups(self, weight_decay)


# The parts of an open_clip model
def image_tokens(clip: nn.Module, vision: Tensor) -> Tensor:
    """Return image tokens (B,1+N,W) after `ln_pre`, the class token first.

    `vision` is pixels (B,3,S,S) or the tokens (B,1+N,C) of a frozen tower. UserError if the image
    size is not that of this CLIP.
    """
    visual = clip.visual
    # compact size: the map of the frozen tower is the image, its global token stays behind
    if vision.ndim == 3:
        vision = vision[:, 1:].transpose(1, 2).unflatten(2, visual.grid_size)
    expected, found = tuple(visual.image_size), tuple(vision.shape[2:])
    if found != expected:
        raise UserError(
            f"This CLIP takes images of {expected[0]}x{expected[1]}, not {found[0]}x{found[1]};"
            " resize them first."
        )
    patches = visual.conv1(vision).flatten(2).transpose(1, 2)
    first = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    return visual.ln_pre(
        torch.cat([first, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
    )


def text_tokens(clip: nn.Module, text: Tensor) -> Tensor:
    """Return text tokens (B,L,W) with positions.

    `text` is ids (B,L) or the states (B,L,C) of a frozen tower. UserError if L is too long.
    """
    length, longest = text.shape[1], len(clip.positional_embedding)
    if length > longest:
        raise UserError(
            f"This CLIP reads captions of {longest} tokens, not {length}; give the tokenizer"
            f" max_length={longest}."
        )
    words = clip.token_embedding(text)
    return words + clip.positional_embedding[:length].to(words.dtype)


def causal_mask(clip: nn.Module, length: int) -> Tensor:
    """Return the additive mask (L,L) by which no token attends a later one."""
    return clip.attn_mask[:length, :length]


def pool_image(clip: nn.Module, tokens: Tensor, position: int = 0) -> Tensor:
    """Project the token at `position` of (B,N,W) after `ln_post`; (B,D), not normalised."""
    return clip.visual.ln_post(tokens[:, position]) @ clip.visual.proj


def pool_text(clip: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Project the last word of each caption after `ln_final`; (B,D), not normalised.

    tokens  (B,L,W)
    mask    (B,L), 1 = word
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    return clip.ln_final(tokens[rows, mask.sum(1) - 1]) @ clip.text_projection


def clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Compute InfoNCE in both directions over unit rows (N,D); `scale` multiplies.

    Only a pair's own partner counts as right. Radford et al., figure 3.
    """
    logits = scale * image @ text.t()
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


@torch.no_grad()
def clamp_scale(clip: nn.Module) -> None:
    """Keep the factor of the logits between 1 and 100; called after every step."""
    clip.logit_scale.clamp_(0.0, math.log(100.0))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Group the parameters as open_clip does: no decay on vectors and scalars."""
    return decay_groups(model.named_parameters(), weight_decay, lambda name, p: p.ndim < 2)

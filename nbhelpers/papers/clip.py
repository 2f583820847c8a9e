"""Not one of the five: CLIP, on which PIR-CLIP and PE-RSITR stand, as one open_clip model opened where they reach in.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
B batch, N patches, L caption length, W width of a tower, D embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbhelpers.errors import UserError
from nbhelpers.papers.dual_encoder import OnFrozenTowers, unpadded
from nbhelpers.towers import backbones
from nbhelpers.training.distributed import gather


@dataclass(frozen=True)
class CLIPConfig:
    """Which CLIP; its sizes stand in backbones.CLIP."""

    clip: str = "vit_b32"  # a name in backbones.CLIP
    # where frozen towers read captions, padding is not attended
    use_mask: ClassVar[bool] = True

    @property
    def freeze_towers(self) -> bool:
        """Whether frozen package towers stand below this CLIP, so that their features can be
        cached.
        """
        return backbones.clip_size(self.clip).towers is not None

    @classmethod
    def tiny(cls, **changes) -> CLIPConfig:
        """A stand-in at 112 px: seven by seven patches, like ViT-B/32 at 224 px."""
        return replace(cls(clip="clip_standin"), **changes)

    @classmethod
    def compact(cls, **changes) -> CLIPConfig:
        """Small towers over the frozen maps of EfficientNet-Lite0 and the frozen states of MiniLM."""
        return replace(cls(clip="clip_compact"), **changes)

    @classmethod
    def paper(cls, **changes) -> CLIPConfig:
        return replace(cls(), **changes)


class CLIP(OnFrozenTowers):
    """`clip` is the open_clip model; `vision_encoder` and `text_encoder` are the frozen towers
    below it (compact size only).
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.clip = backbones.clip(config.clip)
        if towers := backbones.clip_size(config.clip).towers:
            self.stand_on(*towers)
        self.train()

    def embed_images(self, vision: Tensor) -> Tensor:
        """-> (B,D) unit rows."""
        return F.normalize(
            pool_image(self.clip, self.clip.visual.transformer(image_tokens(self.clip, vision))),
            dim=1,
        )

    def embed_texts(self, text: Tensor, mask: Tensor) -> Tensor:
        """-> (B,D) unit rows."""
        text, mask = unpadded(text, mask)
        tokens = text_tokens(self.clip, text)
        states = self.clip.transformer(tokens, attn_mask=causal_mask(self.clip, tokens.shape[1]))
        return F.normalize(pool_text(self.clip, states, mask), dim=1)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Batch of pixels and ids, or of cached features, with mask -> loss and the scale of the
        logits.
        """
        image, text = (gather(rows.float()) for rows in self.embed_batch(batch))
        scale = self.clip.logit_scale.exp()
        with torch.autocast(image.device.type, enabled=False):  # 16-bit logits would be too coarse
            loss = contrastive_loss(image, text, scale)
        return {"loss": loss, "contrastive": loss, "scale": scale.detach()}

    def after_step(self) -> None:
        clamp_scale(self.clip)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        return parameter_groups(self, weight_decay)


# ---- an open_clip model, part by part
def image_tokens(clip: nn.Module, vision: Tensor) -> Tensor:
    """(B,3,S,S) pixels, or the (B,1+N,C) tokens of a frozen tower, -> (B,1+N,W) after `ln_pre`, the class token first.

    UserError if the image is not as large as this CLIP takes it.
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
    """(B,L) ids, or the (B,L,C) states of a frozen tower, -> (B,L,W) with positions.

    UserError if L is too long.
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
    """(L,L) additive: no token sees a later one, so the padding behind a caption changes nothing."""
    return clip.attn_mask[:length, :length]


def pool_image(clip: nn.Module, tokens: Tensor, position: int = 0) -> Tensor:
    """(B,N,W) -> (B,D): the token at `position` after `ln_post`, projected; not normalised."""
    return clip.visual.ln_post(tokens[:, position]) @ clip.visual.proj


def pool_text(clip: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """(B,L,W), mask (B,L) -> (B,D): the last token of each caption after `ln_final`, projected; not
    normalised.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    return clip.ln_final(tokens[rows, mask.sum(1) - 1]) @ clip.text_projection


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE in both directions over unit rows (N,D); `scale` multiplies.

    A pair's own partner alone counts as right.
    """
    logits = scale * image @ text.t()
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


@torch.no_grad()
def clamp_scale(clip: nn.Module) -> None:
    """Keeps the factor of the logits between 1 and 100, after every step."""
    clip.logit_scale.clamp_(0.0, math.log(100.0))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """No decay on vectors and scalars (gains, biases, the scale), as open_clip has it; frozen
    parameters are left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]

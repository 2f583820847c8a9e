"""Read the sizes that diagrams show from the configurations, without allocating a network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import ViltConfig

from nbhelpers.papers.bita import BITAConfig
from nbhelpers.papers.cfitr import CFITRConfig
from nbhelpers.papers.clip import CLIPConfig
from nbhelpers.papers.pir import PIRConfig
from nbhelpers.towers import backbones


@dataclass(frozen=True)
class PIRSizes:
    """What the towers of a PIR give: edge of the image, tokens, and the widths of all three."""

    image: int
    tokens: int
    vision: int
    prior: int
    text: int


def of_pir(config: PIRConfig) -> PIRSizes:
    """Return the sizes of a PIR with a prior of its own."""
    edge = backbones.image_input(config.vision).size
    with torch.device("meta"):
        vision = backbones.vision_tower(config.vision)
        tokens = backbones.image_tokens(vision, torch.empty(1, 3, edge, edge))
        prior = backbones.prior_tower(config.prior)
        text = backbones.text_tower(config.text, config.vocab_size)
    return PIRSizes(
        edge, tokens.shape[1], tokens.shape[2], prior.num_features, text.config.hidden_size
    )


@dataclass(frozen=True)
class CLIPSizes:
    """Edge of the image, image tokens, caption length, layers, and the widths of a CLIP."""

    image: int
    tokens: int
    words: int
    layers: int
    vision: int
    text: int
    embed_dim: int


def of_clip(config: CLIPConfig) -> CLIPSizes:
    """Return the sizes of a CLIP that reads pixels and ids."""
    size = backbones.clip_size(config.clip)
    return CLIPSizes(
        size.image.size,
        1 + (size.vision["image_size"] // size.vision["patch_size"]) ** 2,
        size.text["context_length"],
        size.vision["layers"],
        size.vision["width"],
        size.text["width"],
        size.embed_dim,
    )


@dataclass(frozen=True)
class ViLTSizes:
    """Edge of the image, image tokens, caption length, layers and width of a ViLT."""

    image: int
    tokens: int
    words: int
    layers: int
    width: int


def of_cfitr(config: CFITRConfig) -> ViLTSizes:
    """Return the sizes of a ViLT that reads pixels and ids."""
    size = ViltConfig(**backbones.vilt_size(config.vilt).vilt)
    return ViLTSizes(
        size.image_size,
        1 + (size.image_size // size.patch_size) ** 2,
        size.max_position_embeddings,
        size.num_hidden_layers,
        size.hidden_size,
    )


@dataclass(frozen=True)
class BITASizes:
    """Edge of the image, image tokens, and the widths of image tower and language model."""

    image: int
    tokens: int
    vision: int
    decoder: int


def of_bita(config: BITAConfig) -> BITASizes:
    """Return the sizes of a BITA whose image tower is CLIP's."""
    tower, fed = backbones.CLIP_VISION[config.image]
    (_, _, decoder), *_ = backbones.LANGUAGE[config.decoder]
    return BITASizes(
        fed.size,
        1 + math.prod([tower["image_size"] // tower["patch_size"]] * 2),
        tower["hidden_size"],
        decoder["hidden_size"],
    )

"""The only place that builds towers. Each function returns the library's own module, so that names match public weights.

The modules are built with random weights, on whatever `torch.device` is active; `nbhelpers.weights` fills them.
"""
from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from nbhelpers.data.augment import CLIP_MEAN, CLIP_STD
from nbhelpers.errors import UserError

HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ImageInput:
    """What an image tower wants to be fed: edge length in pixels and the normalisation of [0, 1] values."""

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


def _swin_tiny_standin() -> SwinTransformer:
    return SwinTransformer(img_size=112, patch_size=8, embed_dim=48, depths=(2, 2), num_heads=(2, 4), window_size=7,
                           num_classes=0)


def _resnet_standin() -> ResNet:
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(16, 32, 64, 128), stem_type="deep", stem_width=8)


def _deit_s(heads: int) -> nn.Module:
    return timm.create_model("deit_small_patch16_224", num_classes=0, num_heads=heads)


def _vgg19_bn() -> nn.Module:
    tower = timm.create_model("vgg19_bn", num_classes=0)
    tower.pre_logits = nn.Identity()  # all of VGG's classifier goes; its feature map is averaged, as ResNet's is
    return tower


# name -> (constructor, what the tower is fed). The 12-head DeiT-S is the released code's; the real one has 6 (pir.md 2.1).
VISION = {
    "swin_standin": (_swin_tiny_standin, ImageInput(112)),
    "swin_t": (lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=0), ImageInput(224)),
    "deit_s": (lambda: _deit_s(6), ImageInput(224)),
    "deit_s_released": (lambda: _deit_s(12), ImageInput(224)),
    "efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=0),
                           ImageInput(224, HALF_MEAN, HALF_STD)),
}

PRIOR = {
    "resnet_standin": _resnet_standin,
    "resnet50": lambda: timm.create_model("resnet50", num_classes=0),
    "vgg19_bn": _vgg19_bn,
}

TEXT = {
    "bert_standin": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                         max_position_embeddings=64),
    "bert_base": dict(vocab_size=30522),
    "minilm": dict(vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                   intermediate_size=1536),
}


def _choose(table: dict, kind: str, name: str):
    if name not in table:
        raise UserError(f"There is no {kind} tower called '{name}'; choose one of {', '.join(table)}.")
    return table[name]


def image_input(name: str) -> ImageInput:
    """Edge length and normalisation of the vision tower `name`."""
    return _choose(VISION, "vision", name)[1]


def vision_tower(name: str) -> nn.Module:
    """A timm module; its width is `module.num_features`."""
    return _choose(VISION, "vision", name)[0]()


def image_tokens(tower: nn.Module, pixels: Tensor) -> Tensor:
    """(B,3,S,S) -> (B,1+N,W): a global token, then N local tokens in raster order.

    Towers without a class token get the plain mean of their normalised local tokens (PIR, section 3.2 of the code).
    """
    features = tower.forward_features(pixels)
    if features.ndim == 3:
        return features
    channels_last = isinstance(tower, SwinTransformer)
    local = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    return torch.cat([local.mean(1, keepdim=True), local], dim=1)


def text_tower(name: str, vocab_size: int | None = None) -> BertModel:
    """A BERT without pooler; `vocab_size` replaces the published vocabulary (stand-ins only)."""
    settings = dict(_choose(TEXT, "text", name))
    if vocab_size is not None:
        settings["vocab_size"] = vocab_size
    return bert(**settings)


def bert(**settings) -> BertModel:
    """A BERT of any size. Its padding token has an embedding like any other: PIR attends padding, and trains it."""
    return BertModel(BertConfig(**settings, pad_token_id=None), add_pooling_layer=False)


class SceneHead(nn.Sequential):
    """A scene prior on top of a frozen vision tower: (B,W) global token -> (B,hidden).

    Not the paper's: the compact size uses it where the AID ResNet-50 cannot be had.
    """

    def __init__(self, width: int, hidden: int = 256):
        super().__init__(nn.Linear(width, hidden), nn.GELU())
        self.num_features = hidden


def prior_tower(name: str) -> nn.Module:
    """A scene-recognition CNN without classifier: (B,3,S,S) -> (B,`num_features`)."""
    return _choose(PRIOR, "prior", name)()

"""Build towers; no other module does.

Each function returns the library's own module, so that names match public weights. The modules get
random weights, on the active `torch.device`. `nbhelpers.towers.checkpoints` fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import open_clip
import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from timm.layers import BatchNormAct2d
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    ViltConfig,
    ViltModel,
)

from nbhelpers.data.image_input import ImageInput
from nbhelpers.errors import UserError

HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
FEW = 8  # images that a frozen EfficientNet sees at once on a CPU


def _swin_tiny_standin() -> SwinTransformer:
    return SwinTransformer(
        img_size=112,
        patch_size=8,
        embed_dim=48,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=7,
        num_classes=0,
    )


def _resnet_standin() -> ResNet:
    return ResNet(
        BasicBlock,
        (1, 1, 1, 1),
        num_classes=0,
        channels=(16, 32, 64, 128),
        stem_type="deep",
        stem_width=8,
    )


def _deit_s(heads: int) -> nn.Module:
    return timm.create_model("deit_small_patch16_224", num_classes=0, num_heads=heads)


def _vgg19_bn() -> nn.Module:
    tower = timm.create_model("vgg19_bn", num_classes=0)
    # all of VGG's classifier goes; its feature map is averaged, as ResNet's is
    tower.pre_logits = nn.Identity()
    return tower


# name -> (constructor, what the tower is fed). The 12-head DeiT-S is that of PIR's
# released code; the published one has 6.
VISION = {
    "swin_standin": (_swin_tiny_standin, ImageInput(112)),
    "swin_t": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=0),
        ImageInput(224),
    ),
    "deit_s": (lambda: _deit_s(6), ImageInput(224)),
    "deit_s_released": (lambda: _deit_s(12), ImageInput(224)),
    "efficientnet_lite0": (
        lambda: timm.create_model("tf_efficientnet_lite0", num_classes=0),
        ImageInput(224, HALF_MEAN, HALF_STD),
    ),
}

PRIOR = {
    "resnet_standin": _resnet_standin,
    "resnet50": lambda: timm.create_model("resnet50", num_classes=0),
    "vgg19_bn": _vgg19_bn,
}

TEXT = {
    "bert_standin": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
    },
    "bert_base": {"vocab_size": 30522},
    "minilm": {
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
}


def _choose(table: dict, kind: str, name: str):
    if name not in table:
        raise UserError(
            f"There is no {kind} tower called '{name}'; choose one of {', '.join(table)}."
        )
    return table[name]


def image_input(name: str) -> ImageInput:
    """Return the edge length and normalisation of the vision tower `name`."""
    return _choose(VISION, "vision", name)[1]


def vision_tower(name: str) -> nn.Module:
    """Build a timm module; its width is `module.num_features`."""
    return _choose(VISION, "vision", name)[0]()


def image_tokens(tower: nn.Module, pixels: Tensor) -> Tensor:
    """Map pixels (B,3,S,S) to tokens (B,1+N,W), a global one and N local ones in raster order.

    For towers without a class token the global token is the mean of their normalised local tokens,
    as in PIR's code.
    """
    if isinstance(tower, CLIPVisionModel):
        return tower(pixels).last_hidden_state
    features = _passed(tower, pixels, tower.forward_features)
    if features.ndim == 3:
        return features
    if isinstance(tower, SwinTransformer):
        return _with_mean(features.flatten(1, 2))
    return _with_mean(features.flatten(2).transpose(1, 2))


def _passed(tower: nn.Module, pixels: Tensor, through: Callable[[Tensor], Tensor]) -> Tensor:
    """Return through(pixels), for a frozen EfficientNet on a CPU in parts of FEW images.

    The outputs for a hundred images would be returned to the system after each layer, and allocated
    again page by page, which takes longer than the convolutions (bench_towers).
    """
    if not isinstance(tower, EfficientNet) or torch.is_grad_enabled() or tower.bn1.training:
        return through(pixels)
    count = FEW if pixels.device.type == "cpu" else len(pixels)
    parts = pixels.contiguous(memory_format=torch.channels_last).split(count)
    return torch.cat([through(part) for part in parts])


def _with_mean(local: Tensor) -> Tensor:
    return torch.cat([local.mean(1, keepdim=True), local], dim=1)


@dataclass(frozen=True)
class PartedTower:
    """An EfficientNet whose last `stages` are fine-tuned while those below are frozen.

    `map_of`, then `tokens_of`, give `image_tokens`. Batch norms are frozen in all stages, so an
    image has the same features in every batch. UserError if the tower has no such stages.
    """

    tower: nn.Module
    stages: int

    def __post_init__(self):
        count = len(self.tower.blocks) if isinstance(self.tower, EfficientNet) else 0
        if not 0 < self.stages < count:
            mend = "choose 0, or the vision tower efficientnet_lite0"
            if count:
                mend = f"choose 1 to {count - 1}"
            raise UserError(
                f"tuned_stages is {self.stages}, but {type(self.tower).__name__} has "
                f"{max(count - 1, 0)} stages that can be fine-tuned while others stay "
                f"frozen; {mend}."
            )

    def below(self) -> list[nn.Module]:
        """Return the frozen part, whose map can be cached."""
        return [self.tower.conv_stem, self.tower.bn1, *self.tower.blocks[: -self.stages]]

    def norms(self) -> list[nn.Module]:
        """Return the batch norms of the fine-tuned stages."""
        above = (*self.tower.blocks[-self.stages :], self.tower.bn2)
        parts = chain.from_iterable(stage.modules() for stage in above)
        return [part for part in parts if isinstance(part, BatchNormAct2d)]

    def map_of(self, pixels: Tensor) -> Tensor:
        """Map pixels (B,3,S,S) to the map (B,C,H,W) below the fine-tuned stages."""
        return _passed(self.tower, pixels, nn.Sequential(*self.below()))

    def tokens_of(self, below: Tensor) -> Tensor:
        """Map (B,C,H,W) to tokens (B,1+N,W)."""
        # twice as fast on a CPU
        with _full_precision(below.contiguous(memory_format=torch.channels_last)) as x:
            for part in (*self.tower.blocks[-self.stages :], self.tower.conv_head, self.tower.bn2):
                x = part(x)
        return _with_mean(x.flatten(2).transpose(1, 2))


@contextmanager
def _full_precision(x: Tensor) -> Iterator[Tensor]:
    """Give x in fp32 at least, with autocast off, on a CPU; elsewhere as it is.

    On a CPU the backward pass of depthwise convolutions takes almost twice as long in bf16 (torch
    2.15, with AMX).
    """
    if x.device.type != "cpu":
        yield x
        return
    with torch.autocast("cpu", enabled=False):
        yield x.to(torch.promote_types(x.dtype, torch.float32))


def text_tower(name: str, vocab_size: int | None = None) -> BertModel:
    """Build a BERT without pooler.

    `vocab_size` replaces the published vocabulary (stand-ins only).
    """
    settings = dict(_choose(TEXT, "text", name))
    if vocab_size is not None:
        settings["vocab_size"] = vocab_size
    return bert(**settings)


def bert(**settings) -> BertModel:
    """Build a BERT of any size.

    Its padding token has an embedding like any other: PIR attends padding, and trains it.
    """
    return BertModel(BertConfig(**settings, pad_token_id=None), add_pooling_layer=False)


class SceneHead(nn.Sequential):
    """A scene prior on top of a frozen vision tower: global token (B,W) to (B,hidden).

    It is not the paper's. The compact size uses it where the AID ResNet-50 is not available.
    """

    def __init__(self, width: int, hidden: int = 256):
        super().__init__(nn.Linear(width, hidden), nn.GELU())
        self.num_features = hidden


def prior_tower(name: str) -> nn.Module:
    """Build a scene-recognition CNN without classifier: (B,3,S,S) to (B,`num_features`)."""
    return _choose(PRIOR, "prior", name)()


@dataclass(frozen=True)
class CLIPSize:
    """The sizes for open_clip, and in the compact size the frozen towers (vision, text) below."""

    embed_dim: int
    vision: dict
    text: dict
    image: ImageInput
    quick_gelu: bool = False
    towers: tuple[str, str] | None = None


_B32 = CLIPSize(
    512,
    {"layers": 12, "width": 768, "patch_size": 32, "image_size": 224},
    {"layers": 12, "width": 512, "heads": 8, "context_length": 77, "vocab_size": 49408},
    ImageInput(224),
)
CLIP = {
    "clip_standin": CLIPSize(
        64,
        {"layers": 4, "width": 96, "head_width": 24, "patch_size": 16, "image_size": 112},
        {"layers": 4, "width": 64, "heads": 4, "context_length": 40, "vocab_size": 49408},
        ImageInput(112),
    ),
    "clip_compact": CLIPSize(
        256,
        {"layers": 3, "width": 256, "patch_size": 1, "image_size": 7},
        {"layers": 3, "width": 256, "heads": 4, "context_length": 32, "vocab_size": 1},
        VISION["efficientnet_lite0"][1],
        towers=("efficientnet_lite0", "minilm"),
    ),
    "vit_b32": _B32,
    # OpenAI's weights were trained with this activation
    "vit_b32_quickgelu": replace(_B32, quick_gelu=True),
}


def clip_size(name: str) -> CLIPSize:
    """Return the sizes of the CLIP `name`; UserError if there is none."""
    return _choose(CLIP, "CLIP", name)


def clip(name: str) -> open_clip.CLIP:
    """Build an open_clip model.

    In the compact size its patch embedding reads the map of the frozen vision tower, and its token
    embedding the states of the frozen text tower.
    """
    size = clip_size(name)
    model = open_clip.CLIP(size.embed_dim, size.vision, size.text, quick_gelu=size.quick_gelu)
    if size.towers:
        with torch.device("meta"):
            vision, text = vision_tower(size.towers[0]), text_tower(size.towers[1])
        model.visual.conv1 = nn.Conv2d(vision.num_features, size.vision["width"], 1, bias=False)
        model.token_embedding = nn.Linear(text.config.hidden_size, size.text["width"], bias=False)
    return model


# The instruction encoder of PIR-CLIP
_RN50 = {"layers": (3, 4, 6, 3), "width": 64, "heads": 32}
INSTRUCTION = {
    "clip_standin": {"layers": (1, 1, 1, 1), "width": 16, "heads": 8},
    "vit_b32": _RN50,
    "vit_b32_quickgelu": _RN50,
}


def instruction_encoder(name: str) -> nn.Module:
    """Build PIR-CLIP's instruction encoder for the CLIP `name`: pixels (B,3,S,S) to (B,D).

    It is CLIP's ResNet with attention pooling. In the compact size it is a `SceneHead` over the
    global token of the frozen vision tower.
    """
    size = clip_size(name)
    if size.towers:
        with torch.device("meta"):
            vision = vision_tower(size.towers[0])
        return SceneHead(vision.num_features, size.embed_dim)
    return ModifiedResNet(
        output_dim=size.embed_dim, image_size=size.image.size, **INSTRUCTION[name]
    )


@dataclass(frozen=True)
class ViLTSize:
    """The sizes for transformers, and in the compact size the frozen towers below."""

    vilt: dict
    image: ImageInput
    towers: tuple[str, str] | None = None


VILT = {
    "vilt_standin": ViLTSize(
        {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "image_size": 112,
            "patch_size": 16,
            "max_position_embeddings": 32,
        },
        ImageInput(112, HALF_MEAN, HALF_STD),
    ),
    "vilt_compact": ViLTSize(
        {
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "intermediate_size": 768,
            "image_size": 7,
            "patch_size": 1,
            "max_position_embeddings": 32,
            "vocab_size": 1,
        },
        VISION["efficientnet_lite0"][1],
        towers=("efficientnet_lite0", "minilm"),
    ),
    "vilt_b32": ViLTSize(
        {"num_hidden_layers": 12, "max_position_embeddings": 40},
        ImageInput(384, HALF_MEAN, HALF_STD),
    ),
}


def vilt_size(name: str) -> ViLTSize:
    """Return the sizes of the ViLT `name`; UserError if there is none."""
    return _choose(VILT, "ViLT", name)


def vilt(name: str, vocab_size: int | None = None, dropout: float = 0.1) -> ViltModel:
    """Build a ViLT with pooler.

    `vocab_size` replaces the published vocabulary (stand-ins only). In the compact size the patch
    embedding reads the map of the frozen vision tower, and the word embedding the states of the
    frozen text tower.
    """
    size = vilt_size(name)
    settings = dict(size.vilt)
    if vocab_size is not None:
        settings["vocab_size"] = vocab_size
    if not size.towers:
        return vilt_model(**settings, dropout=dropout)
    with torch.device("meta"):
        vision, text = vision_tower(size.towers[0]), text_tower(size.towers[1])
    model = vilt_model(**settings, num_channels=vision.num_features, dropout=dropout)
    model.embeddings.text_embeddings.word_embeddings = nn.Linear(
        text.config.hidden_size, settings["hidden_size"], bias=False
    )
    return model


def vilt_model(dropout: float = 0.1, **settings) -> ViltModel:
    """Build a ViLT of any size, as its authors build and initialise it.

    transformers differs in the epsilon of the layers' norms, in the dropout behind the GELU and in
    positions that start at zero.
    """
    model = ViltModel(
        ViltConfig(**settings, layer_norm_eps=1e-6, hidden_dropout_prob=dropout, pad_token_id=0)
    )
    model.embeddings.text_embeddings.LayerNorm.eps = 1e-12
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.Sequential(nn.GELU(), nn.Dropout(dropout))
    for start in (model.embeddings.cls_token, model.embeddings.position_embeddings):
        nn.init.trunc_normal_(start, std=0.02)
    return model


def clip_vision(**settings) -> CLIPVisionModel:
    """Build CLIP's image tower up to some block; tokens (B,1+N,W).

    It has no last norm, which BITA does not use.
    """
    tower = CLIPVisionModel(CLIPVisionConfig(**settings))
    tower.post_layernorm = nn.Identity()
    return tower


# name -> (settings of `clip_vision`, what it is fed). Blocks are fewer than the published tower
# has: 21 of 24, 3 of 4.
CLIP_VISION: dict[str, tuple[dict, ImageInput]] = {
    "clip_standin_3": (
        {
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 16,
            "hidden_act": "gelu",
        },
        ImageInput(112),
    ),
    "clip_vit_l14_21": (
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 21,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
        },
        ImageInput(224),
    ),
}


def image_reader(name: str) -> tuple[nn.Module, int, ImageInput]:
    """Build a tower of CLIP_VISION or VISION for `image_tokens`.

    Returns the tower, the channels of its tokens and its input.
    """
    _choose(VISION | CLIP_VISION, "image", name)
    if name not in CLIP_VISION:
        tower = vision_tower(name)
        return tower, tower.num_features, image_input(name)
    settings, image = CLIP_VISION[name]
    return clip_vision(**settings), settings["hidden_size"], image


def _opt(width: int, layers: int, heads: int, **changes) -> tuple[type, type, dict]:
    sizes = {
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
    }
    return OPTForCausalLM, OPTConfig, sizes | changes


# The first token and that of padding stand beside the configuration: the authors' </s> and <pad>,
# and what others have for them.
LANGUAGE = {
    "opt_standin": (
        _opt(96, 2, 4, vocab_size=512, max_position_embeddings=128, dropout=0.0),
        "</s>",
        "<pad>",
    ),
    "opt_125m": (_opt(768, 12, 12), "</s>", "<pad>"),
    "opt_2.7b": (_opt(2560, 32, 32), "</s>", "<pad>"),
    "smollm2": (
        (
            LlamaForCausalLM,
            LlamaConfig,
            {
                "vocab_size": 49152,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_theta": 100000.0,
                "tie_word_embeddings": True,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": 0,
            },
        ),
        "<|endoftext|>",
        "<|endoftext|>",
    ),
}


def language_model(
    name: str, vocab_size: int | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build a causal language model of transformers, with parameters of `dtype` from the start.

    `vocab_size` replaces the published vocabulary (stand-ins only).
    """
    (model, config, settings), *_ = _choose(LANGUAGE, "language", name)
    if vocab_size is not None:
        settings = settings | {"vocab_size": vocab_size}
    return model._from_config(config(**settings), dtype=dtype)

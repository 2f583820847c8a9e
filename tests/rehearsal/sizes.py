"""The sizes of a rehearsal: "full", the published networks with few blocks of OPT, and "cut"."""

from __future__ import annotations

from dataclasses import replace
from functools import partial, partialmethod
from types import ModuleType
from typing import Any

import timm
import torch

BLOCKS = {"full": 3, "cut": 2}  # of OPT-2.7B's 32


class Sizes(dict):
    """The published sizes where parameters are only counted, else those of the rehearsal."""

    def __init__(self, published: dict, rehearsed: dict):
        super().__init__(published)
        self.rehearsed = rehearsed

    def __getitem__(self, name: str) -> Any:
        if _counted():
            return super().__getitem__(name)
        return self.rehearsed.get(name) or super().__getitem__(name)


def change(module: ModuleType, size: str) -> None:
    """Replace sizes in the module that was just imported."""
    if module.__name__.endswith("foreign_configs"):
        module.BESIDE = 2**40  # a file may be smaller than its configuration, counted on meta, says
    elif module.__name__.endswith("backbones"):
        tables: dict[str, dict] = {"LANGUAGE": _opt(module, size)}
        if size == "cut":
            tables |= _cut(module)
        for name, rehearsed in tables.items():
            setattr(module, name, Sizes(getattr(module, name), rehearsed))
    elif size == "cut" and module.__name__.endswith("pir"):
        module.PIR.__init__ = partialmethod(_narrow_pir, module.PIR.__init__)
    elif size == "cut":
        module.BITAConfig.paper = staticmethod(partial(_narrow_bita, module.BITAConfig.paper))


def _counted() -> bool:
    return torch.get_default_device().type == "meta"


def _opt(backbones: ModuleType, size: str) -> dict:
    (model, config, sizes), *words = backbones.LANGUAGE["opt_2.7b"]
    sizes = sizes | {"num_hidden_layers": BLOCKS[size]}
    if size == "cut":
        sizes |= {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
        sizes |= {"num_attention_heads": 4}
    return {"opt_2.7b": ((model, config, sizes), *words)}


def _cut(backbones: ModuleType) -> dict[str, dict]:
    swin = partial(
        timm.create_model,
        "swin_tiny_patch4_window7_224",
        embed_dim=16,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 4),
    )
    resnet = partial(
        timm.create_model, "resnet50", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8
    )
    bert = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert |= {"intermediate_size": 128}
    clip = {
        name: replace(
            backbones.CLIP[name],
            embed_dim=64,
            vision=backbones.CLIP[name].vision | {"layers": 2, "width": 128},
            text=backbones.CLIP[name].text | {"layers": 2, "width": 96, "heads": 4},
        )
        for name in ("vit_b32", "vit_b32_quickgelu")
    }
    vilt = backbones.VILT["vilt_b32"]
    narrow = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    narrow |= {"num_hidden_layers": 8}  # six below CFITR's cut, two above
    of_vit, fed = backbones.CLIP_VISION["clip_vit_l14_21"]
    narrow_vit = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return {
        "VISION": {"swin_t": (partial(swin, num_classes=0), backbones.VISION["swin_t"][1])},
        "PRIOR": {"resnet50": partial(resnet, num_classes=0)},
        "TEXT": {"bert_base": backbones.TEXT["bert_base"] | bert},
        "CLIP": clip,
        "INSTRUCTION": dict.fromkeys(clip, {"layers": (1, 1, 1, 1), "width": 16, "heads": 8}),
        "VILT": {"vilt_b32": replace(vilt, vilt=vilt.vilt | narrow)},
        "CLIP_VISION": {"clip_vit_l14_21": (of_vit | narrow_vit, fed)},
    }


def _narrow_pir(model, published, config, *others, **named) -> None:
    """Begin a PIR with 64 channels where the configuration has the published 512."""
    if config.embed_dim == 512 and not _counted():
        config = replace(config, embed_dim=64)
    published(model, config, *others, **named)


def _narrow_bita(published, **changes):
    """The published configuration where parameters are only counted, else one for the cut BERT."""
    narrow = {"width": 64, "layers": 2, "heads": 4, "hidden": 128}
    return published(**(changes if _counted() else narrow | changes))

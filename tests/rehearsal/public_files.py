"""Random weights of the published networks, in the files and under the names of the public ones."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import open_clip
import small_sets
import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    CLIPConfig,
    CLIPModel,
    ViltConfig,
    ViltForMaskedLM,
)

from nbhelpers.towers import backbones, public_weights

OPT_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def write(folder: Path, captions: list[str]) -> None:
    """Write all weights of `paper_ucm` that no package brings; captions make OPT's byte pairs."""
    torch.manual_seed(0)
    for name in ("swin_t", "resnet50_aid", "bert_base", "clip_vit_b32", "clip_rn50"):
        WRITERS[name](_place(folder, name))
    for name in ("vilt_mlm_itm", "clip_vit_l14"):
        WRITERS[name](_place(folder, name))
    _opt(_place(folder, "opt_2.7b"), captions)


def _place(folder: Path, name: str) -> Path:
    """The folder that a copy of the hub's repository has; the folder itself without one."""
    place = folder / public_weights.KNOWN[name].hub.split("/")[-1]
    place.mkdir(parents=True, exist_ok=True)
    return place


def _safe(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path)


def _with_head(tower: nn.Module, name: str, classes: int) -> dict[str, Tensor]:
    width = tower.num_features
    head = {f"{name}.weight": torch.zeros(classes, width), f"{name}.bias": torch.zeros(classes)}
    return tower.state_dict() | head


def _swin(place: Path) -> None:
    """timm's, with its classifier of ImageNet-22k."""
    state = _with_head(backbones.vision_tower("swin_t"), "head.fc", 21841)
    _safe(state, place / "model.safetensors")


def _prior(place: Path) -> None:
    """As its authors saved it: a pickle with more than weights, and 30 classes of AID."""
    state = _with_head(backbones.prior_tower("resnet50"), "fc", 30)
    content = {"model": state, "epoch": 299, "max_accuracy": 97.1}
    torch.save(content, place / "aid_28-rsp-resnet-50-ckpt.pth")


def _bert(place: Path) -> None:
    """The oldest of the published forms: both heads, and TensorFlow's names of the norms."""
    settings = backbones.TEXT["bert_base"]
    model = BertForPreTraining(BertConfig(**settings))
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in model.state_dict().items()
    }
    _safe(old, place / "model.safetensors")
    model.config.to_json_file(place / "config.json")
    words = public_weights.resolve("minilm").path
    for name in ("tokenizer.json", "vocab.txt"):
        shutil.copy(words / name, place / name)


def _clip(place: Path) -> None:
    model = backbones.clip("vit_b32_quickgelu")
    _safe(model.state_dict(), place / "open_clip_model.safetensors")


def _clip_resnet(place: Path) -> None:
    sizes = backbones.INSTRUCTION["vit_b32"]
    width = 32 * sizes["width"]
    vision = {"layers": list(sizes["layers"]), "width": sizes["width"], "image_size": 224}
    vision["head_width"] = width // sizes["heads"]
    text = backbones.clip_size("vit_b32").text
    model = open_clip.CLIP(1024 if width == 2048 else 96, vision, text, quick_gelu=True)
    _safe(model.state_dict(), place / "open_clip_model.safetensors")


def _vilt(place: Path) -> None:
    """The hub's form, which lacks the matching head."""
    model = ViltForMaskedLM(ViltConfig(**backbones.vilt_size("vilt_b32").vilt))
    torch.save(model.state_dict(), place / "pytorch_model.bin")


def _clip_l14(place: Path) -> None:
    """The whole CLIP of transformers: all 24 blocks of the image tower, and the text tower."""
    vision, _ = backbones.CLIP_VISION["clip_vit_l14_21"]
    of_text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    if vision["hidden_size"] != 1024:
        of_text = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = CLIPConfig(
        vision_config=vision | {"num_hidden_layers": 24},
        text_config=of_text,
        projection_dim=of_text["hidden_size"],
    )
    model = CLIPModel(config)
    _safe(model.state_dict(), place / "model.safetensors")
    config.to_json_file(place / "config.json")


def _opt(place: Path, captions: list[str]) -> None:
    """In 16 bits, under the older of its two names, with byte pairs of its own."""
    model = backbones.language_model("opt_2.7b", dtype=torch.float16)
    state = {
        name.removeprefix("model."): value
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    torch.save(state, place / "pytorch_model.bin")
    model.config.to_json_file(place / "config.json")
    words = tokenizers.ByteLevelBPETokenizer()
    words.train_from_iterator(
        captions, vocab_size=1000, special_tokens=list(OPT_SPECIAL), show_progress=False
    )
    words.save_model(str(place))


WRITERS = {
    "swin_t": _swin,
    "resnet50_aid": _prior,
    "bert_base": _bert,
    "clip_vit_b32": _clip,
    "clip_rn50": _clip_resnet,
    "vilt_mlm_itm": _vilt,
    "clip_vit_l14": _clip_l14,
}

if __name__ == "__main__":
    home, data = Path(sys.argv[1]), sys.argv[2]
    write(home / "weights", small_sets.write(home / "data", data, home / "runs/cache"))

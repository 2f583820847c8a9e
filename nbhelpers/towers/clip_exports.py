"""Write a CLIP of this project in the public forms of open_clip and of transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_folder
from nbhelpers.towers.backbones import CLIPSize, clip_size
from nbhelpers.towers.checkpoints import load_into, rename
from nbhelpers.towers.open_clip_models import CONFIG, WEIGHTS

HEAD = 64  # width of an attention head, where a CLIP names none
FIRST, LAST = "<|startoftext|>", "<|endoftext|>"
# CLIP of open_clip -> Hugging Face, once its one attention projection is three
HUGGING_FACE_RULES = [
    (r"^(?=(transformer|ln_final|token_embedding|positional_embedding))", "text_model."),
    (r"^text_model\.ln_final\.", "text_model.final_layer_norm."),
    (r"^text_model\.token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.", "vision_model."),
    (r"\.class_embedding$", ".embeddings.class_embedding"),
    (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"\.transformer\.resblocks\.", ".encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_pre\.", ".pre_layrnorm."),
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.ln_(?=[12])", ".layer_norm"),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def write_open_clip(clip: nn.Module, name: str, folder: Path | str) -> Path:
    """Write an open_clip model folder that `open_clip.create_model("local-dir:FOLDER")` opens.

    clip    an open_clip model;  name  its sizes, in `backbones.CLIP`
    UserError if the CLIP stands on towers of packages, or the folder exists.
    """
    size = _whole(name)
    about = {
        "model_cfg": {
            "embed_dim": size.embed_dim,
            "vision_cfg": size.vision,
            "text_cfg": size.text,
            "quick_gelu": size.quick_gelu,
        },
        "preprocess_cfg": {
            "mean": list(size.image.mean),
            "std": list(size.image.std),
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    with atomic_folder(new_folder(folder)) as temporary:
        (temporary / CONFIG).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        safetensors.torch.save_file(_tensors(clip), temporary / WEIGHTS[0])
    return Path(folder)


def write_hugging_face(clip: nn.Module, name: str, folder: Path | str) -> Path:
    """Write a model folder that `transformers.CLIPModel.from_pretrained(FOLDER)` opens.

    clip    an open_clip model;  name  its sizes, in `backbones.CLIP`
    It holds the image processor and the tokenizer, too. UserError as `write_open_clip`.
    """
    size = _whole(name)
    model = CLIPModel(_config(size))
    load_into(model, hugging_face_state(_tensors(clip)))
    edge, image = {"height": size.image.size, "width": size.image.size}, size.image
    processor = CLIPImageProcessor(
        size=edge, do_center_crop=False, image_mean=image.mean, image_std=image.std
    )
    with atomic_folder(new_folder(folder)) as temporary:
        # without the progress bar of `save_pretrained`
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(temporary)
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        safetensors.torch.save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        processor.save_pretrained(temporary)
        _tokenizer(size.text["context_length"]).save_pretrained(temporary)
    return Path(folder)


def hugging_face_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an open_clip CLIP under the names of `transformers.CLIPModel`."""
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        if joined := re.fullmatch(r"(.+\.attn\.)in_proj_(weight|bias)", name):
            for which, part in zip("qkv", value.chunk(3), strict=True):
                split[f"{joined[1]}{which}_proj.{joined[2]}"] = part.contiguous()
        else:
            split[name] = value
    found = rename(split, HUGGING_FACE_RULES)
    turned = ("visual_projection.weight", "text_projection.weight")
    return found | {name: found[name].t().contiguous() for name in turned}


def _whole(name: str) -> CLIPSize:
    """Return the sizes of a CLIP that stands alone; UserError for one on towers of packages."""
    size = clip_size(name)
    if size.towers:
        raise UserError(
            f"{name} reads the features of {' and '.join(size.towers)}, which neither open_clip nor"
            " transformers can express; export a CLIP of size tiny or paper."
        )
    return size


def new_folder(folder: Path | str) -> Path:
    """Return the path of a folder to be written; UserError if it exists."""
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists; name a folder that does not.")
    return folder


def _tensors(clip: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an open_clip model as files hold them: float32 on the CPU."""
    state = clip.state_dict()
    return {name: value.detach().cpu().float().contiguous() for name, value in state.items()}


def _config(size: CLIPSize) -> CLIPConfig:
    """Return the sizes for transformers."""
    activation = "quick_gelu" if size.quick_gelu else "gelu"
    vision, text = size.vision, size.text
    shared = {"hidden_act": activation, "projection_dim": size.embed_dim}
    seen = shared | {
        "hidden_size": vision["width"],
        "intermediate_size": 4 * vision["width"],
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision.get("head_width", HEAD),
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
    }
    words = open_clip.tokenizer.SimpleTokenizer()
    read = shared | {
        "hidden_size": text["width"],
        "intermediate_size": 4 * text["width"],
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "vocab_size": text["vocab_size"],
        "bos_token_id": words.sot_token_id,
        "eos_token_id": words.eot_token_id,
    }
    return CLIPConfig(text_config=read, vision_config=seen, projection_dim=size.embed_dim)


def _tokenizer(context: int) -> CLIPTokenizer:
    """Return CLIP's byte pairs, which open_clip brings along, as transformers writes them."""
    words = open_clip.tokenizer.SimpleTokenizer(context_length=context)
    named: dict[int, str] = {words.sot_token_id: FIRST, words.eot_token_id: LAST}
    vocabulary = {named.get(number, token): number for token, number in words.encoder.items()}
    merges: Any = list(words.bpe_ranks)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context)

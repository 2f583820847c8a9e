"""Open the dual encoders of transformers: CLIP, SigLIP, ALIGN and their like.

A model folder holds config.json, the weights, the image processor and the tokenizer. The weights
are read by the safe reader of `checkpoints`; code that a folder brings along is never run.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from nbhelpers.errors import UserError, reason
from nbhelpers.towers import checkpoints
from nbhelpers.towers.checkpoints import load_into, read_state_dict
from nbhelpers.towers.encoders import Encoders
from nbhelpers.towers.foreign_configs import built, check_depth

CONFIG = "config.json"
LONGEST = 128  # texts of models with longer contexts are padded to the longest of a batch
ALIGN_CONTEXT = 64  # ALIGN's text tower reads more, but it was trained on these
SMALL = ("*.json", "*.txt", "*.model")  # files of a model folder beside its weights
STARTS = ("text_model.", "vision_model.", "logit_scale", "text_projection.", "visual_projection.")


def from_folder(folder: Path, activation: str | None = None) -> tuple[Encoders, list[str]]:
    """Open a model folder of transformers whose model has get_image_features.

    UserError if a part is missing or does not fit, if the model does not embed images and texts
    alike, and if `activation` is not that of its configuration.
    """
    config = _config(folder)
    _check_activation(folder, config, activation)
    check_depth(config.to_dict(), folder / CONFIG)
    local = {"local_files_only": True}
    state = read_state_dict(checkpoints.weight_file(folder), *STARTS)
    try:
        module = built(partial(AutoModel.from_config, dtype=torch.float32), config, state)
        # Pillow's resizing is that of the published numbers; torchvision's differs a little
        images = AutoImageProcessor.from_pretrained(folder, **local, backend="pil")
        words = AutoTokenizer.from_pretrained(folder, **local)
    except UserError:
        raise
    except Exception as error:  # transformers has no common error for files that do not fit
        raise UserError(
            f"The model folder {folder} cannot be opened ({reason(error)}); it needs config.json,"
            " preprocessor_config.json and its tokenizer, and no code of its own."
        ) from error
    if not hasattr(module, "get_image_features") or not hasattr(module, "get_text_features"):
        raise UserError(
            f"{folder} is a {type(module).__name__}, which does not embed images and texts alike;"
            " give a CLIP, SigLIP or ALIGN, or write module:function."
        )
    if set(words.get_vocab()) <= set(words.all_special_tokens):
        raise UserError(  # transformers makes an empty one where the files are missing
            f"{folder} has no tokenizer that knows words; add its files, such as tokenizer.json."
        )
    load_into(module, state, allow_unexpected=["*position_ids"])
    return _encoders(module, images, words, context_of(config)), []


def context_of(config: Any) -> int:
    """Return the longest text, in tokens, that a model was trained on."""
    longest = getattr(config.text_config, "max_position_embeddings", 77)
    return min(longest, ALIGN_CONTEXT) if config.model_type == "align" else longest


def snapshot(repository: str) -> Path:
    """Return the folder of a hub repository: from the hub's cache, else fetched from the hub.

    What was fetched once stays as it is. UserError if it is in neither.
    """
    from huggingface_hub import constants, snapshot_download

    found = _cached(repository)
    if found is not None:
        return found
    try:
        if constants.HF_HUB_OFFLINE:
            raise UserError("HF_HUB_OFFLINE is set")
        return Path(snapshot_download(repository, allow_patterns=_wanted(repository)))
    except Exception as error:  # offline, refused, gone: the hub's client has no common error
        raise UserError(
            f"The model {repository} is not on this machine and cannot be fetched"
            f" ({reason(error)}); check the name and the connection, or give a folder."
        ) from error


def _cached(repository: str) -> Path | None:
    """Return the folder of a repository in the hub's cache; None unless it is complete."""
    from huggingface_hub import snapshot_download

    from nbhelpers.towers import open_clip_models

    try:
        found = snapshot_download(repository, local_files_only=True, allow_patterns=list(SMALL))
    except Exception:  # not there, or not whole: the client has no common error
        return None
    weights = (*open_clip_models.WEIGHTS, *checkpoints.FOLDER_FILES)
    return Path(found) if any(Path(found, name).is_file() for name in weights) else None


def _wanted(repository: str) -> list[str]:
    """Return the files of a repository that are needed: all small ones, and the weights once."""
    from huggingface_hub import HfApi

    from nbhelpers.towers import open_clip_models

    files = HfApi().list_repo_files(repository)
    small = [name for name in files if name.endswith(tuple(end[1:] for end in SMALL))]
    of_open_clip = open_clip_models.CONFIG in files
    order = open_clip_models.WEIGHTS if of_open_clip else checkpoints.FOLDER_FILES
    weights = next((name for name in order if name in files), None)
    if weights is None:
        raise UserError(f"it holds none of {', '.join(order)}")
    if weights.endswith(".index.json"):
        ending = weights.removesuffix(".index.json").rsplit(".", 1)[1]
        return [*small, f"*-of-*.{ending}"]
    return [*small, weights]


def _config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.name_or_path = ""  # the digest of a model is not that of its place
        return config
    except Exception as error:  # transformers has no common error for a broken configuration
        raise UserError(
            f"{folder / CONFIG} is no configuration that transformers reads ({reason(error)}); a"
            " model with code of its own is opened by module:function."
        ) from error


def _check_activation(folder: Path, config: Any, activation: str | None) -> None:
    """Raise a UserError if a wish differs from the activation of the configuration."""
    part = getattr(config, "vision_config", None)
    own = getattr(part, "hidden_act", "")
    if activation and (activation == "quickgelu") != (own == "quick_gelu"):
        raise UserError(
            f"{folder / CONFIG} says that the activation is {own or 'its own'}; leave --activation"
            " out."
        )


def _encoders(module: nn.Module, images: Any, words: Any, context: int) -> Encoders:
    padding = "max_length" if context <= LONGEST else True
    names = [name for name in words.model_input_names if name != "token_type_ids"]

    def pixels(picture: Image.Image) -> Tensor:
        return images(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        found = words(
            texts, padding=padding, truncation=True, max_length=context, return_tensors="pt"
        )
        return {name: found[name] for name in names}

    return Encoders(
        module,
        pixels,
        tokens,
        lambda values: _vectors(module.get_image_features(pixel_values=values)),
        lambda given: _vectors(module.get_text_features(**given)),
        {
            "preprocess": json.loads(images.to_json_string()),
            "tokenizer": _digest_of(words),
            "context": context,
        },
    )


def _digest_of(words: Any) -> str:
    """Return what tells one tokenizer from another: its class and its whole content."""
    from nbhelpers.keys import key_digest

    backend = getattr(words, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(words.get_vocab().items())
    return f"{type(words).__name__} {key_digest(content)}"


def _vectors(found: Any) -> Tensor:
    """Return the vectors (N,D); transformers 5 puts them into an output with a pooler."""
    return found if isinstance(found, Tensor) else found.pooler_output

"""Open the models of open_clip: by architecture and file, by tag, and as a model folder.

Weights are read by the safe reader of `checkpoints`, never by open_clip.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
from open_clip.convert import convert_state_dict
from open_clip.factory import CoCa, CustomTextCLIP, convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import Tensor, nn

from nbhelpers.errors import UserError, reason
from nbhelpers.files import read_json
from nbhelpers.towers import public_weights
from nbhelpers.towers.checkpoints import load_into
from nbhelpers.towers.encoders import Encoders, unknown
from nbhelpers.towers.foreign_configs import built, check_depth
from nbhelpers.towers.key_names import clip_state

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
QUICK = "-quickgelu"
# Published files whose activation is known: pattern of the file's name -> QuickGELU or not
KNOWN_FILES = {r"RemoteCLIP-.*": True, r"RS5M_ViT-B-32.*": True}
SHAPES = ("embed_dim", "vision width", "vision layers", "patch", "text width", "text layers")
FOLDER = "local-dir:"  # begins the name of a model folder, for open_clip
Opened = tuple[Encoders, list[str]]


@cache
def names() -> tuple[str, ...]:
    """Return the architectures of open_clip."""
    return tuple(open_clip.list_models())


@cache
def public_names() -> tuple[str, ...]:
    """Return the whole CLIPs of `public_weights.KNOWN`."""
    known = public_weights.KNOWN.items()
    return tuple(name for name, each in known if each.activation)


def from_file(name: str, path: Path, activation: str | None = None) -> Opened:
    """Open an architecture with the weights of a file.

    UserError if the architecture is unknown, the file is missing or does not fit, or the activation
    is another one than its weights were trained with.
    """
    config = _config(name)
    if not path.exists():
        raise UserError(f"{path} does not exist; write {name}=FILE with the file of the weights.")
    known = next((q for form, q in KNOWN_FILES.items() if re.fullmatch(form, path.name)), None)
    notes = _activate(name, config, activation, known, path.name)
    return _opened(name, config, {}, path), notes


def from_tag(name: str, tag: str, activation: str | None = None) -> Opened:
    """Open an architecture with weights that open_clip knows, from the hub's cache or the hub.

    UserError if there is no such tag, the file cannot be had, or the activation is another one.
    """
    config = _config(name)
    found = open_clip.get_pretrained_cfg(name, tag)
    if not found:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if open_clip.get_pretrained_cfg(twin := _twin(name), tag):
            raise UserError(f"{name} has no weights {tag}, {twin} has; name {twin},{tag}.")
        raise unknown(tag, tags, f"{name},TAG with a TAG of {', '.join(tags) or 'no weights'}")
    notes = _activate(name, config, activation, bool(found.get("quick_gelu")), f"{name},{tag}")
    try:
        path = open_clip.download_pretrained(found)
    except Exception as error:  # offline, refused, gone: the clients have no common error
        raise UserError(
            f"The weights {name},{tag} are not on this machine and cannot be fetched"
            f" ({reason(error)}); connect once, or give a file as {name}=FILE."
        ) from error
    return _opened(name, config, found, Path(path)), notes


def from_public(name: str, activation: str | None = None) -> Opened:
    """Open a CLIP of `public_weights.KNOWN`; UserError if its file is missing."""
    quick = public_weights.KNOWN[name].activation == "quick_gelu"
    architecture = f"ViT-B-32{QUICK}" if quick else "ViT-B-32"
    config = _config(architecture)
    notes = _activate(architecture, config, activation, quick, name)
    return _opened(architecture, config, {}, public_weights.resolve(name).path), notes


def from_folder(folder: Path, activation: str | None = None) -> Opened:
    """Open a model folder of open_clip: open_clip_config.json and a file of weights.

    UserError if one of them is missing, damaged or does not fit.
    """
    try:
        about = read_json(folder / CONFIG, "get it again")
        config, preprocess = about["model_cfg"], about.get("preprocess_cfg") or {}
        quick = bool(config.get("quick_gelu", False))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / CONFIG} is no configuration of open_clip ({reason(error)}); get it again."
        ) from error
    if activation and (activation == "quickgelu") != quick:
        raise UserError(
            f"{folder / CONFIG} says quick_gelu {str(quick).lower()}; leave --activation out."
        )
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"The folder {folder} holds none of {', '.join(WEIGHTS)}; add the weights.")
    found = _opened(f"{FOLDER}{folder}", config, preprocess, path)
    return found, _other_sizes(config, found, folder / CONFIG)


def names_of_file(path: Path) -> str:
    """Return ", such as NAME" for the architectures that a file fits; "" if none is known."""
    found = fitting(clip_state(path))
    return f", such as {' or '.join(found)}" if found else ""


def fitting(state: Mapping[str, Tensor]) -> list[str]:
    """Return the architectures of open_clip whose sizes are those of a CLIP's tensors."""
    sizes = _sizes_of(state)
    return [name for name in names() if sizes and _sizes(_config(name)) == sizes][:3]


def _config(name: str) -> dict[str, Any]:
    """Return the configuration of an architecture; UserError with the nearest names."""
    if name not in names():
        raise unknown(name, names(), "NAME,TAG or NAME=FILE with a NAME of open_clip")
    return open_clip.get_model_config(name)


def _twin(name: str) -> str:
    """Return the name of the same architecture with the other activation."""
    return name.removesuffix(QUICK) if name.endswith(QUICK) else name + QUICK


def _activate(
    name: str, config: dict[str, Any], wanted: str | None, known: bool | None, what: str
) -> list[str]:
    """Set the activation of a configuration, and return notes about it.

    known  whether the weights were trained with QuickGELU; None if nobody can tell
    UserError if name, wish and weights contradict each other, with the right name.
    """
    named = bool(config.get("quick_gelu", False))
    quick = named if wanted is None else wanted == "quickgelu"
    twin = _twin(name)
    right = twin if twin in names() else f"{name} with --activation"
    if named and not quick:
        raise UserError(f"{name} has QuickGELU and --activation says {wanted}; name {right}.")
    if known is not None and known != quick:
        trained = "QuickGELU" if known else "GELU"
        right = twin if known != named and twin in names() else name
        raise UserError(
            f"{what} was trained with {trained}, and another activation makes all vectors a little"
            f" wrong; name {right}{'' if right != name else ' and leave --activation out'}."
        )
    config["quick_gelu"] = quick
    if known is None and wanted is None and not named and twin in names():
        return [
            f"{what} does not say with which activation it was trained: {name} means GELU. If it"
            f" descends from OpenAI's CLIP, name {twin}."
        ]
    return []


def _opened(
    name: str, config: dict[str, Any], preprocess: Mapping[str, Any], path: Path
) -> Encoders:
    """Build a model in the image size and context length of its weights, and fill it."""
    check_depth(config, name)
    state = clip_state(path)
    try:
        config = _resized(deepcopy(config), state)
        own = name.startswith(FOLDER)  # the configuration came with the weights
        module = built(_module, config, state) if own else _module(config)
        context = config["text_cfg"].get("context_length")
        tokenizer = open_clip.get_tokenizer(name, context_length=context)
        image = _preprocess(module, preprocess)
    except UserError:
        raise
    except Exception as error:  # a tokenizer or a text tower that only the hub has, a wrong config
        raise UserError(
            f"The network {name} cannot be built ({type(error).__name__}: {reason(error)}); if it"
            " needs files of the hub, connect once, else get its configuration again."
        ) from error
    _fill(module, state, name, path)
    return encoders_of(module, image, tokenizer)


def _preprocess(module: nn.Module, preprocess: Mapping[str, Any]) -> PreprocessCfg:
    """Return the image transform: what is stated, else OpenAI's, in the size of the network."""
    size = getattr(module.visual, "image_size", None)
    about = merge_preprocess_dict(asdict(PreprocessCfg()), dict(preprocess))
    found = PreprocessCfg(**(about | ({"size": size} if size else {})))
    image_transform_v2(found, is_train=False)
    return found


def encoders_of(module: nn.Module, preprocess: PreprocessCfg, tokenizer: Any) -> Encoders:
    """Return the encoders of an open_clip model with its image transform and tokenizer."""

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        return {"ids": tokenizer(texts)}

    return Encoders(
        module,
        image_transform_v2(preprocess, is_train=False),
        tokens,
        lambda pixels: module.encode_image(pixels),
        lambda words: module.encode_text(words["ids"]),
        {
            "preprocess": {key: str(value) for key, value in asdict(preprocess).items()},
            "tokenizer": type(tokenizer).__name__,
            "context": getattr(tokenizer, "context_length", None),
        },
    )


def _module(config: dict[str, Any]) -> nn.Module:
    """Build the network of a configuration with random weights, without looking for others."""
    config = deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    kind = open_clip.CLIP
    if custom:
        kind = CoCa if "multimodal_cfg" in config else CustomTextCLIP
    return kind(**config)


def _fill(module: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    """Fill a model; UserError with the architectures that fit if this one does not."""
    ready = convert_state_dict(module, state)
    if "positional_embedding" in ready and not hasattr(module, "positional_embedding"):
        ready = convert_to_custom_text_state_dict(ready)
    own = module.state_dict()
    for scale in ("logit_scale", "logit_bias"):
        if scale in ready and scale in own:
            ready[scale] = ready[scale].reshape(own[scale].shape)
    try:
        load_into(module, ready, allow_missing=["logit_bias"], allow_unexpected=["*position_ids"])
    except UserError as error:
        fit = fitting(state)
        right = f"Its tensors fit {' or '.join(fit)}. " if fit and name not in fit else ""
        raise UserError(f"{path.name} does not fit {name}. {right}{error}") from error


def _other_sizes(config: dict[str, Any], found: Encoders, path: Path) -> list[str]:
    """Return a note where the weights have another image size or context than a configuration."""
    said = config["vision_cfg"].get("image_size"), config["text_cfg"].get("context_length")
    size = getattr(getattr(found.module, "visual", None), "image_size", None)
    right = size[0] if isinstance(size, tuple) else size, found.settings["context"]
    names = ("images of {} px", "a context of {}")
    pairs = zip(names, said, right, strict=True)
    notes = [name.format(b) for name, a, b in pairs if isinstance(a, int) and b and a != b]
    return [f"{path} says otherwise, but the weights take {' and '.join(notes)}"] if notes else []


def _resized(config: dict[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Give a configuration the image size and the context length of its weights."""
    places, patches = (
        state.get(name) for name in ("visual.positional_embedding", "visual.conv1.weight")
    )
    if places is not None and patches is not None and patches.shape[-1] > 0:
        grid = round((len(places) - 1) ** 0.5)
        if grid * grid == len(places) - 1:
            config["vision_cfg"]["image_size"] = grid * patches.shape[-1]
    words = state.get("positional_embedding", state.get("text.positional_embedding"))
    if words is not None and words.ndim == 2:
        config["text_cfg"]["context_length"] = len(words)
    return config


def _sizes(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the SHAPES of an architecture; None unless it is a plain vision transformer."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or "hf_model_name" in text:
        return None
    values = (
        config["embed_dim"],
        vision["width"],
        vision["layers"] if isinstance(vision["layers"], int) else None,
        vision.get("patch_size"),
        text["width"],
        text["layers"],
    )
    return dict(zip(SHAPES, values, strict=True))


def _sizes_of(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return the SHAPES of a CLIP's tensors; None if it is no plain vision transformer."""
    needed = ("visual.conv1.weight", "visual.class_embedding", "text_projection")
    if any(name not in state for name in needed):
        return None
    patches, projection = state["visual.conv1.weight"], state["text_projection"]
    blocks = r"transformer\.resblocks\.(\d+)\."
    text = {found[1] for name in state if (found := re.match(blocks, name))}
    vision = {found[1] for name in state if (found := re.match(rf"visual\.{blocks}", name))}
    values = (
        projection.shape[1],
        patches.shape[0],
        len(vision),
        patches.shape[-1],
        projection.shape[0],
        len(text),
    )
    return dict(zip(SHAPES, values, strict=True))

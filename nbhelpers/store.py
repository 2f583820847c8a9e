"""Encoded rows, written once and read from then on: append-only arrays on disk, too large to be made or loaded twice.

A folder holds one raw file per array, and `store.json`, which alone says how many rows count. A batch is first appended to
the files and then to the count, so a killed run leaves at most bytes that nothing refers to. Going on after a kill and
adding new rows to a finished store are therefore the same act.
"""
from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from nbhelpers.data.loading import storable
from nbhelpers.errors import UserError, atomic_write

MANIFEST = "store.json"


class Store:
    """Arrays of N rows each: `store[name]` is (N, ...), floats as float16, a read-only memory map if it lies on disk.

    key  what the rows depend on besides the items themselves
    """

    def __init__(self, key: Mapping[str, object], arrays: Mapping[str, np.ndarray]):
        self.key, self.arrays = dict(key), dict(arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @classmethod
    def build(cls, folder: Path | str, key: Mapping[str, object], items: Sequence[str],
              encode: Callable[[np.ndarray], Mapping[str, object]], batch: int = 128) -> Store:
        """Encodes those of `items` that the folder does not hold yet, appends them, and opens the store.

        key     names, as JSON values, everything the rows depend on besides the items: model, options
        items   one string per row, by which a row is known again: an image id, a caption
        encode  row numbers (B,) -> {name: array or tensor (B, ...)}; called for at most `batch` rows
        A build that was killed goes on behind its last whole batch; equal batches then give equal files. Of two builds into
        one folder the second waits. UserError without items, on a folder of another key, of other items or damaged, on
        values that float16 does not hold, and on rows whose form changes.
        """
        folder = Path(folder)
        if not len(items):
            raise UserError(f"There is nothing to write into {folder}: the list of items is empty; give at least one.")
        with FileLock(f"{folder}.lock"):
            about = {"key": dict(key), "rows": 0, "items": 0, "arrays": {}}
            if (folder / MANIFEST).exists():
                about = _checked(folder, key)[0]
                _check_items(folder, about, items)
            for start in range(about["rows"], len(items), batch):
                rows = np.arange(start, min(start + batch, len(items)))
                about = _append(folder, about, items[start:start + len(rows)], encode(rows))
        return cls.open(folder, key, verify=False)  # what was there before has been verified

    @classmethod
    def open(cls, folder: Path | str, key: Mapping[str, object] | None = None, verify: bool = True) -> Store:
        """The store in `folder`. With `verify`, every byte is read once and compared with its checksum.

        UserError if there is none, if it was built under another `key`, or is damaged.
        """
        about, arrays = _checked(Path(folder), key, verify)
        return cls(about["key"], arrays)


def _checked(folder: Path, key: Mapping[str, object] | None, verify: bool = True) -> tuple[dict, dict[str, np.ndarray]]:
    """The manifest and the mapped arrays of a store."""
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        stored, forms = about["key"], about["arrays"].items()
        parts = [(name, np.dtype(form["dtype"]), (about["rows"], *form["shape"]), form["crc32"]) for name, form in forms]
        different = [f"{name}: stored {stored.get(name)!r}, wanted {value!r}" for name, value in (key or {}).items()
                     if stored.get(name) != value]
    except OSError as error:
        raise UserError(f"There is no store in {folder} ({MANIFEST} cannot be read); build it first.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error!r}); delete {folder} and build it again.") from error
    if different:
        raise UserError(f"The store {folder} was built for something else ({'; '.join(different)}); name another folder, "
                        "or delete it and build it again.")
    return about, {name: _mapped(folder / f"{name}.bin", dtype, shape, crc32 if verify else None)
                   for name, dtype, shape, crc32 in parts}


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], crc32: int | None) -> np.ndarray:
    expected, found = dtype.itemsize * int(np.prod(shape)), path.stat().st_size if path.exists() else 0
    if found < expected:
        raise UserError(f"{path} is cut short ({found} of {expected} bytes); delete {path.parent} and build it again.")
    array = np.memmap(path, dtype, "r", shape=shape)
    if crc32 is not None and zlib.crc32(array) != crc32:
        raise UserError(f"{path} does not match its checksum; delete {path.parent} and build it again.")
    return array


def _check_items(folder: Path, about: dict, items: Sequence[str]) -> None:
    rows = about["rows"]
    if _items_crc32(items[:rows]) != about["items"]:
        raise UserError(f"The store {folder} holds {rows} rows of other items than the first {rows} given; add new items "
                        "behind the old ones, or name another folder.")


def _append(folder: Path, about: dict, items: Sequence[str], encoded: Mapping[str, object]) -> dict:
    """Writes a batch behind the rows that count and returns the new manifest."""
    arrays = {name: storable(name, torch.as_tensor(value).detach().cpu().numpy()) for name, value in encoded.items()}
    before = about["arrays"] or {name: _form(array) | {"crc32": 0} for name, array in arrays.items()}
    wrong = [name for name in {*before, *arrays} if name not in arrays or name not in before
             or len(arrays[name]) != len(items) or before[name] != before[name] | _form(arrays[name])]
    if wrong:
        raise UserError(f"The rows of '{min(wrong)}' for {folder} change their number, shape or type from batch to batch; "
                        "pad captions to one length (Tokenizer fixed=True) and encode every row alike.")
    after = {"key": about["key"], "rows": about["rows"] + len(items), "items": _items_crc32(items, about["items"]), "arrays": {}}
    with atomic_write(folder / MANIFEST) as temporary:
        for name, array in arrays.items():
            content = array.tobytes()
            path = folder / f"{name}.bin"
            path.touch()
            with open(path, "r+b") as file:
                file.seek(about["rows"] * len(content) // len(items))
                file.write(content)
                file.truncate()  # what a killed run wrote further on
            after["arrays"][name] = before[name] | {"crc32": zlib.crc32(content, before[name]["crc32"])}
        temporary.write_text(json.dumps(after, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return after


def _form(array: np.ndarray) -> dict:
    return {"dtype": array.dtype.str, "shape": list(array.shape[1:])}


def _items_crc32(items: Sequence[str], before: int = 0) -> int:
    return zlib.crc32("".join(f"{json.dumps(item)}\n" for item in items).encode(), before)

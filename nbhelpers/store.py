"""Encoded rows, written once and read from then on: append-only arrays on disk, too large to be made or loaded twice.

A folder holds one raw file per array, and `store.json`, which alone says how many rows count. A batch is first appended to
the files and then to the count, so a killed run leaves at most bytes that nothing refers to. Going on after a kill and
adding new rows to a finished store are therefore the same act. Equal items are encoded once.
"""
from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from nbhelpers.data.loading import storable
from nbhelpers.distinct import distinct
from nbhelpers.errors import UserError, atomic_write

MANIFEST = "store.json"
SAME = "same"
Encode = Callable[[np.ndarray], Mapping[str, object]]  # row numbers (B,) -> {name: (B, ...)}


class Store:
    """Arrays of N rows each: `store[name]` is (N, ...), floats as float16, a read-only memory map if it lies on disk.

    key       what the rows depend on besides the items themselves
    arrays    by name; SAME (N,), where there is one, is for each row the first row of an equal item
    manifest  what `store.json` says of all rows, with checksums; empty in memory
    """

    def __init__(self, key: Mapping[str, object], arrays: Mapping[str, np.ndarray], manifest: Mapping[str, object] | None = None):
        self.key, self.arrays, self.manifest = dict(key), dict(arrays), dict(manifest or {})

    @property
    def same(self) -> np.ndarray:
        """(N,) for each row the first row of an equal item."""
        return np.asarray(self.arrays[SAME]) if SAME in self.arrays else np.arange(len(self))

    @classmethod
    def in_memory(cls, key: Mapping[str, object], items: Sequence[Hashable], encode: Encode,
                  batch: int = 128) -> Store:
        """As `build`, but written nowhere; items may be anything that can be compared."""
        first, row = distinct(items)
        batches = np.split(first, range(batch, len(first), batch))
        parts = [as_stored(encode(rows)) for rows in batches]
        arrays = {name: np.concatenate([part[name] for part in parts])[row] for name in parts[0]}
        return cls(key, arrays | {SAME: first[row]})

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @classmethod
    def build(cls, folder: Path | str, key: Mapping[str, object], items: Sequence[str],
              encode: Encode, batch: int = 128, renew: bool = False) -> Store:
        """Encodes those of `items` that the folder does not hold yet, appends them, and opens the store.

        key     names, as JSON values, everything the rows depend on besides the items: model, options
        items   one string per row, by which a row is known again: a digest of an image, the ids of
                a caption; equal items get equal rows
        encode  row numbers (B,) -> {name: array or tensor (B, ...)}; called for at most `batch`
                rows, of equal items for the first alone
        renew   True: a store of other items is replaced, not refused
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
                found = _checked(folder, key)[0]
                if renew and not _begins_with(found, items):
                    shutil.rmtree(folder)
                else:
                    _check_items(folder, found, items)
                    about = found
            first, row = distinct(items)
            for start in range(about["rows"], len(items), batch):
                some = slice(start, start + batch)
                about = _append(folder, about, items[some], first[row][some], encode)
        return cls.open(folder, key, verify=False)  # what was there before has been verified

    @classmethod
    def open(cls, folder: Path | str, key: Mapping[str, object] | None = None, verify: bool = True) -> Store:
        """The store in `folder`. With `verify`, every byte is read once and compared with its checksum.

        UserError if there is none, if it was built under another `key`, or is damaged.
        """
        about, arrays = _checked(Path(folder), key, verify)
        return cls(about["key"], arrays, about)


class Computed:
    """An array whose rows are computed when they are asked for: only those are in memory."""

    def __init__(self, rows_of: Callable[[np.ndarray], np.ndarray]):
        self._rows_of = rows_of

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self._rows_of(rows)


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


def _begins_with(about: dict, items: Sequence[str]) -> bool:
    return _items_crc32(items[:about["rows"]]) == about["items"]


def _check_items(folder: Path, about: dict, items: Sequence[str]) -> None:
    rows = about["rows"]
    if not _begins_with(about, items):
        raise UserError(f"The store {folder} holds {rows} rows of other items than the first {rows} given; add new items "
                        "behind the old ones, name another folder, or delete this one and build it again.")


def as_stored(encoded: Mapping[str, object]) -> dict[str, np.ndarray]:
    """What is stored of encoded rows."""
    tensors = {name: torch.as_tensor(value).detach().cpu() for name, value in encoded.items()}
    return {name: storable(name, tensor.numpy()) for name, tensor in tensors.items()}


def _append(folder: Path, about: dict, items: Sequence[str], same: np.ndarray,
            encode: Encode) -> dict:
    """Write a batch behind the rows that count and return the new manifest.

    same  (B,) as in `Store`, of these rows
    """
    fresh = np.unique(same[same >= about["rows"]])
    encoded = as_stored(encode(fresh)) if len(fresh) else {}
    _check_forms(folder, about, encoded, len(fresh))
    arrays = _with_repeats(folder, about["rows"], encoded, fresh, same) | {SAME: same}
    before = about["arrays"] or {name: _form(array) | {"crc32": 0} for name, array in arrays.items()}
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


def _check_forms(folder: Path, about: dict, encoded: Mapping[str, np.ndarray], count: int) -> None:
    """UserError if encoded rows are not as many as asked for, or of another form than those
    before."""
    wrong = {name for name, array in encoded.items() if len(array) != count}
    if about["arrays"] and encoded:
        before = {name: {"dtype": form["dtype"], "shape": form["shape"]}
                  for name, form in about["arrays"].items()}
        now = {name: _form(array) for name, array in encoded.items()} | {SAME: before[SAME]}
        wrong |= {name for name in {*before, *now} if before.get(name) != now.get(name)}
    if wrong:
        raise UserError(f"The rows of '{min(wrong)}' for {folder} change their number, shape or "
                        "type from batch to batch; pad captions to one length (Tokenizer fixed=True) "
                        "and encode every row alike.")


def _with_repeats(folder: Path, begin: int, encoded: dict[str, np.ndarray], fresh: np.ndarray,
                  same: np.ndarray) -> dict[str, np.ndarray]:
    """The rows `same` (B,) from those just encoded, `fresh`, and those before row `begin`, which
    the store holds."""
    old = np.unique(same[same < begin])
    place = np.searchsorted(np.concatenate([old, fresh]), same)
    if not len(old):
        return {name: array[place] for name, array in encoded.items()}
    stored = Store.open(folder, verify=False)
    arrays = {}
    for name in (name for name in stored.arrays if name != SAME):
        known = stored[name][old]
        arrays[name] = (np.concatenate([known, encoded[name]]) if encoded else known)[place]
    return arrays


def _form(array: np.ndarray) -> dict:
    return {"dtype": array.dtype.str, "shape": list(array.shape[1:])}


def _items_crc32(items: Sequence[str], before: int = 0) -> int:
    return zlib.crc32("".join(f"{json.dumps(item)}\n" for item in items).encode(), before)

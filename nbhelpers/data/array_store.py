"""Compute large arrays once, keep them in files, and read them from there.

A folder holds one raw file for each array, and `store.json`. Only `store.json` says how many rows
are valid. Each batch is first appended to the files, then counted, so a killed run leaves at most
unused bytes at the end. Continuing after a kill and adding rows to a finished store work alike.
Equal items are computed once.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nbhelpers.data.distinct import distinct
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write, one_writer
from nbhelpers.keys import key_digest

MANIFEST = "store.json"
SAME = "same"
Compute = Callable[[np.ndarray], Mapping[str, object]]  # row numbers (B,) -> {name: (B, ...)}


class ArrayStore:
    """Hold arrays of N rows each: `store[name]` is (N, ...), floats as float16.

    Arrays on disk are read-only memory maps.

    key       JSON values by name: what the rows depend on besides the items themselves
    arrays    by name
    same      (N,) for each row the first row of an equal item
    manifest  the content of `store.json`, with checksums; empty in memory
    """

    def __init__(
        self,
        key: Mapping[str, object],
        arrays: Mapping[str, np.ndarray],
        same: np.ndarray | None = None,
        manifest: Mapping[str, Any] | None = None,
    ):
        self.key, self.arrays, self.manifest = dict(key), dict(arrays), dict(manifest or {})
        self.same = np.arange(len(next(iter(arrays.values())))) if same is None else same

    def __len__(self) -> int:
        return len(self.same)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @classmethod
    def in_memory(
        cls,
        key: Mapping[str, object],
        items: Sequence[Hashable],
        compute: Compute,
        batch: int = 128,
    ) -> ArrayStore:
        """Compute as `build` does, but in memory; items may be any hashable values."""
        first, row = distinct(items)
        parts = [as_stored(compute(rows)) for rows in in_batches(first, batch)]
        arrays = {name: np.concatenate([part[name] for part in parts])[row] for name in parts[0]}
        return cls(key, arrays, first[row])

    @classmethod
    def build(
        cls,
        folder: Path | str,
        key: Mapping[str, object],
        items: Sequence[str],
        compute: Compute,
        batch: int = 128,
        renew: bool = False,
        verify: bool = True,
    ) -> ArrayStore:
        """Compute those of `items` that the folder does not hold yet, append them, open the store.

        items    one string for each row that identifies it: a digest of an image, the ids of a
                 caption, the name of a file; equal items get equal rows
        compute  row numbers (B,) -> {name: array or tensor (B, ...)}; called for at most `batch`
                 rows, and only for the first of equal items
        renew    True: replace a store of other items; False: refuse it
        verify   as in `open`, for the rows that are there

        A killed build continues after its last whole batch. With equal batches, the files are then
        equal to those of an uninterrupted build. Of two builds into one folder the second waits.
        UserError without items, for a folder that is damaged or has another key or other items, for
        values that float16 cannot hold, and for rows whose shape or type changes.
        """
        folder = Path(folder)
        if not len(items):
            raise UserError(
                f"There is nothing to write into {folder}: the list of items is empty; "
                "give at least one."
            )
        store = cls._found(folder, key, verify)
        if store.manifest["items"] == _items_crc32(items):
            return store
        with one_writer(folder):
            store = cls._begun(folder, key, items, renew, verify)
            first, row = distinct(items)
            for start in range(len(store), len(items), batch):
                some = slice(start, start + batch)
                store = store._append(folder, items[some], first[row[some]], compute)
        return store

    @classmethod
    def cached(
        cls,
        cache: Path | str,
        key: Mapping[str, object],
        items: Sequence[str],
        compute: Compute,
        batch: int,
    ) -> ArrayStore:
        """Build in the folder of the cache that belongs to this key and these items."""
        folder = Path(cache) / f"features-{key_digest(key, items)[:16]}"
        return cls.build(folder, key, items, compute, batch, verify=False)

    @classmethod
    def open(
        cls, folder: Path | str, key: Mapping[str, object] | None = None, verify: bool = True
    ) -> ArrayStore:
        """Open the store in `folder`. With `verify`, compare all bytes with their checksums.

        UserError if there is none, if it was built under another `key`, or is damaged.
        """
        folder = Path(folder)
        about, forms = _read_manifest(folder, key or {})
        arrays = {
            name: _mapped(folder / f"{name}.bin", form, verify) for name, form in forms.items()
        }
        same = arrays.pop(SAME)
        return cls(about["key"], arrays, same, about)

    @classmethod
    def _found(cls, folder: Path, key: Mapping[str, object], verify: bool) -> ArrayStore:
        """The store in `folder`, or an empty one."""
        if (folder / MANIFEST).exists():
            return cls.open(folder, key, verify)
        return cls(key, {}, np.arange(0), {"items": 0, "arrays": {}})

    @classmethod
    def _begun(
        cls,
        folder: Path,
        key: Mapping[str, object],
        items: Sequence[str],
        renew: bool,
        verify: bool,
    ) -> ArrayStore:
        """Open the rows in `folder`; refuse those of other items, or with `renew` drop them."""
        store = cls._found(folder, key, verify)
        rows = len(store)
        if store.manifest["items"] == _items_crc32(items[:rows]):
            return store
        if not renew:
            raise UserError(
                f"The store {folder} holds {rows} rows of other items than the first "
                f"{rows} given; add new items behind the old ones, name another "
                "folder, or delete this one and build it again."
            )
        shutil.rmtree(folder)
        return cls._found(folder, key, verify)

    def _append(
        self, folder: Path, items: Sequence[str], same: np.ndarray, compute: Compute
    ) -> ArrayStore:
        """Append a batch after the valid rows; same (B,) as in the class, of these rows."""
        known, fresh = np.unique(same[same < len(self)]), np.unique(same[same >= len(self)])
        computed = as_stored(compute(fresh)) if len(fresh) else _no_rows(self.arrays)
        before = self.arrays or _no_rows(computed)
        _check_forms(folder, before, computed, len(fresh))
        place = np.searchsorted(np.concatenate([known, fresh]), same)
        arrays = {
            name: np.concatenate([before[name][known], array])[place]
            for name, array in computed.items()
        }
        forms, count = self.manifest["arrays"], _items_crc32(items, self.manifest["items"])
        about: dict[str, Any] = {
            "key": self.key,
            "rows": len(self) + len(items),
            "items": count,
            "arrays": {},
        }
        with atomic_write(folder / MANIFEST) as temporary:
            for name, array in (arrays | {SAME: same}).items():
                with open(folder / f"{name}.bin", "ab") as file:
                    file.truncate(len(self) * array[0].nbytes)  # drop what a killed run left
                    file.write(array.tobytes())
                crc32 = zlib.crc32(array.tobytes(), forms[name]["crc32"] if forms else 0)
                form = {"dtype": array.dtype.str, "shape": array.shape[1:], "crc32": crc32}
                about["arrays"][name] = form
            text = json.dumps(about, indent=1, sort_keys=True)
            temporary.write_text(f"{text}\n", encoding="utf-8")
        return self.open(folder, verify=False)


@dataclass(frozen=True)
class Computed:
    """Compute the rows of an array when they are asked for, so that only those are in memory."""

    rows_of: Callable[[np.ndarray], np.ndarray]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.rows_of(rows)


def in_batches(rows: np.ndarray, batch: int) -> list[np.ndarray]:
    """Split the row numbers (N,) into parts of at most `batch`."""
    return np.split(rows, range(batch, len(rows), batch))


def as_stored(computed: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Convert computed arrays or tensors for storing: floats to float16, others unchanged.

    UserError on values that float16 cannot hold.
    """
    return {
        name: storable(name, torch.as_tensor(value).detach().cpu().numpy())
        for name, value in computed.items()
    }


def storable(name: str, array: np.ndarray) -> np.ndarray:
    """Convert floats to float16. UserError on NaN and on values that float16 cannot hold."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    most = np.finfo(np.float16).max
    if not (np.abs(array) <= most).all():
        raise UserError(
            f"The features '{name}' hold NaN or values beyond {most:.0f}, which "
            "float16 cannot keep; normalise them first, or look for a model that "
            "diverged."
        )
    return array.astype(np.float16)


class _Form(NamedTuple):
    """Describe an array of a store."""

    dtype: np.dtype
    shape: tuple[int, ...]
    crc32: int


def _read_manifest(folder: Path, key: Mapping[str, object]) -> tuple[dict, dict[str, _Form]]:
    """Read the manifest of a store, and the form of each of its arrays."""
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        forms = {
            name: _Form(np.dtype(form["dtype"]), (about["rows"], *form["shape"]), form["crc32"])
            for name, form in about["arrays"].items()
        }
        different = [
            f"{name}: stored {about['key'].get(name)!r}, wanted {value!r}"
            for name, value in key.items()
            if about["key"].get(name) != value
        ]
    except OSError as error:
        raise UserError(
            f"There is no store in {folder} ({MANIFEST} cannot be read); build it first."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / MANIFEST} is damaged ({error!r}); delete {folder} and build it again."
        ) from error
    if different:
        raise UserError(
            f"The store {folder} was built for something else "
            f"({'; '.join(different)}); name another folder, or delete it and build it "
            "again."
        )
    return about, forms


def _mapped(path: Path, form: _Form, verify: bool) -> np.ndarray:
    found = path.stat().st_size if path.exists() else 0
    expected = form.dtype.itemsize * int(np.prod(form.shape))
    if found < expected:
        raise UserError(
            f"{path} is cut short ({found} of {expected} bytes); delete {path.parent} "
            "and build it again."
        )
    array = np.memmap(path, form.dtype, "r", shape=form.shape)
    if verify and zlib.crc32(array.data) != form.crc32:
        raise UserError(
            f"{path} does not match its checksum; delete {path.parent} and build it again."
        )
    return array


def _check_forms(
    folder: Path, before: Mapping[str, np.ndarray], computed: Mapping[str, np.ndarray], count: int
) -> None:
    """UserError if computed rows are not `count`, or of another form than those before."""
    wanted = {(name, count, array.dtype, array.shape[1:]) for name, array in before.items()}
    found = {(name, len(array), array.dtype, array.shape[1:]) for name, array in computed.items()}
    if wrong := [form[0] for form in wanted ^ found]:
        raise UserError(
            f"The rows of '{min(wrong)}' for {folder} change their number, shape or "
            "type from batch to batch; pad captions to one length (Tokenizer "
            "fixed=True) and encode every row alike."
        )


def _no_rows(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array[:0] for name, array in arrays.items()}


def _items_crc32(items: Sequence[str], before: int = 0) -> int:
    return zlib.crc32("".join(f"{json.dumps(item)}\n" for item in items).encode(), before)

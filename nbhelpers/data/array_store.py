"""Arrays that are computed once and read from then on: append-only files, too large to be made or loaded twice.

A folder holds one raw file per array, and `store.json`, which alone says how many rows count. A
batch is first appended to the files and then to the count, so a killed run leaves at most bytes
that nothing refers to. Going on after a kill and adding new rows to a finished store are therefore
the same act. Equal items are computed once.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """Arrays of N rows each: `store[name]` is (N, ...), floats as float16, a read-only memory map if it lies on disk.

    key       JSON values by name: what the rows depend on besides the items themselves
    arrays    by name
    same      (N,) for each row the first row of an equal item
    manifest  what `store.json` says of all rows, with checksums; empty in memory
    """

    def __init__(
        self,
        key: Mapping[str, object],
        arrays: Mapping[str, np.ndarray],
        same: np.ndarray | None = None,
        manifest: Mapping[str, object] | None = None,
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
        """As `build`, but written nowhere; items may be anything that can be compared."""
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

        items    one string per row, by which a row is known again: a digest of an image, the ids
                 of a caption, the name of a file; equal items get equal rows
        compute  row numbers (B,) -> {name: array or tensor (B, ...)}; called for at most `batch`
                 rows, of equal items for the first alone
        renew    True: a store of other items is replaced, not refused
        verify   as in `open`, for the rows that are there
        A build that was killed goes on behind its last whole batch; equal batches then give equal
        files. Of two builds into one folder the second waits. UserError without items, on a folder
        of another key, of other items or damaged, on values that float16 does not hold, and on rows
        whose form changes.
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
        """As `build`, in a folder of the cache for this key and these items alone."""
        folder = Path(cache) / f"features-{key_digest(key, items)[:16]}"
        return cls.build(folder, key, items, compute, batch, verify=False)

    @classmethod
    def open(
        cls, folder: Path | str, key: Mapping[str, object] | None = None, verify: bool = True
    ) -> ArrayStore:
        """The store in `folder`. With `verify`, every byte is read and compared with its checksum.

        UserError if there is none, if it was built under another `key`, or is damaged.
        """
        folder = Path(folder)
        about, forms = _read_manifest(folder, key or {})
        arrays = {
            name: _mapped(folder / f"{name}.bin", *form, verify) for name, form in forms.items()
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
        """What `folder` holds, which must be the first of the items; else nothing with `renew`."""
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
        """Write a batch behind the rows that count; same (B,) as in the class, of these rows."""
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
        about = {"key": self.key, "rows": len(self) + len(items), "items": count, "arrays": {}}
        with atomic_write(folder / MANIFEST) as temporary:  # a full disk kills who writes to a map
            for name, array in (arrays | {SAME: same}).items():
                with open(folder / f"{name}.bin", "ab") as file:
                    file.truncate(len(self) * array[0].nbytes)  # what a killed run wrote further on
                    file.write(array.tobytes())
                crc32 = zlib.crc32(array.tobytes(), forms[name]["crc32"] if forms else 0)
                form = {"dtype": array.dtype.str, "shape": array.shape[1:], "crc32": crc32}
                about["arrays"][name] = form
            text = json.dumps(about, indent=1, sort_keys=True)
            temporary.write_text(f"{text}\n", encoding="utf-8")
        return self.open(folder, verify=False)


@dataclass(frozen=True)
class Computed:
    """An array whose rows are computed when they are asked for: only those are in memory."""

    rows_of: Callable[[np.ndarray], np.ndarray]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.rows_of(rows)


def in_batches(rows: np.ndarray, batch: int) -> list[np.ndarray]:
    """The row numbers (N,) in parts of at most `batch`."""
    return np.split(rows, range(batch, len(rows), batch))


def as_stored(computed: Mapping[str, object]) -> dict[str, np.ndarray]:
    """What is stored of computed arrays or tensors: floats as float16, everything else as it is.

    UserError on values that float16 cannot hold.
    """
    return {
        name: storable(name, torch.as_tensor(value).detach().cpu().numpy())
        for name, value in computed.items()
    }


def storable(name: str, array: np.ndarray) -> np.ndarray:
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


def _read_manifest(folder: Path, key: Mapping[str, object]) -> tuple[dict, dict[str, tuple]]:
    """The manifest of a store, and the type, shape and checksum of each of its arrays."""
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        forms = {
            name: (np.dtype(form["dtype"]), (about["rows"], *form["shape"]), form["crc32"])
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


def _mapped(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], crc32: int, verify: bool
) -> np.ndarray:
    found = path.stat().st_size if path.exists() else 0
    expected = dtype.itemsize * int(np.prod(shape))
    if found < expected:
        raise UserError(
            f"{path} is cut short ({found} of {expected} bytes); delete {path.parent} "
            "and build it again."
        )
    array = np.memmap(path, dtype, "r", shape=shape)
    if verify and zlib.crc32(array) != crc32:
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

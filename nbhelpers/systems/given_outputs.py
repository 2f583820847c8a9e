"""Read what a model put out: embeddings or scores of a split, without the model and without torch.

`.npy` is memory-mapped. `.npz`, `.safetensors` and `.parquet` may give ids, by which rows are
ordered; other rows must stand in the order of the split's images and captions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nbhelpers.data.reading import match_ids
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError, printable, reason
from nbhelpers.files import given
from nbhelpers.metrics import recall, trec
from nbhelpers.metrics.protocols import Scores

IDS = ("ids", "id", "image_id", "image_ids", "caption_id", "names", "file", "filename")
FORMS = (".npy", ".npz", ".safetensors", ".parquet")


@dataclass(frozen=True, eq=False)
class Given:
    """Outputs of a model for a split: embeddings of images and texts, or scores alone.

    images (N,D), texts (M,D), perhaps memory-mapped; or scores
    digest  sha256 of the files;  notes: what was understood
    """

    name: str
    digest: str
    images: np.ndarray | None = None
    texts: np.ndarray | None = None
    scores: Scores | None = None
    notes: list[str] = field(default_factory=list)


def embeddings(images: Path | str, texts: Path | str, table: CaptionTable) -> Given:
    """Read the embeddings of all images and captions of a table.

    UserError for files that hold no matrix of numbers, ids that do not match, and shapes that do
    not fit, with what they look like: transposed, exchanged, one row for each caption.
    """
    seen, seen_ids = read_matrix(images)
    read, read_ids = read_matrix(texts)
    count, captions = len(table), len(table.captions)
    if seen_ids is None and read_ids is None and _exchanged(seen, read, count, captions):
        raise UserError(
            f"{images} has a row for each caption and {texts} one for each image; exchange --images"
            " and --texts."
        )
    dtypes = " and ".join(sorted({_as_read(each.dtype) for each in (seen, read)}))
    rows = len(seen) + len(read)
    seen = _in_order(seen, seen_ids, images, _Items.images(table))
    read = _in_order(read, read_ids, texts, _Items.captions(table))
    if seen.shape[1] != read.shape[1]:
        raise UserError(
            f"{images} has {seen.shape[1]} numbers a row and {texts} has {read.shape[1]}; give"
            " vectors of one space, after the projection."
        )
    by = [name for name, ids in (("images", seen_ids), ("captions", read_ids)) if ids is not None]
    notes = [
        f"{count:,} images x {captions:,} captions, {seen.shape[1]} numbers each, {dtypes}; "
        + (f"{' and '.join(by)} ordered by their ids" if by else "rows in the order of the list")
    ]
    if rows > count + captions:
        notes.append(f"{rows - count - captions:,} rows of other images or captions were left out")
    return Given(Path(images).stem, digest(images, texts), seen, read, None, notes)


def similarity(path: Path | str, table: CaptionTable) -> Given:
    """Read the scores (images, captions) of a table.

    UserError for other shapes, NaN, infinity, and for distances, where small numbers mark own
    pairs. Minus infinity may mark pairs without a score.
    """
    matrix, ids = read_matrix(path)
    wanted = (len(table), len(table.captions))
    if matrix.shape == wanted[::-1] != wanted:
        raise UserError(f"{path} holds captions x images; give its transpose, images x captions.")
    if ids is not None and matrix.shape[1] == wanted[1]:
        matrix = _in_order(matrix, ids, path, _Items.images(table))
    if matrix.shape != wanted:
        raise UserError(
            f"{path} holds {_shape(matrix)} scores, but the split has {wanted[0]:,} images x"
            f" {wanted[1]:,} captions; give one row an image, one column a caption."
        )
    _refuse_distances(matrix, table.owner(), path)
    _refuse_infinity(matrix, path)
    order = "rows and columns in the order of the list"
    if ids is not None:
        order = "rows ordered by their ids, columns in the order of the list"
    notes = [f"scores of {wanted[0]:,} images x {wanted[1]:,} captions, {matrix.dtype}; {order}"]
    return Given(Path(path).stem, digest(path), None, None, Scores.of(matrix), notes)


def run(path: Path | str, table: CaptionTable) -> Given:
    """Read a TREC run of both directions, as `trec.read`."""
    names = trec.Names.of(list(table.images.image_id), table.owner())
    scores, notes = trec.read(path, names)
    return Given(Path(path).stem, digest(path), None, None, scores, notes)


def read_matrix(path: Path | str) -> tuple[np.ndarray, list[str] | None]:
    """Return the numbers (R,C) of a file of FORMS, and the ids of its rows where it has them.

    UserError for a file that cannot be read or holds no matrix, and for another number of ids.
    """
    path = given(path)
    if path.suffix.lower() not in FORMS:
        raise UserError(f"{path} is none of {', '.join(FORMS)}; write one of these files.")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; name a file of embeddings or scores.")
    try:
        found, ids = _READERS[path.suffix.lower()](path)
    except UserError:
        raise
    except Exception as error:  # each library has errors of its own
        if "object" in str(error).lower():  # numpy will not unpickle them
            raise UserError(
                f"{path} holds Python objects; save numbers as a plain array (float32), and ids as"
                " an array of strings."
            ) from error
        raise UserError(
            f"{path} cannot be read ({reason(error)}); write it again as {path.suffix}."
        ) from error
    if found.ndim != 2 or found.dtype.kind not in "fiu" or not found.size:
        raise UserError(
            f"{path} holds {found.dtype} of shape {_shape(found)}; give a matrix of numbers, one"
            " row an item."
        )
    if ids is not None and len(ids) != len(found):
        raise UserError(f"{path} has {len(ids)} ids for {len(found)} rows; give one id a row.")
    return found, ids


def _npy(path: Path) -> tuple[np.ndarray, None]:
    _check_start(path, b"\x93NUMPY", "numpy.save")
    return np.load(path, mmap_mode="r", allow_pickle=False), None


def _npz(path: Path) -> tuple[np.ndarray, list[str] | None]:
    _check_start(path, b"PK", "numpy.savez")
    with np.load(path, allow_pickle=False) as file:
        return _one_of({name: file[name] for name in file.files}, path)


def _check_start(path: Path, start: bytes, by: str) -> None:
    """Raise UserError for a file of another form; numpy would take it for a pickle."""
    with path.open("rb") as file:
        begins = file.read(len(start))
    if begins and begins != start:  # an empty file is refused by its reader
        raise UserError(f"{path} is no {path.suffix} file, only called so; write it with {by}.")


def _safetensors(path: Path) -> tuple[np.ndarray, list[str] | None]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        found, ids = _one_of({name: file.get_tensor(name) for name in file.keys()}, path)  # noqa: SIM118
        listed = (file.metadata() or {}).get("ids")
    return found, ids if ids is not None or listed is None else list(map(str, json.loads(listed)))


def _parquet(path: Path) -> tuple[np.ndarray, list[str] | None]:
    from pyarrow import parquet, types

    table = parquet.read_table(path)
    ids = next((table[name].to_pylist() for name in IDS if name in table.column_names), None)
    lists = [
        field.name
        for field in table.schema
        if types.is_list(field.type)
        or types.is_large_list(field.type)
        or types.is_fixed_size_list(field.type)
    ]
    if len(lists) != 1:
        raise UserError(
            f"{path} has {len(lists)} columns of vectors; keep one, a list of numbers in each row."
        )
    column = table[lists[0]].combine_chunks()
    lengths = set(np.unique(column.value_lengths().to_numpy(zero_copy_only=False)).tolist())
    if len(lengths) != 1:
        raise UserError(f"{path} has vectors of several lengths; give vectors of one space.")
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    return vectors, None if ids is None else list(map(str, ids))


_READERS: dict[str, Callable[[Path], tuple[np.ndarray, list[str] | None]]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}


def _one_of(arrays: dict[str, np.ndarray], path: Path) -> tuple[np.ndarray, list[str] | None]:
    """Return the only matrix of a file, and its ids."""
    matrices = [name for name, array in arrays.items() if array.ndim == 2]
    if len(matrices) != 1:
        raise UserError(
            f"{path} holds {len(matrices)} matrices ({', '.join(sorted(arrays)[:5]) or 'none'});"
            " keep one."
        )
    ids = next((arrays[name] for name in IDS if name in arrays), None)
    return arrays[matrices[0]], None if ids is None else [_text(one) for one in ids.tolist()]


def _text(one: object) -> str:
    return one.decode() if isinstance(one, bytes) else str(one)


@dataclass(frozen=True, eq=False)
class _Items:
    """The images or the captions of a split, as rows of a file may be called by them.

    place  ids -> the row of each in the split, None for unknown ones;  such: an id to show
    """

    kind: str
    count: int
    such: str
    place: Callable[[list[str]], Sequence[int | None]]

    @classmethod
    def images(cls, table: CaptionTable) -> _Items:
        such = str(table.images.image_id.iloc[0])
        return cls("images", len(table), such, lambda ids: _image_rows(ids, table))

    @classmethod
    def captions(cls, table: CaptionTable) -> _Items:
        such = f"{table.captions.image_id.iloc[0]}#0"
        return cls("captions", len(table.captions), such, lambda ids: _caption_rows(ids, table))


def _in_order(
    rows: np.ndarray, ids: list[str] | None, path: Path | str, items: _Items
) -> np.ndarray:
    """Return the rows in the order of the split; UserError where they are not one for each item."""
    count, kind = items.count, items.kind
    if ids is None:
        if len(rows) == count:
            return rows
        if rows.shape[1] == count:
            raise UserError(f"{path} is transposed, {_shape(rows)}; give one row for each item.")
        raise UserError(
            f"{path} has {len(rows):,} rows, but the split has {count:,} {kind}; encode every"
            f" item once, in the order of the list."
        )
    found = items.place(ids)
    known = [row for row in found if row is not None]
    if len(set(known)) < len(known):
        twice = next(row for row, times in Counter(known).items() if times > 1)
        name = ids[found.index(twice)]
        raise UserError(f"{path} has the id {printable(name)} twice; keep one row for each item.")
    if len(known) < count:
        raise UserError(
            f"{path} has ids for {len(known):,} of the {count:,} {kind} (its first:"
            f" {printable(ids[0])}); call them as the caption file does, such as"
            f" {printable(items.such)}."
        )
    row_of = {row: number for number, row in enumerate(found) if row is not None}
    return rows[[row_of[row] for row in range(count)]]


def _image_rows(ids: list[str], table: CaptionTable) -> list[int | None]:
    row = {str(name): number for number, name in enumerate(table.images.image_id)}
    file = dict(zip(table.images.file, table.images.image_id, strict=True))
    by_id = match_ids(ids, list(row))
    by_file = [file.get(str(name)) for name in match_ids(ids, list(file))]
    best = max(by_id, by_file, key=lambda names: sum(name is not None for name in names))
    return [None if name is None else row[name] for name in best]


def _caption_rows(ids: list[str], table: CaptionTable) -> list[int | None]:
    """Rows of captions called IMAGE#K, by their number, or by their image in its order."""
    names = trec.Names.of(list(table.images.image_id), table.owner())
    row = {name: number for number, name in enumerate(names.captions)}
    if any(name in row for name in ids):
        return [row.get(name) for name in ids]
    if len(ids) == len(row) and set(ids) == {str(number) for number in range(len(row))}:
        return [int(one) for one in ids]
    numbered = [re.fullmatch(r"(.*)#(\d+)", one) for one in ids]
    called = [found[1] if found else one for found, one in zip(numbered, ids, strict=True)]
    once = list(dict.fromkeys(called))
    image = dict(zip(once, _image_rows(once, table), strict=True))
    seen: Counter[str] = Counter()
    rows = []
    for number, one in zip(numbered, called, strict=True):
        k = int(number[2]) if number else seen[one]
        seen[one] += 1
        known = image[one]
        rows.append(None if known is None else row.get(f"{names.images[known]}#{k}"))
    return rows


def _exchanged(seen: np.ndarray, read: np.ndarray, count: int, captions: int) -> bool:
    return count != captions and (len(seen), len(read)) == (captions, count)


def _refuse_infinity(matrix: np.ndarray, path: Path | str) -> None:
    for row, scores in enumerate(matrix if matrix.dtype.kind == "f" else ()):
        if np.isposinf(scores).any():
            raise UserError(
                f"{path} holds infinity in row {row}; look for a number that overflowed"
                f" {_as_read(matrix.dtype)}, and leave out its factor or compute in a wider type."
            )


def _refuse_distances(matrix: np.ndarray, owner: np.ndarray, path: Path | str) -> None:
    """UserError where own pairs have the smallest numbers."""
    chance = recall.chance(owner)["mR"]
    here = recall.evaluate(matrix, owner).metrics["mR"]
    signed = matrix if matrix.dtype.kind == "f" else matrix.astype(np.float64)
    turned = recall.evaluate(-signed, owner).metrics["mR"] if here < chance else 0.0
    if turned > 2 * chance:
        raise UserError(
            f"{path} looks like distances: mR is {here:.1f}, and {turned:.1f} when turned around;"
            " give scores, of which higher ones are better, for example the negative distances."
        )


def _as_read(dtype: np.dtype) -> str:
    return "float32" if dtype == np.float32 else f"{dtype} read as float32"


def _shape(array: np.ndarray) -> str:
    return " x ".join(f"{size:,}" for size in array.shape) or "one number"


def digest(*paths: Path | str) -> str:
    """Return the sha256 (hex) of files."""
    found = hashlib.sha256()
    for path in paths:
        with open(Path(path).expanduser(), "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()

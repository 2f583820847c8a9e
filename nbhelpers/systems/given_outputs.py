"""Read what a model put out: embeddings or scores of a split, without the model and without torch.

`.npy` is memory-mapped. `.npz`, `.safetensors` and `.parquet` may give ids, by which rows are
ordered; other rows must stand in the order of the split's images and captions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nbhelpers.data.reading import match_ids
from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError, printable, reason
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
    seen, seen_ids = _matrix(images)
    read, read_ids = _matrix(texts)
    count, captions = len(table), len(table.captions)
    if seen_ids is None and read_ids is None and _exchanged(seen, read, count, captions):
        raise UserError(
            f"{images} has a row for each caption and {texts} one for each image; exchange --images"
            " and --texts."
        )
    dtypes = " and ".join(sorted({_as_read(each.dtype) for each in (seen, read)}))
    seen = _in_order(seen, seen_ids, images, count, "images", lambda ids: _image_rows(ids, table))
    read = _in_order(
        read, read_ids, texts, captions, "captions", lambda ids: _caption_rows(ids, table)
    )
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
    return Given(Path(images).stem, _digest(images, texts), seen, read, None, notes)


def similarity(path: Path | str, table: CaptionTable) -> Given:
    """Read the scores (images, captions) of a table.

    UserError for other shapes, NaN, and for distances, where small numbers mark own pairs.
    """
    matrix, _ = _matrix(path)
    wanted = (len(table), len(table.captions))
    if matrix.shape == wanted[::-1] != wanted:
        raise UserError(f"{path} holds captions x images; give its transpose, images x captions.")
    if matrix.shape != wanted:
        raise UserError(
            f"{path} holds {_shape(matrix)} scores, but the split has {wanted[0]:,} images x"
            f" {wanted[1]:,} captions; give one row an image, one column a caption."
        )
    _refuse_distances(matrix, table.owner(), path)
    notes = [
        f"scores of {wanted[0]:,} images x {wanted[1]:,} captions, {matrix.dtype}; rows"
        " and columns in the order of the list"
    ]
    return Given(Path(path).stem, _digest(path), None, None, Scores.of(matrix), notes)


def run(path: Path | str, table: CaptionTable) -> Given:
    """Read a TREC run of both directions, as `trec.read`."""
    names = trec.Names.of(list(table.images.image_id), table.owner())
    scores, notes = trec.read(path, names)
    return Given(Path(path).stem, _digest(path), None, None, scores, notes)


def _matrix(path: Path | str) -> tuple[np.ndarray, list[str] | None]:
    """(numbers (R,C), ids of the rows where the file has them)."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in FORMS:
        raise UserError(f"{path} is none of {', '.join(FORMS)}; write one of these files.")
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a file of embeddings or scores.")
    try:
        found, ids = _READERS[path.suffix.lower()](path)
    except UserError:
        raise
    except Exception as error:  # each library has errors of its own
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
    return np.load(path, mmap_mode="r", allow_pickle=False), None


def _npz(path: Path) -> tuple[np.ndarray, list[str] | None]:
    with np.load(path, allow_pickle=False) as file:
        return _one_of({name: file[name] for name in file.files}, path)


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


def _in_order(
    rows: np.ndarray,
    ids: list[str] | None,
    path: Path | str,
    count: int,
    kind: str,
    place: Callable[[list[str]], Sequence[int | None]],
) -> np.ndarray:
    """Return the rows in the order of the split; UserError where they are not one for each item."""
    if ids is None:
        if len(rows) == count:
            return rows
        if rows.shape[1] == count:
            raise UserError(f"{path} is transposed, {_shape(rows)}; give one row for each item.")
        raise UserError(
            f"{path} has {len(rows):,} rows, but the split has {count:,} {kind}; encode every"
            f" item once, in the order of the list."
        )
    if len(set(ids)) < len(ids) and kind == "images":
        twice = next(one for one in ids if ids.count(one) > 1)
        raise UserError(f"{path} has the id {printable(twice)} twice; keep one row an image.")
    found = place(ids)
    rows_of = {row: number for number, row in enumerate(found) if row is not None}
    if len(rows_of) < count:
        raise UserError(
            f"{path} has ids for {len(rows_of):,} of the {count:,} {kind} (its first:"
            f" {printable(ids[0])}); call them as the caption file does, captions IMAGE#0, IMAGE#1."
        )
    return rows[[rows_of[row] for row in range(count)]]


def _image_rows(ids: list[str], table: CaptionTable) -> list[int | None]:
    row = {str(name): number for number, name in enumerate(table.images.image_id)}
    file = dict(zip(table.images.file, table.images.image_id, strict=True))
    by_id = match_ids(ids, list(row))
    by_file = [file.get(str(name)) for name in match_ids(ids, list(file))]
    best = max(by_id, by_file, key=lambda names: sum(name is not None for name in names))
    return [None if name is None else row[name] for name in best]


def _caption_rows(ids: list[str], table: CaptionTable) -> list[int | None]:
    """Rows of captions called IMAGE#K, or by their image, in the order of its captions."""
    names = trec.Names.of(list(table.images.image_id), table.owner())
    row = {name: number for number, name in enumerate(names.captions)}
    if any(name in row for name in ids):
        return [row.get(name) for name in ids]
    if len(set(ids)) == len(ids) and set(ids) == {str(number) for number in range(len(ids))}:
        return [int(one) for one in ids]
    once = list(dict.fromkeys(ids))
    image = dict(zip(once, _image_rows(once, table), strict=True))
    seen: dict[str, int] = {}
    found = []
    for one in ids:
        number = seen[one] = seen.get(one, -1) + 1
        known = image[one]
        found.append(None if known is None else row.get(f"{names.images[known]}#{number}"))
    return found


def _exchanged(seen: np.ndarray, read: np.ndarray, count: int, captions: int) -> bool:
    return count != captions and (len(seen), len(read)) == (captions, count)


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


def _digest(*paths: Path | str) -> str:
    found = hashlib.sha256()
    for path in paths:
        with open(Path(path).expanduser(), "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()

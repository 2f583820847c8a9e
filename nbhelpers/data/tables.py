"""Read tables of images and captions: ViLT's arrow tables, and those of `datasets`.

| what       | columns, by preference, in any letter case                                       |
|------------|----------------------------------------------------------------------------------|
| images     | image, img: the bytes of image files, or a struct of bytes and path              |
| captions   | captions, caption, sentences, text, raw: a text, or a list of texts or of        |
|            | structs with a field `raw`                                                       |
| file names | filename, file_name, the paths in the images, image_id, img_id                   |
| splits     | split; else the name of the file, or of its folder, tells it                     |

On disk: `S_train.arrow`; `train-00000-of-00001.parquet`, also in `data/`; `train/0000.parquet`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nbhelpers.data.arrow_sizes import unfolded_size
from nbhelpers.data.images import checksum
from nbhelpers.data.packed import Entry, files_in, split_by_name
from nbhelpers.data.reading import CAPTION_FIELDS, column_names, sentence, split_file, split_of
from nbhelpers.data.table import safe_file_name
from nbhelpers.errors import DAMAGE, UserError, reason

IMAGES = ("image", "img")
UNFOLDED = 20  # a table may unfold to at most so many times its own size ...
SMALL = 256 * 2**20  # ... unless that is fewer bytes than this
ROWS = 64  # read at once
LAYOUT_OF = {".arrow": "arrow", ".parquet": "hub"}


def table_files(path: Path) -> list[Path]:
    """List the tables of a folder, or one table with those of the other splits of its set."""
    if path.is_dir():
        return files_in(path, ".arrow") or files_in(path, ".parquet")
    own = split_file(path.name)
    if not own:
        in_folders = split_of(path.resolve().parent.name)
        beside = files_in(path.resolve().parent.parent, path.suffix.lower()) if in_folders else []
        return beside if path.resolve() in beside else [path]
    named = [(file, split_file(file.name)) for file in files_in(path.parent, path.suffix.lower())]
    return [file for file, found in named if found and found.set == own.set] or [path]


def read_entries(path: Path, notes: list[str]) -> Iterator[Entry]:
    """Read the rows of a table. If it has no images, all digests are "".

    A sentence about columns that were not read is added to `notes`. UserError if the table is
    damaged, lacks captions or a split, or has neither images nor their names.
    """
    table = _open(path)
    images = _images(table, path)
    names = _names(table)
    if table.num_rows and images is None and not any(names):
        raise UserError(
            f"{path} has neither images nor file names ({_described(table)}); add a "
            "column image with the bytes of the image files, or a column filename."
        )
    splits = _splits(table, path)
    captions = table[_caption_column(table, path, notes)].to_pylist()
    for row, (name, split, texts) in enumerate(zip(names, splits, captions, strict=True)):
        read, several = partial(_image, images, row), isinstance(texts, list)
        yield Entry(
            f"row {row} of {path.name}",
            name,
            split_of(split) or split,
            [sentence(text) for text in (texts if several else [texts])],
            "" if images is None else checksum(read()),
            read,
            once=several and images is None,
        )


def refuse_without_images(path: Path) -> None:
    """Raise UserError if a table has no images, but at most their paths."""
    table = _open(path)
    if _images(table, path) is None:
        first = next(filter(None, _names(table)), "none")
        raise UserError(
            f"{path} holds the names of images (first: {first}) but not the images; "
            "name the folder or archive of these files as the images, or write their "
            "bytes into the column image."
        )


def _open(path: Path):
    """The pyarrow Table of a file, its columns in lower case.

    The bytes of an arrow file are mapped, those of a parquet file are in memory. UserError if it
    is damaged or has a column twice.
    """
    parquet = path.suffix.lower() == ".parquet"
    try:
        table = _parquet_table(path) if parquet else _arrow_table(path)
        table.validate(full=True)
        _refuse_bombs(path, _as_values(table))
    except UserError:
        raise
    except (*DAMAGE, pa.ArrowException) as error:
        kind = "parquet" if parquet else "arrow"
        raise UserError(
            f"{path} is not a readable {kind} table ({reason(error)}); fetch it again."
        ) from error
    return table.rename_columns(column_names(table.column_names, str(path)))


def _parquet_table(path: Path):
    """Read in parts, so that a small file cannot unfold to gigabytes."""
    most, size = _most(path), 0
    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        parts = []
        declared = sum(group.total_byte_size for group in groups)
        if declared <= most:
            for part in file.iter_batches(batch_size=ROWS):
                parts.append(part)
                size += part.nbytes
                if size > most:
                    break
        _refuse_bombs(path, max(declared, size))
        return pa.Table.from_batches(parts, schema=file.schema_arrow)


def _most(path: Path) -> int:
    """Return how many bytes a table may unfold to."""
    return max(UNFOLDED * path.stat().st_size, SMALL)


def _as_values(table) -> int:
    """Return the most bytes that the rows take as values.

    A column of nulls has no bytes, but each row is a value. A dictionary has a value once, which
    many rows may name.
    """
    size = 8 * table.num_rows
    for column in table.columns:
        for chunk in column.chunks:
            if pa.types.is_dictionary(chunk.type) and len(chunk.dictionary):
                size += len(chunk) * _longest(chunk.dictionary)
    return size


def _longest(values) -> int:
    """Return the bytes of the longest of some values."""
    if _is_text(values.type) or pa.types.is_binary(values.type):
        return pc.max(pc.binary_length(values)).as_py() or 0
    return values.nbytes


def _refuse_bombs(path: Path, size: int) -> None:
    if size > _most(path):
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, but would unfold to more than "
            f"{_most(path)}; do not use it."
        )


def _arrow_table(path: Path):
    mapped = pa.memory_map(str(path))
    _refuse_bombs(path, unfolded_size(mapped))
    mapped.seek(0)
    try:
        return pa.ipc.open_file(mapped).read_all()
    except pa.ArrowInvalid:  # the other of arrow's two forms
        mapped.seek(0)
        return pa.ipc.open_stream(mapped).read_all()


def _described(table) -> str:
    columns = [f"{field.name} ({field.type})" for field in table.schema]
    return f"its columns: {', '.join(columns) or 'none'}"


def _image_column(table):
    """(name, type, fields of a struct) of the column of images; (None, None, []) without one."""
    name = next((name for name in IMAGES if name in table.column_names), None)
    if name is None:
        return None, None, []
    kind = table.schema.field(name).type
    return name, kind, [field.name for field in kind] if pa.types.is_struct(kind) else []


def _images(table, path: Path):
    """The column of encoded images; None if there are only paths, or no such column."""
    name, _, fields = _image_column(table)
    if name is None:
        return None
    column = pc.struct_field(table[name], "bytes") if "bytes" in fields else table[name]
    kind = column.type
    if column.null_count == len(column) or _is_text(kind):
        return None
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"The column {name} of {path} holds {kind}, not the bytes of image files; "
            "write the files (PNG, JPEG) as binary, or as a struct of bytes and path."
        )
    return column


def _is_text(kind) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _image(column, row: int) -> bytes:
    return column[row].as_py() or b""


def _names(table) -> list[str | None]:
    """The file name of each row, from the first column that has any; an empty one is None."""
    for values in _name_columns(table):
        if any(value not in (None, "") for value in values):
            return [None if value in (None, "") else str(value) for value in values]
    return [None for _ in range(table.num_rows)]


def _name_columns(table) -> Iterator[list]:
    for name in ("filename", "file_name"):
        if name in table.column_names:
            yield table[name].to_pylist()
    name, kind, fields = _image_column(table)
    if "path" in fields:
        yield [_relative(value) for value in pc.struct_field(table[name], "path").to_pylist()]
    elif name and _is_text(kind):
        yield [_relative(value) for value in table[name].to_pylist()]
    for name in ("image_id", "img_id"):
        if name in table.column_names:
            yield table[name].to_pylist()


def _relative(path: str | None) -> str | None:
    """A path of the writer's machine; only its last part where it leaves the folder of images."""
    if not path or safe_file_name(path):
        return path
    return PureWindowsPath(PurePosixPath(path).name).name


def _splits(table, path: Path) -> list[str]:
    if "split" in table.column_names:
        return table["split"].to_pylist()
    named = split_by_name(path)
    if named is None:
        raise UserError(
            f"{path} has no column split, and neither its name nor its folder tells "
            f"one; rename it to {path.stem}_train{path.suffix}, or _val or _test."
        )
    return [named for _ in range(table.num_rows)]


def _caption_column(table, path: Path, notes: list[str]) -> str:
    found = [name for name in CAPTION_FIELDS if name in table.column_names]
    if not found:
        raise UserError(
            f"{path} has no column {', '.join(CAPTION_FIELDS[:-1])} or {CAPTION_FIELDS[-1]} "
            f"({_described(table)}); rename the one of the captions to captions."
        )
    if len(found) > 1:
        notes.append(
            f"The captions of {path.name} were taken from its column {found[0]}, not from "
            f"{', '.join(found[1:])}."
        )
    return found[0]

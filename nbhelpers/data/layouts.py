"""Read the caption layouts that papers publish into a CaptionTable.

| layout   | on disk                                                                             |
|----------|-------------------------------------------------------------------------------------|
| karpathy | one file `{"images": [{"filename", "split", "sentences": [{"raw", "tokens"}]}]}`     |
| precomp  | a folder of `train_caps.txt` + `train_filename.txt`, the same for val and test;      |
|          | AMFMN's `train_*_verify.txt` and `val_*_verify.txt` are its train list, divided     |
| rows     | `S_train.json`: one `{"image", "caption", "label_name"}` per caption, val and test: |
|          | five per image; also as JSON lines, `S_train.jsonl` or `train/metadata.jsonl`       |
| lavis    | `S_train.json` as above; `S_test.json` of images, captions in `S_test_gt.json`      |
| coco     | `captions_train2017.json`: `{"images": [{"id", "file_name"}], "annotations"}`        |
| nwpu     | one file `{class: [{"filename", "split", "raw", "raw_1", ... "raw_4"}]}`             |
| shards   | WebDataset tars,                                                                    |
| arrow    | ViLT's tables, and                                                                  |
| hub      | parquet tables of `datasets`, all three with their images inside: see `shards`      |
| csv      | your own table: a first line `image,caption` and, if there are, `split`, `class`    |

The split of a row is in the row itself, or else in the name of its file (`reading.split_file`). If
it is in neither, a hash of the image's name decides. Files whose names differ only in the split are
read together.

In no layout do image ids stay the same from one release to the next. So the id is the stem of the
file name (or the path, where stems repeat). The same set then has the same ids and the same
fingerprint in every layout.

`layout_writers` writes some of these layouts.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from nbhelpers.data import resplits, shards
from nbhelpers.data.reading import (
    CAPTION_FIELDS,
    FILE_FIELDS,
    JSON_LINES,
    SPLIT_PATTERN,
    column_names,
    first_field,
    json_content,
    match_ids,
    read_text,
    sentence,
    split_file,
    split_of,
)
from nbhelpers.data.rows import Reading, Rows, hashed_split
from nbhelpers.data.table import SPLITS, CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.files import given

LAYOUTS = ("karpathy", "precomp", "rows", "lavis", "coco", "nwpu", "shards", "arrow", "hub", "csv")
TABLES = (".csv", ".tsv")
SUFFIXES = (".json", *JSON_LINES, *TABLES)

_PRECOMP_FILE = re.compile(
    rf"(?P<word>{SPLIT_PATTERN})_(?P<part>caps|filename)(?P<verify>_verify)?" r"\.txt",
    re.IGNORECASE,
)
_AS_TABLE = (
    "write its captions into a file like town.csv whose first line is image,caption,split "
    "(data/README.md, 'Bring your own data set')"
)
_MORE_CAPTIONS = re.compile(r"(?:caption|sentence|raw|text)s?[_ -]?\d+")


def read(path: Path | str, layout: str | None = None) -> CaptionTable:
    """Read the images and captions at `path` (a file, or the folder of a layout of several files).

    Empty captions are dropped as in `without_empty`. UserError, with one sentence for each kind of
    problem.
    """
    return scan(path, layout).usable()


def scan(path: Path | str, layout: str | None = None, joined: bool = False) -> Reading:
    """Read as `read` does, but continue after broken rows and report them.

    With `joined`, captions of an image that is listed twice in its split are joined. UserError if
    nothing can be read.
    """
    path = given(path)
    if layout not in (None, *LAYOUTS):
        raise UserError(f"Unknown layout '{layout}'; the layouts are {', '.join(LAYOUTS)}.")
    if not path.exists():
        raise UserError(
            f"{path} does not exist; name the caption file, or the folder that holds its parts."
        )
    if path.is_file() and _PRECOMP_FILE.fullmatch(path.name):
        path = path.parent
    rows = Rows(joined)
    if packed := shards.layout_of(path):
        _agree(packed, layout, path)
        return rows.reading(path, _plain_name(shards.read(path, rows)), packed)
    if path.is_dir():
        path = caption_file(path)
    if path.is_dir():
        _agree("precomp", layout, path)
        _read_precomp(path, rows)
        name = path.resolve().name.lower().removesuffix("_precomp")
        return rows.reading(path, _plain_name(name), "precomp")
    found, named = _read_files(path, layout, rows)
    return rows.reading(path, _plain_name(named or _set_name(path)), found)


def _plain_name(name: str) -> str:
    name = name.lower().removeprefix("dataset_").removeprefix("dataset-")
    return re.sub(r"[^\w.-]+", "_", name)[:60].strip("._") or "captions"


def _set_name(path: Path) -> str:
    named = split_file(path.name)
    name = named.set if named else path.stem
    if _in_split_folder(path):
        return path.resolve().parent.parent.name
    return path.resolve().parent.name if name.lower() in ("", "dataset", "metadata") else name


def _agree(found: str, layout: str | None, path: Path) -> None:
    if layout not in (None, found):
        raise UserError(f"{path} is in the layout {found}, not {layout}; name {found} or none.")


def caption_file(folder: Path) -> Path:
    """Find the caption file of a set in a folder; for precomp lists, the folder itself.

    UserError if it holds none, or more than one set.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if any(_PRECOMP_FILE.fullmatch(file.name) for file in files):
        return folder
    own = [file for file in files if file.suffix.lower() in SUFFIXES[1:]]
    in_splits = filter(_in_split_folder, folder.glob("*/metadata.*"))
    sets = _sets(filter(_is_published, files)) or _sets(own) or _sets(in_splits)
    if not sets:
        raise UserError(
            f"{folder} holds no caption file of a known layout (dataset*.json, "
            "*_train.json, train_caps.txt with train_filename.txt, *.csv, *.jsonl); "
            f"name the folder or the file that does.{shards.not_shards(folder)}"
        )
    if len(sets) > 1:
        raise UserError(
            f"{folder} holds several sets ({', '.join(file.name for file in sets)}); "
            "name one of the files."
        )
    return sets[0]


def _is_published(file: Path) -> bool:
    name = file.name.lower()
    return name.endswith(".json") and (name.startswith("dataset") or split_file(name) is not None)


def _sets(files: Iterable[Path]) -> list[Path]:
    """One file of each set, the one with the shortest name."""
    first: dict[object, Path] = {}
    for file in sorted(sorted(files), key=lambda file: len(file.name)):
        named = split_file(file.name)
        first.setdefault(named.family if named else file.name, file)
    return sorted(first.values())


def _family(path: Path) -> dict[tuple[str | None, bool], Path]:
    """The files of one set beside each other, by split and whether they are ground truth."""
    own = split_file(path.name)
    files: dict[tuple[str | None, bool], Path] = {}
    if _in_split_folder(path):
        for file in sorted(path.parent.parent.glob(f"*/{path.name}")):
            if split := split_of(file.parent.name):
                _put_once(files, (split, False), file)
        return files
    if not own:
        return {(None, False): path}
    for file in sorted(path.parent.iterdir()):
        named = split_file(file.name)
        if named and named.family == own.family:
            _put_once(files, (named.split, named.truth), file)
    return files


def _in_split_folder(path: Path) -> bool:
    """Whether a file is like train/metadata.jsonl, which `datasets` puts beside the images."""
    return path.stem.lower() == "metadata" and split_of(path.parent.name) is not None


def _put_once(files: dict, key: tuple, file: Path) -> None:
    if key in files:
        raise UserError(
            f"{files[key]} and {file.name} are both of the split {key[0]}; remove one "
            "of them, or write both into one file."
        )
    files[key] = file


def _note_beside(path: Path, read_files: list[Path], rows: Rows) -> None:
    """Notes the files that begin with the name of the set but were not read."""
    named = split_file(path.name)
    name = named.set if named else path.stem
    begins = re.compile(re.escape(name) + r"[_. -]", re.IGNORECASE)
    others = sorted(
        file.name
        for file in path.parent.iterdir()
        if file.suffix.lower() in SUFFIXES and file not in read_files and begins.match(file.name)
    )
    if name and others:
        rows.notes.append(
            f"Not read: {', '.join(others[:5])} beside {path.name}; if they are of "
            f"the same set, name the files {name}_train{path.suffix}, "
            f"{name}_val{path.suffix}, {name}_test{path.suffix}."
        )


class _Part(NamedTuple):
    """Hold a file of a set: its layout, and its JSON or, of a table, its rows and their places."""

    path: Path
    layout: str
    content: Any


def _open(path: Path, rows: Rows) -> _Part:
    text = read_text(path, rows.notes)
    if path.suffix.lower() in TABLES:
        return _Part(path, "csv", _csv_rows(text, path, rows))
    if path.suffix.lower() not in SUFFIXES and text.lstrip()[0] not in "{[":
        raise UserError(f"{path} is neither JSON nor a table ({', '.join(SUFFIXES)}); {_AS_TABLE}.")
    data = json_content(text, path)
    return _Part(path, _detect(data, path), data)


def _detect(data, path: Path) -> str:
    if isinstance(data, dict):
        if isinstance(data.get("images"), list):
            return "coco" if isinstance(data.get("annotations"), list) else "karpathy"
        lists = list(data.values())
        if all(isinstance(rows, list) for rows in lists) and _any_has(chain(*lists), "filename"):
            return "nwpu"
    elif isinstance(data, list) and _any_has(data, *FILE_FIELDS):
        return "rows"
    raise UserError(f"{path} is JSON in none of the known layouts; {_AS_TABLE}.")


def _any_has(rows: Iterable, *fields: str) -> bool:
    """Whether a row has one of the fields."""
    return any(isinstance(row, dict) and first_field(row, fields) for row in rows)


def _read_files(path: Path, layout: str | None, rows: Rows) -> tuple[str, str | None]:
    """Read a file and the other splits of its set; return the layout and the name in the file."""
    own = _open(path, rows)
    if own.layout == "nwpu":
        _agree("nwpu", layout, path)
        _read_nwpu(own.content, rows)
        return "nwpu", None
    alone = own.layout == "karpathy" and _any_has(own.content["images"], "split")
    only: dict[tuple[str | None, bool], Path] = {(None, False): path}
    files = only if alone else _family(path)
    parts = {key: own if file == path else _open(file, rows) for key, file in files.items()}
    found = _common_layout(parts)
    found = layout if found == "rows" and layout == "lavis" else found  # a train list is of both
    _agree(found, layout, path)
    for split in (*SPLITS, None):
        if listed := _listed(parts.get((split, False)), parts.get((split, True)), rows):
            _add(listed, split, files.get((split, False), path).name, rows)
    if not alone:
        _note_beside(path, list(files.values()), rows)
    name = own.content.get("dataset") if found == "karpathy" else None
    return found, name if isinstance(name, str) else None


def _common_layout(parts: dict[tuple[str | None, bool], _Part]) -> str:
    """The layout of all parts; "lavis" where one is a ground truth. UserError if they differ."""
    first = next((part for (_, truth), part in parts.items() if not truth), None)
    listed = first.layout if first else "coco"
    for (_, truth), part in parts.items():
        if part.layout != ("coco" if truth else listed):
            beside = f" of {first.path.name}" if first else ""
            raise UserError(
                f"{part.path} does not belong to the layout{beside}; move it to another folder."
            )
    return "lavis" if any(truth for _, truth in parts) else listed


def _listed(part: _Part | None, truth: _Part | None, rows: Rows) -> list[tuple[str, dict]]:
    """List the rows of one split with their places; captions come from its ground truth, if any."""
    if part is None:
        return _coco_rows(truth.content, rows) if truth else []
    if part.layout == "csv":
        return part.content
    if part.layout == "coco":
        listed = _coco_rows(part.content, rows)
    elif part.layout == "karpathy":
        listed = _karpathy_rows(part.content, rows)
    else:
        listed = list(rows.objects(part.content, part.path.name))
    if _in_split_folder(part.path):
        listed = [(where, _below(part.path.parent.name, row)) for where, row in listed]
    return _with_truth(listed, truth.content, rows) if truth else listed


def _add(listed: list[tuple[str, dict]], split: str | None, name: str, rows: Rows) -> None:
    """Add rows of any layout by their fields FILE_FIELDS, CAPTION_FIELDS, split and class."""
    fields = set().union(*(row for _, row in listed))
    has_split = "split" in fields
    if not has_split and split is None:
        rows.notes.append(
            f"Neither a column or field 'split' nor the name {name} tells a split: a "
            "tenth of the images went to val and a tenth to test, by a hash of "
            "their names."
        )
    for where, row in listed:
        file, given = _file(row), _given(row)
        of = row.get("split") if has_split else split or hashed_split(str(file))
        several = isinstance(given, list)
        texts = [sentence(one) for one in (given if several else [given])]
        scene = row.get("class", row.get("label_name"))
        rows.add(where, file, of, None if given is None else texts, scene, once=several)
    if unread := sorted(filter(_MORE_CAPTIONS.fullmatch, fields)):
        rows.notes.append(
            f"Not read: {', '.join(unread)} of {name}; write one caption "
            "per row, or all of an image as a list in 'captions'."
        )


def _file(row: dict):
    return row.get(first_field(row, FILE_FIELDS))


def _below(folder: str, row: dict) -> dict:
    """The row with the folder before its file name."""
    if not isinstance(_file(row), str):
        return row
    return row | {str(first_field(row, FILE_FIELDS)): f"{folder}/{_file(row)}"}


def _given(row: dict):
    return row.get(first_field(row, CAPTION_FIELDS))


def _karpathy_rows(data: dict, rows: Rows) -> list[tuple[str, dict]]:
    listed = list(rows.objects(data["images"], "images"))
    resplit = all("harma_split" in row and split_of(row.get("split")) != "val" for _, row in listed)
    if not listed or not resplit:
        return listed
    pairs = [(split_of(row.get("split")), split_of(row["harma_split"])) for _, row in listed]
    rows.notes.append(
        "The field 'split' has no val; the published re-split in 'harma_split' was taken."
        f" {resplits.sentence(resplits.of_rows(pairs))}"
    )
    return [(where, row | {"split": row["harma_split"]}) for where, row in listed]


def _coco_rows(data: dict, rows: Rows) -> list[tuple[str, dict]]:
    captions = _annotations(data, rows)
    listed = []
    for where, row in rows.objects(data["images"], "images"):
        listed.append((where, row | {"captions": captions.pop(str(row.get("id")), None)}))
    rows.stray(captions)
    return listed


def _with_truth(listed: list[tuple[str, dict]], truth: dict, rows: Rows) -> list[tuple[str, dict]]:
    """The rows with the captions of a ground truth, by the ids of the rows or of the files.

    Rows that hold as many captions themselves stay as they are.
    """
    captions = _annotations(truth, rows)
    own = [_given(row) for _, row in listed]
    complete = all(isinstance(texts, list) for texts in own)
    if complete and sum(map(len, own)) == sum(map(len, captions.values())):
        return listed
    images = [row for row in truth["images"] if isinstance(row, dict)]
    named = {str(row.get("file_name")): row.get("id") for row in images}
    files = [str(_file(row)) for _, row in listed]
    given = [
        str(row.get("image_id", row.get("id", named.get(file, file))))
        for file, (_, row) in zip(files, listed, strict=True)
    ]
    either = (match_ids(given, captions), match_ids(files, captions))
    ids = min(either, key=lambda ids: ids.count(None))
    rows.stray(one for one in captions if one not in set(ids))
    texts = [None if one is None else captions.get(one) for one in ids]
    return [
        (where, row | {"captions": own}) for (where, row), own in zip(listed, texts, strict=True)
    ]


def _annotations(truth: dict, rows: Rows) -> dict[str, list]:
    captions = defaultdict(list)
    for _, row in rows.objects(truth["annotations"], "annotations"):
        captions[str(row.get("image_id"))].append(row.get("caption"))
    return captions


def _read_nwpu(data: dict, rows: Rows) -> None:
    for scene, listed in data.items():
        for where, row in rows.objects(listed, scene):
            file = row.get("filename")
            if isinstance(file, str) and file and "/" not in file:
                file = f"{scene}/{file}"
            texts = [row[field] for field in sorted(row) if re.fullmatch(r"raw(_\d+)?", field)]
            rows.add(where, file, row.get("split"), texts, scene)


def _csv_rows(text: str, path: Path, rows: Rows) -> list[tuple[str, dict]]:
    first = text.partition("\n")[0].strip()
    delimiter = next((one for one in ";\t" if one in first), ",")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = column_names(next(lines), str(path))
        found = [(lines.line_num, cells) for cells in lines if any(map(str.strip, cells))]
    except csv.Error as error:
        raise UserError(
            f"{path} is no readable CSV (line {lines.line_num}: {error}); put captions "
            "that hold a comma or a quotation mark into double quotes, and double the "
            "marks in them."
        ) from error
    wanted = {"image": FILE_FIELDS, "caption": CAPTION_FIELDS}
    missing = [name for name, fields in wanted.items() if not {*fields} & {*columns}]
    if missing:
        raise UserError(
            f"{path} has no column {' and no column '.join(missing)}; its first line "
            "must name the columns, as in image,caption or image,caption,split,class, "
            f"but is '{first[:100]}'."
        )
    listed = []
    for number, cells in found:
        if len(cells) == len(columns):
            row = dict(zip(columns, map(str.strip, cells), strict=True))
            listed.append((f"line {number} of {path.name}", row))
        else:
            rows.faults["cells"].append(f"line {number} of {path.name}")
    return listed


def _read_precomp(folder: Path, rows: Rows) -> None:
    pairs = _precomp_pairs(folder, rows)
    for (split, _), (caps, names) in _precomp_choice(pairs, rows).items():
        captions, files = _lines(caps, rows), _lines(names, rows)
        files = files[: _full(files)]
        fitting = (
            count
            for count in (len(files), 5 * len(files))
            if _full(captions) <= count <= len(captions)
        )
        captions = captions[: next(fitting, None)]
        if len(files) == len(captions):
            for index, (file, caption) in enumerate(zip(files, captions, strict=True)):
                rows.add(f"{names.name} line {index + 1}", file, split, [caption], once=False)
        elif 5 * len(files) == len(captions):
            rows.notes.append(
                f"{names.name} has one name per image; every five captions are of one image."
            )
            for index, file in enumerate(files):
                texts = captions[5 * index : 5 * index + 5]
                rows.add(f"{names.name} line {index + 1}", file, split, texts)
        else:
            raise UserError(
                f"{caps} has {len(captions)} captions and {names.name} {len(files)} "
                "names, neither one nor five captions per name; take both files from "
                "the same release."
            )


def _precomp_pairs(folder: Path, rows: Rows) -> dict[tuple[str, str], tuple[Path, Path]]:
    """(captions, names) of each (split, "" or "_verify").

    UserError if one of the two is not there.
    """
    found: dict[tuple[str, str, str], Path] = {}
    unknown = []
    for file in sorted(folder.iterdir()):
        match = _PRECOMP_FILE.fullmatch(file.name)
        if match:
            verify, part = (match["verify"] or "").lower(), match["part"].lower()
            key = (split_of(match["word"]), verify, part)
            _put_once(found, key, file)
        elif re.search(r"(caps|filename)\w*\.txt$", file.name, re.IGNORECASE):
            unknown.append(file.name)
    if unknown:
        rows.notes.append(
            f"Not read: {', '.join(unknown[:6])}; only lists of train, val and test are."
        )
    for (split, verify, part), file in found.items():
        other = "filename" if part == "caps" else "caps"
        if (split, verify, other) not in found:
            lacking = re.sub(part, other, file.name, flags=re.IGNORECASE)
            raise UserError(f"{file} has no {lacking} beside it; the two belong together.")
    return {
        (split, verify): (file, found[split, verify, "filename"])
        for (split, verify, part), file in found.items()
        if part == "caps"
    }


def _precomp_choice(pairs: dict, rows: Rows) -> dict:
    """The pairs to read.

    `train_*_verify` and `val_*_verify` (AMFMN) together are the plain train list, so they are taken
    where there is no plain val list.
    """
    plain = {split for split, verify in pairs if not verify}
    verified = {split for split, verify in pairs if verify}
    taken = verified - plain
    if "val" in taken and "train" in plain:
        taken = taken | {"train"} if "train" in verified else taken - {"val"}
    _note_verified(pairs, plain, verified, taken, rows.notes)
    kept = [(split, "_verify" if split in taken else "") for split in SPLITS]
    return {key: pairs[key] for key in kept if key in pairs}


def _note_verified(pairs: dict, plain: set, verified: set, taken: set, notes: list[str]) -> None:
    """Notes which of the lists of one split were read."""
    passed = [pairs[split, "_verify"][0].name for split in SPLITS if split in verified - taken]
    if passed:
        notes.append(f"Not read: {', '.join(passed)}; the lists without _verify were taken.")
    if taken:
        joined = f", not {pairs['train', ''][0].name}, which joins them" if taken & plain else ""
        notes.append(
            f"The authors' lists _verify were taken for {' and '.join(sorted(taken))}{joined}."
        )


def _lines(path: Path, rows: Rows) -> list[str]:
    # not str.splitlines, which breaks a caption at U+2028; an empty line is an empty caption
    text = read_text(path, rows.notes)
    text = text if "\n" in text else text.replace("\r", "\n")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _full(lines: list[str]) -> int:
    """How many lines there are without the blank ones at the end."""
    return max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)

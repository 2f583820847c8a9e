"""Readers and writers of the caption layouts that papers publish; every reader ends in a CaptionTable.

| layout   | on disk                                                                                       |
|----------|-----------------------------------------------------------------------------------------------|
| karpathy | one file `{"images": [{"filename", "split", "sentences": [{"raw", "tokens"}]}]}`               |
| precomp  | a folder of `train_caps.txt` + `train_filename.txt` and the same for val and test              |
| rows     | `S_train.json`: one `{"image", "caption", "label_name"}` per caption; val, test: five per image |
| lavis    | `S_train.json` as above; `S_test.json` of images, their captions in COCO's `S_test_gt.json`    |
| nwpu     | one file `{class: [{"filename", "split", "raw", "raw_1", ... "raw_4"}]}`                       |
| shards   | WebDataset tars,                                                                              |
| arrow    | ViLT's tables, and                                                                            |
| hub      | the parquet tables of `datasets`, all three with their images inside: see `shards`            |
| csv      | your own table: a first line `image,caption` and, if there are, `split` and `class`; a row per caption |

No layout has image ids that survive from one release to the next, so an id is the stem of the file name (or
the path, where stems repeat): the same set has the same ids and the same fingerprint in every layout.
"""
from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from nbhelpers.data import shards
from nbhelpers.data.reading import column_names, parse_json, read_text
from nbhelpers.data.rows import UNPRINTABLE, Reading, Rows, hashed_split
from nbhelpers.data.table import SPLITS, CaptionTable
from nbhelpers.errors import UserError, atomic_write

LAYOUTS = ("karpathy", "precomp", "rows", "lavis", "nwpu", "shards", "arrow", "hub", "csv")
WRITABLE = LAYOUTS[:4]

_SPLIT_FILE = re.compile(r"(?:(?P<set>.+)[_-])?(?P<split>train|val|test)(?P<gt>[_-]gt)?\.json", re.IGNORECASE)
_PRECOMP_FILE = re.compile(r"(train|val|test)_(caps|filename)\.txt")


def read(path: Path | str, layout: str | None = None) -> CaptionTable:
    """The images and captions at `path` (a file, or the folder of a layout of several files).

    Empty captions are dropped as in `without_empty`. Raises UserError, one sentence per class of problem.
    """
    return scan(path, layout).usable()


def scan(path: Path | str, layout: str | None = None, joined: bool = False) -> Reading:
    """As `read`, but goes on past broken rows and reports them; with `joined`, captions of an image that is listed twice in
    its split are joined. UserError where nothing can be read."""
    path = Path(path).expanduser()
    if layout not in (None, *LAYOUTS):
        raise UserError(f"Unknown layout '{layout}'; the layouts are {', '.join(LAYOUTS)}.")
    if not path.exists():
        raise UserError(f"{path} does not exist; name the caption file, or the folder that holds its parts.")
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
    if path.suffix.lower() == ".csv":
        _agree("csv", layout, path)
        _read_csv(path, rows)
        return rows.reading(path, _plain_name(path.stem), "csv")
    data = _load(path, rows)
    found = _detect(data, path)
    if isinstance(data, list) or found == "lavis":
        parts = _parts(path, rows)
        found = layout if layout in ("rows", "lavis") else found
        found = "lavis" if layout != "rows" and any(key.endswith("gt") for key in parts) else found
        _agree(found, layout, path)
        _read_rows(parts, rows)
        name = _SPLIT_FILE.fullmatch(path.name)["set"] or path.resolve().parent.name
        return rows.reading(path, _plain_name(name), found)
    _agree(found, layout, path)
    (_read_karpathy if found == "karpathy" else _read_nwpu)(data, rows)
    stem = path.resolve().parent.name if path.stem.lower() == "dataset" else path.stem
    given = data.get("dataset") if found == "karpathy" else None
    return rows.reading(path, _plain_name(given if isinstance(given, str) else stem), found)


def write(table: CaptionTable, path: Path | str, layout: str) -> None:
    """Writes layouts 1-4: a file for karpathy, else a folder; all of its files or, on an error, none.

    `read` gives the table back, captions grouped by image, where ids are stems (no layout stores ids). Precomp
    and lavis have no field for the scene class, so only classes that are in the file names come back.
    Raises UserError for an unknown layout and for images without captions, which no reader accepts.
    """
    if layout not in WRITABLE:
        raise UserError(f"Cannot write layout '{layout}'; the layouts written are {', '.join(WRITABLE)}.")
    texts = table.captions.text.str.replace(UNPRINTABLE, " ", regex=True)
    of = texts.groupby(table.captions.image_id, sort=False).agg(list)
    bare = table.images.image_id[~table.images.image_id.isin(of.index)]
    if len(bare):
        raise UserError(f"{len(bare)} of the images have no captions (first: {bare.iloc[0]}); drop them.")
    images = [(row.file, row.split, row.scene, of[row.image_id]) for row in table.images.itertuples()]
    files = _WRITERS[layout](table.name, images)
    path = Path(path)
    with ExitStack() as stack:
        for name, text in files.items():
            target = path / name if name else path
            stack.enter_context(atomic_write(target)).write_text(text, encoding="utf-8", newline="\n")


# ---- finding and opening ----

def _plain_name(name: str) -> str:
    name = name.lower().removeprefix("dataset_").removeprefix("dataset-")
    return re.sub(r"[^\w.-]+", "_", name)[:60].strip("._") or "captions"


def _agree(found: str, layout: str | None, path: Path) -> None:
    if layout not in (None, found):
        raise UserError(f"{path} is in the layout {found}, not {layout}; name {found} or none.")


def caption_file(folder: Path) -> Path:
    """The folder itself if it holds precomp lists, else the caption file in it that leads to the others.

    UserError if it holds none, or more than one set.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if any(_PRECOMP_FILE.fullmatch(file.name) for file in files):
        return folder
    split_files = [match for match in (_SPLIT_FILE.fullmatch(file.name) for file in files) if match]
    sets = sorted({match["set"] or "" for match in split_files})
    datasets = [file for file in files if re.fullmatch(r"dataset.*\.json", file.name, re.IGNORECASE)]
    if len(sets) == 1 and not datasets:
        return folder / min((match[0] for match in split_files), key=len)
    if not datasets and not sets:
        datasets = [file for file in files if file.suffix.lower() == ".csv"]
    if not datasets and not sets:
        raise UserError(f"{folder} holds no caption file of a known layout (dataset*.json, *_train.json, "
                        "train_caps.txt with train_filename.txt, *.csv); name the folder or the file that does."
                        + shards.not_shards(folder))
    if len(datasets) == 1 and not sets:
        return datasets[0]
    choices = [file.name for file in datasets] + [f"{name}_*.json" for name in sets]
    raise UserError(f"{folder} holds several sets ({', '.join(choices)}); name one of the files.")


def _load(path: Path, rows: Rows):
    return parse_json(read_text(path, rows.notes), str(path))


def _detect(data, path: Path) -> str:
    if isinstance(data, dict) and isinstance(data.get("images"), list):
        return "lavis" if isinstance(data.get("annotations"), list) else "karpathy"
    if isinstance(data, dict) and data and all(isinstance(rows, list) for rows in data.values()):
        if any("filename" in row for rows in data.values() for row in rows if isinstance(row, dict)):
            return "nwpu"
    if isinstance(data, list) and any(isinstance(row, dict) and "image" in row for row in data):
        labelled = any({"label", "label_name"} & row.keys() or isinstance(row.get("caption"), list)
                       for row in data if isinstance(row, dict))
        return "rows" if labelled else "lavis"
    raise UserError(f"{path} is JSON in none of the known layouts; convert it to one of {', '.join(LAYOUTS)}.")


def _parts(path: Path, rows: Rows) -> dict[str, list | dict]:
    """The files of one set beside each other, by split: {"train": rows, "test": rows, "testgt": {...}}."""
    own = _SPLIT_FILE.fullmatch(path.name)
    if not own:
        raise UserError(f"The name of {path} does not say its split; call it like S_train.json, S_test.json.")
    parts = {}
    for file in sorted(path.parent.iterdir()):
        match = _SPLIT_FILE.fullmatch(file.name)
        if match and match["set"] == own["set"]:
            key = match["split"].lower() + ("gt" if match["gt"] else "")
            parts[key] = _load(file, rows)
            right = isinstance(parts[key], list) if not match["gt"] else _detect(parts[key], file) == "lavis"
            if not right:
                raise UserError(f"{file} does not belong to the layout of {path.name}; move it or mend it.")
    return parts


# ---- the readers ----

def _read_karpathy(data: dict, rows: Rows) -> None:
    images = list(rows.objects(data["images"], "images"))
    resplit = bool(images) and all("harma_split" in row and row.get("split") != "val" for _, row in images)
    if resplit:
        rows.notes.append("The field 'split' has no val; the published re-split in 'harma_split' was taken.")
    for where, row in images:
        sentences = row.get("sentences")
        texts = [_sentence(item) for item in sentences] if isinstance(sentences, list) else None
        split = row.get("harma_split" if resplit else "split")
        rows.add(where, row.get("filename"), split, texts, row.get("class"))


def _sentence(item) -> str | None:
    """`raw`, or the joined tokens where only they were kept."""
    if not isinstance(item, dict):
        return None
    tokens = item.get("tokens")
    if "raw" not in item and isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        return " ".join(tokens)
    return item.get("raw")


def _read_precomp(folder: Path, rows: Rows) -> None:
    for split in SPLITS:
        caps, names = folder / f"{split}_caps.txt", folder / f"{split}_filename.txt"
        if caps.exists() != names.exists():
            there, lacking = (caps, names) if caps.exists() else (names, caps)
            raise UserError(f"{there} has no {lacking.name} beside it; the two belong together.")
        if not caps.exists():
            continue
        captions, files = _lines(caps, rows), _lines(names, rows)
        if len(files) == len(captions):
            for index, (file, caption) in enumerate(zip(files, captions)):
                rows.add(f"{names.name} line {index + 1}", file, split, [caption], once=False)
        elif 5 * len(files) == len(captions):
            rows.notes.append(f"{names.name} has one name per image; every five captions are of one image.")
            for index, file in enumerate(files):
                rows.add(f"{names.name} line {index + 1}", file, split, captions[5 * index:5 * index + 5])
        else:
            raise UserError(f"{caps} has {len(captions)} captions and {names.name} {len(files)} names, neither "
                            "one nor five captions per name; take both files from the same release.")


def _lines(path: Path, rows: Rows) -> list[str]:
    # not str.splitlines, which breaks a caption at U+2028 and its like; an empty line is an empty caption
    return [line.removesuffix("\r") for line in read_text(path, rows.notes).removesuffix("\n").split("\n")]


def _read_rows(parts: dict, rows: Rows) -> None:
    for split in SPLITS:
        truth = parts.get(f"{split}gt")
        captions = _annotations(truth, rows) if truth else None
        listed = parts.get(split, [{"image": row.get("file_name"), "image_id": row.get("id")}
                                   for _, row in rows.objects(truth["images"], "images")] if truth else [])
        for where, row in rows.objects(listed, split):
            file, caption = row.get("image"), row.get("caption")
            if captions is not None:
                stem = PurePosixPath(file).stem if isinstance(file, str) else ""
                caption = captions.pop(str(row.get("image_id", stem)), None)
            once = captions is not None or isinstance(caption, list)
            texts = caption if once or caption is None else [caption]
            rows.add(where, file, split, texts, row.get("label_name"), once)
        if captions:
            rows.faults["stray"] += captions


def _annotations(truth: dict, rows: Rows) -> dict[str, list]:
    captions = defaultdict(list)
    for _, row in rows.objects(truth["annotations"], "annotations"):
        captions[str(row.get("image_id"))].append(row.get("caption"))
    return captions


def _read_nwpu(data: dict, rows: Rows) -> None:
    fields = ("raw", "raw_1", "raw_2", "raw_3", "raw_4")
    for scene, listed in data.items():
        for where, row in rows.objects(listed, scene):
            file = row.get("filename")
            if isinstance(file, str) and file and "/" not in file:
                file = f"{scene}/{file}"
            rows.add(where, file, row.get("split"), [row[field] for field in fields if field in row], scene)


def _read_csv(path: Path, rows: Rows) -> None:
    """One row per caption. Without a column `split`, a hash of the file name puts a tenth of the images into val and a tenth
    into test: the same ones on every machine, and the same when others are added."""
    text = read_text(path, rows.notes)
    first = text.partition("\n")[0].strip()
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=next((one for one in ";\t" if one in first), ","), strict=True)
    try:
        columns = column_names(next(lines), str(path))
        found = [(lines.line_num, cells) for cells in lines if any(cells)]
    except csv.Error as error:
        raise UserError(f"{path} is no readable CSV (line {lines.line_num}: {error}); put captions that hold a comma or a "
                        "quotation mark into double quotes, and double the marks in them.") from error
    if missing := {"image", "caption"} - set(columns):
        raise UserError(f"{path} has no column {' and no column '.join(sorted(missing))}; its first line must name the columns, "
                        f"as in image,caption or image,caption,split,class, but is '{first[:100]}'.")
    if "split" not in columns:
        rows.notes.append("There is no column 'split': a tenth of the images went to val and a tenth to test, by a hash of "
                          "their names.")
    for number, cells in found:
        if len(cells) != len(columns):
            rows.faults["cells"].append(f"line {number}")
            continue
        row = {name: cell.strip() for name, cell in zip(columns, cells)}
        split = row.get("split", hashed_split(row["image"]))
        rows.add(f"line {number}", row["image"], split, [row["caption"]], row.get("class"), once=False)


# ---- the writers: (name, [(file, split, scene, captions)]) -> {file name: text}, "" the path itself ----

def _write_karpathy(name: str, images: list) -> dict[str, str]:
    listed, count = [], 0
    for imgid, (file, split, scene, texts) in enumerate(images):
        ids = list(range(count, count := count + len(texts)))
        sentences = [{"raw": text, "tokens": text.split(), "imgid": imgid, "sentid": sentid}
                     for sentid, text in zip(ids, texts)]
        listed.append({"filename": file, "imgid": imgid, "split": split, "class": scene,
                       "sentences": sentences, "sentids": ids})
    return {"": json.dumps({"images": listed, "dataset": name})}


def _write_precomp(name: str, images: list) -> dict[str, str]:
    files = {}
    for split in _present(images):
        pairs = [(file, text) for file, of, _, texts in images if of == split for text in texts]
        files[f"{split}_filename.txt"] = "".join(f"{file}\n" for file, _ in pairs)
        files[f"{split}_caps.txt"] = "".join(f"{text}\n" for _, text in pairs)
    return files


def _write_rows(name: str, images: list) -> dict[str, str]:
    labels: dict[str, int] = {}
    parts = {split: [] for split in _present(images)}
    for image_id, (file, split, scene, texts) in enumerate(images):
        label = {"label_name": scene, "label": labels.setdefault(scene, len(labels))}
        if split == "train":
            row = {"image": file, "image_id": image_id, **label}
            parts[split] += [row | {"caption": text} for text in texts]
        else:
            parts[split].append({"image": file, "caption": texts, **label})
    return {f"{name}_{split}.json": json.dumps(part) for split, part in parts.items()}


def _write_lavis(name: str, images: list) -> dict[str, str]:
    files = {}
    for split in _present(images):
        own = [(image_id, file, texts) for image_id, (file, of, _, texts) in enumerate(images) if of == split]
        pairs = [(image_id, file, text) for image_id, file, texts in own for text in texts]
        if split == "train":
            part = [{"image": file, "caption": text, "image_id": image_id} for image_id, file, text in pairs]
        else:
            part = [{"image": file, "image_id": image_id} for image_id, file, _ in own]
            truth = {"images": [{"id": image_id} for image_id, _, _ in own], "annotations": [
                {"id": row, "image_id": image_id, "caption": text}
                for row, (image_id, _, text) in enumerate(pairs)]}
            files[f"{name}_{split}_gt.json"] = json.dumps(truth)
        files[f"{name}_{split}.json"] = json.dumps(part)
    return files


def _present(images: list) -> list[str]:
    return [split for split in SPLITS if any(image[1] == split for image in images)]


_WRITERS = dict(zip(WRITABLE, (_write_karpathy, _write_precomp, _write_rows, _write_lavis)))

"""Read files of generated captions and of their references, by image id."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from nbhelpers.data import layouts
from nbhelpers.data.reading import (
    FILE_FIELDS,
    JSON_LINES,
    captions_in,
    first_field,
    json_content,
    match_ids,
    read_text,
    split_file,
)
from nbhelpers.errors import UserError


def read_captions(path: Path | str, notes: list[str] | None = None) -> dict[str, str]:
    """Read captions by image id (as text).

    The file holds `{"captions": {id: text}}`, as the command `caption` writes it; or `{id: text}`;
    or COCO's results `[{"image_id", "caption"}]`, also as JSON lines. Decisions about the file are
    added to `notes`. UserError if an image has no text, or two.
    """
    found = _content(path, [] if notes is None else notes)
    if isinstance(found, dict):
        name = first_field(found, ("captions", "annotations"))
        found = found[name] if name else found
    captions = _texts_by_id(found, path) if isinstance(found, (dict, list)) else {}
    if not captions:
        raise UserError(
            f"{path} holds no captions; give COCO's [{{'image_id', 'caption'}}] or "
            "{'captions': {id: text}}."
        )
    for one, texts in captions.items():
        if len(texts) != 1:
            raise UserError(
                f"{path} captions image {one} {len(texts)} times; keep one caption for each image."
            )
    return {one: texts[0] for one, texts in captions.items()}


def read_references(
    path: Path | str,
    split: str = "test",
    captioned: Iterable[str] = (),
    notes: list[str] | None = None,
) -> dict[str, list[str]]:
    """Read reference captions by image id.

    The file holds `{"references": {id: [text]}}`, `{id: [text]}`, COCO's ground truth, rows of
    image_id and caption, or a split of a published layout.

    captioned  the ids of the generated captions. Where they differ from those of the references,
               the references take them: matched by file name or stem, by the lists or the ground
               truth beside the file, or else by number (UCM_3 is 3).
    notes      list to which decisions are added
    """
    notes, wanted = [] if notes is None else notes, list(captioned)
    namings = _namings(Path(path).expanduser(), split, notes)
    if not wanted:
        return next(namings)
    seen = []
    for naming in namings:
        seen.append(naming)
        if whole := _joined(naming, wanted, notes, numbers=False):
            return whole
    joined = (_joined(naming, wanted, notes, numbers=True) for naming in seen)
    return next(filter(None, joined), seen[0])


def _joined(
    naming: dict[str, list[str]], wanted: list[str], notes: list[str], numbers: bool
) -> dict[str, list[str]] | None:
    """The references under the ids that are wanted; None if an image is on one side only."""
    found = match_ids(wanted, naming, numbers)
    if None in found or len(set(found)) != len(naming):
        return None
    other = [(one, known) for one, known in zip(wanted, found, strict=True) if one != known]
    if other:
        notes.append(
            "Captions and references call the images otherwise; they were joined by name or "
            f"number (first: {other[0][0]} is {other[0][1]})."
        )
    new = dict(zip(found, wanted, strict=True))
    return {new[known]: texts for known, texts in naming.items()}


def _namings(path: Path, split: str, notes: list[str]) -> Iterator[dict[str, list[str]]]:
    """The references under the ids of the file, its file names, and those of files beside it."""
    is_json = path.suffix.lower() in (".json", *JSON_LINES)
    content = _content(path, notes) if is_json else None
    rows = _reference_rows(content)
    if rows is None:
        yield from _of_layout(path, split)
        for truth in _ground_truths(path, split):
            yield _references(_content(truth, notes)["annotations"], truth)
        return
    own = _references(rows, path)
    yield own
    files = _files_by_id(content)
    yield {files.get(one, one): texts for one, texts in own.items()}
    named = split_file(path.name)
    try:
        yield from _of_layout(path, named.split if named else split)
    except UserError:
        return  # no list of images beside it


def _of_layout(path: Path, split: str) -> Iterator[dict[str, list[str]]]:
    """The captions of a split in a published layout, by image id and by file name."""
    table = layouts.read(path).split(split)
    texts = table.captions.groupby("image_id", sort=False).text.apply(list).to_dict()
    yield texts
    files = dict(zip(table.images.image_id, table.images.file, strict=True))
    yield {files[one]: own for one, own in texts.items()}


def _reference_rows(content) -> list | dict | None:
    """What holds the references in a file of ours or COCO's; None for a published layout."""
    if isinstance(content, list):
        return content if content and all(map(_is_own_row, content)) else None
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("references"), (dict, list)):
        return content["references"]
    if isinstance(content.get("annotations"), list):
        return content["annotations"]
    return content if content and all(map(_are_plain, content.values())) else None


def _is_own_row(row) -> bool:
    return isinstance(row, dict) and "image_id" in row and _is_plain(row)


def _are_plain(texts) -> bool:
    return all(map(_is_plain, texts)) if isinstance(texts, list) else _is_plain(texts)


def _is_plain(text) -> bool:
    """Whether it is a text, or has a caption without the name of a file."""
    if isinstance(text, dict):
        return "caption" in text and first_field(text, FILE_FIELDS) is None
    return isinstance(text, str)


def _files_by_id(content) -> dict[str, str]:
    """COCO's file names by image id; none where two images share one."""
    images = content.get("images") if isinstance(content, dict) else None
    named = {}
    for row in images if isinstance(images, list) else []:
        if isinstance(row, dict) and isinstance(row.get("file_name"), str):
            named[str(row.get("id"))] = row["file_name"]
    return named if len(set(named.values())) == len(named) else {}


def _ground_truths(path: Path, split: str) -> list[Path]:
    """COCO's ground truth of a split in the folder of a layout, where there is just one."""
    files = (path if path.is_dir() else path.parent).glob("*.json")
    named = [(file, split_file(file.name)) for file in files]
    found = [file for file, name in named if name and name.truth and name.split == split]
    return found if len(found) == 1 else []


def _references(rows: list | dict, path: Path) -> dict[str, list[str]]:
    """The texts by image id, of which one may hold several references."""
    found = {}
    for one, texts in _texts_by_id(rows, path).items():
        try:
            found[one] = list(chain.from_iterable(map(captions_in, texts)))
        except ValueError:
            raise UserError(
                f"{path}: a reference of image {one} begins as a list but is none; write a "
                "text, or a list of texts."
            ) from None
    return found


def _texts_by_id(rows: list | dict, path: Path | str) -> dict[str, list[str]]:
    """The texts of `{id: text or texts}`, or of rows with image_id and caption, by id."""
    found: dict[str, list[str]] = {}
    pairs = rows.items() if isinstance(rows, dict) else [_pair(row, path) for row in rows]
    for one, given in pairs:
        own = found.setdefault(one, [])
        for text in given if isinstance(given, list) else [given]:
            text = text.get("caption") if isinstance(text, dict) else text
            if not isinstance(text, str):
                raise UserError(
                    f"{path}: a caption of image {one} is {json.dumps(text)[:60]}, not a "
                    "text; write it in quotation marks, if empty."
                )
            own.append(text)
    return found


def _pair(row, path: Path | str) -> tuple[str, object]:
    """The image id and the caption or captions in a row."""
    name = first_field(row, ("image_id", *FILE_FIELDS)) if isinstance(row, dict) else None
    if name is None or "caption" not in row:
        raise UserError(f"{path} has a row without image_id and caption; every row must have both.")
    one = row[name]
    if isinstance(one, float) and one.is_integer():
        one = int(one)
    if isinstance(one, bool) or not isinstance(one, (str, int)):
        raise UserError(
            f"{path} has the {name} {json.dumps(one)[:60]}; write a text or a whole number."
        )
    return str(one), row["caption"]


def _content(path: Path | str, notes: list[str]):
    """What a file of JSON, or of JSON lines, holds."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; name a file of captions.")
    return json_content(read_text(path, notes), path)

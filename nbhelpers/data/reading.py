"""Read text, JSON, splits, packed captions and ids by the rules that all readers share."""

from __future__ import annotations

import ast
import codecs
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from nbhelpers.errors import UserError, of_system
from nbhelpers.files import given

MAX_BYTES = 2**30  # the largest published caption file has 30 MB
EXTENSIONS = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp"}  # of images
JSON_LINES = (".jsonl", ".ndjson")

# Of a row, a sample or a table, by preference.
FILE_FIELDS = ("image", "filename", "file_name")
CAPTION_FIELDS = ("captions", "caption", "sentences", "text", "raw")

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),  # begins as UTF-16's
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SPLIT_PATTERN = "|".join(sorted(SPLIT_WORDS, key=len, reverse=True))
_SPLIT_FILE = re.compile(
    rf"(?:(?P<set>.+?)[_. -]+)?(?P<word>{SPLIT_PATTERN})(?P<number>[_-]?\d+)?"
    r"(?:-of-\d+)?(?:-[0-9a-f]{8,})?(?P<truth>[_-]gt)?"
    r"(?:[_. -](?:captions?|caps|annotations|data|metadata))?\.(?P<suffix>\w+)",
    re.IGNORECASE,
)
_STRING = re.compile(r"""[uU]?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")[\s,]*""", re.DOTALL)
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_LIST_BEGINS = re.compile(r"""\[[\s\[{(]*[uUbB]?['"]""")
_LIST_GOES_ON = re.compile(r"""['"]\s*,\s*['"{]|\]$""")
_LINE_BREAK = re.compile(r"\r\n|\r|\n")


def decode_text(data: bytes, name: str, notes: list[str]) -> str:
    """Decode text by its byte order mark, else as UTF-8, else as Windows-1252 with a note.

    UserError about the file `name` if it holds null bytes or contradicts its mark.
    """
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        if encoding != "utf-8":
            raise UserError(
                f"{name} begins as {encoding} text but goes on otherwise; save it as UTF-8."
            ) from None
        text = data.decode("cp1252", errors="replace")
        if "\0" not in text:
            notes.append(f"{name} is not UTF-8; it was read as Windows-1252.")
    if "\0" in text:
        raise UserError(
            f"{name} holds null bytes, so it is no plain text; save it as UTF-8, or "
            "name the right file."
        )
    return text


def read_text(path: Path | str, notes: list[str]) -> str:
    """Read the text of a file as `decode_text` does.

    UserError if it is empty, too large or cannot be read.
    """
    path = given(path)
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(
                f"{path} has {size / 2**30:.1f} GiB, too much for captions; name the right file."
            )
        data = path.read_bytes()
    except OSError as error:
        raise of_system(error, path) from error
    text = decode_text(data, str(path), notes)
    if not text.strip():
        raise UserError(f"{path} is empty; copy or download it again.")
    return text


def parse_json(text: str, name: str):
    """Parse JSON text.

    UserError about the file `name` if it is damaged or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, name))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"{name} is not readable JSON{place}; download it again or mend it."
        ) from None


def json_content(text: str, path: Path):
    """Parse the text of a file of JSON, or of JSON lines (a list). UserError as `parse_json`.

    The text is JSON lines if its first line is a whole object and another object follows. In a file
    .jsonl one object is enough.
    """
    match = re.match(r"\s*\{.*\}[ \t\r]*(?:\n\s*(?P<more>\{)|\s*$)", text)
    if not match or not (match["more"] or path.suffix.lower() in JSON_LINES):
        return parse_json(text, str(path))
    lines = enumerate(text.split("\n"), 1)
    return [parse_json(line, f"{path}, line {number},") for number, line in lines if line.strip()]


def first_field(names: Iterable[str], fields: tuple[str, ...]) -> str | None:
    """Find the first of the fields that is among the names; None without one."""
    return next((field for field in fields if field in names), None)


def sentence(item):
    """Take the text of a caption with fields; anything without fields is returned unchanged.

    The text is the field `raw`, the joined tokens if only they were kept, or the first of
    CAPTION_FIELDS.
    """
    if not isinstance(item, Mapping):
        return item
    tokens = item.get("tokens")
    only_tokens = "raw" not in item and isinstance(tokens, list)
    if only_tokens and all(isinstance(one, str) for one in tokens):
        return " ".join(tokens)
    return item.get(first_field(item, ("raw", *CAPTION_FIELDS)))


def _object(pairs: list[tuple], name: str) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        key = repeated(key for key, _ in pairs)
        first = f"{pairs[0][0]!r}: {pairs[0][1]!r}"[:60]
        raise UserError(
            f"{name} has the key {key!r} twice in one object (the one that begins with "
            f"{first}); give each value a key of its own."
        )
    return found


def repeated(names: Iterable[str]) -> str | None:
    """Find the first of the names that occurs more than once; None without one."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def column_names(names: Iterable[str], place: str) -> list[str]:
    """Strip byte order mark, outer spaces and letter case from the names of columns.

    UserError if one occurs twice.
    """
    plain = [name.strip("\ufeff \t\r\n\xa0").lower() for name in names]
    if twice := repeated(name for name in plain if name):
        raise UserError(
            f"{place} has the column '{twice}' more than once; rename or remove one of them."
        )
    return plain


def split_of(word) -> str | None:
    """Return train, val or test for a word that means it (`SPLIT_WORDS`, any case), else None."""
    return SPLIT_WORDS.get(word.strip().lower()) if isinstance(word, str) else None


class SplitFile(NamedTuple):
    """Hold the parts of the name of a file with a split.

    set     the name of the set, "" without one
    split   train, val or test
    truth   whether the file is a COCO ground truth
    family  equal for the files of one set
    """

    set: str
    split: str
    truth: bool
    family: tuple[str, str, str]


def split_file(name: str) -> SplitFile | None:
    """Read a name like S_train.json, S.valid.csv or captions_val2017.json; None without a split."""
    match = _SPLIT_FILE.fullmatch(name)
    if not match:
        return None
    own = match["set"] or ""
    family = (own.lower(), match["number"] or "", match["suffix"].lower())
    return SplitFile(own, SPLIT_WORDS[match["word"].lower()], bool(match["truth"]), family)


def captions_in(text: str) -> list[str]:
    """Split a text into its captions.

    They are the strings of a JSON, Python or numpy list, or the lines that are not empty, or else
    the text itself.

    ValueError for a text that begins as a list of strings but is none.
    """
    inner = text.strip()
    texts = _listed(inner) if inner[:1] in _BRACKETS else None
    if texts is None and _LIST_BEGINS.match(inner) and _LIST_GOES_ON.search(inner):
        raise ValueError("begins as a list")
    return list(chain.from_iterable(map(_lines, [text] if texts is None else texts)))


def _listed(text: str) -> list[str] | None:
    """Parse a list of strings, or a tuple or set of at least two, written as text; else None."""
    try:
        found = json.loads(text)
        strings = isinstance(found, list) and all(isinstance(one, str) for one in found)
        return found if strings else None
    except (ValueError, RecursionError):
        pass
    found, place, end = [], len(text) - len(text[1:].lstrip()), len(text) - 1
    while place < end and (match := _STRING.match(text, place, end)):
        found.append(match[1])
        place = match.end()
    whole = place == end and text[end] == _BRACKETS[text[0]]
    return list(map(_unquoted, found)) if whole and len(found) > (text[0] != "[") else None


def _unquoted(literal: str) -> str:
    """Evaluate a Python string literal, which may hold line breaks.

    If its escapes are not Python's, its text is returned unchanged.
    """
    if "\\" not in literal:
        return literal[1:-1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape
            return ast.literal_eval(literal[0] * 3 + literal[1:-1] + literal[0] * 3)
    except (ValueError, SyntaxError):
        return literal[1:-1]


def _lines(text: str) -> list[str]:
    lines = [line.strip() for line in _LINE_BREAK.split(text)]
    full = [line for line in lines if line]
    return full if len(full) > 1 else [text.strip("\r\n")]


def match_ids(wanted: list[str], known: Iterable[str], numbers: bool = True) -> list[str | None]:
    """Find the known id of the same image for each wanted id or file name, None without one.

    One rule is used for all, the first that finds most: equal ids; equal paths without extension;
    equal stems; equal numbers at the end (`UCM_3.png`, `UCM_3` and 3, as LAVIS numbers its ground
    truth). A rule under which two ids become equal is not used. Numbers are compared only with
    `numbers`, and only if all ids of one side are numbers.
    """
    known = list(dict.fromkeys(known))
    best: list[str | None] = [None for _ in wanted]
    rules: list[Callable[[str], str]] = [str, _without_extension, _stem]
    if numbers and any(all(_stem(one).isdigit() for one in side) for side in (known, wanted)):
        rules.append(_number)
    for rule in rules:
        keys = [rule(one) for one in known]
        asked = [rule(one) for one in wanted]
        if len(set(keys)) < len(keys) or len(set(asked)) < len(set(wanted)):
            continue
        of = dict(zip(keys, known, strict=True))
        found = [of.get(key) for key in asked]
        if sum(one is not None for one in found) > sum(one is not None for one in best):
            best = found
    return best


def _without_extension(name: str) -> str:
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in EXTENSIONS else name


def _stem(name: str) -> str:
    return _without_extension(PurePosixPath(name).name)


def _number(name: str) -> str:
    """Return the number that ends a stem, without leading zeros; the stem if there is none."""
    stem = _stem(name)
    digits = re.search("[0-9]+$", stem)
    return digits[0].lstrip("0") or "0" if digits else stem

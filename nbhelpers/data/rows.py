"""Collect the rows of a caption file into a CaptionTable; clean them and report problems."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd

from nbhelpers.data.reading import SPLIT_WORDS, captions_in, split_of
from nbhelpers.data.table import CAPTION_COLUMNS, IMAGE_COLUMNS, CaptionTable, safe_file_name
from nbhelpers.errors import UserError

MAX_EMPTY = 0.01  # share of empty captions above which the file is taken for broken
# marks that no caption has between words, but that join several captions
_JOINED = re.compile(r"\w[\s.]*(\|+|#{3,}|\t|<sep>|\[sep\])\s*\w", re.IGNORECASE)
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NUMBERED = re.compile(r"(.*[^\d_-])[_-]*\d+")

_FAULTS = {
    "row": "{n} rows are not JSON objects (first: {first}); write each as {{...}}.",
    "cells": (
        "{n} rows have more or fewer cells than the first line (first: {first}); put "
        "captions that hold a comma into double quotes."
    ),
    "name": "{n} rows have no file name (first: {first}); name the image of each.",
    "unsafe": (
        "{n} file names leave the image folder or hold control characters (first: {first}); "
        "list plain relative names without '..'."
    ),
    "split": (
        "{n} images have an unknown split (first: {first}); use one of the words "
        f"{', '.join(SPLIT_WORDS)}."
    ),
    "bare": "{n} images have no sentences (first: {first}); give each at least one or remove it.",
    "text": "{n} captions are not text (first: of {first}); write each as a string.",
    "packed": (
        "{n} texts begin as a list of captions but are none (first: of {first}); write one "
        "caption per row, or a list in JSON."
    ),
    "joined": (
        "{n} captions hold a mark as if several were joined by it (first: of {first}); "
        "write one caption per row, or a list in JSON."
    ),
    "twice": (
        "{n} file names are listed twice (first: {first}); list every image once, in one split."
    ),
    "moved": (
        "{n} rows put an image into a second split (first: {first}); give all captions of an image"
        " one split."
    ),
    "stray": "{n} annotated images are not listed (first: image_id {first}); list or drop them.",
}

_CHANGES = {
    "again": "{n} images were listed again; their captions were joined.",
    "cleaned": "{n} captions held control characters; each became a space.",
}


@dataclass(frozen=True)
class Reading:
    """Hold what `scan` found.

    table     every good row, empty captions included
    notes     sentences about what was decided
    problems  one sentence for each kind of problem
    """

    path: Path
    table: CaptionTable
    layout: str
    notes: list[str]
    problems: list[str]

    def usable(self) -> CaptionTable:
        """Return the table after `without_empty`.

        UserError with one sentence for each kind of problem.
        """
        if self.problems:
            raise UserError(f"{self.path}: " + " ".join(self.problems))
        return without_empty(self.table)


class Rows:
    """Collect images and captions, and for each kind of problem the places where it occurs.

    joined  True: join the captions of an image that is listed again in its split, and note it
    """

    def __init__(self, joined: bool = False):
        self.joined = joined
        self.images: dict[str, tuple[str, str]] = {}  # file -> split, scene
        self.captions: list[tuple[str, str]] = []  # file, text
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.notes: list[str] = []
        self.changes: Counter[str] = Counter()
        self.packed: list[tuple[str, int]] = []  # file and captions of each text with several
        self.marked: list[str] = []  # of each text that holds a separator: its file and the mark

    def add(self, where: str, file, split, texts, scene=None, once: bool = True) -> None:
        """Add one image with its captions; with once=False it may be added again with more."""
        part = split_of(split) or ""
        if fault := _fault_of_name(file, where) or self._fault_of_place(file, split, part, once):
            kind, place = fault
            self.faults[kind].append(place)
            return
        self.changes["again"] += once and file in self.images
        if not isinstance(texts, list) or not texts:
            self.faults["bare"].append(file)
            return
        scene = UNPRINTABLE.sub(" ", scene).strip() if isinstance(scene, str) else ""
        self.images.setdefault(file, (part, scene or scene_of(file)))
        for text in self._unpacked(file, texts):
            clean = UNPRINTABLE.sub(" ", text)
            self.changes["cleaned"] += clean != text
            self.captions.append((file, clean))

    def _fault_of_place(self, file: str, split, part: str, once: bool) -> tuple[str, str] | None:
        """The kind of fault, and its place, in the split of an image or in its coming again."""
        if not part:
            return "split", f"{file}: {split!r}"
        if file not in self.images:
            return None
        if once and not self.joined:
            return "twice", file
        first = self.images[file][0]
        return None if first == part else ("moved", f"{file}: {first} and {part}")

    def _unpacked(self, file: str, texts: list) -> list[str]:
        """The captions in the texts of an image, of which one may hold several."""
        found = []
        for text in texts:
            if not isinstance(text, str):
                self.faults["text"].append(file)
                continue
            try:
                captions = captions_in(text)
            except ValueError:
                self.faults["packed"].append(file)
                continue
            if not captions:
                self.faults["bare"].append(file)
            if len(captions) > 1:
                self.packed.append((file, len(captions)))
            if joined := _JOINED.search(text):
                self.marked.append(f"{file}, {joined[1]!r}")
            found += captions
        return found

    def objects(self, rows: list, where: str):
        """Yield the JSON objects among the rows, with the place of each."""
        for index, row in enumerate(rows):
            if isinstance(row, dict):
                yield f"{where}[{index}]", row
            else:
                self.faults["row"].append(f"{where}[{index}]")

    def stray(self, ids) -> None:
        """Report ids of annotations that no image has."""
        if ids := list(ids):
            self.faults["stray"] += ids

    def reading(self, path: Path, name: str, layout: str) -> Reading:
        """Make a table of all rows, with notes and problems."""
        ids = dict(zip(self.images, image_ids(list(self.images)), strict=True))
        images = [(ids[file], file, split, scene) for file, (split, scene) in self.images.items()]
        captions = [(ids[file], text) for file, text in self.captions]
        if 2 * len(self.marked) > len(captions):
            self.faults["joined"] = self.marked
        table = CaptionTable(
            name,
            pd.DataFrame(images, columns=IMAGE_COLUMNS, dtype=str),
            pd.DataFrame(captions, columns=CAPTION_COLUMNS, dtype=str),
        )
        problems = [
            _FAULTS[kind].format(n=len(found), first=found[0][:120])
            for kind, found in self.faults.items()
        ]
        self._note_changes()
        if captions:
            problems += self._without_text(table)
        elif not problems:
            problems.append("There is no caption at all; is this the right file?")
        return Reading(path, table, layout, self.notes, problems)

    def _note_changes(self) -> None:
        """Notes what was done to the captions."""
        if self.packed:
            count = sum(count for _, count in self.packed)
            self.notes.append(
                f"{len(self.packed)} texts held several captions (first: of "
                f"{self.packed[0][0]}); they were read as {count} captions, one per "
                "list entry or line."
            )
        counts = [(self.changes[kind], sentence) for kind, sentence in _CHANGES.items()]
        self.notes += [sentence.format(n=count) for count, sentence in counts if count]

    def _without_text(self, table: CaptionTable) -> list[str]:
        """The problem of too many empty captions; a few are noted."""
        empty = _empty(table)
        bare = table.captions.image_id[empty]
        if empty.mean() > MAX_EMPTY:
            return [
                f"{len(bare)} of {len(empty)} captions are empty (first: of {bare.iloc[0]}), "
                f"more than {MAX_EMPTY:.0%}; the file is damaged."
            ]
        if len(bare):
            self.notes.append(
                f"{len(bare)} captions of {bare.nunique()} images are empty; training drops them."
            )
        return []


def _fault_of_name(file, where: str) -> tuple[str, str] | None:
    """The kind of fault, and its place, in the name of an image."""
    if not isinstance(file, str) or not file:
        return "name", where
    plain = safe_file_name(file) and PurePosixPath(file).name == file.split("/")[-1]
    return ("unsafe", f"{file[:100]!r}") if not plain or UNPRINTABLE.search(file) else None


def scene_of(file: str) -> str:
    """Read the class in a file name (airport_1.jpg -> airport); else the name is the class."""
    match = _NUMBERED.fullmatch(PurePosixPath(file).stem)
    return match[1] if match else file


def draw(name: str) -> float:
    """Draw a number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def hashed_split(name: str) -> str:
    """Draw the split of an image by its name: a tenth val, a tenth test, the rest train."""
    place = draw(name)
    if place < 0.1:
        return "val"
    return "test" if place < 0.2 else "train"


def image_ids(files: list[str]) -> list[str]:
    """Return the stems of the file names; if they repeat, the paths, with extension if needed."""
    paths = [PurePosixPath(file) for file in files]
    for ids in ([p.stem for p in paths], [str(p.with_suffix("")) for p in paths]):
        if len(set(ids)) == len(files):
            return ids
    return files


def without_empty(table: CaptionTable) -> CaptionTable:
    """Drop the empty captions of train and val, and images there that have no other caption.

    The test split stays as published, because fewer queries would be another protocol.
    """
    test = table.captions.image_id.isin(table.images.image_id[table.images.split == "test"])
    captions = table.captions[test | ~_empty(table)]
    keep = table.images.image_id.isin(captions.image_id)
    return CaptionTable(table.name, table.images[keep], captions)


def _empty(table: CaptionTable) -> pd.Series:
    return table.captions.text.str.strip() == ""

"""Read images that lie in one file with their captions: what shards and tables share."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from nbhelpers.data.images import ImageStore, checksum
from nbhelpers.data.reading import split_file, split_of
from nbhelpers.data.rows import Rows
from nbhelpers.errors import UserError


class Entry(NamedTuple):
    """Hold an image with captions, from a sample of a shard or a row of a table.

    place   its name in messages
    name    the name of the image as listed, None without one
    split   from the column or the name of the file
    texts   as stored: a list of texts, each with one or several captions
    digest  `images.checksum` of the encoded image: equal images have equal digests
    read    returns the encoded image
    once    True: a second entry of the same name is an error, since the images cannot be compared
    """

    place: str
    name: str | None
    split: str
    texts: list
    digest: str
    read: Callable[[], bytes]
    once: bool = False


class PackedImages(ImageStore):
    """Read images that lie beside their captions; messages name the sample or row of each."""

    def __init__(self, path: Path, entries: list[Entry]):
        found: dict[str, Entry] = {}
        for name, entry in zip(image_names(entries), entries, strict=True):
            found.setdefault(name, entry)
        super().__init__(path, found, self._read_unchanged)
        self._found = found

    def where(self, member: str) -> str:
        """Name an image in messages, with its sample or row."""
        return f"{member} ({self._found[member].place})"

    def _read_unchanged(self, member: str) -> bytes:
        data = self._found[member].read()
        if checksum(data) != self._found[member].digest:
            raise UserError(
                f"{self.where(member)} changed since {self.path} was opened; run again "
                "when nothing writes to it."
            )
        return data


def image_names(entries: list[Entry]) -> list[str]:
    """Name the image of each entry, so that one name stands for one image.

    Equal images of one name are one image. Different images with one name get their split as a
    folder (`0.png` in train and test: `train/0.png`, `test/0.png`), or within a split the first
    digits of their digests (`1f3b5a7c9e0d/1.png`). An image without a name is named after its split
    and the number of its first row there, counted from 0 (`test/17`).
    """
    names = _listed_names(entries)
    images: dict[str, set[str]] = defaultdict(set)
    of_split: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name, entry in zip(names, entries, strict=True):
        images[name].add(entry.digest)
        of_split[name, entry.split].add(entry.digest)
    found = []
    for name, entry in zip(names, entries, strict=True):
        if len(images[name]) > 1:
            alone = len(of_split[name, entry.split]) == 1
            in_split = f"{entry.split}/{name}"
            name = in_split if alone and in_split not in images else f"{entry.digest[:12]}/{name}"
        found.append(name)
    return found


def _listed_names(entries: list[Entry]) -> list[str]:
    rows: Counter[str] = Counter()
    first: dict[tuple[str, str], str] = {}
    names = []
    for entry in entries:
        of_row = f"{entry.split}/{rows[entry.split]}"
        rows[entry.split] += 1
        if entry.name is None:
            names.append(first.setdefault((entry.split, entry.digest), of_row))
        else:
            names.append(entry.name)
    return names


def add_entries(entries: list[Entry], rows: Rows) -> None:
    """Add images and captions to `rows`, and note how many names stood for several images."""
    names = image_names(entries)
    renamed = {}
    for name, entry in zip(names, entries, strict=True):
        rows.add(entry.place, name, entry.split, entry.texts, once=entry.once)
        if entry.name not in (None, name):
            renamed[entry.name] = name
    if renamed:
        listed, name = next(iter(renamed.items()))
        rows.notes.append(
            f"{len(renamed)} file names stand for different images, so these are called by "
            f"split or checksum, too (first: one {listed} is {name})."
        )
    if any(entry.name is None for entry in entries):
        rows.notes.append("Images without a file name are called by split and row, as test/0.")


def split_by_name(file: Path) -> str | None:
    """Read the split in the name of a file, or else of its folder; None if there is none."""
    named = split_file(file.name)
    return named.split if named else split_of(file.resolve().parent.name)


def set_name(files: Iterable[Path], folder: Path) -> str:
    """Read the set in the names of all files, or else in that of their folder."""
    named = [split_file(file.name) for file in files]
    sets = {found.set if found else "" for found in named}
    if len(sets) == 1 and (only := sets.pop()):
        return only
    folder = folder.resolve()
    inner = split_of(folder.name) or folder.name in ("data", "default")
    return folder.parent.name if inner and folder.parent.name else folder.name


def files_in(folder: Path, suffix: str) -> list[Path]:
    """List the files of a kind in a folder, or in its folders named after splits, by name.

    If there are none, list those of its folder `data` or `default`, as in data sets on the Hugging
    Face hub.
    """
    for place in (folder, folder / "data", folder / "default"):
        inner = [one for one in _visible(place) if split_of(one.name) and one.is_dir()]
        for folders in ([place], inner):
            visible = chain.from_iterable(map(_visible, folders))
            found = [one for one in visible if one.suffix.lower() == suffix and one.is_file()]
            if found:
                return found
    return []


def _visible(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*"))

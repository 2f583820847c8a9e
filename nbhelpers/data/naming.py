"""Find the image file that a listed name means, if folder, extension, case or form differ."""

from __future__ import annotations

import os.path
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain, takewhile
from pathlib import PurePosixPath
from typing import NamedTuple

from nbhelpers.data.reading import EXTENSIONS, split_of
from nbhelpers.errors import UserError


class _Name(NamedTuple):
    folder: tuple[str, ...]
    stem: str
    extension: str


def _same_form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _parsed(name: str) -> _Name:
    """Split a name into its parts, in NFC and without case; only image extensions count."""
    path = PurePosixPath(_same_form(_same_form(name).casefold()))
    extension = path.suffix if path.suffix in EXTENSIONS else ""
    return _Name(path.parent.parts, path.name.removesuffix(extension), extension)


def _common(folders: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(os.path.commonprefix(list(folders)))


class Naming:
    """Find the image files at one place by their listed names.

    A listed name means, of these, the first that there is:
    1. the file of exactly that path, or of that path in another Unicode form;
    2. the file of that stem in that folder, in any case and with any image extension;
    3. if it is listed without a folder, the only file of that stem at the place;
    4. if its folder is not at the place, the only file of that stem in a folder whose path ends
       with the listed one, or the reverse; or the file of that stem if there are no folders at all.
    A folder around all files counts only if the list names it. A listed train, val or test counts
    only if it is at the place. Of several files the one with the listed extension is taken, else
    none.
    So a missing file is never replaced by one of the same stem in another folder.
    """

    def __init__(self, names: Iterable[str], place):
        self._place, self._parsed = place, {name: _parsed(name) for name in sorted(names)}
        self._by_form, self._by_stem = defaultdict(list), defaultdict(list)
        for name, parsed in self._parsed.items():
            self._by_form[_same_form(name)].append(name)
            self._by_stem[parsed.stem].append(name)
        folders = {parsed.folder for parsed in self._parsed.values()}
        self._around, self._in_one_folder = _common(folders), len(folders) == 1
        self._parts = set(chain.from_iterable(folders))
        self._folders: set[tuple[str, ...]] = set()
        for folder in folders:
            self._folders |= {folder[:depth] for depth in range(1, len(folder) + 1)}

    def find(self, file: str) -> str:
        """Find the file that a listed name means. UserError if none or several are likely."""
        return self._find(file, _Listed([file]))

    def find_all(
        self, files: Iterable[str], others: Iterable[str] = ()
    ) -> tuple[dict[str, str], list[str]]:
        """Find the files of a list: (listed name -> file, a sentence for each unusable name).

        Two names that mean one file are unusable too. `others` are further names of the same list,
        since the folders of all names are compared.
        """
        files = list(dict.fromkeys(files))
        listed = _Listed([*files, *others])
        found: dict[str, str] = {}
        owner: dict[str, str] = {}
        wrong = []
        for file in files:
            try:
                name = self._find(file, listed)
            except UserError as error:
                wrong.append(str(error))
                continue
            if name in owner:
                wrong.append(
                    f"{owner[name]} and {file} both mean {name} in {self._place}; list "
                    "every image once, and complete the images if one is missing."
                )
                continue
            owner[name], found[file] = file, name
        return found, wrong

    def _find(self, file: str, listed: _Listed) -> str:
        if file in self._parsed:
            return file
        wanted = _parsed(file)
        namesakes = self._by_stem.get(wanted.stem, [])
        found = self._by_form.get(_same_form(file)) or self._fitting(wanted, namesakes, listed)
        if len(found) > 1:
            alike = [name for name in found if self._parsed[name].extension == wanted.extension]
            found = alike or found
        if len(found) > 1:
            raise UserError(
                f"{file} may be {found[0]} or {found[1]} in {self._place}; list the "
                "one that is meant by exactly that name."
            )
        if found:
            return found[0]
        if namesakes:
            raise UserError(
                f"{file} is not in {self._place}, where {namesakes[0]} lies in another "
                "folder; complete the images, or list that name if it is meant."
            )
        raise UserError(
            f"{file} is not in {self._place}; complete the images or remove it from the list."
        )

    def _fitting(self, wanted: _Name, namesakes: list[str], listed: _Listed) -> list[str]:
        """The files of one stem whose folder may be the listed one."""
        around = tuple(takewhile(lambda part: part not in listed.parts, self._around))
        folder = self._without_split(wanted.folder)
        inner = {name: self._parsed[name].folder[len(around) :] for name in namesakes}
        same = [name for name in namesakes if inner[name] == folder]
        if same or not folder:
            return same or namesakes
        if {folder, around + folder} & self._folders:
            return []
        alike = [name for name in namesakes if self._ends_alike(folder, inner[name])]
        no_folders = self._in_one_folder and around == self._around
        if no_folders or folder == listed.around:
            return alike
        return [name for name in alike if inner[name]]

    def _without_split(self, folder: tuple[str, ...]) -> tuple[str, ...]:
        """A listed folder without a first train, val or test that is not at the place."""
        named = folder and split_of(folder[0]) and folder[0] not in self._parts
        return folder[1:] if named else folder

    def _ends_alike(self, listed: tuple[str, ...], found: tuple[str, ...]) -> bool:
        """Whether one folder ends with the other, and what the list has beyond is nowhere here."""
        if len(found) > len(listed):
            return found[-len(listed) :] == listed
        beyond, end = listed[: len(listed) - len(found)], listed[len(listed) - len(found) :]
        return end == found and not self._parts & set(beyond)


class _Listed:
    """Hold the parts of the folders in a list, and the folder around all of them."""

    def __init__(self, files: list[str]):
        folders = {_parsed(file).folder for file in files}
        self.parts = set(chain.from_iterable(folders))
        self.around = _common(folders) if len(files) > 1 else None

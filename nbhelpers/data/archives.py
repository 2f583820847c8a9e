"""Open the images of folders, zips, tars, shards and tables."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from nbhelpers.data import shards
from nbhelpers.data.images import MAX_BYTES, ImageStore
from nbhelpers.data.reading import EXTENSIONS
from nbhelpers.data.table import safe_file_name
from nbhelpers.errors import DAMAGE, UserError, reason
from nbhelpers.files import given

MAX_FOLDERS = 100_000  # below one folder; links between folders may lead to any number
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")  # how gzip, bzip2 and xz begin


def open_images(path: Path | str) -> ImageStore:
    """Open the images of a folder, zip, tar, shard or table.

    UserError if `path` is missing, holds no images, is damaged or has unsafe names.
    """
    path = given(path)
    try:
        return _opened(path)
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); fetch it again.") from error


def _opened(path: Path) -> ImageStore:
    if packed := shards.image_store(path):
        return packed
    if path.is_dir():
        members, read = _open_folder(path)
    elif not path.is_file():
        raise UserError(
            f"{path} does not exist; name the folder, zip or tar that holds the images."
        )
    elif zipfile.is_zipfile(path):
        members, read = _open_zip(path)
    elif _is_tar(path):
        members, read = _open_tar(path)
    else:
        raise UserError(f"{path} is neither a folder nor a readable zip or tar; fetch it again.")
    members = [name for name in members if _is_image(name)]
    if not members:
        raise UserError(
            f"{path} holds no image files ({' '.join(sorted(EXTENSIONS))}); name another."
        )
    return ImageStore(path, members, read)


def _is_tar(path: Path) -> bool:
    """Whether a file is a tar, plain or compressed.

    tarfile.is_tarfile unpacks a file to find out, for minutes if the file is made for it.
    """
    with open(path, "rb") as file:
        head = file.read(8)
    if head.startswith(COMPRESSED):
        return True
    try:
        tarfile.TarFile.open(path, mode="r:").close()
    except DAMAGE:
        return False
    return True


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def _refuse_unsafe(members: list[str], path: Path) -> None:
    unsafe = [name for name in members if not safe_file_name(name)]
    if unsafe:
        raise UserError(
            f"{path} has {len(unsafe)} members with absolute, '..' or backslash names (first: "
            f"{unsafe[0]!r}); do not trust it, or pack it again with relative names."
        )


def _limit(size: int, name: str, path: Path) -> None:
    if size > MAX_BYTES:
        raise UserError(
            f"{name} in {path} unpacks to {size / 2**20:.0f} MB, more than the "
            f"{MAX_BYTES // 2**20} MB an image file may have; remove it."
        )


def image_files(folder: Path) -> Iterator[Path]:
    """Find the image files below a folder. Links to folders are followed, but not in circles.

    UserError if there are more than MAX_FOLDERS folders.
    """
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    seen = 0
    while waiting:
        place, above = waiting.pop()
        stat = place.stat()
        here = (stat.st_dev, stat.st_ino)
        seen += 1
        if seen > MAX_FOLDERS:
            raise UserError(
                f"{folder} leads to more than {MAX_FOLDERS} folders; remove links between them."
            )
        if here in above:
            continue
        for found in place.iterdir():
            if found.is_dir():
                waiting.append((found, above | {here}))
            elif _is_image(found.name) and found.is_file():  # not a dangling link
                yield found


def _open_folder(path: Path):
    members = [found.relative_to(path).as_posix() for found in image_files(path)]

    def read(member: str) -> bytes:
        _limit((path / member).stat().st_size, member, path)
        return (path / member).read_bytes()

    return members, read


def _open_zip(path: Path):
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGE as error:
        raise UserError(f"{path} is a damaged zip ({reason(error)}); fetch it again.") from error
    entries = [(entry.filename, entry) for entry in archive.infolist() if not entry.is_dir()]

    def read(entry: zipfile.ZipInfo) -> bytes:
        _limit(entry.file_size, entry.filename, path)  # zipfile yields no more than declared
        return archive.read(entry)

    return _open_archive(path, entries, read)


def _open_tar(path: Path):
    try:
        archive = tarfile.TarFile.open(path, mode="r:")  # stays open while images are read
        files = [entry for entry in archive.getmembers() if entry.isfile()]  # no links, no devices
    except DAMAGE as error:
        raise UserError(
            f"{path} is a compressed or damaged tar ({reason(error)}); unpack it first."
        ) from error
    entries = [(entry.name.removeprefix("./"), entry) for entry in files]

    def read(entry: tarfile.TarInfo) -> bytes:
        _limit(entry.size, entry.name, path)
        return cast(IO[bytes], archive.extractfile(entry)).read()  # None only for folders

    return _open_archive(path, entries, read)


def _open_archive(path: Path, entries: list[tuple[str, Any]], read_entry: Callable[[Any], bytes]):
    """(names, function that reads one). UserError for unsafe names and two images of one name."""
    _refuse_unsafe([name for name, _ in entries], path)
    members = dict(entries)
    for name, entry in entries:
        again = entry is not members[name] and _is_image(name)
        if again and read_entry(entry) != read_entry(members[name]):
            raise UserError(
                f"{path} holds two different files called {name}; pack it again "
                "with a name for each."
            )
    return list(members), lambda name: read_entry(members[name])

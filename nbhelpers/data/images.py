"""Images from folders and archives, decoded once into a memory-mapped cache of uint8 RGB."""
from __future__ import annotations

import hashlib
import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from nbhelpers.code_identity import code_digest
from nbhelpers.data.decoding import decode
from nbhelpers.data.naming import Naming
from nbhelpers.data.reading import EXTENSIONS
from nbhelpers.data.table import safe_file_name
from nbhelpers.errors import UserError, atomic_folder, atomic_write

MAX_FOLDERS = 100_000     # below one folder; links between folders may lead to any number
MAX_BYTES = 256 * 2**20   # of one encoded file; a larger one is taken for an archive bomb


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3): Pillow's antialiased bicubic, aspect ratio not kept."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


class ImageStore:
    """The image files of a folder tree, a zip or an uncompressed tar, read in place.

    names  the members, sorted POSIX paths relative to the root, image extensions only

    Listed names and the files on disk often differ in folder and extension: `Naming` says what a
    listed name means.
    """

    def __init__(self, path: Path, members: Iterable[str], read: Callable[[str], bytes]):
        self.path = path
        self.names = sorted(members)
        self._naming = Naming(self.names, path)
        self._read = read

    @classmethod
    def open(cls, path: Path | str) -> ImageStore:
        """Also of shards and tables. UserError if `path` is missing, holds no images, is damaged or has unsafe names."""
        from nbhelpers.data import shards  # which stands on this module

        path = Path(path)
        if packed := shards.image_store(path):
            return packed
        if path.is_dir():
            members, read = _open_folder(path)
        elif not path.is_file():
            raise UserError(f"{path} does not exist; name the folder, zip or tar that holds the images.")
        elif zipfile.is_zipfile(path):
            members, read = _open_zip(path)
        elif tarfile.is_tarfile(path):
            members, read = _open_tar(path)
        else:
            raise UserError(f"{path} is neither a folder nor a readable zip or tar; fetch it again.")
        members = [name for name in members if _is_image(name)]
        if not members:
            raise UserError(f"{path} holds no image files ({' '.join(sorted(EXTENSIONS))}); name another.")
        return cls(path, members, read)

    def locate(self, file: str) -> str:
        """The member a listed name means. UserError if there is none, or several are likely."""
        return self._naming.find(file)

    def resolve(self, files: Iterable[str],
                others: Iterable[str] = ()) -> tuple[dict[str, str], list[str]]:
        """(listed name -> member, a sentence for each name without a member of its own).

        Prefer it to `locate` where there is a list: the folders of the other names tell more, and
        two names that mean one member are found out. `others`: further names of the same list.
        """
        return self._naming.find_all(files, others)

    def members(self, files: Iterable[str], others: Iterable[str] = ()) -> list[str]:
        """The member of each listed name, as `resolve`. UserError if one has none, or several."""
        files = list(files)
        found, wrong = self.resolve(files, others)
        refuse_broken(wrong, len(files))
        return [found[file] for file in files]

    def read(self, file: str) -> np.ndarray:
        """(H, W, 3) uint8 of a listed file. UserError as `encoded` and `decode`."""
        return decode(self.encoded(file), self.where(self.locate(file)))

    def encoded(self, file: str) -> bytes:
        """The bytes of a listed file as they are stored. UserError as `locate`, and if they cannot be read."""
        member = self.locate(file)
        try:
            return self._read(member)
        except (OSError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
            raise UserError(f"{self.where(member)} cannot be read ({error}); fetch it again.") from error

    def digest(self, file: str) -> str:
        """The checksum (hex) of the stored bytes of a listed file, read anew each time. UserError as `encoded`."""
        return checksum(self.encoded(file))

    def where(self, member: str) -> str:
        """What messages call a member."""
        return f"{member} in {self.path}"


def checksum(*parts: bytes) -> str:
    """BLAKE2b of the parts one after the other, 128 bits, hex."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def _refuse_unsafe(members, path: Path) -> None:
    unsafe = [name for name in members if not safe_file_name(name)]
    if unsafe:
        raise UserError(f"{path} has {len(unsafe)} members with absolute, '..' or backslash names (first: "
                        f"{unsafe[0]!r}); do not trust it, or pack it again with relative names.")


def _limit(size: int, name: str, path: Path) -> None:
    if size > MAX_BYTES:
        raise UserError(f"{name} in {path} unpacks to {size / 2**20:.0f} MB, more than the "
                        f"{MAX_BYTES // 2**20} MB an image file may have; remove it.")


def image_files(folder: Path) -> Iterator[Path]:
    """The image files below a folder, through linked folders too, but never round in a circle."""
    waiting, seen = [(folder, frozenset())], 0
    while waiting:
        place, above = waiting.pop()
        stat = place.stat()
        here = (stat.st_dev, stat.st_ino)
        seen += 1
        if seen > MAX_FOLDERS:
            raise UserError(f"{folder} leads to more than {MAX_FOLDERS} folders; remove links "
                            "between them.")
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
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is a damaged zip ({error}); fetch it again.") from error
    entries = [(entry.filename, entry) for entry in archive.infolist() if not entry.is_dir()]

    def read(entry: zipfile.ZipInfo) -> bytes:
        _limit(entry.file_size, entry.filename, path)  # zipfile yields no more than declared
        return archive.read(entry)

    return _open_archive(path, entries, read)


def _open_tar(path: Path):
    try:
        archive = tarfile.open(path, mode="r:")
        files = [entry for entry in archive.getmembers() if entry.isfile()]  # no links, no devices
    except tarfile.TarError as error:
        raise UserError(f"{path} is a compressed or damaged tar ({error}); unpack it first.") from error
    entries = [(entry.name.removeprefix("./"), entry) for entry in files]

    def read(entry: tarfile.TarInfo) -> bytes:
        _limit(entry.size, entry.name, path)
        return archive.extractfile(entry).read()

    return _open_archive(path, entries, read)


def _open_archive(path: Path, entries: list[tuple[str, Any]], read_entry: Callable[[Any], bytes]):
    """(names, function that reads one). UserError for unsafe names and two images of one name."""
    _refuse_unsafe([name for name, _ in entries], path)
    members = dict(entries)
    for name, entry in entries:
        if entry is not members[name] and _is_image(name):
            if read_entry(entry) != read_entry(members[name]):
                raise UserError(f"{path} holds two different files called {name}; pack it again "
                                "with a name for each.")
    return list(members), lambda name: read_entry(members[name])


class DecodedCache:
    """All images of a set, decoded at source size: `cache[i]` is a read-only (H, W, 3) uint8 view.

    files    the listed names, row i of the cache being files[i]
    shapes   (N, 2) int64, height and width
    digests  N hex strings; two are equal if and only if the images have equal shapes and pixels
    key      hex, of the code that decodes, the files in their order and the bytes of each; nothing else decides
    """

    def __init__(self, folder: Path, key: str, files: list[str], shapes: np.ndarray, digests: list[str]):
        self.folder, self.key, self.files = folder, key, files
        self.shapes, self.digests = shapes, digests
        self._ends = np.concatenate([[0], np.cumsum(shapes.prod(axis=1) * 3)])
        self._row = {file: row for row, file in enumerate(files)}
        try:
            self._pixels = np.memmap(folder / "pixels.u8", np.uint8, mode="r", shape=(int(self._ends[-1]),))
        except (OSError, ValueError) as error:
            raise _damaged(folder) from error

    @classmethod
    def build(cls, store: ImageStore, files: list[str], folder: Path | str,
              others: Iterable[str] = ()) -> DecodedCache:
        """Decode `files` into `<folder>/images-<key>/`, or open it if it is there.

        `others` are further names of the list that `files` are of; see `ImageStore.resolve`.
        Every file is read each time, since only its bytes tell what it is (RSICD's 117 MB take a
        second). Nothing is written if an image is missing or unreadable, or two names mean one
        (UserError with their number and the first), or if the disk fills up. Of two processes that
        build the same cache, the first to finish wins.
        """
        files = list(files)
        if not files:
            raise UserError("No image is listed; a cache needs at least one.")
        members = store.members(files, others)
        names = tqdm(members, desc="read images", disable=None)
        stored = [_stored_digest(store, name) for name in names]
        code = code_digest((ImageStore, "read"), _write_pixels)
        key = checksum(json.dumps([code, files, stored]).encode())
        target = Path(folder) / f"images-{key[:16]}"
        if not target.exists():
            with atomic_folder(target) as temporary:
                pixels = _write_pixels(store, members, stored, temporary / "pixels.u8")
                index = {"key": key, "files": files, **pixels}
                (temporary / "index.json").write_text(json.dumps(index))
        cache = cls.open(target)
        if cache.key != key:
            raise _damaged(target)
        return cache

    @classmethod
    def open(cls, folder: Path | str) -> DecodedCache:
        """UserError if the folder is no cache or is damaged."""
        folder = Path(folder)
        try:
            index = json.loads((folder / "index.json").read_text())
            key, files, digests = index["key"], index["files"], index["digests"]
            shapes = np.array(index["shapes"], np.int64).reshape(len(files), 2)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder) from error
        if len(digests) != len(files):
            raise _damaged(folder)
        return cls(folder, key, files, shapes, digests)

    def __reduce__(self):  # a pickled memmap would carry all its pixels
        return DecodedCache.open, (self.folder,)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> np.ndarray:
        height, width = self.shapes[row]
        start = self._ends[:-1][row]
        return self._pixels[start:start + height * width * 3].reshape(height, width, 3)

    def rows(self, files) -> np.ndarray:
        """(len(files),) int64: the cache row of each listed file. UserError on one that was not cached."""
        absent = [file for file in files if file not in self._row]
        if absent:
            raise UserError(f"{len(absent)} images are not in the cache {self.folder} (first: {absent[0]}); "
                            "build it from the whole table.")
        return np.array([self._row[file] for file in files], np.int64)

    def resized(self, size: int) -> np.ndarray:
        """(N, size, size, 3) uint8 memmap of every image after `resize`, derived once and kept beside the
        source pixels (the source pixels themselves where every image has that size already)."""
        shape = (len(self), size, size, 3)
        if (self.shapes == size).all():
            return self._pixels.reshape(shape)
        path = self.folder / f"resized-{size}-{code_digest(resize)[:8]}.u8"
        if not path.exists():
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                for row in tqdm(range(len(self)), desc=f"resize to {size}", disable=None):
                    file.write(resize(self[row], size).tobytes())
        if path.stat().st_size != np.prod(shape):
            raise _damaged(self.folder)
        return np.memmap(path, np.uint8, mode="r", shape=shape)


def _stored_digest(store: ImageStore, member: str) -> str | None:
    """None for a file that cannot be read; decoding it says why."""
    try:
        return store.digest(member)
    except UserError:
        return None


def _write_pixels(store: ImageStore, members: list[str], stored: list[str | None],
                  path: Path) -> dict[str, list]:
    """{"shapes", "digests"} of the images, their pixels written one after the other.

    Plain writes, since a memory map on a full disk kills the process instead of raising.
    """
    shapes, digests, broken = [], [], []
    with open(path, "wb") as out:
        for member, known in zip(tqdm(members, desc="decode images", disable=None), stored):
            try:
                pixels = _decode_unchanged(store, member, known)
            except UserError as error:
                broken.append(str(error))
                continue
            out.write(pixels.tobytes())
            shapes.append(list(pixels.shape[:2]))
            digests.append(checksum(str(pixels.shape).encode(), pixels))
    refuse_broken(broken, len(members))
    return {"shapes": shapes, "digests": digests}


def _decode_unchanged(store: ImageStore, member: str, stored: str | None) -> np.ndarray:
    data, place = store.encoded(member), store.where(member)
    if checksum(data) != stored:
        raise UserError(f"{place} changed while it was read; run again when nothing writes to it.")
    return decode(data, place)


def refuse_broken(sentences: list[str], count: int) -> None:
    """UserError if there is a sentence: it alone, or the first of several with their number."""
    if len(sentences) == 1:
        raise UserError(sentences[0])
    if sentences:
        raise UserError(f"{len(sentences)} of {count} images cannot be used; the first: "
                        f"{sentences[0]}")


def _damaged(folder: Path) -> UserError:
    return UserError(f"The image cache {folder} is damaged or incomplete; delete that folder and run again.")

"""Decode images once into a memory-mapped cache of uint8 RGB."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nbhelpers.code_identity import code_digest
from nbhelpers.data.decoding import decode
from nbhelpers.data.images import ImageStore, checksum, refuse_broken, resize
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_folder, atomic_write


class DecodedCache:
    """Hold all images of a set at source size: `cache[i]` is a read-only (H, W, 3) uint8 view.

    files    the listed names, row i of the cache being files[i]
    shapes   (N, 2) int64, height and width
    digests  N hex strings; two are equal if and only if the images have equal shapes and pixels
    key      hex digest of the code that decodes, the files in their order and the bytes of each
    """

    def __init__(
        self, folder: Path, key: str, files: list[str], shapes: np.ndarray, digests: list[str]
    ):
        self.folder, self.key, self.files = folder, key, files
        self.shapes, self.digests = shapes, digests
        self._ends = np.concatenate([[0], np.cumsum(shapes.prod(axis=1) * 3)])
        self._row = {file: row for row, file in enumerate(files)}
        try:
            self._pixels = np.memmap(
                folder / "pixels.u8", np.uint8, mode="r", shape=(int(self._ends[-1]),)
            )
        except (OSError, ValueError) as error:
            raise _damaged(folder) from error

    @classmethod
    def build(
        cls, store: ImageStore, files: list[str], folder: Path | str, others: Iterable[str] = ()
    ) -> DecodedCache:
        """Decode `files` into `<folder>/images-<key>/`, or open it if it exists.

        `others` are further names of the list that `files` are of; see `ImageStore.resolve`.
        Every file is read each time, because the key depends on its bytes (RSICD's 117 MB take a
        second). UserError, and nothing written, if an image is missing or unreadable, if two names
        mean one image, or if the disk is full. Of two processes that build the same cache, the
        first to finish wins.
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
        """Open a finished cache. UserError if the folder is no cache or is damaged."""
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
        return self._pixels[start : start + height * width * 3].reshape(height, width, 3)

    def rows(self, files) -> np.ndarray:
        """Find the cache row of each listed file: (len(files),) int64.

        UserError on one that was not cached.
        """
        absent = [file for file in files if file not in self._row]
        if absent:
            raise UserError(
                f"{len(absent)} images are not in the cache {self.folder} (first: {absent[0]}); "
                "build it from the whole table."
            )
        return np.array([self._row[file] for file in files], np.int64)

    def resized(self, size: int) -> np.ndarray:
        """Resize every image once and keep the result: (N, size, size, 3) uint8 memory map.

        The file lies beside the source pixels. If every image has that size already, the source
        pixels themselves are returned.
        """
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
    """Return the digest of a file; None if it cannot be read (decoding it then says why)."""
    try:
        return store.digest(member)
    except UserError:
        return None


def _write_pixels(
    store: ImageStore, members: list[str], stored: list[str | None], path: Path
) -> dict[str, list]:
    """Write the pixels of the images one after the other; return {"shapes", "digests"}.

    Files are written plainly, since on a full disk a memory map kills the process without an error.
    """
    shapes, digests, broken = [], [], []
    with open(path, "wb") as out:
        listed = tqdm(members, desc="decode images", disable=None)
        for member, known in zip(listed, stored, strict=True):
            try:
                pixels = _decode_unchanged(store, member, known)
            except UserError as error:
                broken.append(str(error))
                continue
            out.write(pixels.tobytes())
            shapes.append(list(pixels.shape[:2]))
            digests.append(checksum(str(pixels.shape).encode(), pixels.data))
    refuse_broken(broken, len(members))
    return {"shapes": shapes, "digests": digests}


def _decode_unchanged(store: ImageStore, member: str, stored: str | None) -> np.ndarray:
    data, place = store.encoded(member), store.where(member)
    if checksum(data) != stored:
        raise UserError(f"{place} changed while it was read; run again when nothing writes to it.")
    return decode(data, place)


def _damaged(folder: Path) -> UserError:
    return UserError(
        f"The image cache {folder} is damaged or incomplete; delete that folder and run again."
    )

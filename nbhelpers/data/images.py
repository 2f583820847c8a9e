"""Find and read image files by their listed names (`archives` opens folders and archives)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nbhelpers.data.decoding import decode
from nbhelpers.data.naming import Naming
from nbhelpers.errors import DAMAGE, UserError, reason

MAX_BYTES = 256 * 2**20  # of one encoded file; a larger one is taken for an archive bomb


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (size, size, 3) with Pillow's antialiased bicubic filter.

    The aspect ratio is not kept.
    """
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


class ImageStore:
    """Read the image files of a folder tree, a zip or an uncompressed tar in place.

    names  the members, sorted POSIX paths relative to the root, image extensions only

    Listed names and the files on disk often differ in folder and extension. `Naming` finds the
    file that a listed name means.
    """

    def __init__(self, path: Path, members: Iterable[str], read: Callable[[str], bytes]):
        self.path = path
        self.names = sorted(members)
        self._naming = Naming(self.names, path)
        self._read = read

    def locate(self, file: str) -> str:
        """Find the member that a listed name means. UserError if none or several are likely."""
        return self._naming.find(file)

    def resolve(
        self, files: Iterable[str], others: Iterable[str] = ()
    ) -> tuple[dict[str, str], list[str]]:
        """Find the members of a list of names, and say which names have no member of their own.

        Returns (listed name -> member, sentences). Prefer it to `locate` for a list: the folders of
        all names are compared, and two names that mean one member are reported. `others` are
        further names of the same list.
        """
        return self._naming.find_all(files, others)

    def members(self, files: Iterable[str], others: Iterable[str] = ()) -> list[str]:
        """Find the member of each listed name, as `resolve`. UserError if one has no own member."""
        files = list(files)
        found, wrong = self.resolve(files, others)
        refuse_broken(wrong, len(files))
        return [found[file] for file in files]

    def read(self, file: str) -> np.ndarray:
        """Decode a listed file to (H, W, 3) uint8. UserError as `encoded` and `decode`."""
        return decode(self.encoded(file), self.where(self.locate(file)))

    def encoded(self, file: str) -> bytes:
        """Read the bytes of a listed file as they are stored.

        UserError as `locate`, and if they cannot be read.
        """
        member = self.locate(file)
        try:
            return self._read(member)
        except UserError:
            raise
        except DAMAGE as error:
            raise UserError(
                f"{self.where(member)} cannot be read ({reason(error)}); fetch it again."
            ) from error

    def digest(self, file: str) -> str:
        """Read a listed file anew and return the checksum (hex) of its bytes.

        UserError as `encoded`.
        """
        return checksum(self.encoded(file))

    def where(self, member: str) -> str:
        """Name a member in messages."""
        return f"{member} in {self.path}"


def checksum(*parts: Any) -> str:
    """Hash the parts one after the other with BLAKE2b: 128 bits, hex."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def refuse_broken(sentences: list[str], count: int) -> None:
    """Raise UserError if there are sentences: the only one, or the first with their number."""
    if len(sentences) == 1:
        raise UserError(sentences[0])
    if sentences:
        raise UserError(
            f"{len(sentences)} of {count} images cannot be used; the first: {sentences[0]}"
        )

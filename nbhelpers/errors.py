"""The one error that a user sees, and what libraries raise on damaged files."""

from __future__ import annotations

import errno
import lzma
import struct
import tarfile
import zipfile
import zlib

LONGEST = 6000  # characters of a message
# What the standard library raises on damaged or hostile archives. UserError is one of these too.
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
)


class UserError(ValueError):
    """A foreseeable mistake: one sentence says what, where, and how to mend it."""

    def __init__(self, message: str):
        super().__init__(printable(message))

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows in a notebook: the sentence without the traceback."""
        return [f"{type(self).__name__}: {self}"]


# What the operating system refuses, and how to mend it
SYSTEM = {
    errno.ENOENT: "{path} does not exist; check the path",
    errno.EACCES: "{path} may not be read or written by this user; choose one that you own",
    errno.EPERM: "{path} may not be read or written by this user; choose one that you own",
    errno.EROFS: "{path} lies on a file system that can only be read; choose a folder elsewhere",
    errno.ENOSPC: "The disk is full: {path} was not written; free some space and run again",
    errno.EDQUOT: "The disk is full: {path} was not written; free some space and run again",
    errno.ENAMETOOLONG: "{path} has a name that is too long for the file system; shorten it",
    errno.ENOTDIR: "A part of {path} is a file where a folder is needed; check the path",
    errno.EISDIR: "{path} is a folder where a file is needed; name a file in it",
    errno.EEXIST: "{path} is a file where a folder is needed; choose another place",
    errno.ELOOP: "{path} is a link that leads back to itself; name the file itself",
    errno.EIO: "{path} could not be read or written; copy it anew, or check the disk",
    errno.EMFILE: "Too many files are open to open {path}; raise the limit with `ulimit -n 4096`",
}


def of_system(error: OSError, path: object = None) -> UserError:
    """Return what the operating system said as a sentence about a path, by default the error's."""
    place = path or error.filename or "A file"
    known = SYSTEM.get(error.errno or 0, "{path} cannot be used ({said}); check it")
    return UserError(known.format(path=place, said=error.strerror or reason(error)) + ".")


def printable(text: str) -> str:
    """Return a text that a terminal shows as it is: control characters become escapes.

    Names in files may hold anything. What is longer than LONGEST is cut.
    """
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1]
        for letter in text[:LONGEST]
    )
    return shown if len(text) <= LONGEST else f"{shown} ..."


def reason(error: BaseException) -> str:
    """Return why a library failed, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__

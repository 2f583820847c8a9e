"""The one error that a user sees, and what libraries raise on damaged files."""

from __future__ import annotations

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


def printable(text: str) -> str:
    """Return a text that a terminal shows as it is: control characters become escapes.

    Names in files may hold anything. What is longer than LONGEST is cut.
    """
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1]
        for letter in text[:LONGEST]
    )
    return shown if len(text) <= LONGEST else f"{shown} ..."


def reason(error: Exception) -> str:
    """Return why a library failed, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__

"""Tell how many bytes an arrow file unfolds to, before anything is unfolded.

Buffers of a record batch may be compressed. Each then begins with its size as eight bytes. Where
the buffers lie stands in the batch's metadata, a flatbuffer (Message.fbs of arrow).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

MAGIC = b"ARROW1\0\0"  # begins the form with an index; a stream follows
# places of fields in the tables of Message.fbs
HEADER, DICTIONARY_DATA, BUFFERS, COMPRESSION = 2, 1, 2, 3


def unfolded_size(file: pa.NativeFile) -> int:
    """Return the bytes of all buffers of an arrow file, unfolded.

    pa.ArrowInvalid, or an error of errors.DAMAGE, if the file is damaged.
    """
    start = len(MAGIC) if file.read(len(MAGIC)) == MAGIC else 0
    file.seek(start)
    reader = pa.MessageReader.open_stream(file)
    return sum(sum(_sizes(message)) for message in _messages(reader))


def _messages(reader: pa.MessageReader) -> Iterator[pa.Message]:
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


def _sizes(message: pa.Message) -> Iterator[int]:
    """Yield the size of each buffer of a message."""
    if message.type not in ("record batch", "dictionary"):
        return
    data = memoryview(message.metadata)
    root = Table(data, struct.unpack_from("<I", data)[0])
    batch = root.table(HEADER)
    if message.type == "dictionary":
        batch = batch.table(DICTIONARY_DATA)
    compressed = batch.place(COMPRESSION) != 0
    body = memoryview(message.body) if message.body is not None else memoryview(b"")
    for offset, length in batch.pairs(BUFFERS):
        if not compressed or length < 8:
            yield max(length, 0)
            continue
        (size,) = struct.unpack_from("<q", body, offset)
        yield length if size < 0 else size


class Table(NamedTuple):
    """A table of a flatbuffer: its data and where the table begins in it."""

    data: memoryview
    at: int

    def place(self, field: int) -> int:
        """Return where a field lies; 0 if the table lacks it."""
        fields = self.at - struct.unpack_from("<i", self.data, self.at)[0]
        (size,) = struct.unpack_from("<H", self.data, fields)
        entry = 4 + 2 * field
        if entry >= size:
            return 0
        (offset,) = struct.unpack_from("<H", self.data, fields + entry)
        return self.at + offset if offset else 0

    def _follow(self, field: int) -> int:
        place = self.place(field)
        return place + struct.unpack_from("<I", self.data, place)[0]

    def table(self, field: int) -> Table:
        """Return the table in a field."""
        return Table(self.data, self._follow(field))

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """Return a vector of pairs of eight-byte numbers; [] if the table lacks the field."""
        if not self.place(field):
            return []
        start = self._follow(field)
        (count,) = struct.unpack_from("<I", self.data, start)
        return list(struct.iter_unpack("<qq", self.data[start + 4 : start + 4 + 16 * count]))

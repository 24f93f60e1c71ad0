"""Reads as much of the Arrow IPC file format as must be known before pyarrow is let loose on a file.

pyarrow decompresses without asking how much will come out, and trusts what a footer says. Here the footer and each
record batch's header are walked with bounds checks, and refused unless they hold plain, uncompressed record batches
that lie inside the file. Format: https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format; the field numbers
are those of File.fbs and Message.fbs, the encoding is that of https://flatbuffers.dev/internals.
"""

from __future__ import annotations

import struct
from typing import Final

MAGIC: Final = b"ARROW1"
_RECORD_BATCH = 3  # MessageHeader.RecordBatch
BLOCK = struct.Struct("<qixxxxq")  # Block: offset, metaDataLength, padding, bodyLength
BUFFER = struct.Struct("<qq")  # Buffer: offset into the body, length


class FramingError(ValueError):
    """The file is not the plain Arrow file that the cache writes."""


def check_plain(data: memoryview) -> None:
    """Checks the framing of an IPC file.

    Raises:
        FramingError: for compressed buffers, dictionaries, or anything that points outside the file.
    """
    try:
        _check(data)
    except struct.error as error:
        raise FramingError(f"a structure reaches past the end: {error}") from None


def _check(data: memoryview) -> None:
    size = len(data)
    if size < 32 or bytes(data[:8]) != MAGIC + b"\0\0" or bytes(data[-6:]) != MAGIC:
        raise FramingError("not an Arrow IPC file")
    (footer_size,) = struct.unpack_from("<i", data, size - 10)
    start = size - 10 - footer_size
    if not 0 < footer_size <= size - 18:
        raise FramingError("the footer reaches past the file")
    footer = Table.root(data[start : size - 10])
    if footer.vector_length(2, BLOCK.size):
        raise FramingError("dictionaries are not allowed")
    end_before = len(MAGIC) + 2
    for index in range(footer.vector_length(3, BLOCK.size)):
        offset, metadata_size, body_size = BLOCK.unpack(footer.vector_item(3, BLOCK.size, index))
        if offset < end_before:  # or a small file could list one batch a million times
            raise FramingError("record batches overlap")
        end_before = offset + metadata_size + body_size
        if metadata_size < 8 or body_size < 0 or end_before > start:
            raise FramingError("a record batch reaches past the file")
        if offset % 8 or metadata_size % 8:
            raise FramingError("a record batch is not aligned")
        marker, header_size = struct.unpack_from("<Ii", data, offset)
        if marker != 0xFFFFFFFF or not 0 < header_size <= metadata_size - 8:
            raise FramingError("a record batch without a header")
        _check_batch(Table.root(data[offset + 8 : offset + 8 + header_size]), body_size)


def _check_batch(message: Table, body_size: int) -> None:
    if message.scalar(1, "<B") != _RECORD_BATCH:
        raise FramingError("a message that is no record batch")
    if message.scalar(3, "<q") != body_size:
        raise FramingError("header and footer differ on the size of a record batch")
    batch = message.table(2)
    if batch.offset_of(3):
        raise FramingError("compressed buffers are not allowed")
    for index in range(batch.vector_length(2, BUFFER.size)):
        offset, length = BUFFER.unpack(batch.vector_item(2, BUFFER.size, index))
        if offset < 0 or length < 0 or offset % 8 or offset + length > body_size:
            raise FramingError("a buffer reaches past its record batch")


class Table:
    """A flatbuffer table: fields are found through a vtable of 16-bit offsets; every access is bounds-checked."""

    def __init__(self, data: memoryview, position: int) -> None:
        self._data = data
        self._position = position
        self._vtable = position - self._read("<i", position)
        self._fields = (self._read("<H", self._vtable) - 4) // 2

    @classmethod
    def root(cls, data: memoryview) -> Table:
        (position,) = struct.unpack_from("<I", data, 0)
        return cls(data, position)

    def _read(self, kind: str, position: int) -> int:
        if position < 0:  # struct would count from the end
            raise FramingError("a structure reaches before its start")
        value: int = struct.unpack_from(kind, self._data, position)[0]
        return value

    def offset_of(self, field: int) -> int:
        """Where a field stands, counted from the table; 0 if it is absent."""
        return self._read("<H", self._vtable + 4 + 2 * field) if field < self._fields else 0

    def scalar(self, field: int, kind: str) -> int:
        offset = self.offset_of(field)
        return self._read(kind, self._position + offset) if offset else 0

    def _target(self, field: int) -> int:
        position = self._position + self.offset_of(field)
        return position + self._read("<I", position)

    def table(self, field: int) -> Table:
        if not self.offset_of(field):
            raise FramingError("a header without its content")
        return Table(self._data, self._target(field))

    def vector_length(self, field: int, item_size: int) -> int:
        if not self.offset_of(field):
            return 0
        length = self._read("<I", self._target(field))
        if length * item_size > len(self._data):
            raise FramingError("a list longer than the structure that holds it")
        return length

    def vector_item(self, field: int, item_size: int, index: int) -> bytes:
        position = self._target(field) + 4 + index * item_size
        item = bytes(self._data[position : position + item_size])
        if len(item) != item_size:
            raise FramingError("a list reaches past the end")
        return item

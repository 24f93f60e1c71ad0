"""Walks the Arrow IPC format with bounds checks before pyarrow reads a file.

pyarrow trusts what a footer or a message claims: it decompresses without a limit on the output, and accepts 2^40 rows
from a file of 352 bytes. `check_plain` refuses everything that the cache itself does not write: compression,
dictionaries, batches outside the file. `check_arrow` accepts any file or stream of another program, unless it points
outside its body or expands far beyond its size. `validate(full=True)` judges the values.

Format: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc. Field
numbers are those of File.fbs, Message.fbs and Schema.fbs; the encoding is https://flatbuffers.dev/internals.
"""

from __future__ import annotations

import struct
from typing import IO, Final

MAGIC: Final = b"ARROW1"
_RECORD_BATCH = 3  # MessageHeader.RecordBatch
BLOCK = struct.Struct("<qixxxxq")  # Block: offset, metaDataLength, padding, bodyLength
BUFFER = struct.Struct("<qq")  # Buffer: offset into the body, length


class FramingError(ValueError):
    """The file is not a plain Arrow file as the cache writes them."""


def check_plain(data: memoryview) -> None:
    """Checks the framing of an IPC file.

    Raises:
        FramingError: compressed buffers, dictionaries, or something that points outside the file.
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
        if offset < end_before:  # otherwise a small file could list one batch a million times
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
        raise FramingError("a message that is not a record batch")
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
    """A flatbuffer table: a vtable of 16-bit offsets locates its fields; every access is bounds-checked."""

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
        if position < 0:  # struct would count a negative position from the end
            raise FramingError("a structure reaches before its start")
        value: int = struct.unpack_from(kind, self._data, position)[0]
        return value

    def offset_of(self, field: int) -> int:
        """A field's offset from its table; 0 if the field is absent."""
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


# --------------------------------------------------------------------------- files of other programs

MAX_COLUMNS: Final = 10_000
MAX_EXPANDED_BYTES: Final = 512 << 20  # of the compressed buffers of one batch
MAX_HEADER_BYTES: Final = 64 << 20
MAX_BATCH_ROWS: Final = 1 << 24
# Rows without bytes cost nothing to claim: a batch may have this many, plus one for each bit it contains.
MAX_EMPTY_ROWS: Final = 1024

_SCHEMA, _DICTIONARY, _RECORDS = 1, 2, 3  # MessageHeader
_NODE = struct.Struct("<qq")  # FieldNode: length, null_count
_CONTINUATION: Final = 0xFFFFFFFF


class LimitError(ValueError):
    """A valid file that expands to more than is read at once; the message names the limit."""


def check_arrow(file: IO[bytes], size: int) -> None:
    """Checks all messages of an Arrow file or stream.

    Args:
        file: opened for reading, seekable; its position afterwards is unspecified.
        size: of the file, in bytes.

    Raises:
        FramingError: the file is cut off, or a message points outside its container.
        LimitError: the file claims more columns, rows or expanded bytes than allowed.
    """
    file.seek(0)
    try:
        if file.read(len(MAGIC)) == MAGIC:
            _check_file(file, size)
        else:
            _check_stream(file, size)
    except struct.error as error:
        raise FramingError(f"a structure reaches past the end: {error}") from None


def _check_stream(file: IO[bytes], size: int) -> None:
    position, kinds = 0, []
    while position < size:
        message, body_size, start = _message(file, position, size)
        if message is None:
            break
        position = start + body_size
        kinds.append(_check_message(file, message, start, body_size))
    if not kinds or kinds[0] != _SCHEMA:
        raise FramingError("not an Arrow file or stream")


def _check_file(file: IO[bytes], size: int) -> None:
    if size < 32:
        raise FramingError("not an Arrow file")
    footer_size, magic = struct.unpack("<i6s", _exactly(file, size - 10, 10))
    if magic != MAGIC or not 0 < footer_size <= min(size - 18, MAX_HEADER_BYTES):
        raise FramingError("the footer is cut off or reaches past the file")
    footer = Table.root(memoryview(_exactly(file, size - 10 - footer_size, footer_size)))
    _check_schema(footer.table(1))
    blocks = [
        (*BLOCK.unpack(footer.vector_item(field, BLOCK.size, index)), kind)
        for field, kind in ((2, _DICTIONARY), (3, _RECORDS))
        for index in range(footer.vector_length(field, BLOCK.size))
    ]
    end_before = len(MAGIC)
    for offset, header_size, body_size, kind in sorted(blocks):
        if offset < end_before or offset % 8 or header_size < 8 or body_size < 0:
            raise FramingError("batches overlap, or are not aligned")
        end_before = offset + header_size + body_size
        if end_before > size - 10 - footer_size:
            raise FramingError("a batch reaches past the file")
        message, stated, start = _message(file, offset, size)
        if message is None or (stated, start) != (body_size, offset + header_size):
            raise FramingError("header and footer differ on the size of a batch")
        if _check_message(file, message, start, body_size) != kind:
            raise FramingError("header and footer differ on the kind of a batch")


def _message(file: IO[bytes], position: int, size: int) -> tuple[Table | None, int, int]:
    """Header of the message at a position, size of its body, and the body's start; None at the end of a stream."""
    (header_size,) = struct.unpack("<I", _exactly(file, position, 4))
    start = position + 4
    if header_size == _CONTINUATION:  # absent before Arrow 0.15
        (header_size,) = struct.unpack("<I", _exactly(file, start, 4))
        start += 4
    if header_size == 0:
        return None, 0, start
    if start + header_size > size:
        raise FramingError("a header reaches past the file")
    if header_size > MAX_HEADER_BYTES:
        raise LimitError(f"a header of {header_size} bytes; the limit is {MAX_HEADER_BYTES >> 20} MiB")
    message = Table.root(memoryview(_exactly(file, start, header_size)))
    body_size, start = message.scalar(3, "<q"), start + header_size
    if not 0 <= body_size <= size - start:
        raise FramingError("a body reaches past the file")
    return message, body_size, start


def _check_message(file: IO[bytes], message: Table, start: int, body_size: int) -> int:
    kind = message.scalar(1, "<B")
    if kind == _SCHEMA:
        _check_schema(message.table(2))
    elif kind == _RECORDS:
        _check_foreign_batch(file, message.table(2), start, body_size)
    elif kind == _DICTIONARY:
        _check_foreign_batch(file, message.table(2).table(1), start, body_size)
    else:
        raise FramingError("a message that is neither schema nor batch")
    return kind


def _check_schema(schema: Table) -> None:
    columns = schema.vector_length(1, 4)
    if columns > MAX_COLUMNS:
        raise LimitError(f"{columns} columns; the limit is {MAX_COLUMNS}")


def _check_foreign_batch(file: IO[bytes], batch: Table, start: int, body_size: int) -> None:
    expanded, compressed = 0, bool(batch.offset_of(3))
    for index in range(batch.vector_length(2, BUFFER.size)):
        offset, length = BUFFER.unpack(batch.vector_item(2, BUFFER.size, index))
        if offset < 0 or length < 0 or offset + length > body_size:
            raise FramingError("a buffer reaches past its batch")
        if compressed and length >= 8:  # starts with its expanded size; -1 means uncompressed
            (stated,) = struct.unpack("<q", _exactly(file, start + offset, 8))
            if stated < -1:
                raise FramingError("a buffer of negative size")
            length = length if stated == -1 else stated
        expanded += length
    if compressed and expanded > max(MAX_EXPANDED_BYTES, body_size):
        raise LimitError(f"a batch that expands to {expanded} bytes; the limit is {MAX_EXPANDED_BYTES >> 20} MiB")
    _check_nodes(batch, MAX_EMPTY_ROWS + 8 * expanded)


def _check_nodes(batch: Table, most: int) -> None:
    rows = batch.scalar(0, "<q")
    if rows < 0:
        raise FramingError("a batch with a negative number of rows")
    if rows > min(most, MAX_BATCH_ROWS):
        raise LimitError(f"a batch of {rows} rows; the limit for its bytes is {min(most, MAX_BATCH_ROWS)}")
    for index in range(batch.vector_length(1, _NODE.size)):
        length, nulls = _NODE.unpack(batch.vector_item(1, _NODE.size, index))
        if not 0 <= nulls <= length:
            raise FramingError("a column with more nulls than values")
        if length > most:  # empty lists take no bytes either
            raise LimitError(f"a column of {length} values; the limit for its bytes is {most}")


def _exactly(file: IO[bytes], position: int, length: int) -> bytes:
    file.seek(position)
    data = file.read(length)
    if len(data) != length:
        raise FramingError("the file is cut off")
    return data

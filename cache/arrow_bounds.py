"""Bounds of an Arrow file or stream that somebody else wrote, checked before pyarrow reads it.

pyarrow trusts the lengths that a message states: it allocates what a compressed buffer says that it will expand to, and
takes 2^40 rows from a file of 352 bytes. Here every message is walked, by its header alone, and refused where it points
outside its body or stands for far more than the file holds. What the values are is for `validate(full=True)` to find.
Format: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc; the field
numbers are those of Message.fbs, Schema.fbs and File.fbs.
"""

from __future__ import annotations

import struct
from typing import IO, Final

from dpoeng.cache.framing import BLOCK, BUFFER, MAGIC, FramingError, Table

MAX_COLUMNS: Final = 10_000
MAX_EXPANDED_BYTES: Final = 512 << 20  # of the compressed buffers of one batch
MAX_HEADER_BYTES: Final = 64 << 20
MAX_BATCH_ROWS: Final = 1 << 24
# Rows without bytes are free to claim: a batch may have so many, and one more for each bit that it holds.
MAX_EMPTY_ROWS: Final = 1024

_SCHEMA, _DICTIONARY, _RECORDS = 1, 2, 3  # MessageHeader
_NODE = struct.Struct("<qq")  # FieldNode: length, null_count
_CONTINUATION: Final = 0xFFFFFFFF


class LimitError(ValueError):
    """A sound file that stands for more than is read at once; the message names the limit."""


def check_arrow(file: IO[bytes], size: int) -> None:
    """Checks all messages of an Arrow file or stream.

    Args:
        file: opened for reading, seekable; left wherever reading ended.
        size: of the file, in bytes.

    Raises:
        FramingError: the file is cut, or a message points outside what holds it.
        LimitError: it claims more columns, rows or expanded bytes than are allowed.
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
            raise FramingError("header and footer differ on what a batch is")


def _message(file: IO[bytes], position: int, size: int) -> tuple[Table | None, int, int]:
    """The header of a message at a position, the bytes of its body, and where that starts; None at a stream's end."""
    (header_size,) = struct.unpack("<I", _exactly(file, position, 4))
    start = position + 4
    if header_size == _CONTINUATION:  # absent in files of before Arrow 0.15
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
        _check_batch(file, message.table(2), start, body_size)
    elif kind == _DICTIONARY:
        _check_batch(file, message.table(2).table(1), start, body_size)
    else:
        raise FramingError("a message that is neither schema nor batch")
    return kind


def _check_schema(schema: Table) -> None:
    columns = schema.vector_length(1, 4)
    if columns > MAX_COLUMNS:
        raise LimitError(f"{columns} columns; the limit is {MAX_COLUMNS}")


def _check_batch(file: IO[bytes], batch: Table, start: int, body_size: int) -> None:
    expanded, compressed = 0, bool(batch.offset_of(3))
    for index in range(batch.vector_length(2, BUFFER.size)):
        offset, length = BUFFER.unpack(batch.vector_item(2, BUFFER.size, index))
        if offset < 0 or length < 0 or offset + length > body_size:
            raise FramingError("a buffer reaches past its batch")
        if compressed and length >= 8:  # each states its expanded size first; -1 says that it is stored as it is
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
        raise FramingError("a batch of less than no rows")
    if rows > min(most, MAX_BATCH_ROWS):
        raise LimitError(f"a batch of {rows} rows; the limit for its bytes is {min(most, MAX_BATCH_ROWS)}")
    for index in range(batch.vector_length(1, _NODE.size)):
        length, nulls = _NODE.unpack(batch.vector_item(1, _NODE.size, index))
        if not 0 <= nulls <= length:
            raise FramingError("a column with more nulls than values")
        if length > most:  # lists of nothing: their items take no bytes either
            raise LimitError(f"a column of {length} values; the limit for its bytes is {most}")


def _exactly(file: IO[bytes], position: int, length: int) -> bytes:
    file.seek(position)
    found = file.read(length)
    if len(found) != length:
        raise FramingError("the file is cut off")
    return found

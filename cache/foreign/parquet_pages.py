"""Walks a Parquet file's page headers: finds how much each page expands to, before a decoder trusts it.

A page of 34 kB may claim that it is 2 GiB decompressed, and decoders allocate what it claims. Only headers are read.
Format: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift (PageHeader),
written in https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

from typing import IO, Any, Final, TypeAlias

from dpoeng.cache.framing import MAX_BATCH_ROWS, MAX_EXPANDED_BYTES, FramingError, LimitError

Fields: TypeAlias = dict[int, Any]
"""A struct of Thrift: field number -> value; the contents of texts and lists are skipped."""

_HEADER_BYTES: Final = (4096, 1 << 24)  # first read, and limit: a header may contain statistics
_DEPTH: Final = 8
_EXPANDED, _STORED, _DATA, _DATA_V2 = 2, 3, 5, 8  # PageHeader
_VALUES: Final = 1  # DataPageHeader, DataPageHeaderV2


def check_pages(file: IO[bytes], size: int, metadata: Any) -> None:
    """Checks what all pages of a file expand to.

    Args:
        file: opened for reading.
        size: of the file, in bytes.
        metadata: pyarrow's `FileMetaData` of the file.

    Raises:
        FramingError: a page lies outside the file, or pages overlap.
        LimitError: the pages that are decoded together, one of each column, expand to more than allowed.
    """
    left = 1000 + size // 8  # headers at most: each takes 8 bytes or more, so more would overlap
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        together = 0
        for number in range(metadata.num_columns):
            chunk = group.column(number)
            largest, values, pages = _chunk(file, size, chunk, left)
            together, left = together + largest, left - pages
            # A list can repeat one value in no bytes at all, and a decoder writes out a whole row.
            repeated = metadata.schema.column(number).max_repetition_level > 0
            if repeated and values > (most := MAX_BATCH_ROWS + 8 * size):
                raise LimitError(f"a column of lists of {values} values; the limit for this file is {most}")
        if together > (most := max(MAX_EXPANDED_BYTES, size)):
            raise LimitError(f"pages that expand to {together} bytes at once; the limit for this file is {most}")


def _chunk(file: IO[bytes], size: int, chunk: Any, left: int) -> tuple[int, int, int]:
    """Bytes of the largest page of a column chunk, its number of values, and its number of pages."""
    if chunk.num_values == 0:  # some writers write no page at all for a file without rows
        return 0, 0, 0
    begins = [at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at is not None]
    at = min(begins, default=0)
    end = at + chunk.total_compressed_size
    if not 0 <= at <= end <= size:
        raise FramingError("a column reaches past the file")
    largest = values = pages = 0
    while at < end:
        if pages >= left:
            raise FramingError("columns overlap")
        header, behind = _header(file, at, end)
        expanded, stored = header.get(_EXPANDED, -1), header.get(_STORED, -1)
        data = header.get(_DATA, header.get(_DATA_V2, {}))
        count = data.get(_VALUES, 0) if isinstance(data, dict) else -1
        if not all(isinstance(size, int) and size >= 0 for size in (expanded, stored, count)):
            raise FramingError("a page of negative size")
        largest, values, pages = max(largest, expanded), values + count, pages + 1
        at = behind + stored
        if values >= chunk.num_values:
            break
    return largest, values, pages


def _header(file: IO[bytes], at: int, end: int) -> tuple[Fields, int]:
    """The page header at a position, and its end."""
    file.seek(at)
    for length in _HEADER_BYTES:
        file.seek(at)
        data = file.read(min(length, end - at))
        try:
            fields, used = _struct(data, 0, _DEPTH)
        except IndexError:
            continue
        return fields, at + used
    raise FramingError("a page header is cut off or too long")


def _struct(data: bytes, at: int, depth: int) -> tuple[Fields, int]:
    fields: Fields = {}
    number = 0
    while kind := data[at]:
        at += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, at = _varint(data, at)
            number = number >> 1 ^ -(number & 1)
        fields[number], at = _value(data, at, kind & 15, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind in (4, 5, 6):
        raw, at = _varint(data, at)
        return raw >> 1 ^ -(raw & 1), at
    if kind == 12 and depth:
        return _struct(data, at, depth - 1)
    if kind == 8:
        length, at = _varint(data, at)
        return None, _within(data, at + length)
    if kind in (3, 7):
        return None, _within(data, at + (1 if kind == 3 else 8))
    if kind in (9, 10) and depth:
        count, inner, at = data[at] >> 4, data[at] & 15, at + 1
        if count == 15:
            count, at = _varint(data, at)
        for _ in range(count):
            if inner in (1, 2):  # in a list a boolean is a byte
                at = _within(data, at + 1)
            else:
                _, at = _value(data, at, inner, depth - 1)
        return None, at
    raise FramingError(f"a page header with a field of type {kind}")


def _within(data: bytes, at: int) -> int:
    if at > len(data):
        raise IndexError
    return at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise FramingError("a number of more than 64 bits")

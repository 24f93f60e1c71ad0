"""Arrow and Parquet files of other programs, in batches that are safe to read: bounded, validated, never mapped.

A mapped file that is truncated while it is read crashes the process, and so do unchecked offsets. A file that is
damaged or claims too much raises a `UserError` that names the limit. Independent of the columns' meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from dpoeng.cache.errors import UserError
from dpoeng.cache.foreign.parquet_pages import check_pages
from dpoeng.cache.framing import MAX_COLUMNS, MAX_EMPTY_ROWS, FramingError, LimitError, check_arrow

MAX_ROW_BYTES: Final = 16 << 20
BATCH_ROWS: Final = 256
# Once dictionaries and runs are written out, a file may be this many times its size; 1 GiB is always allowed.
MAX_EXPANSION: Final = 1000
_FREE_BYTES: Final = 1 << 30
_PIECE_BYTES: Final = 1 << 20
_VALUE_BYTES: Final = 8  # counted for each number

Sizes: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Batch: TypeAlias = tuple[pa.RecordBatch, Mask]
"""Rows, and whether each has more than `MAX_ROW_BYTES`: such a row must not become a Python object."""


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns pyarrow's complaints about a file into a `UserError`.

    Raises:
        UserError: `data-damaged`, `data-too-large` or `data-unreadable`.
    """
    try:
        yield
    except LimitError as error:
        raise UserError(
            "the file expands to more than dpoeng reads at once",
            code="data-too-large",
            where=str(path),
            found=str(error),
            remedy="write it in smaller batches with fewer columns, or as JSON Lines: one object a line",
            exit_status=3,
        ) from None
    except (pa.ArrowException, FramingError, UnicodeDecodeError, OSError) as error:  # damaged streams raise OSError
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from None
        raise UserError(
            "the file is damaged, or its format does not match its name",
            code="data-damaged",
            where=str(path),
            expected=f"a complete {kind} file",
            found=next(iter(str(error).splitlines()), type(error).__name__)[:200],
            remedy="write or copy the file again",
            exit_status=3,
        ) from None


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for a file that the system does not let us read."""
    return UserError(
        "the file cannot be read",
        code="data-unreadable",
        where=str(path),
        found=error.strerror or str(error),
        remedy="check its permissions and the disk",
        exit_status=3,
    )


def arrow_batches(path: Path) -> Iterator[Batch]:
    """Batches of an Arrow file or stream, at most `BATCH_ROWS` rows each, and which rows exceed the limit.

    Raises:
        FramingError, LimitError, pa.ArrowException: see `reading`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        check_arrow(file, size)
    with pa.OSFile(str(path)) as source:
        magic = source.read(6)
        source.seek(0)
        batches = _file_batches(source) if magic == b"ARROW1" else ipc.open_stream(source)
        yield from _bounded(_validated(batches), size)


def parquet_batches(path: Path) -> Iterator[Batch]:
    """Batches of a Parquet file, at most `BATCH_ROWS` rows each, and which rows exceed the limit.

    Raises:
        LimitError, pa.ArrowException: see `reading`.
    """
    size = path.stat().st_size
    metadata = pq.read_metadata(path)
    columns, rows = metadata.num_columns, metadata.num_rows
    if columns > MAX_COLUMNS:
        raise LimitError(f"{columns} columns; the limit is {MAX_COLUMNS}")
    if rows > (most := MAX_EMPTY_ROWS + MAX_EXPANSION * size):
        raise LimitError(f"{rows} rows in so few bytes; the limit is {most}")
    with path.open("rb") as file:
        check_pages(file, size, metadata)
    # Read piece by piece and group by group: at once, a group of a million rows takes gigabytes, and so do many groups.
    with pq.ParquetFile(
        path, metadata=metadata, read_dictionary=_repeating(metadata), buffer_size=_PIECE_BYTES, pre_buffer=False
    ) as table:
        groups = (table.iter_batches(BATCH_ROWS, row_groups=[group]) for group in range(metadata.num_row_groups))
        yield from _bounded(chain.from_iterable(groups), size)  # built here: its offsets are sound


def _repeating(metadata: Any) -> list[str]:
    """Text columns with a dictionary. They stay dictionaries: 64 MiB values in 256 rows would fill the memory.

    Raises:
        FramingError: a row group names a column that is not in the schema.
    """
    columns = set()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(metadata.num_columns)):
            if chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page:
                columns.add(chunk.path_in_schema)
    unknown = columns - {metadata.schema.column(i).path for i in range(metadata.num_columns)}
    if unknown:
        raise FramingError(f"a row group has the column {min(unknown)!r}, which is not in the schema")
    return sorted(columns)


def _file_batches(source: Any) -> Iterator[pa.RecordBatch]:
    reader = ipc.open_file(source)
    return (reader.get_batch(index) for index in range(reader.num_record_batches))


def _validated(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches whose offsets, indices and texts are checked: pyarrow itself follows them without a check."""
    known: dict[tuple[object, ...], pa.Array] = {}
    for batch in batches:
        batch.validate()
        for column in batch.columns:
            if pa.types.is_dictionary(column.type):
                _validate_dictionary(column, known)
            else:
                column.validate(full=True)
        yield batch


def _validate_dictionary(column: Any, known: dict[tuple[object, ...], pa.Array]) -> None:
    """Validates each dictionary's values once, not per batch: otherwise a file of 64 MiB could take hours."""
    values = column.dictionary
    place = (*(None if buffer is None else (buffer.address, buffer.size) for buffer in values.buffers()), len(values))
    if place not in known:
        values.validate(full=True)
        known.clear()  # streams have few; an address identifies values only while they are alive
        known[place] = values
    column.indices.validate(full=True)
    bounds = pc.min_max(column.indices).as_py()
    if bounds["min"] is not None and not 0 <= bounds["min"] <= bounds["max"] < len(values):
        raise pa.ArrowInvalid(f"an index outside the {len(values)} values of a dictionary")


def _bounded(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[Batch]:
    """Slices of batches whose rows stay within the file's limit once written out."""
    most, total = _FREE_BYTES + MAX_EXPANSION * size, 0
    for batch in batches:
        sizes = row_bytes(batch)
        total += int(sizes[sizes <= MAX_ROW_BYTES].sum())
        if total > most:
            raise LimitError(f"values that are {total} bytes once written out; the limit is {most} for this file")
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS), sizes[start : start + BATCH_ROWS] > MAX_ROW_BYTES


def row_bytes(batch: pa.RecordBatch) -> Sizes:
    """About how many bytes each row of a validated batch has once dictionaries, runs and views are written out."""
    total = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        total += _sizes(column)
    return total


def _sizes(array: Any) -> Sizes:
    kind, count = array.type, len(array)
    if isinstance(array, pa.ExtensionArray):
        return _sizes(array.storage)
    if pa.types.is_dictionary(kind):
        value_sizes = _sizes(array.dictionary)
        chosen = np.asarray(pc.fill_null(array.indices, 0), np.int64)
        return value_sizes[chosen] if len(value_sizes) else np.full(count, _VALUE_BYTES, np.int64)
    if pa.types.is_run_end_encoded(kind):
        ends = np.asarray(array.run_ends)
        runs: Sizes = np.searchsorted(ends, array.offset + np.arange(count), side="right")
        return _sizes(array.values)[runs]
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1] or b"", np.int32).reshape(-1, 4)
        return views[array.offset : array.offset + count, 0].astype(np.int64)
    if pa.types.is_union(kind):
        raise LimitError("a column of a union type, whose size cannot be checked; no union is allowed")
    if pa.types.is_struct(kind):
        total = np.full(count, _VALUE_BYTES, np.int64)
        for index in range(kind.num_fields):
            total += _sizes(array.field(index))
        return total
    if pa.types.is_fixed_size_list(kind):
        starts = (array.offset + np.arange(count)) * kind.list_size
        return _spans(array.values, starts, np.full(count, kind.list_size))
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return _spans(array.values, array.offsets, array.sizes)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = np.asarray(array.offsets, np.int64)
        return _spans(array.values, offsets[:-1], np.diff(offsets))
    if pa.types.is_map(kind):
        offsets = np.asarray(array.offsets, np.int64)
        starts, lengths = offsets[:-1], np.diff(offsets)
        return _spans(array.keys, starts, lengths) + _spans(array.items, starts, lengths)
    if any(test(kind) for test in _OF_BYTES):
        lengths = pc.fill_null(pc.binary_length(array), 0)
        return np.asarray(lengths, np.int64)
    return np.full(count, _width(kind), np.int64)


_OF_BYTES: Final = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def _width(kind: pa.DataType) -> int:
    return int(kind.byte_width) if pa.types.is_fixed_size_binary(kind) else _VALUE_BYTES


def _spans(values: Any, starts: Any, lengths: Any) -> Sizes:
    """Bytes of lists: the sum of their items."""
    starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    if pa.types.is_primitive(values.type) or pa.types.is_null(values.type):
        numbers: Sizes = _VALUE_BYTES * (lengths + 1)  # long lists of ids: no need to visit each item
        return numbers
    before = np.concatenate([[0], np.cumsum(_sizes(values))])
    list_sizes: Sizes = before[starts + lengths] - before[starts] + _VALUE_BYTES
    return list_sizes

"""The table of a view: for each row of the source, in its order, the cache row with its numbers."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpoeng.cache.records import damaged
from dpoeng.cache.shard import fixed_binary, read_batches

TABLE_SCHEMA: Final = pa.schema(
    [
        pa.field("file", pa.int32(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("pair_key", pa.binary(16), nullable=False),
        pa.field("object", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("extra", pa.large_binary(), nullable=False),
    ],
    metadata={"dpoeng.kind": "view", "dpoeng.version": "1"},
)


@dataclass(frozen=True, slots=True)
class ViewEntry:
    """One row of the source and its pair. Equal pairs share a row of the cache.

    Attributes:
        source_file: as the user named it.
        source_row: 1-based line or row in that file.
        pair_key: `schema.pair_key` of the pair's ids.
        extra: the user's other columns; values that JSON has no form for are stored as their str().
    """

    source_file: str
    source_row: int
    pair_key: bytes
    extra: Mapping[str, Any] = field(default_factory=dict)


class Entries:
    """Entries stored by column: a million of them take little more than their bytes.

    Attributes:
        files: index of each source file, in the order of their first rows.
        file: [N] index of each row's file.
        source_row: [N] row in that file.
        keys: [N, 16] pair keys.
    """

    def __init__(self, entries: Iterable[ViewEntry]) -> None:
        """Reads the entries once, in a stream."""
        self.files: dict[str, int] = {}
        file, source_row, keys = array("i"), array("q"), bytearray()
        self._extra, ends = bytearray(), array("q", [0])
        for entry in entries:
            file.append(self.files.setdefault(entry.source_file, len(self.files)))
            source_row.append(entry.source_row)
            keys += entry.pair_key
            self._extra += json.dumps(dict(entry.extra), default=str).encode("ascii")
            ends.append(len(self._extra))
        self.file, self.source_row, self._ends = np.asarray(file), np.asarray(source_row), np.asarray(ends)
        self.keys: npt.NDArray[np.uint8] = np.frombuffer(keys, np.uint8).reshape(-1, 16)

    def __len__(self) -> int:
        return len(self.file)

    def place(self, i: int) -> str:
        """File and row of an entry, for messages."""
        return f"{list(self.files)[self.file[i]]}:{self.source_row[i]}"

    def extra(self) -> pa.Array:
        """The user's other columns, as JSON."""
        buffers = [None, pa.py_buffer(self._ends), pa.py_buffer(self._extra)]
        return pa.Array.from_buffers(pa.large_binary(), len(self), buffers)


def encode_table(entries: Entries, objects: npt.NDArray[np.int32], rows: npt.NDArray[np.int32]) -> memoryview:
    """The bytes of a table.

    Args:
        entries: N rows of the source.
        objects: [N] index of the object in the view's record.
        rows: [N] row in that object.
    """
    keys = pa.py_buffer(np.ascontiguousarray(entries.keys))
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array(entries.file, pa.int32()),
            pa.array(entries.source_row, pa.int64()),
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(entries), [None, keys]),
            pa.array(objects, pa.int32()),
            pa.array(rows, pa.int32()),
            entries.extra(),
        ],
        schema=TABLE_SCHEMA,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, TABLE_SCHEMA) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue()).cast("B")


class Table:
    """A table in memory that the caller owns; its columns are views of that memory.

    Args:
        data: the whole file.
        where: name of the file in error messages.
        shard_rows: rows of each object in the view's record.
        file_count: number of source files in that record.

    Raises:
        CacheError: the structure is not exactly right, or a row points outside the objects.
    """

    def __init__(self, data: memoryview, where: str, shard_rows: Sequence[int], file_count: int) -> None:
        self._where = where
        batches = read_batches(data, (TABLE_SCHEMA,), where)
        if len(batches) != 1:
            raise damaged(where, "one record batch", f"{len(batches)}")
        file, source_row, keys, objects, row, self._extra = batches[0].columns
        self.keys = fixed_binary(keys)  # [N, 16] uint8
        self.file: npt.NDArray[np.int32] = file.to_numpy()  # [N]
        self.source_row: npt.NDArray[np.int64] = source_row.to_numpy()  # [N]
        self.object: npt.NDArray[np.int32] = objects.to_numpy()  # [N]
        self.row: npt.NDArray[np.int32] = row.to_numpy()  # [N]
        if not len(self):
            return
        if self.object.min() < 0 or self.object.max() >= len(shard_rows):
            raise damaged(where, f"objects 0 to {len(shard_rows) - 1}", "an object outside the record's list")
        if self.row.min() < 0 or (self.row >= np.asarray(shard_rows)[self.object]).any():
            raise damaged(where, "rows inside their objects", "a row past the end of its object")
        if self.file.min() < 0 or self.file.max() >= file_count:
            raise damaged(where, f"files 0 to {file_count - 1}", "a file outside the record's list")

    def __len__(self) -> int:
        return len(self.object)

    def extra(self, i: int) -> dict[str, Any]:
        """The user's other columns of row i. Raises CacheError where they are no JSON object."""
        try:
            loaded = json.loads(self._extra[i].as_py())
        except (ValueError, RecursionError) as error:
            loaded = type(error).__name__
        if not isinstance(loaded, dict):
            raise damaged(f"{self._where}, row {i}: extra", "a JSON object", repr(loaded)[:200])
        return loaded

"""A shard: scored pairs as one immutable, uncompressed Arrow IPC file, read in place.

Knows the bytes of a shard, not where shards are stored (`store`) nor which rows a data set uses (`reader`).
"""

from __future__ import annotations

import copy
import os
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from dpoeng.cache.framing import FramingError, check_plain
from dpoeng.cache.mapped import release
from dpoeng.cache.records import damaged
from dpoeng.cache.schema import Gaps, IdArray, LogpArray, PairIds, ScoredPair, as_ids, gap_tokens, gaps_fit, pair_key

BATCH_ROWS: Final = 4096
_BATCH_IDS = 1 << 26  # keeps a batch's 32-bit offsets far from overflow, however long the rows
SUM_TOLERANCE: Final = 1e-9  # relative; another order of summation gives slightly different float64 sums


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


SHARD_SCHEMA: Final = pa.schema(
    [
        pa.field("pair_key", pa.binary(16), nullable=False),
        pa.field("prompt_ids", _list(pa.int32()), nullable=False),
        pa.field("chosen_ids", _list(pa.int32()), nullable=False),
        pa.field("rejected_ids", _list(pa.int32()), nullable=False),
        pa.field("chosen_logps", _list(pa.float32()), nullable=False),
        pa.field("rejected_logps", _list(pa.float32()), nullable=False),
        pa.field("chosen_sum", pa.float64(), nullable=False),
        pa.field("rejected_sum", pa.float64(), nullable=False),
    ],
    metadata={"dpoeng.kind": "shard", "dpoeng.version": "1"},
)


# Version 2 is written only if a row has gaps: all other shards keep their bytes, and so their names.
SHARD_SCHEMA_WITH_GAPS: Final = pa.schema(
    [
        *SHARD_SCHEMA,
        pa.field("chosen_gaps", _list(pa.int32()), nullable=False),
        pa.field("rejected_gaps", _list(pa.int32()), nullable=False),
    ],
    metadata={"dpoeng.kind": "shard", "dpoeng.version": "2"},
)


def encode_shard(rows: Sequence[ScoredPair]) -> memoryview:
    """The bytes of a shard. They depend only on the rows and their order.

    Raises:
        ValueError: no rows, a duplicate row, or a row whose numbers cannot be log-probs; the message names the row.
    """
    if not rows:
        raise ValueError("a shard needs at least one row")
    for index, row in enumerate(rows):
        try:
            row.check()
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from None
    keys = [pair_key(row.ids) for row in rows]
    if len(set(keys)) != len(keys):
        raise ValueError("a pair appears twice in the shard")
    gaps = any(row.ids.chosen_gaps or row.ids.rejected_gaps for row in rows)
    schema = SHARD_SCHEMA_WITH_GAPS if gaps else SHARD_SCHEMA
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=None, metadata_version=pa.ipc.MetadataVersion.V5)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for part in _batches(rows):
            writer.write_batch(_encode_batch(rows[part], keys[part], schema))
    return memoryview(sink.getvalue()).cast("B")


def _batches(rows: Sequence[ScoredPair]) -> Iterator[slice]:
    start = tokens = 0
    for index, row in enumerate(rows):
        if index > start and (index - start == BATCH_ROWS or tokens + row.ids.total_tokens > _BATCH_IDS):
            yield slice(start, index)
            start, tokens = index, 0
        tokens += row.ids.total_tokens
    yield slice(start, len(rows))


def list_column(
    parts: Sequence[IdArray] | Sequence[LogpArray], kind: pa.DataType, *, type: pa.DataType | None = None
) -> pa.Array:
    """Arrays of numbers, at least one, as a list column; `type`: a list type of `kind`, or None."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts), kind), type=type)


def _encode_batch(rows: Sequence[ScoredPair], keys: Sequence[bytes], schema: pa.Schema) -> pa.RecordBatch:
    def lists(parts: Sequence[IdArray] | Sequence[LogpArray], kind: pa.DataType, dtype: str) -> pa.Array:
        return list_column([part.astype(dtype, copy=False) for part in parts], kind, type=_list(kind))

    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(rows), [None, pa.py_buffer(b"".join(keys))]),
        lists([row.ids.prompt_ids for row in rows], pa.int32(), "<i4"),
        lists([row.ids.chosen_ids for row in rows], pa.int32(), "<i4"),
        lists([row.ids.rejected_ids for row in rows], pa.int32(), "<i4"),
        lists([row.chosen_logps for row in rows], pa.float32(), "<f4"),
        lists([row.rejected_logps for row in rows], pa.float32(), "<f4"),
        pa.array([row.chosen_sum for row in rows], pa.float64()),
        pa.array([row.rejected_sum for row in rows], pa.float64()),
    ]
    if len(schema) > len(columns):
        columns += [
            lists([as_ids([edge for gap in gaps for edge in gap]) for gaps in side], pa.int32(), "<i4")
            for side in ([row.ids.chosen_gaps for row in rows], [row.ids.rejected_gaps for row in rows])
        ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def read_batches(data: memoryview, schemas: Sequence[pa.Schema], where: str) -> list[pa.RecordBatch]:
    """The record batches of an IPC file with exactly one of these schemas, as checked views of `data`.

    Raises:
        CacheError: another schema, compression, dictionaries, nulls, bad offsets, or not an Arrow file.
    """
    try:
        check_plain(data)
        with pa.ipc.open_file(pa.py_buffer(data)) as reader:
            if not any(reader.schema.equals(schema, check_metadata=True) for schema in schemas):
                raise damaged(where, "exactly the schema of docs/cache-format.md", "another schema")
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
    except (FramingError, pa.ArrowException, OSError) as error:
        raise damaged(where, "a valid, uncompressed Arrow file", str(error).splitlines()[0][:200]) from None
    if any(_null_count(column) for batch in batches for column in batch.columns):
        raise damaged(where, "no nulls", "nulls")
    return batches


def _null_count(column: pa.Array) -> int:
    nulls: int = column.null_count
    return nulls + (column.values.null_count if pa.types.is_list(column.type) else 0)


SCHEMAS: Final = (SHARD_SCHEMA, SHARD_SCHEMA_WITH_GAPS)


class Lists(NamedTuple):
    """A list column of one batch, in place: item j is `values[at[j]:at[j + 1]]`."""

    values: npt.NDArray[Any]
    offsets: npt.NDArray[np.int32]
    at: memoryview  # the offsets again; items are plain ints: faster for single rows


class _Batch(NamedTuple):
    keys: npt.NDArray[np.uint8]  # [n, 16]
    prompt: Lists
    chosen: Lists
    rejected: Lists
    chosen_logps: Lists
    rejected_logps: Lists
    sums: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]  # chosen, rejected
    gaps: tuple[Lists, Lists] | None  # chosen, rejected; a list alternates beginnings and ends


class Numbers(NamedTuple):
    """Values for each row, [N] each: prompt tokens, scored tokens of both responses, sums of log-probs in nats."""

    prompt_tokens: npt.NDArray[np.int32]
    chosen_tokens: npt.NDArray[np.int32]
    rejected_tokens: npt.NDArray[np.int32]
    chosen_sum: npt.NDArray[np.float64]
    rejected_sum: npt.NDArray[np.float64]

    @classmethod
    def join(cls, parts: Sequence[Numbers]) -> Numbers:
        """Concatenates at least one."""
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def at(self, rows: npt.NDArray[np.signedinteger[Any]]) -> Numbers:
        """The values of these rows, in this order."""
        return Numbers(*(column[rows] for column in self))


class Shard:
    """A shard in memory that the caller owns (usually a mapped file); all arrays are views of that memory.

    Args:
        data: the whole file.
        where: name of the file in error messages.

    Raises:
        CacheError: the structure is not exactly right. `check_values` checks the values.
    """

    def __init__(self, data: memoryview, where: str) -> None:
        self.where = where
        self.data = data
        self._batches = [_decode_batch(batch, where) for batch in read_batches(data, SCHEMAS, where)]
        ends = np.cumsum([len(batch.keys) for batch in self._batches], dtype=np.int64)
        self._starts: list[int] = [0, *ends.tolist()]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> ScoredPair:
        """The pair in this row, zero-copy (the arrays are read-only)."""
        k = bisect_right(self._starts, row) - 1
        j = row - self._starts[k]
        after = j + 1
        # Training reads rows in a loop: written out here, this takes two thirds of the time of a method of `Lists`.
        _, prompts, chosens, rejecteds, chosen_logps, rejected_logps, _, gaps = self._batches[k]
        values, _, at = prompts
        prompt = values[at[j] : at[after]]
        values, _, at = chosens
        begin, end = at[j], at[after]
        chosen = values[begin:end]
        values, _, at = chosen_logps
        first, last = at[j], at[after]
        chosen_logp, chosen_start = values[first:last], end - begin - last + first
        values, _, at = rejecteds
        begin, end = at[j], at[after]
        rejected = values[begin:end]
        values, _, at = rejected_logps
        first, last = at[j], at[after]
        ids = PairIds(prompt, chosen, rejected, chosen_start, end - begin - last + first)
        if gaps is not None:
            ids.chosen_gaps, ids.rejected_gaps = _gaps(gaps[0], j), _gaps(gaps[1], j)
            ids.chosen_start -= gap_tokens(ids.chosen_gaps)
            ids.rejected_start -= gap_tokens(ids.rejected_gaps)
        return ScoredPair(ids, chosen_logp, values[first:last])

    def prompt_ids(self, row: int) -> IdArray:
        """The prompt of a row alone."""
        k = bisect_right(self._starts, row) - 1
        values, _, at = self._batches[k].prompt
        return values[at[row - self._starts[k]] : at[row - self._starts[k] + 1]]

    def unmapped(self, descriptor: int) -> Shard:
        """This shard, with tokens and log-probs read from its open file on access.

        Rows are copies then, and nothing stays mapped; keys, sums and offsets are in memory, some 70 bytes a row.

        Args:
            descriptor: of the file; it is closed with the result.
        """
        owner, start = _Owner(), _address(np.frombuffer(self.data, np.uint8))
        weakref.finalize(owner, os.close, descriptor)

        def lists(mapped: Lists) -> Lists:
            offsets = mapped.offsets.copy()
            begin = _address(mapped.values) - start
            values: Any = _FileValues(descriptor, owner, begin, mapped.values.dtype, self.where)
            return Lists(values, offsets, offsets.data)  # of an array, rows use only slices

        found = copy.copy(self)
        found.data = memoryview(b"")
        found._batches = [
            batch._replace(
                keys=batch.keys.copy(),
                prompt=lists(batch.prompt),
                chosen=lists(batch.chosen),
                rejected=lists(batch.rejected),
                chosen_logps=lists(batch.chosen_logps),
                rejected_logps=lists(batch.rejected_logps),
                sums=(batch.sums[0].copy(), batch.sums[1].copy()),
                gaps=(lists(batch.gaps[0]), lists(batch.gaps[1])) if batch.gaps else None,
            )
            for batch in self._batches
        ]
        self.release()  # before the next shard is read, not when all of a view's maps are dropped
        return found

    def release(self) -> None:
        """Returns the mapped pages to the system, which reads them again when they are needed.

        Otherwise a scan of a cache of many gigabytes would count as this process's memory.
        """
        release(self.data)

    def numbers(self) -> Numbers:
        """Lengths and sums of all rows, without reading the tokens."""
        return Numbers.join(
            [
                Numbers(
                    np.diff(batch.prompt.offsets),
                    np.diff(batch.chosen_logps.offsets),
                    np.diff(batch.rejected_logps.offsets),
                    *batch.sums,
                )
                for batch in self._batches
            ]
        )

    def keys(self) -> npt.NDArray[np.uint8]:
        """[rows, 16] pair keys."""
        return np.concatenate([np.empty((0, 16), np.uint8), *(batch.keys for batch in self._batches)])

    def check_values(self) -> None:
        """Checks every value, at memory speed: counts, ids, finite log-probs <= 0.

        Raises:
            CacheError: names the shard and the first bad batch.
        """
        for k, batch in enumerate(self._batches):
            where = f"{self.where}, rows {self._starts[k]} to {self._starts[k + 1] - 1}"
            for side, ids, logps in (
                ("chosen", batch.chosen, batch.chosen_logps),
                ("rejected", batch.rejected, batch.rejected_logps),
            ):
                scored, tokens = np.diff(logps.offsets), np.diff(ids.offsets)
                if len(tokens) and not (scored.min() >= 1 and (scored <= tokens).all()):
                    raise damaged(where, f"a log-prob for each scored {side} token", "another number")
                if len(logps.values) and not (logps.values.max() <= 0 and logps.values.min() > -np.inf):
                    raise damaged(where, f"finite {side} log-probs, none above 0", "NaN, an infinity or one above 0")
            for row in range(self._starts[k], self._starts[k + 1] if batch.gaps is not None else self._starts[k]):
                pair = self[row].ids
                for side, tokens, start, gaps in (
                    ("chosen", pair.chosen_ids, pair.chosen_start, pair.chosen_gaps),
                    ("rejected", pair.rejected_ids, pair.rejected_start, pair.rejected_gaps),
                ):
                    if start < 0 or not gaps_fit(gaps, start, len(tokens)):
                        raise damaged(f"{self.where}, row {row}", f"{side} gaps between scored tokens", f"{gaps}")
            for lists in (batch.prompt, batch.chosen, batch.rejected):
                if len(lists.values) and lists.values.min() < 0:
                    raise damaged(where, "token ids of at least 0", f"{lists.values.min()}")

    def check_sums_and_keys(self) -> None:
        """Checks every stored sum against its log-probs and every key against its ids, row by row.

        Raises:
            CacheError: names the shard and the first bad row.
        """
        for k, batch in enumerate(self._batches):
            for name, lists, sums in zip(
                ("chosen_sum", "rejected_sum"), (batch.chosen_logps, batch.rejected_logps), batch.sums, strict=True
            ):
                if not len(sums):
                    continue
                again = np.add.reduceat(lists.values.astype(np.float64), lists.offsets[:-1])
                wrong = ~(np.abs(again - sums) <= SUM_TOLERANCE * np.abs(again))  # so that NaN counts as wrong
                if wrong.any():
                    j = int(wrong.argmax())
                    where = f"{self.where}, row {self._starts[k] + j}"
                    raise damaged(where, f"{name} {again[j]!r}", f"{sums[j]!r}")
        for row, key in enumerate(self.keys()):
            if (again_key := pair_key(self[row].ids)) != key.tobytes():
                raise damaged(f"{self.where}, row {row}", f"pair_key {again_key.hex()}", key.tobytes().hex())


class _Owner:
    """Holds an open file."""


class _FileValues:
    """The values of a list column in a file; a slice of them is an array. Any process or thread may read at once.

    Args:
        descriptor: of the open file; closed with `owner`.
        owner: what all columns of the file share.
        begin: byte of the first value.
        dtype: of the values.
        where: what errors call the file.
    """

    __slots__ = ("_begin", "_descriptor", "_dtype", "_owner", "_size", "_where")

    def __init__(self, descriptor: int, owner: object, begin: int, dtype: np.dtype[Any], where: str) -> None:
        self._descriptor, self._owner, self._begin, self._dtype = descriptor, owner, begin, dtype
        self._size, self._where = dtype.itemsize, where

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        first, wanted = self._begin + part.start * self._size, (part.stop - part.start) * self._size
        data = os.pread(self._descriptor, wanted, first)
        if len(data) != wanted:
            raise damaged(self._where, f"{wanted} bytes from byte {first}", f"{len(data)} bytes")
        return np.frombuffer(data, self._dtype)


def _address(values: npt.NDArray[Any]) -> int:
    return int(values.__array_interface__["data"][0])


def check_hash(data: memoryview, name: str, where: str) -> None:
    """Raises CacheError unless the bytes are those of the object with this name."""
    if (digest := xxhash.xxh3_128_hexdigest(data)) != name:
        raise damaged(where, f"bytes with hash {name}", f"hash {digest}")


def _decode_batch(batch: pa.RecordBatch, where: str) -> _Batch:
    keys, *columns = batch.columns[:6]
    chosen_sum, rejected_sum, *gaps = batch.columns[6:]
    columns += gaps
    lists = [Lists(_numpy(column.values), offsets := _numpy(column.offsets), offsets.data) for column in columns]
    if any(item.offsets[0] != 0 or item.offsets[-1] != len(item.values) for item in lists):
        raise damaged(where, "lists that use all of their values", "values outside the lists")
    prompt, chosen, rejected, chosen_logps, rejected_logps, *between = lists
    if any((item.offsets % 2).any() for item in between):
        raise damaged(where, "a beginning and an end for each gap", "an odd number of ends")
    sums = _numpy(chosen_sum), _numpy(rejected_sum)
    return _Batch(
        fixed_binary(keys),
        prompt,
        chosen,
        rejected,
        chosen_logps,
        rejected_logps,
        sums,
        (between[0], between[1]) if between else None,
    )


def _gaps(lists: Lists, row: int) -> Gaps:
    edges = lists.values[lists.at[row] : lists.at[row + 1]].tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def fixed_binary(array: pa.Array) -> npt.NDArray[np.uint8]:
    """[N, 16] bytes of a key column, zero-copy."""
    return np.frombuffer(array.buffers()[1] or b"", np.uint8)[: 16 * len(array)].reshape(-1, 16)


def _numpy(array: pa.Array) -> npt.NDArray[Any]:
    view: npt.NDArray[Any] = array.to_numpy(zero_copy_only=True)
    return view

"""One object of a trunk: texts with their hidden states, as an immutable, uncompressed, mapped Arrow file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpoeng.cache.mapped import release
from dpoeng.cache.records import damaged
from dpoeng.cache.shard import fixed_binary, read_batches
from dpoeng.cache.spec import ReferenceSpec

ByteArray = npt.NDArray[np.uint8]
ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_CHECKED_AT_ONCE = 1 << 24


def token_bytes(spec: ReferenceSpec) -> int:
    """Bytes of one token's states in a trunk."""
    return int(spec.fields["width"]) * ITEM_BYTES[spec.fields["dtype"]]


def states_schema(spec: ReferenceSpec) -> pa.Schema:
    """The schema of a trunk's objects. A token's states are plain bytes: numpy and Arrow have no bfloat16."""
    item = pa.field("item", pa.binary(token_bytes(spec)), nullable=False)
    return pa.schema(
        [
            pa.field("text_key", pa.binary(16), nullable=False),
            pa.field("states", pa.list_(item), nullable=False),
        ],
        metadata={
            "dpoeng.kind": "states",
            "dpoeng.version": "1",
            "dpoeng.dtype": spec.fields["dtype"],
            "dpoeng.width": str(spec.fields["width"]),
        },
    )


def encode_states(spec: ReferenceSpec, texts: Sequence[tuple[bytes, ByteArray]]) -> memoryview:
    """The bytes of an object. They depend only on the texts and their order.

    Args:
        spec: of the trunk.
        texts: key and states [tokens, token_bytes] of each, little-endian; no duplicate keys.

    Raises:
        ValueError: no texts, a duplicate key, or states of another width.
    """
    width = token_bytes(spec)
    if not texts or len({key for key, _ in texts}) != len(texts):
        raise ValueError("an object needs at least one text and no duplicates")
    if any(states.dtype != np.uint8 or states.ndim != 2 or states.shape[1] != width for _, states in texts):
        raise ValueError(f"states are [tokens, {width}] bytes")
    offsets = np.zeros(len(texts) + 1, dtype=np.int32)
    np.cumsum([len(states) for _, states in texts], out=offsets[1:])
    schema = states_schema(spec)
    values = pa.py_buffer(np.concatenate([states for _, states in texts]).reshape(-1))
    items = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), int(offsets[-1]), [None, values])
    keys = pa.py_buffer(b"".join(key for key, _ in texts))
    batch = pa.RecordBatch.from_arrays(
        [
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(texts), [None, keys]),
            pa.ListArray.from_arrays(pa.array(offsets), items, type=schema.field("states").type),
        ],
        schema=schema,
    )
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=None, metadata_version=pa.ipc.MetadataVersion.V5)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue()).cast("B")


class StatesObject:
    """An object in memory that the caller owns (usually a mapped file); its arrays are views of that memory.

    Args:
        data: the whole file.
        where: name of the file in error messages.
        spec: the trunk's spec.

    Raises:
        CacheError: the structure is not exactly right. `check_values` checks the values.
    """

    def __init__(self, data: memoryview, where: str, spec: ReferenceSpec) -> None:
        self.where, self.data = where, data
        self._dtype, width = spec.fields["dtype"], token_bytes(spec)
        batches = read_batches(data, (states_schema(spec),), where)
        if len(batches) != 1:
            raise damaged(where, "one record batch", f"{len(batches)}")
        keys, lists = batches[0].columns
        self.keys = fixed_binary(keys)  # [N, 16] uint8
        offsets: npt.NDArray[np.int32] = lists.offsets.to_numpy(zero_copy_only=True)
        self._states = np.frombuffer(lists.values.buffers()[1] or b"", np.uint8)
        self._states = self._states[: len(lists.values) * width].reshape(-1, width)  # [tokens, width] bytes
        if offsets[0] != 0 or offsets[-1] != len(self._states):
            raise damaged(where, "lists that use all of their values", "values outside the lists")
        self._at = offsets.data

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> ByteArray:
        """States [tokens, token_bytes] of a text, zero-copy (the array is read-only)."""
        return self._states[self._at[row] : self._at[row + 1]]

    def release(self) -> None:
        """Returns the mapped pages to the system; see `Shard.release`."""
        release(self.data)

    def check_values(self) -> None:
        """Checks every number, at memory speed.

        Raises:
            CacheError: a number is NaN or infinite, or a text appears twice.
        """
        flat = self._states.reshape(-1)
        for begin in range(0, len(flat), _CHECKED_AT_ONCE):
            if not _finite(flat[begin : begin + _CHECKED_AT_ONCE], self._dtype):
                raise damaged(self.where, "finite states", "NaN or an infinity")
        if len(np.unique(self.keys, axis=0)) != len(self.keys):
            raise damaged(self.where, "each text once", "a text twice")


def _finite(values: ByteArray, dtype: str) -> bool:
    if dtype == "bfloat16":  # the upper half of float32: an exponent of all ones is NaN or infinity
        return bool(((values.view("<u2") & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(values.view("<f4" if dtype == "float32" else "<f2")).all())


def as_float32(states: ByteArray, dtype: str) -> npt.NDArray[Any]:
    """States [tokens, token_bytes] as numbers [tokens, width] float32; exact, since float32 holds the others."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(states).view("<u2").astype("<u4") << 16).view("<f4")
    return np.ascontiguousarray(states).view("<f4" if dtype == "float32" else "<f2").astype("<f4", copy=False)

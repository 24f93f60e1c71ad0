"""Writes the files of this folder: each would be taken for a shard by a careless reader. Run it to make them again.

Every file is tested under its true hash, with a record that names it, as an attacker (or a broken writer) would leave
it. What is wrong with each stands in its name.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpoeng.bench.cache import synthetic_rows
from dpoeng.cache.shard import SHARD_SCHEMA, encode_shard

HERE = Path(__file__).parent


def ipc(batch: pa.RecordBatch, compression: str | None = None, stream: bool = False, copies: int = 1) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression and pa.Codec(compression, 19))
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, batch.schema, options=options) as writer:
        for _ in range(copies):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def batch_offsets(data: bytes) -> list[int]:
    """Where the messages of the record batches begin: after the magic and the schema, one behind the other."""
    starts, position = [], 8
    while (size := int.from_bytes(data[position + 4 : position + 8], "little")) > 0:
        message = pa.ipc.read_message(pa.py_buffer(data[position:]))
        starts.append(position)
        position += 8 + size + (len(message.body) if message.body else 0)
    return starts[1:]


def offsets(batch: pa.RecordBatch, column: str, values: list[int]) -> bytes:
    """The batch with other list offsets: bytes replaced in place, since pyarrow would not write them."""
    data = ipc(batch)
    old = batch.column(column).offsets.to_numpy().astype("<i4").tobytes()
    assert data.count(old) >= 1
    return data.replace(old, np.array(values, "<i4").tobytes(), 1)


def with_column(batch: pa.RecordBatch, name: str, array: pa.Array, field: pa.Field | None = None) -> pa.RecordBatch:
    place = batch.schema.get_field_index(name)
    schema = batch.schema.set(place, field or batch.schema.field(name))
    return pa.RecordBatch.from_arrays([*batch.columns[:place], array, *batch.columns[place + 1 :]], schema=schema)


def main() -> None:
    rows = synthetic_rows(3, mean_prompt=4, mean_response=3, seed=3)
    good = bytes(encode_shard(rows))
    batch = pa.ipc.open_file(pa.py_buffer(good)).get_batch(0)
    ends = batch.column("chosen_ids").offsets.to_pylist()
    logps = batch.column("chosen_logps")

    def log_probs(value: float) -> pa.Array:
        values = logps.values.to_numpy().copy()
        values[1] = value
        return pa.ListArray.from_arrays(logps.offsets, pa.array(values, pa.float32()), type=logps.type)

    zeros = np.zeros(1 << 26, np.int32)
    bomb = with_column(
        batch.slice(0, 1),
        "prompt_ids",
        pa.ListArray.from_arrays(pa.array([0, len(zeros)], pa.int32()), pa.array(zeros), type=batch.schema.types[1]),
    )
    nullable = [field.with_nullable(True) for field in SHARD_SCHEMA]
    nulls = pa.RecordBatch.from_arrays(
        [*batch.columns[:6], pa.array([None, -1.0, -1.0], pa.float64()), batch.column(7)], schema=SHARD_SCHEMA
    )
    keys = batch.column("pair_key")
    dictionary = pa.field("pair_key", pa.dictionary(pa.int32(), pa.binary(16)), nullable=False)
    footer_size = int.from_bytes(good[-10:-6], "little")
    twice = ipc(batch, copies=2)
    first, second = (struct.pack("<q", at) for at in batch_offsets(twice))
    files = {
        "compressed-bomb-of-256-MiB": ipc(bomb, "zstd"),
        "compressed-with-lz4": ipc(batch, "lz4"),
        "offsets-not-ascending": offsets(batch, "chosen_ids", [0, ends[2], ends[1], ends[3]]),
        "offsets-negative": offsets(batch, "chosen_ids", [0, -5, ends[2], ends[3]]),
        "offsets-past-the-values": offsets(batch, "chosen_ids", [0, ends[1], ends[2], 1 << 30]),
        "offsets-that-skip-the-first-value": offsets(batch, "chosen_ids", [1, *ends[1:]]),
        "offsets-that-leave-out-the-last-value": offsets(batch, "chosen_ids", [*ends[:3], ends[3] - 1]),
        "stream-format": ipc(batch, stream=True),
        "columns-in-another-order": ipc(batch.select([*SHARD_SCHEMA.names[:-2], *SHARD_SCHEMA.names[:-3:-1]])),
        "column-missing": ipc(batch.drop_columns(["rejected_sum"])),
        "column-too-many": ipc(batch.append_column("note", pa.array(["x"] * 3))),
        "schema-nullable": ipc(pa.RecordBatch.from_arrays(batch.columns, schema=pa.schema(nullable))),
        "schema-without-metadata": ipc(batch.replace_schema_metadata(None)),
        "schema-of-the-future": ipc(batch.replace_schema_metadata({"dpoeng.kind": "shard", "dpoeng.version": "2"})),
        "ids-of-64-bits": ipc(
            with_column(
                batch,
                "prompt_ids",
                batch.column("prompt_ids").cast(pa.list_(pa.int64())),
                pa.field("prompt_ids", pa.list_(pa.int64())),
            )
        ),
        "ids-negative": good.replace(rows[0].ids.chosen_ids.tobytes(), b"\xff" * rows[0].ids.chosen_ids.nbytes),
        "dictionary": ipc(with_column(batch, "pair_key", keys.dictionary_encode(), dictionary)),
        "null-in-a-column-without-nulls": ipc(nulls),
        "log-prob-nan": ipc(with_column(batch, "chosen_logps", log_probs(np.nan))),
        "log-prob-infinite": ipc(with_column(batch, "chosen_logps", log_probs(-np.inf))),
        "log-prob-positive": ipc(with_column(batch, "chosen_logps", log_probs(0.5))),
        "more-log-probs-than-tokens": ipc(
            with_column(
                batch,
                "chosen_logps",
                pa.ListArray.from_arrays(
                    pa.array([0, 50, 51, 52], pa.int32()), pa.array([-1.0] * 52, pa.float32()), type=logps.type
                ),
            )
        ),
        "no-log-probs": ipc(
            with_column(
                batch,
                "chosen_logps",
                pa.ListArray.from_arrays(
                    pa.array([0, 0, 1, 2], pa.int32()), pa.array([-1.0] * 2, pa.float32()), type=logps.type
                ),
            )
        ),
        "footer-longer-than-the-file": good[:-10] + (1 << 30).to_bytes(4, "little") + good[-6:],
        "footer-of-negative-length": good[:-10] + (-5).to_bytes(4, "little", signed=True) + good[-6:],
        "footer-of-zeros": good[: -10 - footer_size] + bytes(footer_size) + good[-10:],
        "nothing-but-magic": b"ARROW1\0\0" + b"ARROW1" * 8,
        "record-batch-listed-twice": twice[:-footer_size] + twice[-footer_size:].replace(second, first),
        "pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R." + bytes(64),
    }
    for name, data in files.items():
        (HERE / f"{name}.arrow").write_bytes(data)


if __name__ == "__main__":
    main()

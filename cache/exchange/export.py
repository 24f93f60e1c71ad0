"""Writes a view as columns in JSON Lines or Parquet, for other programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

import pyarrow as pa

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import replacing
from dpoeng.cache.reader import View
from dpoeng.cache.schema import Gaps, ScoredPair
from dpoeng.cache.shard import BATCH_ROWS, list_column

T = TypeVar("T")

EXPORT_SCHEMA: Final = pa.schema(
    [
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("ref_chosen_logps", pa.float64()),
        ("ref_rejected_logps", pa.float64()),
        ("ref_chosen_token_logps", pa.list_(pa.float32())),
        ("ref_rejected_token_logps", pa.list_(pa.float32())),
        ("source_file", pa.string()),
        ("source_row", pa.int64()),
    ]
)
TRL_SCHEMA: Final = pa.schema([EXPORT_SCHEMA.field(i) for i in range(5)])
"""The columns of TRL's data set once it has precomputed its reference."""
IDS: Final = ("prompt_ids", "chosen_ids", "rejected_ids")
TOKENS: Final = ("ref_chosen_token_logps", "ref_rejected_token_logps")
GAPS: Final = ("chosen_gaps", "rejected_gaps")
"""Columns of conversations, where a row has such gaps."""


def export_view(view: View, path: Path) -> int:
    """Writes the columns of `EXPORT_SCHEMA`, one row for each row of the source, in its order.

    Args:
        view: what to write.
        path: ends in `.jsonl` or `.parquet`. The file appears once it is complete.

    Returns:
        The number of rows.

    Raises:
        UserError: the path has another ending.
    """
    schema = EXPORT_SCHEMA
    if any(row.ids.chosen_gaps or row.ids.rejected_gaps for row in (view[i] for i in range(len(view)))):
        for name in GAPS:
            schema = schema.append(pa.field(name, pa.list_(pa.int32())))
    return _write(view, path, schema)


def export_sums(view: View, path: Path) -> int:
    """Writes the columns of `TRL_SCHEMA`; else as `export_view`."""
    return _write(view, path, TRL_SCHEMA)


def _write(view: View, path: Path, schema: pa.Schema) -> int:
    write = {".jsonl": _write_jsonl, ".parquet": _write_parquet}.get(path.suffix)
    if write is None:
        raise bad_suffix(path)
    with replacing(path) as temporary:
        write(view, temporary, schema)
    return len(view)


def is_export(path: Path) -> bool:
    """Whether `export_view` wrote this file. Raises ValueError if the file does not have the format of its name."""
    return [name for name in _names(path) if name not in GAPS] == list(EXPORT_SCHEMA.names)


def is_sums_export(path: Path) -> bool:
    """Whether `export_sums` wrote this file; as `is_export`."""
    return _names(path) == list(TRL_SCHEMA.names)


def _names(path: Path) -> list[str]:
    """The columns of a file, in their order; of JSON Lines those of the first line."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return list(parquet.read_schema(path).names)
    with path.open("rb") as file:
        line = file.readline()
    return list(json.loads(line)) if line else []


def _write_jsonl(view: View, path: Path, schema: pa.Schema) -> None:
    tokens = not view.spec.holds_sums
    with path.open("w", encoding="utf-8") as file:
        for i in range(len(view)):
            row, (source_file, source_row) = view[i], view.source(i)
            columns = {
                "prompt_ids": row.ids.prompt_ids.tolist(),
                "chosen_ids": row.ids.chosen_ids.tolist(),
                "rejected_ids": row.ids.rejected_ids.tolist(),
                "ref_chosen_logps": row.chosen_sum,
                "ref_rejected_logps": row.rejected_sum,
                "ref_chosen_token_logps": row.chosen_logps.tolist() if tokens else None,
                "ref_rejected_token_logps": row.rejected_logps.tolist() if tokens else None,
                "source_file": source_file,
                "source_row": source_row,
            }
            columns |= {name: _edges(getattr(row.ids, name)) for name in GAPS}
            file.write(json.dumps({name: columns[name] for name in schema.names}, ensure_ascii=False) + "\n")


def _write_parquet(view: View, path: Path, schema: pa.Schema) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(path, schema) as writer:
        for rows in batched(range(len(view))):
            writer.write_batch(_batch([view[i] for i in rows], [view.source(i) for i in rows], view, schema))


def _batch(
    rows: Sequence[ScoredPair], sources: Sequence[tuple[str, int]], view: View, schema: pa.Schema
) -> pa.RecordBatch:
    """Rows as arrays: numbers as objects of Python's would take ten times their memory, and as much of the time."""
    columns = {name: list_column([getattr(row.ids, name) for row in rows], pa.int32()) for name in IDS}
    for side in ("chosen", "rejected"):
        columns[f"ref_{side}_logps"] = pa.array([getattr(row, f"{side}_sum") for row in rows], pa.float64())
        logps = [getattr(row, f"{side}_logps") for row in rows]
        columns[f"ref_{side}_token_logps"] = (
            pa.nulls(len(rows), pa.list_(pa.float32())) if view.spec.holds_sums else list_column(logps, pa.float32())
        )
        gaps = [_edges(getattr(row.ids, f"{side}_gaps")) for row in rows]
        columns[f"{side}_gaps"] = pa.array(gaps, pa.list_(pa.int32()))
    columns["source_file"], columns["source_row"] = map(pa.array, zip(*sources, strict=True))
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _edges(gaps: Gaps) -> list[int]:
    return [edge for gap in gaps for edge in gap]


def batched(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of `BATCH_ROWS` items, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, BATCH_ROWS)):
        yield batch


def bad_suffix(path: Path) -> UserError:
    """The error for a file whose ending names no format that is known here."""
    return UserError(
        "unknown file ending",
        code="export-format",
        where=str(path),
        expected=".jsonl or .parquet (and .arrow, to read)",
        found=path.suffix or "no ending",
        remedy="rename the file to one of these endings",
    )

"""Writes a view as columns in JSON Lines or Parquet, for other programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa

from dpoeng.cache.errors import UserError
from dpoeng.cache.exchange.responses import responses_of
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
"""The columns of TRL's data set after it precomputed its reference."""
IDS: Final = ("prompt_ids", "chosen_ids", "rejected_ids")
TOKENS: Final = ("ref_chosen_token_logps", "ref_rejected_token_logps")
GAPS: Final = ("chosen_gaps", "rejected_gaps")
"""Additional columns if a response contains unscored turns of others."""


RESPONSES_SCHEMA: Final = pa.schema(
    [
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.list_(pa.int32()))),
        ("ref_logps", pa.list_(pa.float64())),
        ("ref_token_logps", pa.list_(pa.list_(pa.float32()))),
        ("response_gaps", pa.list_(pa.list_(pa.int32()))),
        ("scores", pa.list_(pa.float64())),
        ("source_file", pa.string()),
        ("source_row", pa.int64()),
    ]
)
"""Columns of ranked rows (all responses and their scores) and of unpaired rows (the response, the mismatched one, and
the label as a score, 1 or 0). Gaps are as in shards."""


def export_view(view: View, path: Path) -> int:
    """Writes a view with the columns of `EXPORT_SCHEMA`, or of `RESPONSES_SCHEMA` if its rows are not pairs.

    Args:
        view: the view.
        path: ends in `.jsonl` or `.parquet`. The file appears when it is complete.

    Returns:
        The number of rows.

    Raises:
        UserError: the path has another ending.
    """
    if view.rows != "pairs":
        return _write(view, path, RESPONSES_SCHEMA)
    schema = EXPORT_SCHEMA
    if any(row.ids.chosen_gaps or row.ids.rejected_gaps for row in (view[i] for i in range(len(view)))):
        for name in GAPS:
            schema = schema.append(pa.field(name, pa.list_(pa.int32())))
    return _write(view, path, schema)


def export_sums(view: View, path: Path) -> int:
    """Writes the columns of `TRL_SCHEMA`; otherwise like `export_view`."""
    return _write(view, path, TRL_SCHEMA)


def _write(view: View, path: Path, schema: pa.Schema) -> int:
    write = {".jsonl": _write_jsonl, ".parquet": _write_parquet}.get(path.suffix)
    if write is None:
        raise bad_suffix(path)
    with replacing(path) as temporary:
        write(view, temporary, schema)
    return len(view.row_starts())


def is_export(path: Path) -> bool:
    """Whether `export_view` wrote this file. Raises ValueError if the file does not have the format of its name."""
    names = [name for name in _names(path) if name not in GAPS]
    return names in (EXPORT_SCHEMA.names, RESPONSES_SCHEMA.names)


def is_sums_export(path: Path) -> bool:
    """Whether `export_sums` wrote this file. Raises like `is_export`."""
    return _names(path) == list(TRL_SCHEMA.names)


def _names(path: Path) -> list[str]:
    """The column names of a file, in order; for JSON Lines those of the first line."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return list(parquet.read_schema(path).names)
    with path.open("rb") as file:
        line = file.readline()
    return list(json.loads(line)) if line else []


def _response_columns(view: View, place: int) -> dict[str, Any]:
    responses, tokens = responses_of(view, place), not view.spec.holds_sums
    source_file, source_row = view.source(place)
    return {
        "prompt_ids": view.prompt_ids(place).tolist(),
        "response_ids": [one.ids.tolist() for one in responses],
        "ref_logps": [float(one.logps.sum(dtype=np.float64)) for one in responses],
        "ref_token_logps": [one.logps.tolist() for one in responses] if tokens else None,
        "response_gaps": [_edges(one.gaps) for one in responses],
        "scores": list(view.scores(place)),
        "source_file": source_file,
        "source_row": source_row,
    }


def _write_jsonl(view: View, path: Path, schema: pa.Schema) -> None:
    tokens = not view.spec.holds_sums
    with path.open("w", encoding="utf-8") as file:
        if schema is RESPONSES_SCHEMA:
            rows = (_response_columns(view, place) for place in view.row_starts())
            file.writelines(json.dumps(columns, ensure_ascii=False) + "\n" for columns in rows)
            return
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
        if schema is RESPONSES_SCHEMA:
            for places in batched(view.row_starts()):
                columns = [_response_columns(view, place) for place in places]
                writer.write_batch(pa.RecordBatch.from_pylist(columns, schema=schema))
            return
        for rows in batched(range(len(view))):
            writer.write_batch(_batch([view[i] for i in rows], [view.source(i) for i in rows], view, schema))


def _batch(
    rows: Sequence[ScoredPair], sources: Sequence[tuple[str, int]], view: View, schema: pa.Schema
) -> pa.RecordBatch:
    """Converts rows to arrays. Python lists of numbers would take ten times the memory and the time."""
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
    """Yields lists of `BATCH_ROWS` items; the last one may be shorter."""
    rest = iter(items)
    while batch := list(islice(rest, BATCH_ROWS)):
        yield batch


def bad_suffix(path: Path) -> UserError:
    """The error for an unknown file ending."""
    return UserError(
        "unknown file ending",
        code="export-format",
        where=str(path),
        expected=".jsonl or .parquet (and .arrow, to read)",
        found=path.suffix or "no ending",
        remedy="rename the file to one of these endings",
    )

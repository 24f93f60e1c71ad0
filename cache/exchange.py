"""Exports a cache's rows, imports rows, and merges caches: columns in JSON Lines or Parquet, or a whole cache."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa

from dpoeng.cache.errors import CacheError, UserError
from dpoeng.cache.files import hash_file, replacing
from dpoeng.cache.folder import object_name, table_name, view_name
from dpoeng.cache.foreign.tables import MAX_ROW_BYTES, Batch, arrow_batches, parquet_batches, reading
from dpoeng.cache.reader import View
from dpoeng.cache.records import Commit
from dpoeng.cache.schema import Gaps, PairIds, ScoredPair, as_ids, gap_tokens, pair_key
from dpoeng.cache.shard import BATCH_ROWS
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry
from dpoeng.cache.trunk.index import open_states

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
_GAPS: Final = ("chosen_gaps", "rejected_gaps")  # written only for rows that have gaps
_MAX_LISTS: Final = 1 << 20  # per line; an export has seven. An empty list of 3 bytes takes 64 bytes of memory
_IDS: Final = ("prompt_ids", "chosen_ids", "rejected_ids")
_TOKENS: Final = ("ref_chosen_token_logps", "ref_rejected_token_logps")
# Column names for summed log-probs: TRL's (and ours), then those of older TRL and open-instruct.
_SUMS: Final = (("ref_chosen_logps", "ref_rejected_logps"), ("reference_chosen_logps", "reference_rejected_logps"))


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
    gaps = any(row.ids.chosen_gaps or row.ids.rejected_gaps for row in (view[i] for i in range(len(view))))
    _write(path, _columns(view, gaps=gaps), EXPORT_SCHEMA)
    return len(view)


def export_sums(view: View, path: Path) -> int:
    """Writes the columns of `TRL_SCHEMA`; else as `export_view`."""
    rows = _columns(view, gaps=False)
    _write(path, ({name: row[name] for name in TRL_SCHEMA.names} for row in rows), TRL_SCHEMA)
    return len(view)


def _write(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    if path.suffix not in (".jsonl", ".parquet"):
        raise _bad_suffix(path)
    with replacing(path) as temporary:
        if path.suffix == ".jsonl":
            _write_jsonl(temporary, _batched(rows))
        else:
            _write_parquet(temporary, _batched(rows), schema)


def is_export(path: Path) -> bool:
    """Whether `export_view` wrote this file. Raises ValueError if the file does not have the format of its name."""
    return [name for name in _names(path) if name not in _GAPS] == list(EXPORT_SCHEMA.names)


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


def _columns(view: View, *, gaps: bool) -> Iterator[dict[str, Any]]:
    tokens = not view.spec.holds_sums
    for i in range(len(view)):
        row = view[i]
        source_file, source_row = view.source(i)
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
        if gaps:
            columns["chosen_gaps"] = [edge for gap in row.ids.chosen_gaps for edge in gap]
            columns["rejected_gaps"] = [edge for gap in row.ids.rejected_gaps for edge in gap]
        yield columns


def _batched(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of `BATCH_ROWS` items, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, BATCH_ROWS)):
        yield batch


def _write_jsonl(path: Path, batches: Iterable[list[dict[str, Any]]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for batch in batches:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch)


def _write_parquet(path: Path, batches: Iterable[list[dict[str, Any]]], schema: pa.Schema) -> None:
    from pyarrow import parquet

    batches = iter(batches)
    first = next(batches, [])
    for name in _GAPS:
        if first and name in first[0]:
            schema = schema.append(pa.field(name, pa.list_(pa.int32())))
    with parquet.ParquetWriter(path, schema) as writer:
        for batch in chain([first], batches):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


@dataclass(frozen=True, slots=True)
class Imported:
    """Result of an import: rows read, rows that were new to the cache, and the view if the rows named a source."""

    rows: int
    added: int
    view: str | None


def file_holds_sums(path: Path) -> bool:
    """Whether a file to import has only sums, as TRL writes them. The first row decides.

    Raises:
        UserError: the file has neither sums nor log-probs of tokens, or cannot be read.
    """
    for columns in _read_columns(path):
        if all(columns.get(name) is not None for name in _TOKENS):
            return False
        if _sum_columns(columns):
            return True
        raise _lacking(path, 1, columns)
    raise UserError(
        "the file has no rows to import",
        code="import-columns",
        where=str(path),
        remedy="name a file that `dpoeng cache export` or TRL wrote",
        exit_status=3,
    )


def import_rows(
    store: Store, spec: ReferenceSpec, path: Path, view: str | None = None, meta: Mapping[str, Any] | None = None
) -> Imported:
    """Imports rows that another program computed, under a reference that the caller vouches for.

    The file has the columns that `export_view` writes. Sources are optional. So are sums, or log-probs of tokens if the
    spec is one of sums. Nothing in the file proves which model computed its numbers. Therefore the records say that
    they were imported; the parity check before training, or `verify --recompute`, finds a wrong claim.

    Args:
        store: the cache.
        spec: the reference; `spec.of_sums()` for a file with sums only.
        path: `.jsonl`, `.parquet` or `.arrow`.
        view: name for a view over all rows of the file, in their order.
        meta: what the view's record states, besides that its rows were imported.

    Raises:
        UserError: columns are missing, or a row's numbers cannot be correct; the message names the row.
    """
    pairs = list(_read(path, sums=spec.holds_sums))
    digest = store.put_spec(spec)
    index = store.lookup(digest)
    unique = {pair_key(row.ids): row for row, _ in pairs}
    missing = [row for row in unique.values() if row.ids not in index]
    provenance = {"imported": {"xxh3_128": hash_file(path), "name": path.name}}
    for rows in _batched(missing):
        store.commit_shard(digest, rows, provenance)
    store.seal(digest)
    if view is not None:
        entries = [ViewEntry(*source, pair_key(row.ids)) for row, source in pairs]
        store.write_view(digest, view, entries, {**(meta or {}), **provenance}, known=index)
    return Imported(len(pairs), len(missing), view)


def _read(path: Path, *, sums: bool) -> Iterator[tuple[ScoredPair, tuple[str, int]]]:
    """Rows of a file with their sources: the source in the row, or else this file and the row's number."""
    for number, columns in enumerate(_read_columns(path), 1):
        values = _sum_columns(columns) if sums else _TOKENS
        if not values or any(columns.get(name) is None for name in (*_IDS, *values)):
            raise _lacking(path, number, columns)
        try:
            with np.errstate(over="ignore"):  # overflow gives infinity, which the check of the row reports
                row = _row(columns, values)
        except (ValueError, TypeError, OverflowError) as error:
            raise _bad_row(path, number, str(error)) from None
        yield row, (str(columns.get("source_file") or path.name), int(columns.get("source_row") or number))


def _sum_columns(columns: Mapping[str, Any]) -> Sequence[str]:
    """Names of the columns that have the sums of both responses; empty if there are none."""
    return next((names for names in _SUMS if all(columns.get(name) is not None for name in names)), ())


def _read_columns(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        with reading(path, "JSON Lines"):
            yield from _json_columns(path)
    elif path.suffix in (".parquet", ".arrow"):  # Arrow is what the datasets library writes
        with reading(path, path.suffix[1:].capitalize()):
            batches = parquet_batches(path) if path.suffix == ".parquet" else arrow_batches(path)
            yield from _table_columns(batches, path)
    else:
        raise _bad_suffix(path)


def _json_columns(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number in count(1):
            if not (line := file.readline(MAX_ROW_BYTES + 1)):
                return
            if len(line) > MAX_ROW_BYTES or line.count(b"[") > _MAX_LISTS:
                raise _too_long(path, number)
            try:
                columns = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _bad_row(path, number, str(error)) from None
            if not isinstance(columns, dict):
                raise _bad_row(path, number, type(columns).__name__)
            yield columns


def _table_columns(batches: Iterable[Batch], path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    for batch, too_long in batches:
        for index in range(batch.num_rows):
            number += 1
            if too_long[index]:
                raise _too_long(path, number)
            try:
                yield {
                    name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
            except (ValueError, OverflowError) as error:  # a date outside Python's range
                raise _bad_row(path, number, str(error)) from None


def _too_long(path: Path, number: int) -> UserError:
    return _bad_row(path, number, f"a row larger than the limit of {MAX_ROW_BYTES >> 20} MiB")


def _row(columns: Mapping[str, Any], values: Sequence[str]) -> ScoredPair:
    prompt, chosen, rejected = (as_ids(columns[name]) for name in _IDS)
    gaps = [_pairs_of(columns.get(name) or ()) for name in _GAPS]
    if values == _TOKENS:
        logps = [np.asarray(columns[name], np.float32) for name in values]
    else:
        logps = [
            np.zeros(len(ids) - gap_tokens(side_gaps), np.float32)
            for ids, side_gaps in zip((chosen, rejected), gaps, strict=True)
        ]
        for side_logps, name in zip(logps, values, strict=True):
            side_logps[:1] = columns[name]
    starts = [
        len(ids) - len(side_logps) - gap_tokens(between)
        for ids, side_logps, between in zip((chosen, rejected), logps, gaps, strict=True)
    ]
    row = ScoredPair(PairIds(prompt, chosen, rejected, starts[0], starts[1], gaps[0], gaps[1]), logps[0], logps[1])
    row.check()
    return row


def _pairs_of(edges: Sequence[int]) -> Gaps:
    if len(edges) % 2:
        raise ValueError("each gap needs a beginning and an end")
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def merge(target: Store, source: Store) -> tuple[int, list[str]]:
    """Copies everything undamaged from another cache: specs, objects, trunks, records, views. Changes nothing else.

    Returns:
        (number of new objects, names of the copied views).

    Raises:
        CacheError: the target has a different view of the same name, or the source is damaged. Copied parts stay, and
            a second call continues from there.
    """
    copied = 0
    target.raise_format(source.format)
    views = [source.view_record(name) for name in source.views()]
    for record in views:
        if record.name in target.views() and target.view_record(record.name) != record:
            raise CacheError(
                "both caches have a view of this name",
                code="cache-view-exists",
                where=f"{target.root / view_name(record.name)} and {source.root / view_name(record.name)}",
                remedy="run `dpoeng precompute-ref` on one of the two data sets with another --name and a new --cache, "
                "then merge that one",
                exit_status=2,
            )
    for digest, spec in source.specs().items():
        target.put_spec(spec)
        before = {commit.object.name for commit in target.commits(digest, [])}
        for commit in _sound_commits(source, digest):
            if commit.object.name not in before:
                target.put_object(commit.object.name, source.map(object_name(commit.object.name), commit.object.bytes))
                target.put_commit(commit)
                copied += 1
        target.seal(digest)
    for record in views:
        target.put_view(record, source.map(table_name(record.table.name), record.table.bytes))
    return copied, [record.name for record in views]


def _sound_commits(store: Store, digest: str) -> list[Commit]:
    spec = store.spec(digest)
    opener = partial(open_states, store, spec) if spec.holds_states else store.open_shard
    opened, _ = store.sound_objects(digest, opener, sealed=False, held={})
    sound = {reference for reference, _ in opened}
    return [commit for commit in store.commits(digest, []) if commit.object in sound]


def _bad_suffix(path: Path) -> UserError:
    return UserError(
        "unknown file ending",
        code="export-format",
        where=str(path),
        expected=".jsonl or .parquet (and .arrow, to read)",
        found=path.suffix or "no ending",
        remedy="rename the file to one of these endings",
    )


def _bad_row(path: Path, number: int, found: str) -> UserError:
    return UserError(
        "a row of the import is invalid",
        code="import-row",
        where=f"{path}:{number}",
        expected="token ids, and for each scored token a finite log-probability of at most 0",
        found=found[:200],
        remedy="correct the row at its source; nothing was imported",
        exit_status=3,
    )


def _lacking(path: Path, number: int, columns: Mapping[str, Any]) -> UserError:
    return UserError(
        "the file to import lacks columns",
        code="import-columns",
        where=f"{path}:{number}",
        expected=", ".join(_IDS) + f"; and {' and '.join(_TOKENS)}, or sums: {' and '.join(_SUMS[0])}",
        found=", ".join(name for name, value in columns.items() if value is not None) or "none",
        remedy="write these columns; from TRL: trainer.train_dataset.to_parquet(FILE) once it has precomputed",
        exit_status=3,
    )

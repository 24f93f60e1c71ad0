"""Reads rows from a program by the rules for files: lists of dicts, and tables of pandas, pyarrow or datasets.

Imports none of these libraries: methods identify a table. Independent of the definition of a pair.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.strict_json import MAX_DEPTH, RowFault, as_row

if TYPE_CHECKING:
    from dpoeng.engine.data.tables import NumberedRow

_NAME = re.compile(r"rows-[0-9a-f]{8}")  # no data file has such a name, because it has no ending


class RowsInMemory:
    """Rows used instead of a file.

    A list of dicts is read like a JSON Lines file with these objects, a table like a Parquet file with these columns,
    with the same rejects for the same reasons.

    Attributes:
        digest: xxh3_128 (hex) of the rows; for a list, that of the file that json.dumps would write, one row per line.
        name: `rows-` and the beginning of the digest, so that different rows never share a name in a cache.
    """

    def __init__(self, rows: Any) -> None:
        """Reads all rows once, for the digest.

        Args:
            rows: dicts in a list or any other iterable; or a table: a pandas or polars DataFrame, a pyarrow Table, a
                `datasets.Dataset`.

        Raises:
            UserError: there are no rows, or the object contains columns or splits instead.
        """
        for method in ("to_arrow", "read_all"):  # polars' DataFrame, pyarrow's RecordBatchReader
            rows = getattr(rows, method)() if hasattr(rows, method) else rows
        if isinstance(rows, Mapping) or not (isinstance(rows, Iterable) or hasattr(rows, "schema")):
            raise UserError(
                "the pairs are neither paths nor rows",
                code="data-unknown-kind",
                where="pairs",
                expected="paths, a list of dicts, a pandas or pyarrow table, or a datasets.Dataset",
                found=type(rows).__name__,
                remedy='choose one, e.g. pairs["train"]' if isinstance(rows, Mapping) else "give one of these",
                exit_status=3,
            )
        # Read a generator into a list: it could not be read twice.
        self._rows = list(rows) if isinstance(rows, Iterable) and iter(rows) is rows else rows
        digest, count = xxhash.xxh3_128(), 0
        for _, row in self.read():
            line = f"{row.reason}: {row.detail}" if isinstance(row, RowFault) else json.dumps(row)
            digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
            count += 1
        if not count:
            raise UserError(
                "there are no rows",
                code="data-empty",
                where="pairs",
                remedy="pass at least one pair",
                exit_status=3,
            )
        self.digest = digest.hexdigest()
        self.name = f"rows-{self.digest[:8]}"

    def read(self) -> Iterator[NumberedRow]:
        """Every row with its position, counted from 1."""
        from dpoeng.engine.data.tables import table_rows

        rows, place = self._rows, Path("pairs")
        if hasattr(rows, "schema"):  # pyarrow's Table or RecordBatch
            batches: Any = rows.to_batches() if hasattr(rows, "to_batches") else [rows]
            yield from table_rows(((batch, [False] * batch.num_rows) for batch in batches), place)
            return
        if hasattr(rows, "iloc"):  # pandas
            rows = _pandas_rows(rows, place)
        is_table = rows is not self._rows or hasattr(rows, "column_names")  # the latter is a datasets.Dataset
        for number, row in enumerate(rows, 1):
            try:
                yield number, as_row(_json(row, is_table=is_table))
            except RowFault as fault:
                yield number, fault

    def __str__(self) -> str:
        return self.name


def is_in_memory(source_file: str) -> bool:
    """Whether rows came from memory, judged by the name of their source."""
    return _NAME.fullmatch(source_file) is not None


def place(source_file: str, source_row: int) -> str:
    """A row's place for messages: `pairs.jsonl:7`, or `row 7` of rows in memory."""
    return f"row {source_row}" if is_in_memory(source_file) else f"{source_file}:{source_row}"


def _pandas_rows(frame: Any, place: Path) -> Iterator[dict[str, Any]]:
    """Rows in chunks, since all rows as dicts take several times the table's memory."""
    from dpoeng.cache.foreign.tables import BATCH_ROWS
    from dpoeng.engine.data.tables import check_names

    check_names([str(name) for name in frame.columns], place)
    for start in range(0, len(frame), BATCH_ROWS):
        yield from frame.iloc[start : start + BATCH_ROWS].to_dict("records")


def _json(value: Any, *, is_table: bool, depth: int = 1) -> Any:
    """A value in JSON form. As in Parquet, a table's missing number is null, and structs leave out missing fields.

    Raises:
        RowFault: `not-finite`, `json-too-deep`, or `bad-value` for an object of another kind.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        if is_table:
            return None
        raise RowFault("not-finite", f"{json.dumps(float(value))} is not a JSON number")
    if depth > MAX_DEPTH:
        raise RowFault("json-too-deep", f"nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        items = {key: item for key, item in value.items() if not (is_table and depth > 1 and item is None)}
        return {str(key): _json(item, is_table=is_table, depth=depth + 1) for key, item in items.items()}
    if isinstance(value, list | tuple):
        return [_json(item, is_table=is_table, depth=depth + 1) for item in value]
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return _json(value.tolist(), is_table=is_table, depth=depth + 1)
    return None if _is_missing(value) else _json_of_object(value)


def _is_missing(value: Any) -> bool:
    """Whether this is pandas' NaT or NA: NaT differs from itself, and NA has no truth value."""
    try:
        return bool(value != value)
    except TypeError:
        return True


def _json_of_object(value: Any) -> Any:
    import datetime

    from dpoeng.engine.data.tables import plain

    if isinstance(value, bytes | datetime.date | datetime.time):
        return plain(value)
    raise RowFault("bad-value", f"a {type(value).__name__} cannot be written as JSON: convert it to text or a number")

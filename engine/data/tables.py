"""Reads CSV, Parquet and Arrow into numbered rows of JSON values.

Independent of where the bytes come from and of the definition of a pair.
"""

from __future__ import annotations

import base64
import csv
import datetime
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpoeng.cache.errors import UserError
from dpoeng.cache.foreign.tables import MAX_ROW_BYTES, Mask
from dpoeng.cache.framing import MAX_COLUMNS
from dpoeng.engine.data import strict_json
from dpoeng.engine.data.strict_json import RowFault, as_row
from dpoeng.engine.data.structured import Base64

NumberedRow = tuple[int, dict[str, Any] | RowFault]


def csv_rows(lines: Iterable[tuple[int, bytes | RowFault]], path: Path, max_cell: int) -> Iterator[NumberedRow]:
    """CSV with a header. A cell that reads as a number, true or false has that value; an empty cell is null."""
    previous_limit = csv.field_size_limit(max_cell)  # process-wide; 128 KiB by default
    try:
        source = _csv_lines(lines)
        first = next(source, "")
        delimiter = max(",;\t", key=first.count)
        reader = csv.reader(chain([first], source), delimiter=delimiter, strict=True)
        names = _csv_header(reader, path)
        number = 0
        while True:
            row: dict[str, Any] | RowFault
            try:
                cells = next(reader)
                if not cells:
                    continue
                row = _csv_row(names, cells)
            except StopIteration:
                return
            except csv.Error as error:
                if "field larger" in str(error):
                    raise _open_quote(path, number + 1, max_cell) from None
                row = RowFault("bad-csv", str(error))
            except RowFault as fault:
                row = fault
            number += 1
            yield number, row
    finally:
        csv.field_size_limit(previous_limit)


def _open_quote(path: Path, number: int, max_cell: int) -> UserError:
    """The error for a cell that spans too many lines: it is unclear which row the lines after it belong to."""
    return UserError(
        "a quote of the CSV file is not closed",
        code="data-bad-csv",
        where=f"{path}, row {number}",
        expected=f"the end of a quoted cell within {max_cell >> 20} MiB",
        remedy='close it, and double the quotes inside cells (""); a CSV library does both',
        exit_status=3,
    )


def _csv_header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        names = next(reader, [])
        _csv_row(names, names)
    except (csv.Error, RowFault) as error:
        raise UserError(
            "cannot read the CSV file's header",
            code="data-bad-csv",
            where=str(path),
            expected="the names of the columns, in UTF-8, in the first line",
            found=str(error),
            remedy="write the file with a CSV library, column names first",
            exit_status=3,
        ) from None
    check_names(names, path)
    check_width(names, path)
    return names


_TOO_LONG = "\udc00"  # marks a skipped line; no decoded byte gives this character


def _csv_lines(lines: Iterable[tuple[int, bytes | RowFault]]) -> Iterator[str]:
    # Bytes that are not UTF-8 become U+DC80 to U+DCFF, and are reported for the cell that contains them.
    for _, line in lines:
        yield _TOO_LONG + "\n" if isinstance(line, RowFault) else line.decode(errors="surrogateescape")


def _csv_row(names: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    for cell in cells:
        if not cell.isascii() and any("\udc00" <= character <= "\udcff" for character in cell):
            if _TOO_LONG in cell:
                raise RowFault("line-too-long", "it contains a line longer than the limit for a row")
            raise RowFault("bad-utf8", "a cell is not UTF-8")
    if len(cells) != len(names):
        raise RowFault("bad-csv", f"{len(cells)} cells where the header has {len(names)}")
    return dict(zip(names, cells, strict=True))


def csv_value(cell: str) -> Any:
    """Parses an extra CSV cell, since CSV has no types: a number, true, false, null (empty) or text."""
    if cell == "":
        return None
    if cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    if "_" in cell:  # Python would read 1_000 as a number
        return cell
    for number in (int, float):
        try:
            value = number(cell)
        except ValueError:
            continue
        return value if math.isfinite(value) else cell
    return cell


def check_names(names: Sequence[str], path: Path) -> None:
    """Raises UserError if two columns have the same name."""
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise UserError(
            "a column name occurs twice",
            code="data-columns",
            where=str(path),
            found=", ".join(repeated),
            remedy="rename or remove one of them",
            exit_status=3,
        )


def check_width(names: Sized, path: Path) -> None:
    """Raises UserError if there are too many columns: each row would contain all of them."""
    if len(names) > MAX_COLUMNS:
        raise UserError(
            f"there are more than {MAX_COLUMNS} columns",
            code="data-columns",
            where=str(path),
            found=str(len(names)),
            remedy="keep only the columns you need, or pack the rest into one list column",
            exit_status=3,
        )


def table_rows(batches: Iterable[tuple[pa.RecordBatch, Sequence[bool] | Mask]], path: Path) -> Iterator[NumberedRow]:
    number = 0
    for batch, too_long in batches:
        names = batch.schema.names
        check_names(names, path)
        columns = [(name, column, _holds_json(column.type)) for name, column in zip(names, batch.columns, strict=True)]
        for index in range(batch.num_rows):
            number += 1
            if too_long[index]:
                yield number, RowFault("line-too-long", f"a row larger than {MAX_ROW_BYTES >> 20} MiB")
                continue
            try:
                row = {
                    name: _parsed(plain(column[index].as_py())) if is_json else plain(column[index].as_py())
                    for name, column, is_json in columns
                }
            except UnicodeDecodeError as error:
                yield number, RowFault("bad-utf8", f"{error.reason} at byte {error.start} of a value")
            except RowFault as fault:
                yield number, fault
            except (ValueError, OverflowError) as error:  # e.g. a date outside Python's range
                yield number, RowFault("bad-value", str(error)[:200])
            else:
                yield number, as_row(row)


def plain(value: Any) -> Any:
    """A table's value in JSON form: dates as ISO 8601, NaN (a missing number) as null, bytes as UTF-8.

    Bytes that are not UTF-8 become base64, which is never used as text.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        # A struct column gives every row the keys of all rows; missing ones are null.
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return Base64(base64.b64encode(value).decode("ascii"))
    if isinstance(value, datetime.date | datetime.time):  # datetime is a date
        return value.isoformat()
    return str(value)


def _holds_json(kind: pa.DataType) -> bool:
    """Whether a column's values, or the items of its lists, have a JSON type (`datasets`' `Json()` feature)."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_json(kind.value_type)
    return getattr(kind, "extension_name", "") == "arrow.json"


def _parsed(value: Any) -> Any:
    if isinstance(value, list):
        return [_parsed(item) for item in value]
    return strict_json.parse(value) if isinstance(value, str) else value

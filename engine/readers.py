"""Files to numbered rows: JSON Lines, JSON, CSV, Parquet, Arrow, the text formats also as gzip or zstd.

A row that cannot be read comes out as a `RowFault` with its number, and reading goes on behind it; a file that cannot
be read at all is a `UserError`. Memory is bounded by the longest line allowed. Knows nothing of what a pair is.
"""

from __future__ import annotations

import base64
import csv
import datetime
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from dpoeng.cache.errors import UserError
from dpoeng.engine import strict_json
from dpoeng.engine.rejects import Reject as Reject
from dpoeng.engine.rejects import write_rejects as write_rejects
from dpoeng.engine.strict_json import RowFault

MAX_LINE_BYTES = 16 << 20
MAX_DOCUMENT_BYTES = 256 << 20  # a JSON document is parsed whole
BATCH_ROWS = 256

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}

NumberedRow = tuple[int, dict[str, Any] | RowFault]


def expand(paths: Sequence[Path]) -> list[Path]:
    """The files to read, in order and each once; a directory stands for the data files directly in it, by name.

    Raises:
        UserError: nothing is there, a directory holds no data file, a file is a pipe or of an unknown kind.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        for file in _data_files(path) if path.is_dir() else [path]:
            _kind(file)
            files.setdefault(file.resolve(), file)
    return list(files.values())


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """Every row of a file with its number: the line (from 1) in JSON Lines, else the position (from 1) among the rows.

    Blank lines of JSON Lines are counted as lines but are no rows.

    Raises:
        UserError: the file cannot be read as the kind that its name says.
    """
    kind, compression = _kind(path)
    try:
        if kind == "parquet":
            with pq.ParquetFile(path) as table:
                yield from _table_rows(table.iter_batches(batch_size=BATCH_ROWS), path)
        elif kind == "arrow":
            yield from _table_rows(_arrow_batches(path), path)
        elif kind == "csv":
            with _open(path, compression) as stream:
                yield from _csv_rows(stream, path)
        elif kind == "json" and not _starts_with_a_row(path, compression):
            with _open(path, compression) as stream:
                yield from _document_rows(stream, path)
        else:
            with _open(path, compression) as stream:
                yield from _line_rows(stream)
    except (pa.ArrowException, OSError) as error:  # pyarrow reports damage of compressed streams as OSError
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(
                f"Cannot read {path}: {error.strerror}.", code="data-unreadable", where=str(path), exit_status=3
            ) from None
        raise UserError(
            "The file is damaged or not of the kind that its name says.",
            code="data-damaged",
            where=str(path),
            expected=f"a complete {compression or kind} file",
            found=str(error).splitlines()[0],
            remedy="make or copy the file again",
            exit_status=3,
        ) from None


def is_untyped(path: Path) -> bool:
    """Whether all values of the file are texts: `csv_value` says what they mean."""
    return _suffixes(path)[0] in (".csv", ".tsv")


def _data_files(folder: Path) -> list[Path]:
    names = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in names if _suffixes(file)[0] in FORMATS]
    if not files:
        raise UserError(
            "The directory holds no data file.",
            code="data-no-files",
            where=str(folder),
            expected=f"files ending in {', '.join(FORMATS)}, or one of the text kinds + .gz or .zst",
            found=", ".join(file.name for file in names[:5]) or "no files (subdirectories are not searched)",
            exit_status=3,
        )
    return files


def _suffixes(path: Path) -> tuple[str, str | None]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kinds = suffixes[:-1] if compression else suffixes
    return (kinds[-1] if kinds else ""), compression


def _kind(path: Path) -> tuple[str, str | None]:
    """`(format, compression or None)` by the name of the file, which must be a regular one."""
    if not path.exists():
        raise UserError(
            "There is no such file.", code="data-missing", where=str(path), remedy="check the path", exit_status=3
        )
    if not path.is_file():
        raise UserError(
            "Pairs are read from regular files only.",
            code="data-not-a-file",
            where=str(path),
            remedy="write the stream to a file first: a run that is resumed must find the same rows again",
            exit_status=3,
        )
    suffix, compression = _suffixes(path)
    kind = FORMATS.get(suffix)
    if kind is None or (compression and kind in ("parquet", "arrow")):
        raise UserError(
            "The name of the file does not say what kind it is.",
            code="data-unknown-kind",
            where=str(path),
            expected=f"a name ending in {', '.join(FORMATS)}; the text kinds also with .gz or .zst",
            found="".join(path.suffixes) or "no suffix",
            remedy="rename the file" if kind is None else "decompress it: Parquet and Arrow compress by themselves",
            exit_status=3,
        )
    return kind, compression


@contextmanager
def _open(path: Path, compression: str | None) -> Iterator[IO[bytes]]:
    """The decompressed bytes, past a byte-order mark."""
    with pa.input_stream(str(path), compression=compression) as source:
        # cast: pyarrow's streams have all that a BufferedReader asks of a raw file
        stream = io.BufferedReader(cast(io.RawIOBase, source), 1 << 20)
        head = stream.peek(4)[:4]
        if head.startswith(b"\xef\xbb\xbf"):
            stream.read(3)
        elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(
                "The file is UTF-16.", code="data-encoding", where=str(path), expected="UTF-8", exit_status=3
            )
        yield stream


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | RowFault]]:
    """Lines ended by LF (a CR before it stays), none longer than MAX_LINE_BYTES; longer ones are skipped in pieces."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)
        yield number, RowFault("line-too-long", f"a line of more than {MAX_LINE_BYTES >> 20} MiB")


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise RowFault("bad-utf8", f"{error.reason} at byte {error.start} of the row") from None


def _line_rows(stream: IO[bytes]) -> Iterator[NumberedRow]:
    for number, line in _lines(stream):
        if isinstance(line, RowFault):
            yield number, line
        elif not line.isspace():
            try:
                row = _row(strict_json.parse(_decode(line)))
            except RowFault as fault:
                cut = fault.reason in ("bad-json", "bad-utf8") and not line.endswith(b"\n")
                row = RowFault("cut-line", f"the last line is incomplete: {fault.detail}") if cut else fault
            yield number, row


def _row(value: Any) -> dict[str, Any] | RowFault:
    """A parsed value as a row, if it is a sound object."""
    try:
        strict_json.check(value)
    except RowFault as fault:
        return fault
    if not isinstance(value, dict):
        return RowFault("not-an-object", f"a row must be a JSON object, this is {json_type(value)}")
    return value


def json_type(value: Any) -> str:
    """What JSON calls the type of a value, with its article, for messages."""
    if value is None:
        return "null"
    for types, name in ((bool, "a boolean"), (int | float, "a number"), (str, "a string"), (list, "an array")):
        if isinstance(value, types):
            return name
    return "an object"


def _starts_with_a_row(path: Path, compression: str | None) -> bool:
    """Whether a `.json` file is JSON Lines under another name, as is common: its first line is an object by itself."""
    with _open(path, compression) as stream:
        try:
            first = strict_json.parse(_decode(stream.readline(MAX_LINE_BYTES)))
        except RowFault:
            return False
        return isinstance(first, dict) and not isinstance(first.get("data"), list)


def _document_rows(stream: IO[bytes], path: Path) -> Iterator[NumberedRow]:
    """The rows of an array, or of the array under `data` in an object."""
    content = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"A JSON document of more than {MAX_DOCUMENT_BYTES >> 20} MiB is not read whole.",
            code="data-too-large",
            where=str(path),
            remedy="make it JSON Lines, one object a line, e.g. with `jq -c '.[]'`",
            exit_status=3,
        )
    if not content.strip():
        return
    try:
        document = strict_json.parse(_decode(content))
        if isinstance(document, RowFault):
            raise document
    except RowFault as fault:
        raise UserError(
            "The file is not valid JSON.",
            code="data-bad-json",
            where=str(path),
            found=f"{fault.reason}: {fault.detail}",
            remedy="mend it, or give one object a line and name the file .jsonl: then only the bad row is lost",
            exit_status=3,
        ) from None
    rows = document.get("data", [document]) if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise UserError(
            "The JSON file holds no rows.",
            code="data-bad-json",
            where=str(path),
            expected='an array of objects, or {"data": [...]}',
            found=json_type(rows),
            exit_status=3,
        )
    for number, value in enumerate(rows, 1):
        yield number, _row(value)


def _csv_rows(stream: IO[bytes], path: Path) -> Iterator[NumberedRow]:
    """CSV with a header. A cell that reads as a number, true or false is that; an empty one is null."""
    previous_limit = csv.field_size_limit(MAX_LINE_BYTES)  # process-wide, and 128 KiB unless told
    try:
        source = _csv_lines(stream)
        first = next(source, "")
        delimiter = max(",;\t", key=first.count)
        names = next(csv.reader([first], delimiter=delimiter, strict=True), [])
        _check_names(names, path)
        reader = csv.reader(source, delimiter=delimiter, strict=True)
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
                row = RowFault("bad-csv", str(error))
            except RowFault as fault:
                row = fault
            number += 1
            yield number, row
    finally:
        csv.field_size_limit(previous_limit)


_TOO_LONG = "\udc00"  # stands for a line that was skipped; no decoded byte gives this character


def _csv_lines(stream: IO[bytes]) -> Iterator[str]:
    # Bytes that are no UTF-8 become U+DC80 to U+DCFF, and are found in the cell that holds them.
    for _, line in _lines(stream):
        yield _TOO_LONG + "\n" if isinstance(line, RowFault) else line.decode(errors="surrogateescape")


def _csv_row(names: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    for cell in cells:
        if not cell.isascii() and any("\udc00" <= character <= "\udcff" for character in cell):
            if _TOO_LONG in cell:
                raise RowFault("line-too-long", f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
            raise RowFault("bad-utf8", "a cell is not UTF-8")
    if len(cells) != len(names):
        raise RowFault("bad-csv", f"{len(cells)} cells where the header has {len(names)}")
    return dict(zip(names, cells, strict=True))


def csv_value(cell: str) -> Any:
    """What an extra cell of a CSV file means, since CSV has no types: a number, true, false, null (empty) or text."""
    if cell == "":
        return None
    if cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    if "_" in cell:  # which Python would read as 1_000
        return cell
    for number in (int, float):
        try:
            value = number(cell)
        except ValueError:
            continue
        return value if math.isfinite(value) else cell
    return cell


def _check_names(names: Sequence[str], path: Path) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(
            "A column name occurs twice.",
            code="data-columns",
            where=str(path),
            found=", ".join(repeated),
            remedy="rename or remove one of them",
            exit_status=3,
        )


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow file or stream, validated, since pyarrow trusts the offsets of what it maps."""
    with pa.memory_map(str(path)) as source:
        magic = source.read(6)
        source.seek(0)
        if magic == b"ARROW1":
            reader = ipc.open_file(source)
            batches: Iterable[pa.RecordBatch] = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = ipc.open_stream(source)
        for batch in batches:
            batch.validate(full=True)
            yield from (batch.slice(start, BATCH_ROWS) for start in range(0, batch.num_rows, BATCH_ROWS))


def _table_rows(batches: Iterable[pa.RecordBatch], path: Path) -> Iterator[NumberedRow]:
    number = 0
    for batch in batches:
        names = batch.schema.names
        _check_names(names, path)
        for index in range(batch.num_rows):
            number += 1
            try:
                row = {name: plain(batch.column(at)[index].as_py()) for at, name in enumerate(names)}
            except UnicodeDecodeError as error:
                yield number, RowFault("bad-utf8", f"{error.reason} at byte {error.start} of a value")
            else:
                yield number, _row(row)


def plain(value: Any) -> Any:
    """A value of a table as JSON can hold it: dates as ISO 8601, bytes as base64, NaN (a missing number) as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        # A struct column gives every row the keys of all rows; those that a row did not have are null.
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime.date | datetime.time):  # datetime is a date
        return value.isoformat()
    return str(value)

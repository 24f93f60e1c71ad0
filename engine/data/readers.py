"""Reads files into numbered rows: JSON Lines, JSON, CSV, Parquet, Arrow; text formats also as gzip or zstd.

An unreadable row becomes a `RowFault` with its number, and reading continues after it; an unreadable file raises a
`UserError`. Memory is bounded by the longest allowed line. Independent of the definition of a pair.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from dpoeng.cache.errors import UserError
from dpoeng.cache.foreign.tables import MAX_ROW_BYTES, arrow_batches, parquet_batches, reading, unreadable
from dpoeng.engine.data import strict_json
from dpoeng.engine.data.data_folders import data_files
from dpoeng.engine.data.hub import hub_files, is_hub
from dpoeng.engine.data.strict_json import RowFault, as_row, json_type
from dpoeng.engine.data.tables import NumberedRow, csv_rows, table_rows

MAX_LINE_BYTES = MAX_ROW_BYTES
MAX_DOCUMENT_BYTES = 256 << 20  # a JSON document is parsed whole
MAX_DOCUMENT_VALUES = 16 << 20
MAX_ROW_VALUES = 2 << 20  # per line: 16 MiB of empty lists would take 400 MB of memory

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
# Files that `datasets` writes next to the data when it saves to a directory.
NOT_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


def expand(paths: Sequence[Path]) -> list[Path]:
    """The files to read, in order, each once; a directory means the data files in it (see `data_folders`).

    `hf://org/name` stands for the files of a data set of the hub (see `hub`), which are downloaded.

    Raises:
        UserError: a path does not exist, a directory contains no data file or several splits, or a file is a pipe or
            has an unknown format.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        try:
            for file in _files(path):
                _kind(file)
                files.setdefault(file.resolve(), file)
        except OSError as error:
            raise unreadable(path, error) from None
    return list(files.values())


def _files(path: Path) -> Sequence[Path]:
    if is_hub(path):
        return hub_files(path, _is_data)
    return data_files(path, _is_data) if path.is_dir() else [path]


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """Every row of a file with its number: in JSON Lines the line, otherwise the position, both counted from 1.

    Blank lines of JSON Lines count as lines but are not rows.

    Raises:
        UserError: the file cannot be read in the format of its name.
    """
    kind, compression = _kind(path)
    with reading(path, compression or kind):
        if kind == "parquet":
            yield from table_rows(parquet_batches(path), path)
        elif kind == "arrow":
            yield from table_rows(arrow_batches(path), path)
        elif kind == "csv":
            with _open(path, compression) as stream:
                yield from csv_rows(_lines(stream), path, MAX_LINE_BYTES)
        elif kind == "json" and not _starts_with_a_row(path, compression):
            with _open(path, compression) as stream:
                yield from _document_rows(stream, path)
        else:
            with _open(path, compression) as stream:
                yield from _line_rows(stream)


def is_untyped(path: Path) -> bool:
    """Whether all values of the file are texts, whose meaning `csv_value` decides."""
    return _suffixes(path)[0] in (".csv", ".tsv")


def _is_data(file: Path) -> bool:
    return _suffixes(file)[0] in FORMATS and file.name not in NOT_DATA


def _suffixes(path: Path) -> tuple[str, str | None]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kinds = suffixes[:-1] if compression else suffixes
    return (kinds[-1] if kinds else ""), compression


def _kind(path: Path) -> tuple[str, str | None]:
    """`(format, compression or None)` from the name of a file, which must be a regular one."""
    if not path.exists():
        raise UserError("no such file", code="data-missing", where=str(path), remedy="check the path", exit_status=3)
    if not path.is_file():
        raise UserError(
            "pairs can only be read from regular files",
            code="data-not-a-file",
            where=str(path),
            remedy="write the stream to a file first: a resumed run must read the same rows again",
            exit_status=3,
        )
    suffix, compression = _suffixes(path)
    kind = FORMATS.get(suffix)
    if kind is None or (compression and kind in ("parquet", "arrow")):
        raise UserError(
            "unknown file ending",
            code="data-unknown-kind",
            where=str(path),
            expected=f"a name ending in {', '.join(FORMATS)}; the text kinds also with .gz or .zst",
            found="".join(path.suffixes) or "no suffix",
            remedy="rename the file" if kind is None else "decompress it: Parquet and Arrow have their own compression",
            exit_status=3,
        )
    return kind, compression


@contextmanager
def _open(path: Path, compression: str | None) -> Iterator[IO[bytes]]:
    """The decompressed bytes after a byte-order mark."""
    with pa.input_stream(str(path), compression=compression) as source:
        # cast: pyarrow's streams have all methods that BufferedReader needs
        stream = io.BufferedReader(cast(io.RawIOBase, source), 1 << 20)
        head = stream.peek(4)[:4]
        if head.startswith(b"\xef\xbb\xbf"):
            stream.read(3)
        elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(
                "the file is UTF-16",
                code="data-encoding",
                where=str(path),
                expected="UTF-8",
                remedy="convert it, e.g. iconv -f utf-16 -t utf-8",
                exit_status=3,
            )
        yield stream


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | RowFault]]:
    """Lines that end with LF (a CR before it stays), at most MAX_LINE_BYTES long; longer ones are skipped in pieces."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)
        yield number, RowFault("line-too-long", f"a line longer than {MAX_LINE_BYTES >> 20} MiB")


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise RowFault("bad-utf8", f"{error.reason} at byte {error.start} of the row") from None


def _line_rows(stream: IO[bytes]) -> Iterator[NumberedRow]:
    for number, line in _lines(stream):
        if isinstance(line, RowFault):
            yield number, line
        elif len(line) > MAX_ROW_VALUES and _values(line) > MAX_ROW_VALUES:
            yield number, RowFault("line-too-long", f"a line with more than {MAX_ROW_VALUES >> 20} million values")
        elif not line.isspace():
            try:
                row = as_row(strict_json.parse(_decode(line).rstrip("\r\n"), is_line=True))
            except RowFault as fault:
                cut = fault.reason in ("bad-json", "bad-utf8") and not line.endswith(b"\n")
                row = RowFault("cut-line", f"the last line is incomplete: {fault.detail}") if cut else fault
            yield number, row


def _starts_with_a_row(path: Path, compression: str | None) -> bool:
    """Whether a `.json` file is really JSON Lines: its first line is a complete object."""
    with _open(path, compression) as stream:
        try:
            first = strict_json.parse(_decode(stream.readline(MAX_LINE_BYTES)))
        except RowFault:
            return False
        return isinstance(first, dict) and not isinstance(first.get("data"), list)


def _values(content: bytes) -> int:
    """Upper bound for the number of values: lists, objects and commas. Empty lists take 3 bytes here, 64 in memory."""
    return sum(content.count(mark) for mark in b",[{")


def _document_rows(stream: IO[bytes], path: Path) -> Iterator[NumberedRow]:
    """The rows of an array, or of the array under `data` in an object."""
    content = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"the JSON document is larger than {MAX_DOCUMENT_BYTES >> 20} MiB",
            code="data-too-large",
            where=str(path),
            remedy="convert it to JSON Lines, one object a line, e.g. with `jq -c '.[]'`",
            exit_status=3,
        )
    if _values(content) > MAX_DOCUMENT_VALUES:
        raise UserError(
            f"the JSON document has more than {MAX_DOCUMENT_VALUES >> 20} million values",
            code="data-too-large",
            where=str(path),
            remedy="convert it to JSON Lines, one object a line, e.g. with `jq -c '.[]'`",
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
            "the file is not valid JSON",
            code="data-bad-json",
            where=str(path),
            found=f"{fault.reason}: {fault.detail}",
            remedy="fix it, or write one object a line and name the file .jsonl: then only the bad row is rejected",
            exit_status=3,
        ) from None
    rows = document.get("data", [document]) if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise UserError(
            "the JSON file contains no rows",
            code="data-bad-json",
            where=str(path),
            expected='an array of objects, or {"data": [...]}',
            found=json_type(rows),
            remedy="write the pairs as an array, or one object a line in a .jsonl file",
            exit_status=3,
        )
    for number, value in enumerate(rows, 1):
        yield number, as_row(value)

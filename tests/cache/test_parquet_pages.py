"""Parquet from strangers: what pages say that they expand to is summed before a decoder believes it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from dpoeng.cache.errors import UserError
from dpoeng.cache.foreign import parquet_pages
from dpoeng.cache.foreign.tables import parquet_batches
from dpoeng.cache.framing import FramingError
from dpoeng.engine.data.readers import read_rows
from dpoeng.engine.data.strict_json import RowFault


def written(path: Path, table: pa.Table, **options: Any) -> Any:
    parquet.write_table(table, path, **options)
    return parquet.read_metadata(path)


def some_table(rows: int = 3000) -> pa.Table:
    dice = random.Random(0)
    return pa.table(
        {
            "text": [str(dice.random()) * 5 for _ in range(rows)],
            "category": [f"c{dice.randrange(5)}" for _ in range(rows)],
            "ids": [[dice.randrange(50_000) for _ in range(dice.randrange(30))] for _ in range(rows)],
            "messages": [[{"role": "user", "content": str(i)}] * (i % 3) for i in range(rows)],
        }
    )


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_pages_are_found_as_the_writer_counted_them(
    tmp_path: Path, version: str, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    options = {"data_page_size": 2000, "row_group_size": 1000, "data_page_version": version, "write_statistics": True}
    metadata = written(path, some_table(), compression=compression, **options)
    with path.open("rb") as file:
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for chunk in map(group.column, range(metadata.num_columns)):
                headers: list[int] = []
                real = parquet_pages._header

                def counting(file: Any, at: int, end: int, real: Any = real, headers: list[int] = headers) -> Any:
                    header, behind = real(file, at, end)
                    headers.append(behind - at + header[2])
                    return header, behind

                monkeypatch.setattr(parquet_pages, "_header", counting)
                largest, values, pages = parquet_pages._chunk(file, path.stat().st_size, chunk, 10_000)
                monkeypatch.setattr(parquet_pages, "_header", real)
                assert (values, pages) == (chunk.num_values, len(headers))
                assert sum(headers) == chunk.total_uncompressed_size
                assert largest < max(headers)


def test_pages_that_expand_too_far_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    written(path, pa.table({"x": ["a" * 300_000], "y": ["b" * 300_000]}), compression="zstd")
    assert len(list(read_rows(path))) == 1
    monkeypatch.setattr(parquet_pages, "MAX_EXPANDED_BYTES", 500_000)
    with pytest.raises(UserError, match="expand to 6000") as caught:
        list(read_rows(path))
    assert caught.value.code == "data-too-large"


def test_pages_that_claim_gigabytes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """The sizes in five headers are made 128 MiB each; the compressed bytes stay what they were."""
    path = tmp_path / "a.parquet"
    table = pa.table({f"c{i}": ["a" * (2 << 20)] for i in range(5)})
    metadata = written(path, table, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    for column in range(5):
        at = metadata.row_group(0).column(column).data_page_offset
        assert content[at : at + 3] == b"\x15\x00\x15"  # type of the page, and the size as a number of four bytes
        assert parquet_pages._varint(bytes(content), at + 3)[1] == at + 7
        content[at + 3 : at + 7] = b"\xfe\xff\xff\x7f"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{5 * ((1 << 27) - 1)} bytes at once") as caught:
        list(read_rows(path))
    assert caught.value.code == "data-too-large"


def test_a_value_that_a_dictionary_repeats_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    value = "x" * (20 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 50_000, pa.int32()), [value])
    written(path, pa.table({"prompt": column}), compression="zstd", store_schema=False)
    assert path.stat().st_size < 10_000
    before = pa.default_memory_pool().bytes_allocated()
    count = 0
    for batch, too_long in parquet_batches(path):
        count += batch.num_rows
        assert too_long.all()
        assert pa.default_memory_pool().bytes_allocated() - before < 10 * len(value)
    assert count == 50_000
    _, row = next(iter(read_rows(path)))
    assert isinstance(row, RowFault)


def test_lists_that_take_no_bytes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    written(path, pa.table({"x": [[7] * 100_000]}))
    assert len(list(read_rows(path))) == 1
    monkeypatch.setattr(parquet_pages, "MAX_BATCH_ROWS", 1000)
    with pytest.raises(UserError, match="lists of 100000 values"):
        list(read_rows(path))


def test_columns_that_share_their_pages_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    metadata = written(path, some_table(), data_page_size=100)
    with path.open("rb") as file, pytest.raises(FramingError, match="overlap"):
        parquet_pages._chunk(file, path.stat().st_size, metadata.row_group(0).column(2), 3)


@pytest.mark.parametrize(
    "data", [b"", b"\x15", b"\x1c" * 20 + b"\0", b"\x19\xf5\xff\xff\xff\xff\x0f", b"\x18\x7fab", b"\x1b\x01"]
)
def test_invalid_headers_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "header"
    path.write_bytes(data)
    with path.open("rb") as file, pytest.raises(FramingError):
        parquet_pages._header(file, 0, len(data))

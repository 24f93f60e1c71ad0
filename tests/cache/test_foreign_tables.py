"""Arrow and Parquet from strangers: damage is reported, bombs exceed their limit, nothing ends the process."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from dpoeng.cache import framing
from dpoeng.cache.errors import UserError
from dpoeng.cache.exchange.importing import file_holds_sums, import_rows
from dpoeng.cache.foreign import tables
from dpoeng.cache.foreign.tables import arrow_batches, parquet_batches, reading, row_bytes
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.engine.data.readers import read_rows
from dpoeng.engine.data.strict_json import RowFault

TRIES = int(os.environ.get("DPOENG_FUZZ", "60"))
SPEC = ReferenceSpec.from_fields({"model": "strangers"})
COLUMNS: dict[str, list[Any]] = {
    "prompt_ids": [[1], [2, 3], []] * 4,
    "chosen_ids": [[2], [4], [5]] * 4,
    "rejected_ids": [[3], [6], [7, 8]] * 4,
    "ref_chosen_token_logps": [[-1.0], [-0.5], [-2.0]] * 4,
    "ref_rejected_token_logps": [[-2.0], [-1.5], [-2.0, -3.0]] * 4,
    "source_file": ["a.jsonl", "b", "ü"] * 4,
    "source_row": list(range(12)),
}


def plain_table() -> pa.Table:
    return pa.table(COLUMNS)


def odd_table() -> pa.Table:
    """The same with every way to write less than there is: dictionaries, runs, views, structs."""
    texts = pa.array(COLUMNS["source_file"])
    return plain_table().append_column("runs", pa.RunEndEncodedArray.from_arrays([5, 12], ["x", "y"])).append_column(
        "dictionary", texts.dictionary_encode()
    ).append_column("view", texts.cast(pa.string_view())).append_column(
        "struct", pa.array([{"a": [None, "b"], "c": {"d": 1.5}}] * 12)
    )  # fmt: skip


def arrow(table: pa.Table, opener: Callable[..., Any] = ipc.new_stream, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with opener(sink, table.schema, options=ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=5)
    return bytes(sink.getvalue())


def of_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, row_group_size=5)
    return bytes(sink.getvalue())


FILES: dict[str, Callable[[], bytes]] = {
    "stream.arrow": lambda: arrow(plain_table()),
    "odd.arrow": lambda: arrow(odd_table()),
    "file.arrow": lambda: arrow(plain_table().append_column("d", odd_table()["dictionary"]), ipc.new_file),
    "zstd.arrow": lambda: arrow(odd_table(), compression="zstd"),
    "a.parquet": lambda: of_parquet(plain_table()),
}


def mutated(content: bytes, dice: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 4])):
        at = dice.randrange(len(data)) & ~dice.choice([0, 3, 7])
        match dice.randrange(5):
            case 0:
                del data[at:]
            case 1:
                data[at] ^= 1 << dice.randrange(8)
            case 2:
                struct.pack_into("<q", data := data.ljust(at + 8, b"\0"), at, dice.choice(WILD))
            case 3:
                struct.pack_into("<i", data := data.ljust(at + 4, b"\0"), at, dice.choice(WILD) & 0x7FFFFFFF)
            case _:
                other = dice.randrange(len(data))
                data[at : at + 16] = data[other : other + 16]
        data = data or bytearray(1)
    return bytes(data)


WILD = (-1, 0, 1, 7, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, -(2**62))


def fault_of(read: Callable[..., Any], *arguments: Any) -> UserError | None:
    try:
        read(*arguments)
    except UserError as error:
        return error
    return None


@pytest.mark.parametrize("name", FILES)
def test_mutated_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    path, sound = tmp_path / name, FILES[name]()
    path.write_bytes(sound)
    assert file_holds_sums(path) is False
    store = Store.open(tmp_path / "cache", create=True)
    outcomes = {"read": 0, "refused": 0}
    for seed in range(TRIES):
        path.write_bytes(mutated(sound, random.Random(f"{name} {seed}")))
        found = [fault_of(list, read_rows(path)), fault_of(import_rows, store, SPEC, path)]
        errors = [error for error in found if error is not None]
        assert all(error.where for error in errors), seed
        outcomes["refused" if errors else "read"] += 1
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.parametrize("suffix", [".arrow", ".parquet", ".jsonl"])
@pytest.mark.parametrize("content", [b"", b"text\n", b"\xff\xfe\xff", b"ARROW1\0\0", b"PAR1PAR1"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"in{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        file_holds_sums(path)
    assert caught.value.code in ("data-damaged", "import-row", "import-columns")
    assert str(caught.value.where).startswith(str(path))


def refused(path: Path) -> str:
    """What is found wrong with a file that claims too much, by the import and by the reader of pairs alike."""
    found = []
    for read in (lambda: list(read_rows(path)), lambda: file_holds_sums(path)):
        with pytest.raises(UserError) as caught:
            read()
        assert caught.value.code == "data-too-large"
        found.append(str(caught.value.found))
    assert found[0] == found[1]
    return found[0]


def test_rows_that_take_no_bytes_are_limited(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.arrow", 0x3579
    content = arrow(pa.table({"nothing": pa.nulls(1000)})).replace(struct.pack("<q", 5), struct.pack("<q", 2**40))
    path.write_bytes(content)
    assert "batch of 1099511627776 rows" in refused(path)
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 1], pa.int32()), pa.array(["x"]))
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, pa.schema({"x": runs.type})) as writer:
        writer.write_batch(pa.record_batch({"x": runs}))
    path.write_bytes(bytes(sink.getvalue()))
    assert "batch of 2147483647 rows" in refused(path)
    lists = pa.ListArray.from_arrays(pa.array([0, rows], pa.int32()), pa.nulls(rows))
    path.write_bytes(arrow(pa.table({"x": lists})))
    assert f"column of {rows} values" in refused(path)


def test_a_value_that_a_dictionary_repeats_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.arrow"
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 3000 + [1], pa.int32()), ["x" * 5000, "y" * 9000])
    path.write_bytes(arrow(pa.table({"prompt": repeated})))
    assert len(list(read_rows(path))) == 3001
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 8000)
    last = list(read_rows(path))[-1][1]
    assert isinstance(last, RowFault)
    assert last.reason == "line-too-long"
    monkeypatch.setattr(tables, "_FREE_BYTES", 1000)
    monkeypatch.setattr(tables, "MAX_EXPANSION", 10)
    with pytest.raises(UserError, match="bytes once written out"):
        list(read_rows(path))


def test_declared_sizes_of_compressed_buffers_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.arrow"
    content = arrow(pa.table({"x": ["a" * 100_000], "y": ["b" * 100_000]}), compression="zstd")
    path.write_bytes(content)
    assert len(list(read_rows(path))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(framing, "MAX_EXPANDED_BYTES", 150_000)
        assert "expands to 2000" in refused(path)
    path.write_bytes(content.replace(struct.pack("<q", 100_000), struct.pack("<q", 2**40)))
    assert "the limit is 512 MiB" in refused(path)


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_columns_are_limited(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (framing, tables):
        monkeypatch.setattr(module, "MAX_COLUMNS", 20)
    path = tmp_path / f"a{suffix}"
    table = pa.table({f"c{i}": [i] for i in range(21)})
    path.write_bytes(arrow(table) if suffix == ".arrow" else of_parquet(table))
    assert refused(path) == "21 columns; the limit is 20"


def test_a_long_line_of_an_import_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpoeng.cache.exchange.importing.MAX_ROW_BYTES", 50)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt_ids": [1] * 50}))
    with pytest.raises(UserError, match="the limit of 0 MiB"):
        file_holds_sums(path)


@pytest.mark.parametrize(
    ("column", "sizes"),
    [
        (pa.array(["ab", None, "cde"]), [2, 0, 3]),
        (pa.array(["ab", "cde", "ab"]).dictionary_encode(), [2, 3, 2]),
        (pa.array(["ab", None]).dictionary_encode(), [2, 2]),
        (pa.array(["", "ab", "cde" * 9]).cast(pa.string_view())[1:], [2, 27]),
        (pa.array([["ab"], None, ["c", "de"]])[1:], [8, 11]),
        (pa.array([[1, 2], None, []]), [24, 8, 8]),
        (pa.array([{"a": "x", "b": [1]}, {"a": "xyz", "b": []}])[1:], [19]),
        (pa.array([["a", "bb"], ["c", "d"]], pa.list_(pa.string(), 2))[1:], [10]),
        (pa.array([[("k", "vv")], [("kk", "v")]], pa.map_(pa.string(), pa.string()))[1:], [19]),
        (pa.RunEndEncodedArray.from_arrays([2, 5], ["aa", "b"])[1:], [2, 1, 1, 1]),
        (pa.array([["a"], ["b", "ccc"]], pa.list_view(pa.string()))[1:], [12]),
        (pa.array([b"123"], pa.binary(3)), [3]),
        (pa.array(["{}"], pa.json_()), [2]),
        (pa.array([], pa.string_view()), []),
    ],
)
def test_the_size_of_a_row_is_that_of_what_is_written_out(column: pa.Array, sizes: list[int]) -> None:
    assert row_bytes(pa.record_batch({"x": column})).tolist() == sizes


def test_sound_tables_come_whole(tmp_path: Path) -> None:
    for name, make in FILES.items():
        path = tmp_path / name
        path.write_bytes(make())
        with reading(path, "table"):
            read = parquet_batches if path.suffix == ".parquet" else arrow_batches
            rows = [row for batch, _ in read(path) for row in batch.select(list(COLUMNS)).to_pylist()]
        assert rows == plain_table().to_pylist()


def test_a_dictionary_is_validated_once_and_its_indices_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.arrow"
    content = arrow(pa.table({"x": pa.array(["a", "b"] * 50).dictionary_encode()}))
    path.write_bytes(content)
    known: list[int] = []
    real = tables._validate_dictionary

    def counting(column: Any, seen: Any) -> None:
        real(column, seen)
        known.append(id(next(iter(seen.values()))))

    monkeypatch.setattr(tables, "_validate_dictionary", counting)
    with reading(path, "Arrow"):
        rows = [value for batch, _ in arrow_batches(path) for value in batch["x"].to_pylist()]
    assert rows == ["a", "b"] * 50
    assert len(known) == 20
    assert len(set(known)) == 1
    wild = struct.pack("<5i", 0, 1, 0, 1, 0)
    assert content.count(wild) > 5
    path.write_bytes(content.replace(wild, struct.pack("<5i", 0, 1, 0, 1 << 20, 0)))
    with pytest.raises(UserError, match="outside the 2 values"), reading(path, "Arrow"):
        list(arrow_batches(path))

"""Rows in memory are read by the rules of a file: the same pairs, the same rejects, the same digest."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.in_memory import RowsInMemory, is_in_memory, place
from dpoeng.engine.data.pairs import PairFile, ensure_unchanged, read_pairs

GOOD = [
    {"prompt": f"Question {i}:", "chosen": f" yes {i}", "rejected": f" no {i}", "margin": i / 2, "tag": "ab"[i % 2]}
    for i in range(5)
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"Hi {i}"}],
        "chosen": [{"role": "assistant", "content": "Hello"}],
        "rejected": [{"role": "assistant", "content": "Go", **({"name": "x"} if i else {})}],
    }
    for i in range(3)
]
BAD: list[Any] = [
    {"prompt": "p", "chosen": None, "rejected": "b"},
    {"prompt": "p", "chosen": "a", "rejected": "a"},
    {"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("nan")},
    {"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("-inf")},
    {"prompt": "p", "chosen": "\ud800", "rejected": "b"},
    {"prompt": "p", "chosen": 5, "rejected": "b"},
    {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"},
    ["p", "a", "b"],
    7,
    GOOD[0],
    {**GOOD[1], "chosen": GOOD[1]["rejected"], "rejected": GOOD[1]["chosen"]},
]


def read(*sources: Any, **settings: Any) -> PairFile:
    paths = [source if isinstance(source, Path) else RowsInMemory(source) for source in sources]
    return read_pairs(paths, max_reject_share=1, **settings)


def content(found: PairFile) -> Any:
    """All of it but the name of the source."""
    return (
        [(p.prompt, p.chosen, p.rejected, p.extra, p.source_row) for p in found.pairs],
        [(r.source_row, r.reason, r.detail) for r in found.rejects],
        [(r.source_row, r.first_row) for r in (*found.duplicates, *found.contradictions)],
        (found.filtered, found.columns, found.misspelt, found.prompts.columns),
    )


@pytest.mark.parametrize("rows", [GOOD, CHAT, GOOD + BAD], ids=["texts", "messages", "faults"])
def test_a_list_is_read_like_json_lines(tmp_path: Path, rows: list[Any]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_file, from_memory = read(file), read(rows)
    assert content(from_memory) == content(from_file)
    if not from_file.rejects:
        assert list(from_memory.files.values()) == list(from_file.files.values()), "the digest is that of the file"
    assert content(read(iter(rows))) == content(from_file), "a generator is read once and kept"


class Frame:
    """The methods of a pandas DataFrame that are used."""

    def __init__(self, table: pa.Table) -> None:
        self.rows, self.columns, self.iloc = table.to_pylist(), table.column_names, self

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __getitem__(self, part: slice) -> Any:
        rows = [{k: np.array(v, object) if isinstance(v, list) else v for k, v in row.items()}
                for row in self.rows[part]]  # fmt: skip
        rows = [{k: float("nan") if v is None else v for k, v in row.items()} for row in rows]
        return type("Part", (), {"to_dict": lambda _, orient: rows})()


class Dataset:
    """The methods of a datasets.Dataset that are used."""

    def __init__(self, table: pa.Table) -> None:
        self.rows, self.column_names = table.to_pylist(), table.column_names

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


KINDS = {
    "pyarrow": lambda table: table,
    "batch": lambda table: table.to_batches()[0],
    "reader": lambda table: table.to_reader(),
    "polars": lambda table: type("Polars", (), {"to_arrow": lambda _: table})(),
    "pandas": Frame,
    "datasets": Dataset,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [[*GOOD, *BAD[:2], {**GOOD[3], "tag": None}], CHAT], ids=["texts", "messages"])
def test_a_table_is_read_like_parquet(tmp_path: Path, kind: str, rows: list[Any]) -> None:
    """The classes stand in for libraries that dpoeng does not need; each was tried with the real one."""
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "pairs.parquet")
    assert content(read(KINDS[kind](table))) == content(read(tmp_path / "pairs.parquet"))


def test_places_are_rows_and_names_follow_the_content() -> None:
    found = read([*GOOD, {"prompt": "p", "chosen": "a"}])
    (name,) = found.files
    assert is_in_memory(name)
    assert not is_in_memory("rows-0123abcd.jsonl")
    assert (place(name, 6), place("pairs.jsonl", 6)) == ("row 6", "pairs.jsonl:6")
    with pytest.raises(UserError, match="first row 1: "):
        read_pairs([RowsInMemory([{"prompt": "p", "chosen": " ", "rejected": "b"}])])
    assert RowsInMemory(GOOD).name == RowsInMemory([dict(row) for row in GOOD]).name
    assert RowsInMemory(GOOD).name != RowsInMemory(GOOD[:4]).name
    ensure_unchanged(found.files)


def test_values_of_python_become_those_of_json() -> None:
    day = datetime.datetime(2026, 1, 2, 3, 4)
    extra = {"a": np.float32(0.5), "b": np.arange(2), "c": (1, "x"), "d": day, "e": b"\xff", "f": np.bool_(True)}
    (pair,) = read([{**GOOD[0], **extra}]).pairs
    assert {k: pair.extra[k] for k in "abcdef"} == {
        "a": 0.5, "b": [0, 1], "c": [1, "x"], "d": "2026-01-02T03:04:00", "e": "/w==", "f": True,
    }  # fmt: skip
    (reject,) = read([*GOOD, {**GOOD[0], "x": object()}]).rejects
    assert (reject.source_row, reject.reason) == (6, "bad-value")
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    (reject,) = read([*GOOD, {**GOOD[0], "x": deep}]).rejects
    assert reject.reason == "json-too-deep"


@pytest.mark.parametrize(
    ("rows", "code", "says"),
    [
        ({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}, "data-unknown-kind", "dict"),
        (5, "data-unknown-kind", "int"),
        ([], "data-empty", "no rows"),
        (pa.table({"chosen": ["a"], "x": [1]}).rename_columns(["chosen", "chosen"]), "data-columns", "twice"),
        ([{"prompt": "p", "chosen_text": "a", "rejected": "b"}], "data-columns", "did you mean 'chosen_text'"),
    ],
    ids=["columns", "number", "nothing", "one-name-twice", "no-chosen"],
)
def test_data_without_rows_is_refused(rows: Any, code: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        read(rows)
    assert caught.value.code == code
    assert says in str(caught.value)

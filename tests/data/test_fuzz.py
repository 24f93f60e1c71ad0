"""Damaged files: the outcome is pairs, named rejects or one clear error, and every row is accounted for.

A few hundred files by default; `DPOENG_FUZZ=10000` tries so many of each kind.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.pairs import read_pairs

TRIES = int(os.environ.get("DPOENG_FUZZ", "120"))

ROWS: list[dict[str, Any]] = [
    {"prompt": "Ünï: ", "chosen": "a\u2028b", "rejected": "🙂", "margin": 0.5, "confident": True},
    {"prompt": "p", "chosen": "yes", "rejected": "no", "margin": -1e3, "confident": False},
    {"prompt": "q\n", "chosen": " x\n", "rejected": "[1]", "margin": 0.0, "confident": True},
] * 4
CHATS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"hi {i}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "tools": [{"type": "function"}],
        "chat_template_kwargs": {"a": 1},
    }
    for i in range(8)
]

# What damage is made of: bytes that mean something to one of the formats.
TOKENS = [
    b'"',
    b"\\",
    b"\\ud800",
    b"{",
    b"}",
    b"[" * 5000,
    b"]",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
]
TOKENS += [
    b"NaN",
    b"1e999",
    b"null",
    b"true",
    b"-",
    b'"chosen":',
    b'"role":',
    "\u2028".encode(),
    b"\xed\xa0\x80",
    b"9" * 5000,
]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def csv_bytes(rows: list[dict[str, Any]]) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=5)
    return bytes(sink.getvalue())


def arrow(rows: list[dict[str, Any]], opener: Callable[..., Any], **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    with opener(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=5)
    return bytes(sink.getvalue())


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": jsonl,
    "a.json": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "a.csv": csv_bytes,
    "a.jsonl.gz": lambda rows: gzip.compress(jsonl(rows), mtime=0),
    "a.parquet": parquet,
    "file.arrow": lambda rows: arrow(rows, ipc.new_file),
    "stream.arrow": lambda rows: arrow(rows, ipc.new_stream),
    "lz4.arrow": lambda rows: arrow(rows, ipc.new_file, options=ipc.IpcWriteOptions(compression="lz4")),
}


def damaged(content: bytes, dice: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 5])):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(6):
            case 0:
                del data[at:]
            case 1:
                data[at:at] = dice.choice(TOKENS)
            case 2:
                data[at : at + dice.randrange(1, 40)] = dice.choice(TOKENS)
            case 3:
                data[at : at + 8] = bytes(min(8, len(data) - at))
            case 4:
                other = dice.randrange(len(data) + 1)
                data[at:at] = data[other : other + dice.randrange(60)]
            case _:
                if at < len(data):
                    data[at] ^= 1 << dice.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.timeout(3000)
def test_damage_never_surprises(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = [KINDS[name](rows) for rows in (ROWS, CHATS)]
    outcomes = {"pairs": 0, "refused": 0}
    for seed in range(TRIES):
        dice = random.Random(f"{name} {seed}")
        content = damaged(dice.choice(whole), dice)
        path.write_bytes(content)
        where = dice.choice([None, None, "confident", "margin > 0 or not confident"])
        refused: UserError | None = None
        try:
            found = read_pairs([path], max_reject_share=1.0, where=where)
        except UserError as error:
            refused = error
        if refused is not None:
            outcomes["refused"] += 1
            assert refused.exit_status == 3, seed
            assert refused.where, seed
            continue
        outcomes["pairs"] += 1
        assert found.pairs, seed
        rows = [pair.source_row for pair in found.pairs] + [reject.source_row for reject in found.rejects]
        assert len(set(rows)) == len(rows), seed
        for reject in found.rejects:
            assert reject.reason, seed
            assert reject.detail, seed
        if name == "a.jsonl":
            lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
            assert len(rows) + found.filtered == len(lines), seed
        for pair in found.pairs:  # what went through can be written, hashed and rendered
            json.dumps(
                [pair.prompt, pair.chosen, pair.rejected, pair.extra], ensure_ascii=False, allow_nan=False
            ).encode()
            assert type(pair.chosen) is type(pair.rejected) is type(pair.prompt), seed
            assert pair.chosen, seed
            assert pair.chosen != pair.rejected, seed
    assert outcomes["pairs"] > 0 or name == "a.jsonl.gz"  # whose checksum finds all damage
    assert outcomes["refused"] > 0

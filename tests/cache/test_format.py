"""The format of docs/cache-format.md: bytes pinned by a golden cache, read by a reader that shares no code with ours.

`tests/golden/cache-v1` is never rewritten: a cache that was written once must stay readable. It was made by
`python tests/cache/test_format.py NEW_FOLDER`.
"""

from __future__ import annotations

import itertools
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, ScoredPair, as_ids, pair_key
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry
from dpoeng.cache.verify import verify

GOLDEN = Path(__file__).parent / "golden" / "cache-v1"
SPEC = ReferenceSpec.from_fields(
    {"weights": {"lm_head.weight": ["BF16", [4, 2], "0" * 32]}, "lora_alpha": 16.0, "é": None}
)
ROWS = [
    ScoredPair(
        PairIds(as_ids([1, 2, 3]), as_ids([10, 11]), as_ids([12])),
        np.array([-0.5, -0.25], np.float32),
        np.array([-3.0], np.float32),
    ),
    ScoredPair(
        PairIds(as_ids([]), as_ids([7, 8, 9]), as_ids([7, 2**31 - 1]), 1, 1),
        np.array([-0.1, -0.0], np.float32),
        np.array([-1e-30], np.float32),
    ),
]
ENTRIES = [
    ViewEntry("data/pairs.jsonl", 1, pair_key(ROWS[1].ids), {"note": "ü", "margin": 0.5}),
    ViewEntry("data/pairs.jsonl", 2, pair_key(ROWS[0].ids)),
    ViewEntry("more.jsonl", 1, pair_key(ROWS[1].ids), {"note": None}),
]


def write(root: Path) -> None:
    store = Store.open(root, create=True)
    spec = store.put_spec(SPEC)
    store.commit_shard(spec, ROWS, {"torch": "2.13.0", "device": "cpu"})
    store.seal(spec)
    store.write_view(spec, "pairs", ENTRIES, {"max_length": 1024, "files": {"data/pairs.jsonl": "f" * 32}})


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_bytes_of_the_format_do_not_change(tmp_path: Path) -> None:
    write(tmp_path / "new")
    assert files(tmp_path / "new") == files(GOLDEN)


def test_a_cache_of_version_1_stays_readable() -> None:
    assert verify(GOLDEN, depth="all").ok
    view = View.open(GOLDEN)
    assert view.spec == SPEC
    for i, k in enumerate((1, 0, 1)):
        assert view[i].ids.same_as(ROWS[k].ids)
        assert view[i].chosen_logps.tobytes() == ROWS[k].chosen_logps.tobytes()
        assert (view.source(i), view.extra(i)) == (
            (ENTRIES[i].source_file, ENTRIES[i].source_row),
            dict(ENTRIES[i].extra),
        )


# -- a reader written from docs/cache-format.md, with nothing but struct, json and xxhash ------------------------------


def unsealed(path: Path) -> Any:
    body, seal = path.read_bytes().splitlines(keepends=True)
    assert json.loads(seal) == {"xxh3_128": xxhash.xxh3_128_hexdigest(body)}
    return json.loads(body)


def columns(data: bytes, kinds: str) -> list[Any]:
    """The columns of an Arrow file of one record batch.

    Kinds: k a 16-byte key, b bytes, else a code of `struct`, as a capital letter for lists of it.
    """

    def field(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", data, table)[0]
        size = struct.unpack_from("<H", data, vtable)[0]
        offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
        return table + offset if offset else 0

    def follow(at: int) -> int:
        return at + int(struct.unpack_from("<I", data, at)[0])

    footer_size = struct.unpack_from("<i", data, len(data) - 10)[0]
    footer = follow(len(data) - 10 - footer_size)
    blocks = follow(field(footer, 3))
    assert struct.unpack_from("<I", data, blocks)[0] == 1
    start, metadata_size, _ = struct.unpack_from("<qixxxxq", data, blocks + 4)
    batch = follow(field(follow(start + 8), 2))
    rows = struct.unpack_from("<q", data, field(batch, 0))[0]
    assert not field(batch, 3)  # not compressed
    buffers = follow(field(batch, 2))
    spans = [
        struct.unpack_from("<qq", data, buffers + 4 + 16 * k) for k in range(struct.unpack_from("<I", data, buffers)[0])
    ]
    values = iter([start + metadata_size + offset for offset, _ in spans][1::2])  # every other one is a validity map

    def numbers(at: int, code: str, count: int) -> list[Any]:
        return list(struct.unpack_from(f"<{count}{code}", data, at))

    found: list[Any] = []
    for kind in kinds:
        at = next(values)
        if kind == "k":
            found.append([data[at + 16 * i : at + 16 * i + 16] for i in range(rows)])
        elif kind == "b":  # large_binary: the bytes are a third buffer, not a second child
            ends = numbers(at, "q", rows + 1)
            raw = start + metadata_size + spans[-1][0]
            found.append([data[raw + a : raw + b] for a, b in itertools.pairwise(ends)])
        elif kind.isupper():
            ends = numbers(at, "i", rows + 1)
            flat = numbers(next(values), kind.lower(), ends[-1])
            found.append([flat[a:b] for a, b in itertools.pairwise(ends)])
        else:
            found.append(numbers(at, kind, rows))
    return found


def test_a_reader_that_shares_no_code_reads_the_same() -> None:
    assert (GOLDEN / "FORMAT").read_bytes() == b"dpoeng-refcache 1\n"
    view = unsealed(GOLDEN / "views" / "pairs.json")
    spec = (GOLDEN / "specs" / f"{view['spec']}.json").read_bytes()
    assert xxhash.xxh3_128_hexdigest(spec) == view["spec"]
    assert json.loads(spec)["lora_alpha"] == 16

    name, rows, size = view["table"]
    table = (GOLDEN / "views" / f"{name}.arrow").read_bytes()
    assert (xxhash.xxh3_128_hexdigest(table), len(table)) == (name, size)
    file, source_row, keys, object_, row, extra = columns(table, "iqkiib")
    assert len(row) == rows == 3
    assert [view["files"][k] for k in file] == ["data/pairs.jsonl", "data/pairs.jsonl", "more.jsonl"]
    assert source_row == [1, 2, 1]
    assert json.loads(extra[0]) == {"note": "ü", "margin": 0.5}

    [[name, rows, size]] = view["objects"]
    record = unsealed(GOLDEN / "runs" / view["spec"] / "commits" / f"{name}.json")
    assert record["object"] == [name, rows, size]
    assert unsealed(GOLDEN / "runs" / view["spec"] / "manifest-000001.json")["objects"] == [[name, rows, size]]
    shard = (GOLDEN / "objects" / name[:2] / f"{name}.arrow").read_bytes()
    assert (xxhash.xxh3_128_hexdigest(shard), len(shard)) == (name, size)
    pair_keys, prompt, chosen, rejected, chosen_logps, rejected_logps, chosen_sum, rejected_sum = columns(
        shard, "kIIIFFdd"
    )
    assert (prompt, chosen, rejected) == ([[1, 2, 3], []], [[10, 11], [7, 8, 9]], [[12], [7, 2**31 - 1]])
    assert chosen_logps[0] == [-0.5, -0.25]
    assert [len(ids) - len(logps) for ids, logps in zip(chosen, chosen_logps, strict=True)] == [0, 1]
    assert chosen_sum == [sum(logps) for logps in chosen_logps]
    assert rejected_sum == [sum(logps) for logps in rejected_logps]
    assert object_ == [0, 0, 0]
    assert [pair_keys[k] for k in row] == keys

    for k, key in enumerate(pair_keys):
        starts = [len(side[k]) - len(logps[k]) for side, logps in ((chosen, chosen_logps), (rejected, rejected_logps))]
        counts = struct.pack("<5q", len(prompt[k]), len(chosen[k]), len(rejected[k]), *starts)
        ids = [*prompt[k], *chosen[k], *rejected[k]]
        content = b"dpoeng.pair.v1" + counts + struct.pack(f"<{len(ids)}i", *ids)
        assert xxhash.xxh3_128_digest(content) == key


if __name__ == "__main__":
    write(Path(sys.argv[1]))

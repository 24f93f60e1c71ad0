"""What bounds memory: a large view is read from its files, mapped pages are given back, an import waits in a file."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from dpoeng.bench.cache import synthetic_rows
from dpoeng.bench.studies.rows import make_cache
from dpoeng.cache import mapped, reader, shard
from dpoeng.cache.errors import CacheError, UserError
from dpoeng.cache.exchange import importing
from dpoeng.cache.foreign.tables import parquet_batches
from dpoeng.cache.mapped import MappedPages
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, ScoredPair, as_ids, pair_key
from dpoeng.cache.shard import Shard
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry

SPEC = ReferenceSpec.from_fields({"model": "memory"})


def a_cache(root: Path) -> list[ScoredPair]:
    """Two objects, one of them with gaps; the view goes through them in turns."""
    plain = synthetic_rows(20, mean_prompt=6, mean_response=6)
    random = np.random.default_rng(1)
    gapped = [
        ScoredPair(
            PairIds(as_ids([row]), as_ids(range(9)), as_ids(range(8)), 1, 0, ((3, 5),), ((2, 3),)),
            *(-random.random(count, np.float32) for count in (6, 7)),
        )
        for row in range(20)
    ]
    store = Store.open(root, create=True)
    digest = store.put_spec(SPEC)
    rows = [row for both in zip(plain, gapped, strict=True) for row in both]
    for some in (plain, gapped):
        store.commit_shard(digest, some, {})
    store.write_view(digest, "v", [ViewEntry("f", i + 1, pair_key(row.ids)) for i, row in enumerate(rows)], {})
    return rows


def test_a_large_view_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = a_cache(tmp_path)
    of_maps = View.open(tmp_path)
    monkeypatch.setattr(reader, "RESIDENT_LIMIT", 100)
    view = View.open(tmp_path)
    for i in np.random.default_rng(0).permutation(len(rows)).tolist():
        assert view[i].ids.same_as(rows[i].ids)
        assert view[i].chosen_logps.tobytes() == rows[i].chosen_logps.tobytes()
        assert view[i].rejected_logps.tobytes() == rows[i].rejected_logps.tobytes()
        assert not view[i].chosen_logps.flags.writeable
        assert view.prompt_ids(i).tolist() == of_maps.prompt_ids(i).tolist() == rows[i].ids.prompt_ids.tolist()
    assert view.keys().tobytes() == of_maps.keys().tobytes()
    for of_file, of_map in zip(view.numbers(), of_maps.numbers(), strict=True):
        assert np.array_equal(of_file, of_map)


def test_what_opening_has_read_is_given_back_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With large pages in the page cache, reading some of each of a hundred files makes all of them resident."""
    a_cache(tmp_path)
    monkeypatch.setattr(reader, "RESIDENT_LIMIT", 100)
    monkeypatch.setattr(mapped, "RESIDENT_LIMIT", 100)
    happened: list[str] = []
    release, keys = mapped.release, Shard.keys
    monkeypatch.setattr(shard, "release", lambda data: happened.append("released") or release(data))
    unmapped = Shard.unmapped
    monkeypatch.setattr(
        Shard, "unmapped", lambda self, descriptor: happened.append("read") or unmapped(self, descriptor)
    )
    opened = Store.open_shard
    monkeypatch.setattr(Store, "open_shard", lambda *args, **named: happened.append("mapped") or opened(*args, **named))
    monkeypatch.setattr(reader, "THREADS", 1)
    View.open(tmp_path, verify="open")
    assert happened == ["mapped", "read", "released"] * 2
    happened.clear()
    monkeypatch.setattr(Shard, "keys", lambda self: happened.append("read") or keys(self))
    Store.open(tmp_path).lookup(SPEC.digest)
    assert happened[-4:] == ["read", "released"] * 2


def test_an_index_of_the_same_objects_is_not_made_twice(tmp_path: Path) -> None:
    rows = a_cache(tmp_path)
    store = Store.open(tmp_path)
    store.seal(SPEC.digest)
    first = store.lookup(SPEC.digest)
    for again in (store.lookup(SPEC.digest, known=first), store.lookup(SPEC.digest, sealed=True, known=first)):
        assert np.shares_memory(again._keys, first._keys)
        assert all(row.ids in again for row in rows)
    new = synthetic_rows(3, seed=9, mean_prompt=6, mean_response=6)
    store.commit_shard(SPEC.digest, new, {})
    sealed = store.lookup(SPEC.digest, sealed=True, known=first)
    later = store.lookup(SPEC.digest, known=first)
    assert len(later) == len(first) + 3 == len(sealed) + 3
    assert new[0].ids in later
    assert new[0].ids not in sealed
    assert new[0].ids not in first


def test_a_large_view_whose_file_is_cut_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_cache(tmp_path)
    monkeypatch.setattr(reader, "RESIDENT_LIMIT", 100)
    view = View.open(tmp_path)
    for path in (tmp_path / "objects").rglob("*.arrow"):
        os.truncate(path, 100)
    with pytest.raises(CacheError, match="damaged"):
        view[0]


def test_its_files_are_closed_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_cache(tmp_path)
    monkeypatch.setattr(reader, "RESIDENT_LIMIT", 100)

    def is_open(path: Path) -> bool:
        return any(one.resolve() == path for one in Path("/proc/self/fd").iterdir())

    path = next((tmp_path / "objects").rglob("*.arrow")).resolve()
    view = View.open(tmp_path)
    assert is_open(path)
    del view
    assert not is_open(path)


def test_pages_are_given_back_once_they_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 8 << 20
    (tmp_path / "file").write_bytes(bytes(size))
    with (tmp_path / "file").open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ))
    assert MappedPages([data]).look() == mapped._NEVER  # so small a file may stay
    monkeypatch.setattr(mapped, "RESIDENT_LIMIT", 2 << 20)
    pages = MappedPages([data])
    before = mapped._resident_file_bytes()
    assert sum(data[:: mmap.PAGESIZE]) == 0
    assert mapped._resident_file_bytes() - before >= size // 2
    assert pages.look() < 1000
    assert mapped._resident_file_bytes() - before < size // 2
    assert data[size - 1] == 0  # it can still be read


def lines_of(rows: list[ScoredPair]) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": row.ids.prompt_ids.tolist(),
            "chosen_ids": row.ids.chosen_ids.tolist(),
            "rejected_ids": row.ids.rejected_ids.tolist(),
            "ref_chosen_token_logps": row.chosen_logps.tolist(),
            "ref_rejected_token_logps": row.rejected_logps.tolist(),
        }
        for row in rows
    ]


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_nothing_is_committed_before_the_last_row_is_right(tmp_path: Path) -> None:
    lines = lines_of(synthetic_rows(9, mean_prompt=4, mean_response=4))
    file = written(tmp_path / "rows.jsonl", [*lines, {**lines[0], "ref_chosen_token_logps": [0.5]}])
    store = Store.open(tmp_path / "cache", create=True)
    with pytest.raises(UserError, match="invalid") as caught:
        importing.import_rows(store, SPEC, file, "v")
    assert caught.value.where == f"{file}:10"
    assert store.views() == store.spec_digests() == []
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_file_that_changes_while_it_is_imported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "rows.jsonl", lines_of(synthetic_rows(9, mean_prompt=4, mean_response=4)))
    read = importing._read

    def changing(path: Path, *, sums: bool) -> Any:
        yield from read(path, sums=sums)
        path.write_text("{}")

    monkeypatch.setattr(importing, "_read", changing)
    store = Store.open(tmp_path / "cache", create=True)
    with pytest.raises(UserError) as caught:
        importing.import_rows(store, SPEC, file, "v")
    assert caught.value.code == "data-changed"
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize(
    "source", [{"source_row": 2**70}, {"source_row": "x"}, {"source_row": -1}, {"source_file": "\ud800"}]
)
def test_a_wild_source_is_a_message(tmp_path: Path, source: dict[str, Any]) -> None:
    lines = lines_of(synthetic_rows(2, mean_prompt=4, mean_response=4))
    file = written(tmp_path / "rows.jsonl", [lines[0], {**lines[1], **source}])
    with pytest.raises(UserError) as caught:
        importing.import_rows(Store.open(tmp_path / "cache", create=True), SPEC, file, "v")
    assert (caught.value.code, caught.value.where) == ("import-row", f"{file}:2")


def test_of_equal_pairs_the_first_is_imported_and_both_are_rows(tmp_path: Path) -> None:
    one, two = lines_of(synthetic_rows(2, mean_prompt=4, mean_response=4))
    again = {**one, "ref_chosen_token_logps": [value - 1 for value in one["ref_chosen_token_logps"]]}
    file = written(tmp_path / "rows.jsonl", [one, two, {**again, "source_file": "é.jsonl", "source_row": 7}])
    done = importing.import_rows(Store.open(tmp_path / "cache", create=True), SPEC, file, "v")
    view = View.open(tmp_path / "cache")
    assert (done.rows, done.added) == (3, 2)
    assert view[0].chosen_logps.tolist() == view[2].chosen_logps.tolist() == one["ref_chosen_token_logps"]
    assert [view.source(i) for i in range(3)] == [("rows.jsonl", 1), ("rows.jsonl", 2), ("é.jsonl", 7)]


@pytest.mark.parametrize("group_rows", [500, 10_000])
def test_parquet_is_read_in_pieces(tmp_path: Path, group_rows: int) -> None:
    """Memory of Arrow's at any time, against what the file holds: 20 MB in many groups of rows, or in one."""
    values = np.random.default_rng(0).integers(0, 1 << 20, 5_000_000).astype("i4")
    lists = pa.ListArray.from_arrays(pa.array(np.arange(0, 5_000_001, 500, dtype="i4")), pa.array(values))
    parquet.write_table(pa.table({"ids": lists}), tmp_path / "t.parquet", row_group_size=group_rows)
    del values, lists
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() for _ in parquet_batches(tmp_path / "t.parquet"))
    assert most - before < 12_000_000


@pytest.mark.slow
def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    """The slope between 10,000 and 40,000 rows of 300 tokens, times a million: less than 500 MiB."""
    works = ("stats", "verify", "jsonl", "parquet", "import-jsonl", "import-parquet", "training", "select")
    own: dict[str, list[float]] = {work: [] for work in works}
    for count in (10_000, 40_000):
        make_cache(tmp_path / str(count), count)
        for work in works:
            command = [sys.executable, "-m", "dpoeng.bench.studies.rows", "--work", work]
            found = subprocess.check_output([*command, "--folder", str(tmp_path / str(count))])
            own[work].append(json.loads(found)["own_mib"])
    slopes = {work: (after - before) * (1_000_000 / 30_000) for work, (before, after) in own.items()}
    assert max(slopes.values()) < 500, slopes

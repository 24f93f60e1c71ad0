"""The store when nothing breaks: rows come back exactly, found by their ids, and only what is new is missing."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import multiprocessing
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from dpoeng_testing import tree
from processes import sum_of_row

from dpoeng.bench.cache import synthetic_rows
from dpoeng.cache import schema
from dpoeng.cache.errors import CacheError
from dpoeng.cache.files import Disk, Files
from dpoeng.cache.folder import FORMAT_BYTES
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, ScoredPair, as_ids, pair_key
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry

SPEC = ReferenceSpec.from_fields({"model": "m", "dtype": "float32"})


def entries(rows: Sequence[ScoredPair], file: str = "pairs.jsonl") -> list[ViewEntry]:
    return [ViewEntry(file, i + 1, pair_key(row.ids), {"line": i}) for i, row in enumerate(rows)]


def filled(root: Path, rows: Sequence[ScoredPair], shard_rows: int = 7) -> Store:
    store = Store.open(root, create=True)
    spec = store.put_spec(SPEC)
    for start in range(0, len(rows), shard_rows):
        store.commit_shard(spec, rows[start : start + shard_rows], {"torch": "2.13.0"})
    store.seal(spec)
    store.write_view(spec, "pairs", entries(rows), {"max_length": 1024})
    return store


def assert_same(found: ScoredPair | None, expected: ScoredPair) -> None:
    assert found is not None
    assert found.ids.same_as(expected.ids)
    assert found.chosen_logps.tobytes() == expected.chosen_logps.tobytes()
    assert found.rejected_logps.tobytes() == expected.rejected_logps.tobytes()


def test_rows_come_back_bit_for_bit_through_index_and_view(tmp_path: Path) -> None:
    # 5000 rows in one shard: more than one record batch, so that rows are found across a batch boundary.
    rows = synthetic_rows(5000, mean_prompt=5, mean_response=4)
    rows[0] = ScoredPair(
        PairIds(as_ids([]), as_ids([5, 6, 7]), as_ids([5, 8]), 1, 1),
        np.array([-1.5, -0.0], np.float32),
        np.array([-2.0], np.float32),
    )
    store = filled(tmp_path / "cache", rows, shard_rows=5000)
    index = store.lookup(SPEC.digest)
    view = View.open(tmp_path / "cache")
    assert len(index) == len(view) == len(rows)
    assert index.quarantined == []
    for i in (0, 1, 4095, 4096, 4999):
        assert_same(index.get(rows[i].ids), rows[i])
        assert_same(view[i], rows[i])
        assert view.source(i) == ("pairs.jsonl", i + 1)
        assert view.extra(i) == {"line": i}
        assert view.key(i) == pair_key(rows[i].ids)
    assert_same(view[-1], rows[-1])
    assert view.meta == {"max_length": 1024}
    assert view.spec == SPEC
    with pytest.raises(IndexError):
        view[len(rows)]


def test_arrays_of_a_view_are_the_file_itself(tmp_path: Path) -> None:
    filled(tmp_path, synthetic_rows(3))
    row = View.open(tmp_path)[1]
    for array in (row.ids.prompt_ids, row.ids.chosen_ids, row.chosen_logps):
        assert not array.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_same_rows_give_the_same_object_and_other_rows_another(tmp_path: Path) -> None:
    rows = synthetic_rows(4)
    store = Store.open(tmp_path, create=True)
    spec = store.put_spec(SPEC)
    name = store.commit_shard(spec, rows, {"torch": "2.13.0"})
    before = tree(tmp_path, "objects", "runs")
    assert store.commit_shard(spec, rows, {"torch": "2.14.0"}) == name
    assert tree(tmp_path, "objects", "runs") == before  # the first writer's provenance stays
    assert store.commit_shard(spec, rows[::-1], {}) != name
    assert not (tmp_path / "quarantine").exists()


def test_new_pairs_add_objects_and_leave_the_old_as_they_are(tmp_path: Path) -> None:
    """Fault 58: the engine asks which pairs are missing, and finds exactly the new ones."""
    rows = synthetic_rows(30)
    store = filled(tmp_path, rows[:20])
    before = tree(tmp_path, "objects", "runs", "specs")
    index = store.lookup(SPEC.digest)
    missing = [row for row in rows if row.ids not in index]
    assert [row.ids for row in missing] == [row.ids for row in rows[20:]]
    store.commit_shard(SPEC.digest, missing, {})
    assert store.seal(SPEC.digest).name == "manifest-000002.json"
    after = tree(tmp_path, "objects", "runs", "specs")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 3  # object, record, manifest
    assert len(store.lookup(SPEC.digest)) == 30
    assert len(store.lookup(SPEC.digest, sealed=True)) == 30


def test_sealed_lookup_shows_what_the_last_finished_run_left(tmp_path: Path) -> None:
    rows = synthetic_rows(10)
    store = filled(tmp_path, rows[:5])
    store.commit_shard(SPEC.digest, rows[5:], {})
    assert len(store.lookup(SPEC.digest)) == 10
    assert len(store.lookup(SPEC.digest, sealed=True)) == 5


def test_seal_writes_a_generation_only_if_something_changed(tmp_path: Path) -> None:
    store = filled(tmp_path, synthetic_rows(5))
    first = store.seal(SPEC.digest)
    assert first.name == "manifest-000001.json"
    assert store.seal(SPEC.digest) == first
    assert store.generations(SPEC.digest) == [1]


def test_rows_reordered_removed_or_duplicated_are_all_hits(tmp_path: Path) -> None:
    """Faults 57 and 16."""
    rows = synthetic_rows(12)
    store = filled(tmp_path, rows)
    before = tree(tmp_path, "objects", "runs")
    shuffled = [rows[i] for i in (11, 3, 3, 0, 7)]
    index = store.lookup(SPEC.digest)
    assert all(row.ids in index for row in shuffled)
    store.write_view(SPEC.digest, "shuffled", entries(shuffled), {})
    view = View.open(tmp_path, "shuffled")
    assert len(view) == 5
    for i, row in enumerate(shuffled):
        assert_same(view[i], row)
    assert view.key(1) == view.key(2)
    assert tree(tmp_path, "objects", "runs") == before


def test_moved_cache_is_a_hit(tmp_path: Path) -> None:
    """Fault 56: nothing inside names the folder."""
    rows = synthetic_rows(6)
    filled(tmp_path / "here", rows)
    (tmp_path / "here").rename(tmp_path / "there")
    assert_same(View.open(tmp_path / "there")[4], rows[4])


def test_another_spec_sees_none_of_the_rows(tmp_path: Path) -> None:
    rows = synthetic_rows(6)
    store = filled(tmp_path, rows)
    other = store.put_spec(ReferenceSpec.from_fields({"model": "m", "dtype": "bfloat16"}))
    assert len(store.lookup(other)) == 0
    assert rows[0].ids not in store.lookup(other)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        # Each of the two differs in nothing but where a boundary lies.
        (PairIds(as_ids([1, 2]), as_ids([3]), as_ids([4])), PairIds(as_ids([1]), as_ids([2, 3]), as_ids([4]))),
        (PairIds(as_ids([1]), as_ids([2, 3]), as_ids([4])), PairIds(as_ids([1]), as_ids([2]), as_ids([3, 4]))),
        (PairIds(as_ids([1]), as_ids([2, 3]), as_ids([4])), PairIds(as_ids([1]), as_ids([2, 3]), as_ids([4]), 1)),
        (PairIds(as_ids([1]), as_ids([2]), as_ids([3])), PairIds(as_ids([1]), as_ids([3]), as_ids([2]))),
    ],
)
def test_a_moved_boundary_is_a_miss(tmp_path: Path, left: PairIds, right: PairIds) -> None:
    """Fault 33."""

    def scored(ids: PairIds) -> ScoredPair:
        counts = len(ids.chosen_ids) - ids.chosen_start, len(ids.rejected_ids) - ids.rejected_start
        return ScoredPair(ids, *(np.full(count, -1, np.float32) for count in counts))

    store = Store.open(tmp_path, create=True)
    store.commit_shard(store.put_spec(SPEC), [scored(left)], {})
    index = store.lookup(SPEC.digest)
    assert left in index
    assert right not in index


def test_a_key_collision_is_a_miss_and_a_view_refuses_to_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 34: with a hash that always says the same, the ids alone decide."""
    for module in ("schema", "index", "shard"):
        monkeypatch.setattr(f"dpoeng.cache.{module}.pair_key", lambda ids: b"same for all....")
    one, two = synthetic_rows(2)
    store = Store.open(tmp_path, create=True)
    store.commit_shard(store.put_spec(SPEC), [one], {})
    assert one.ids in store.lookup(SPEC.digest)
    assert two.ids not in store.lookup(SPEC.digest)
    store.commit_shard(SPEC.digest, [two], {})
    assert_same(store.lookup(SPEC.digest).get(two.ids), two)
    with pytest.raises(CacheError) as caught:
        store.write_view(SPEC.digest, "v", [ViewEntry("f", 1, b"same for all....")], {})
    assert caught.value.code == "cache-key-collision"


def test_pairs_that_share_half_a_key_are_distinguished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index sorts by the first 8 bytes; equal ones must be told apart by the rest."""
    real = schema.pair_key

    def half(ids: PairIds) -> bytes:
        return b"\xff" * 8 + real(ids)[8:]

    for module in ("index", "shard"):
        monkeypatch.setattr(f"dpoeng.cache.{module}.pair_key", half)
    rows = synthetic_rows(20)
    store = Store.open(tmp_path, create=True)
    store.commit_shard(store.put_spec(SPEC), rows[:15], {})
    index = store.lookup(SPEC.digest)
    for row in rows[:15]:
        assert_same(index.get(row.ids), row)
    assert not any(row.ids in index for row in rows[15:])
    store.write_view(SPEC.digest, "v", [ViewEntry("f", i, half(row.ids)) for i, row in enumerate(rows[:15])], {})
    view = View.open(tmp_path)
    for i in range(15):
        assert_same(view[i], rows[i])


def test_a_key_with_only_half_a_match_is_missing(tmp_path: Path) -> None:
    [row] = rows = synthetic_rows(1)
    store = filled(tmp_path, rows)
    with pytest.raises(CacheError) as caught:
        store.write_view(SPEC.digest, "half", [ViewEntry("f", 1, pair_key(row.ids)[:8] + bytes(8))], {})
    assert caught.value.code == "cache-incomplete"


def test_a_view_of_a_pair_without_numbers_is_refused(tmp_path: Path) -> None:
    rows = synthetic_rows(5)
    store = filled(tmp_path, rows[:4])
    before = tree(tmp_path, "views")
    with pytest.raises(CacheError) as caught:
        store.write_view(SPEC.digest, "pairs", entries(rows), {})
    assert caught.value.code == "cache-incomplete"
    assert caught.value.where == "pairs.jsonl:5"
    assert tree(tmp_path, "views") == before


def test_rewriting_a_view_replaces_it_and_an_open_reader_keeps_the_old_one(tmp_path: Path) -> None:
    rows = synthetic_rows(8)
    store = filled(tmp_path, rows)
    old = View.open(tmp_path)
    store.write_view(SPEC.digest, "pairs", entries(rows[:2]), {})
    assert len(View.open(tmp_path)) == 2
    assert len(old) == 8
    assert_same(old[7], rows[7])


def test_a_view_opens_again_in_another_process(tmp_path: Path) -> None:
    """DataLoader workers, forked or spawned, get the view by pickle or by inheritance."""
    rows = synthetic_rows(8)
    store = filled(tmp_path, rows)
    view = View.open(tmp_path)
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            assert pool.submit(sum_of_row, view, 5).result() == rows[5].chosen_sum
    frozen = pickle.dumps(view)
    assert len(frozen) < 1000  # names, not rows
    store.write_view(SPEC.digest, "pairs", entries(rows[:2]), {})
    with pytest.raises(CacheError) as caught:
        pickle.loads(frozen)
    assert caught.value.code == "cache-changed"


def test_which_view(tmp_path: Path) -> None:
    rows = synthetic_rows(3)
    store = Store.open(tmp_path, create=True)
    spec = store.put_spec(SPEC)
    store.commit_shard(spec, rows, {})
    with pytest.raises(CacheError) as caught:
        View.open(tmp_path)
    assert caught.value.code == "cache-no-view"
    store.write_view(spec, "train", entries(rows), {})
    assert View.open(tmp_path).name == "train"
    store.write_view(spec, "eval", entries(rows[:1]), {})
    assert store.views() == ["eval", "train"]
    with pytest.raises(CacheError) as caught:
        View.open(tmp_path)
    assert (caught.value.code, caught.value.found) == ("cache-view-unnamed", "eval, train")
    with pytest.raises(CacheError) as caught:
        View.open(tmp_path, "test")
    assert (caught.value.code, caught.value.found) == ("cache-no-view", "eval, train")
    assert "eval, train" in caught.value.remedy


def test_the_view_beside_the_one_that_is_evaluated_on(tmp_path: Path) -> None:
    rows = synthetic_rows(3)
    store = Store.open(tmp_path, create=True)
    spec = store.put_spec(SPEC)
    store.commit_shard(spec, rows, {})
    store.write_view(spec, "eval", entries(rows[:1]), {})
    assert View.open(tmp_path, beside="eval").name == "eval"  # there is no other
    store.write_view(spec, "train", entries(rows), {})
    assert View.open(tmp_path, beside="eval").name == "train"
    assert View.open(tmp_path, "eval", beside="eval").name == "eval"
    with pytest.raises(CacheError, match="several views"):
        View.open(tmp_path, beside="none of them")
    store.write_view(spec, "more", entries(rows[1:]), {})
    with pytest.raises(CacheError) as caught:
        View.open(tmp_path, beside="eval")
    assert (caught.value.code, caught.value.remedy) == ("cache-view-unnamed", "choose one, e.g. --view more")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x\n", "ü", "a" * 201])
def test_a_view_name_cannot_be_a_path(tmp_path: Path, name: str) -> None:
    """Fault 29."""
    rows = synthetic_rows(1)
    store = filled(tmp_path, rows)
    with pytest.raises(CacheError) as caught:
        store.write_view(SPEC.digest, name, entries(rows), {})
    assert caught.value.code == "cache-view-name"


@pytest.mark.parametrize("digest", ["", "..", "A" * 32, "0" * 31, "0" * 32 + "\n", "../" * 10 + "ab"])
def test_nothing_but_a_digest_gets_into_a_path(tmp_path: Path, digest: str) -> None:
    """Fault 29."""
    store = filled(tmp_path, synthetic_rows(1))
    with pytest.raises(ValueError, match="not 32 hex digits"):
        store.lookup(digest)


def _bad(row: ScoredPair, kind: str) -> ScoredPair:
    logps = row.chosen_logps.copy()
    ids = row.ids
    match kind:
        case "nan":
            logps[0] = np.nan
        case "infinite":
            logps[-1] = -np.inf
        case "positive":
            logps[0] = 1e-6
        case "short":
            logps = logps[:-1]
        case "empty":
            logps = logps[:0]
            ids = dataclasses.replace(ids, chosen_start=len(ids.chosen_ids))
        case "negative id":
            ids = dataclasses.replace(ids, prompt_ids=as_ids([-1]))
    return ScoredPair(ids, logps, row.rejected_logps)


@pytest.mark.parametrize("kind", ["nan", "infinite", "positive", "short", "empty", "negative id"])
def test_numbers_that_cannot_be_log_probs_are_never_written(tmp_path: Path, kind: str) -> None:
    """Fault 32, at the door."""
    rows = synthetic_rows(3, mean_response=8, seed=1)
    store = Store.open(tmp_path, create=True)
    spec = store.put_spec(SPEC)
    with pytest.raises(ValueError, match="row 2"):
        store.commit_shard(spec, [*rows[:2], _bad(rows[2], kind)], {})
    assert not (tmp_path / "objects").exists()


def test_an_empty_shard_and_a_pair_twice_are_bugs(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    rows = synthetic_rows(1)
    with pytest.raises(ValueError, match="at least one row"):
        store.commit_shard(SPEC.digest, [], {})
    with pytest.raises(ValueError, match="twice"):
        store.commit_shard(SPEC.digest, rows * 2, {})


def test_opening_a_folder_that_is_not_a_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError) as caught:
        Store.open(tmp_path / "none")
    assert caught.value.code == "cache-not-found"
    assert not (tmp_path / "none").exists()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheError) as caught:
        Store.open(tmp_path, create=True)
    assert (caught.value.code, caught.value.found) == ("cache-not-empty", "thesis.tex")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"dpoeng-refcache 5\n", "cache-future"),  # fault 28
        (b"dpoeng-refcache 1", "cache-format"),
        (b"dpoeng-refcache 1\n\0", "cache-format"),
        (b"", "cache-format"),
    ],
)
def test_a_format_of_the_future_or_damaged_is_refused(tmp_path: Path, content: bytes, code: str) -> None:
    filled(tmp_path, synthetic_rows(1))
    (tmp_path / "FORMAT").write_bytes(content)
    for create in (False, True):
        with pytest.raises(CacheError) as caught:
            Store.open(tmp_path, create=create)
        assert caught.value.code == code
    assert (tmp_path / "FORMAT").read_bytes() == content
    # The remedy that the message gives for damage is the right one.
    if code == "cache-format":
        assert caught.value.remedy is not None
        line = re.search(r"echo (.*) >", caught.value.remedy)
        assert line is not None
        assert f"{line[1]}\n".encode() == FORMAT_BYTES


@pytest.mark.parametrize("victim", ["FORMAT", "objects", "spec", "record", "object", "view", "table"])
def test_symbolic_links_are_refused(tmp_path: Path, victim: str) -> None:
    """Fault 29: every name below the root is a plain file or folder, so that a cache cannot point outside itself."""
    root = tmp_path / "cache"
    store = filled(root, synthetic_rows(2))
    [reference] = store.view_record("pairs").objects
    path = {
        "FORMAT": root / "FORMAT",
        "objects": root / "objects",
        "spec": root / "specs" / f"{SPEC.digest}.json",
        "record": root / "runs" / SPEC.digest / "commits" / f"{reference.name}.json",
        "object": root / "objects" / reference.name[:2] / f"{reference.name}.arrow",
        "view": root / "views" / "pairs.json",
        "table": next((root / "views").glob("*.arrow")),
    }[victim]
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")

    def use() -> None:
        Store.open(root).lookup(SPEC.digest)
        View.open(root)

    with pytest.raises(CacheError) as caught:
        use()
    assert caught.value.code == "cache-not-plain"
    assert path.is_symlink()


def test_a_pipe_in_the_place_of_an_object_does_not_hang(tmp_path: Path) -> None:
    store = filled(tmp_path, synthetic_rows(2))
    [reference] = store.view_record("pairs").objects
    path = tmp_path / "objects" / reference.name[:2] / f"{reference.name}.arrow"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CacheError) as caught:
        store.lookup(SPEC.digest)
    assert caught.value.code == "cache-not-plain"


class ReadOnlyDisk(Disk):
    """A disk that refuses every change, as a read-only mount does."""

    def mkdir(self, path: Path) -> None:
        raise FileExistsError(path) if path.exists() else OSError(errno.EROFS, "Read-only file system", str(path))

    def create(self, path: Path) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    def touch(self, path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    def rename(self, source: Path, target: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(source))

    def unlink(self, path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    link = rename


def test_a_complete_cache_may_be_read_only(tmp_path: Path) -> None:
    """Fault 79: the whole of a run that finds every pair does without a change on the disk."""
    rows = synthetic_rows(9)
    filled(tmp_path, rows)
    store = Store.open(tmp_path, create=True, disk=ReadOnlyDisk())
    assert store.put_spec(SPEC) == SPEC.digest
    assert all(row.ids in store.lookup(SPEC.digest) for row in rows)
    assert store.seal(SPEC.digest).name == "manifest-000001.json"
    store.write_view(SPEC.digest, "pairs", entries(rows), {"max_length": 1024})
    assert len(View.open(tmp_path)) == 9


def test_damage_in_a_read_only_cache_is_missing_but_not_moved(tmp_path: Path) -> None:
    rows = synthetic_rows(9)
    filled(tmp_path, rows)
    victim = next((tmp_path / "objects").rglob("*.arrow"))
    victim.write_bytes(victim.read_bytes()[:-1])
    index = Store.open(tmp_path, disk=ReadOnlyDisk()).lookup(SPEC.digest)
    [damage] = index.quarantined
    assert damage.where == str(victim)
    assert damage.moved_to is None
    assert damage.rows == 9 - len(index)
    assert victim.exists()


def _race(root: str, seed: int) -> str:
    store = Store.open(root, create=True)
    rows = synthetic_rows(40, seed=5)
    spec = store.put_spec(SPEC)
    for k in np.random.default_rng(seed).permutation(8):
        store.commit_shard(spec, rows[5 * k : 5 * k + 5], {})
    store.seal(spec)
    store.write_view(spec, "pairs", entries(rows), {})
    return str(len(store.lookup(spec)))


def test_many_processes_write_one_cache_at_once(tmp_path: Path) -> None:
    """Faults 62 and 64: six processes do the same work in different orders; the result is that of one."""
    with concurrent.futures.ProcessPoolExecutor(6, mp_context=multiprocessing.get_context("fork")) as pool:
        assert {*pool.map(_race, [str(tmp_path / "many")] * 6, range(6))} == {"40"}
    _race(str(tmp_path / "one"), 0)
    many, one = (tree(tmp_path / name, "objects", "specs", "views") for name in ("many", "one"))
    assert many == one
    last = (Store.open(tmp_path / name).latest_manifest(SPEC.digest, []) for name in ("many", "one"))
    assert len({manifest.objects for manifest in last if manifest}) == 1
    assert list((tmp_path / "many" / "tmp").iterdir()) == []
    assert not (tmp_path / "many" / "quarantine").exists()


def test_two_processes_may_create_a_cache_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is quicker: between our look and our listing it has made the cache and filled it."""
    real = Files.read
    looks = iter([False])

    def look(self: Files, name: str) -> bytes:
        if next(looks, True):
            return real(self, name)
        filled(tmp_path, synthetic_rows(2))
        raise FileNotFoundError(name)

    monkeypatch.setattr(Files, "read", look)
    assert len(Store.open(tmp_path, create=True).lookup(SPEC.digest)) == 2


@pytest.mark.parametrize("folder", ["objects", "runs", "views", "tmp"])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path, folder: str) -> None:
    rows = synthetic_rows(2)
    store = Store.open(tmp_path, create=True)
    store.put_spec(SPEC)
    if (tmp_path / folder).exists():
        (tmp_path / folder).rmdir()
    (tmp_path / folder).write_text("")

    def use() -> None:
        store.lookup(SPEC.digest)
        store.views()
        Store.open(tmp_path).commit_shard(SPEC.digest, rows, {})

    with pytest.raises(CacheError) as caught:
        use()
    assert caught.value.code == "cache-not-plain"


def test_an_error_of_the_disk_while_reading_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 42: nothing is moved to quarantine because a disk could not be read just now."""
    filled(tmp_path, synthetic_rows(2))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdopen", fail)
    with pytest.raises(CacheError) as caught:
        Store.open(tmp_path)
    assert (caught.value.code, caught.value.where) == ("cache-disk-error", str(tmp_path / "FORMAT"))

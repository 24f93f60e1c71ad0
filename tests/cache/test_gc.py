"""Garbage: what goes, what stays, and that nobody who reads or writes meanwhile is disturbed. Faults 36 and 37."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dpoeng.bench.cache import synthetic_rows
from dpoeng.cache.errors import CacheError
from dpoeng.cache.files import Disk, Files
from dpoeng.cache.folder import object_name
from dpoeng.cache.gc import collect
from dpoeng.cache.reader import View
from dpoeng.cache.schema import pair_key
from dpoeng.cache.shard import encode_shard
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry
from dpoeng.cache.verify import verify

SPEC = ReferenceSpec.from_fields({"model": "gc"})
ROWS = synthetic_rows(12)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.open(tmp_path / "cache", create=True)
    spec = store.put_spec(SPEC)
    store.commit_shard(spec, ROWS[:6], {})
    store.seal(spec)
    write_view(store, 6)
    return store


def write_view(store: Store, count: int) -> None:
    entries = [ViewEntry("f", i + 1, pair_key(row.ids)) for i, row in enumerate(ROWS[:count])]
    store.write_view(SPEC.digest, "pairs", entries, {})


def orphan(store: Store) -> Path:
    """An object without a record: its writer was killed between the two."""
    data = encode_shard(ROWS[6:8])
    other = Store.open(store.root)
    other.commit_shard(SPEC.digest, ROWS[6:8], {})
    name = next(c.object.name for c in other.commits(SPEC.digest, []) if c.object.bytes == len(data))
    (store.root / "runs" / SPEC.digest / "commits" / f"{name}.json").unlink()
    return store.root / object_name(name)


def kinds(store: Store, **options: bool) -> list[str]:
    return [item.kind for item in collect(store.root, grace_s=0, **options)]


def test_a_sound_cache_holds_no_garbage(store: Store) -> None:
    assert kinds(store) == []


def test_a_dry_run_changes_nothing_and_deleting_takes_exactly_what_it_said(store: Store) -> None:
    path = orphan(store)
    (store.root / "tmp" / "left.123.abcd").write_bytes(b"half")
    write_view(store, 3)
    said = collect(store.root, grace_s=0)
    assert sorted(item.kind for item in said) == ["orphan", "table", "temporary"]
    assert path.exists()
    before = {file for file in store.root.rglob("*") if file.is_file()}
    assert collect(store.root, grace_s=0, dry_run=False) == said
    gone = before - {file for file in store.root.rglob("*") if file.is_file()}
    assert gone == {store.root / item.name for item in said}
    assert verify(store.root, depth="all").ok
    assert kinds(store) == []


def test_the_two_newest_generations_stay(store: Store) -> None:
    for k in (6, 8, 10):
        store.commit_shard(SPEC.digest, ROWS[k : k + 2], {})
        store.seal(SPEC.digest)
    assert store.generations(SPEC.digest) == [1, 2, 3, 4]
    assert kinds(store, dry_run=False) == ["manifest", "manifest"]
    assert store.generations(SPEC.digest) == [3, 4]
    assert len(store.lookup(SPEC.digest)) == 12


def test_new_files_and_files_from_the_future_stay(store: Store) -> None:
    """Fault 46: a clock set back must not make a live writer's object look old."""
    path = orphan(store)
    assert collect(store.root, dry_run=False) == []
    os.utime(path, (time.time() + 86400,) * 2)
    assert collect(store.root, dry_run=False) == []
    os.utime(path, (time.time() - 7200,) * 2)
    assert [item.kind for item in collect(store.root, dry_run=False)] == ["orphan"]
    assert not path.exists()


def test_an_old_orphan_that_a_writer_comes_upon_is_young_again(store: Store) -> None:
    """Between the object and its record a collector could come by; an object found lying there counts as new."""
    path = orphan(store)
    os.utime(path, (time.time() - 7200,) * 2)
    store.commit_shard(SPEC.digest, ROWS[6:8], {})
    assert time.time() - path.stat().st_mtime < 60


def test_a_temporary_file_stays_while_its_writer_lives(store: Store) -> None:
    """Fault 37: a lock tells the living from the dead, whatever the file's age."""
    start, end = os.pipe()
    ready, told = os.pipe()
    if (child := os.fork()) == 0:
        with Files(store.root, Disk())._temporary("slow", b"x" * 1000):
            os.write(told, b"x")
            os.read(start, 1)
            os._exit(0)  # killed: nothing is tidied up
    os.read(ready, 1)
    [path] = (store.root / "tmp").iterdir()
    os.utime(path, (0, 0))
    beside_the_living = kinds(store, dry_run=False)
    os.write(end, b"x")
    os.waitpid(child, 0)
    assert beside_the_living == []
    assert path.exists()
    assert kinds(store, dry_run=False) == ["temporary"]
    assert not path.exists()
    for descriptor in (start, end, ready, told):
        os.close(descriptor)


def test_a_reader_is_not_disturbed(store: Store) -> None:
    """Fault 36: what it maps stays until it is done, even if the whole reference is dropped."""
    view = View.open(store.root)
    (store.root / "views" / "pairs.json").unlink()
    gone = collect(store.root, dry_run=False, grace_s=0, drop_specs=[SPEC.digest])
    assert {item.kind for item in gone} == {"spec", "orphan", "table"}
    assert list((store.root / "objects").rglob("*.arrow")) == []
    for i in range(6):
        assert view[i].ids.same_as(ROWS[i].ids)
        assert view.source(i) == ("f", i + 1)
    assert store.specs() == {}
    assert verify(store.root).ok


def test_a_reference_in_use_or_unknown_cannot_be_dropped(store: Store) -> None:
    for digest, found in ((SPEC.digest, "the view 'pairs' uses it"), ("0" * 32, "no such reference")):
        with pytest.raises(CacheError) as caught:
            collect(store.root, dry_run=False, drop_specs=[digest])
        assert (caught.value.code, caught.value.found) == ("cache-spec-in-use", found)
    assert len(store.lookup(SPEC.digest)) == 6


def test_dropping_one_reference_leaves_objects_that_another_shares(store: Store) -> None:
    other = store.put_spec(ReferenceSpec.from_fields({"model": "twin"}))
    store.commit_shard(other, ROWS[:6], {})  # the same numbers, so the same object
    store.commit_shard(other, ROWS[6:], {})
    collect(store.root, dry_run=False, grace_s=0, drop_specs=[other])
    assert len(store.lookup(SPEC.digest)) == 6
    assert len(list((store.root / "objects").rglob("*.arrow"))) == 1
    assert verify(store.root, depth="all").ok


def test_quarantine_goes_only_when_asked(store: Store) -> None:
    victim = next((store.root / "objects").rglob("*.arrow"))
    victim.write_bytes(b"")
    store.lookup(SPEC.digest)
    assert "quarantine" not in kinds(store)
    assert kinds(store, quarantine=True, dry_run=False).count("quarantine") == 2  # the object and its record
    assert list((store.root / "quarantine").iterdir()) == []


def test_with_a_damaged_view_nothing_is_collected(store: Store) -> None:
    """Nobody knows what it names."""
    path = store.root / "views" / "pairs.json"
    path.write_bytes(path.read_bytes()[:-1])
    orphan(store)
    with pytest.raises(CacheError):
        collect(store.root, dry_run=False, grace_s=0)

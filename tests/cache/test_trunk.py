"""Stored hidden states: their bytes, damage, collection and copies; a cache without them stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash

from dpoeng.bench.cache import synthetic_rows
from dpoeng.cache.errors import CacheError
from dpoeng.cache.exchange.merging import merge
from dpoeng.cache.folder import FORMAT_BYTES, FORMAT_WITH_TRUNK, object_name
from dpoeng.cache.gc import collect
from dpoeng.cache.info import cache_info
from dpoeng.cache.schema import as_ids
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.trunk.index import TrunkIndex, commit_states, trunks_of
from dpoeng.cache.trunk.objects import ByteArray, StatesObject, as_float32, encode_states
from dpoeng.cache.trunk.texts import distinct_tokens, text_key, texts_of
from dpoeng.cache.verify import verify

SPEC = ReferenceSpec.from_fields({"model": "trunk"})
TRUNK = SPEC.of_states(3, "bfloat16", 4)
ROWS = synthetic_rows(5)


def states_of(tokens: int, seed: int) -> ByteArray:
    """Random bfloat16 numbers as bytes [tokens, 8]."""
    numbers = np.random.default_rng(seed).standard_normal((tokens, 4)).astype("<f4")
    return (numbers.view("<u4") >> 16).astype("<u2").view(np.uint8)


def texts(count: int) -> list[tuple[bytes, ByteArray]]:
    found: dict[bytes, int] = {}
    for row in ROWS[:count]:
        found |= texts_of(row.ids)
    return [(key, states_of(tokens, i)) for i, (key, tokens) in enumerate(found.items())]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.open(tmp_path / "cache", create=True)
    spec = store.put_spec(SPEC)
    store.commit_shard(spec, ROWS, {})
    store.seal(spec)
    assert store.format == FORMAT_BYTES
    store.put_trunk_spec(TRUNK)
    commit_states(store, TRUNK, texts(3), {})
    commit_states(store, TRUNK, texts(5)[len(texts(3)) :], {})
    store.seal(TRUNK.digest)
    return store


def test_states_come_back_bit_by_bit_and_only_a_trunk_raises_the_format(store: Store) -> None:
    assert store.format == FORMAT_WITH_TRUNK
    ((layer, spec),) = trunks_of(Store.open(store.root), SPEC.digest).items()
    assert (layer, spec) == (3, TRUNK)
    index = TrunkIndex.open(store, TRUNK.digest)
    assert index.check(row.ids for row in ROWS) > 0
    stored = dict(texts(5))
    for row in ROWS:
        assert index.holds(row.ids)
        for response in (None, row.ids.chosen_ids, row.ids.rejected_ids):
            wanted = stored[text_key(row.ids.prompt_ids, response)]
            assert np.array_equal(index.states(row.ids.prompt_ids, response), wanted)
    with pytest.raises(CacheError) as caught:
        index.states(as_ids([1, 2, 3]))
    assert caught.value.code == "cache-incomplete"


def test_the_bytes_of_an_object_are_pinned() -> None:
    """Another order of columns, alignment or schema would be another format."""
    data = encode_states(TRUNK, [(bytes(16), np.arange(16, dtype=np.uint8).reshape(2, 8))])
    assert xxhash.xxh3_128_hexdigest(data) == "41c7b2161a07fc9806657ad69852d7ad"
    found = StatesObject(data, "here", TRUNK)
    assert found[0].tolist() == [list(range(8)), list(range(8, 16))]


def test_a_key_tells_a_prompt_from_a_response_and_where_one_ends() -> None:
    keys = {
        text_key(as_ids([1, 2, 3])),
        text_key(as_ids([1, 2]), as_ids([3])),
        text_key(as_ids([1]), as_ids([2, 3])),
        text_key(as_ids([1, 2, 3]), as_ids([])),
    }
    assert len(keys) == 4
    ids = ROWS[0].ids
    assert distinct_tokens([ids, ids]) == ids.total_tokens


def test_numbers_are_read_in_every_dtype() -> None:
    numbers = np.array([[1.5, -2.0, 0.25, 3.0]], "<f4")
    assert np.array_equal(as_float32(numbers.view(np.uint8), "float32"), numbers)
    assert np.array_equal(as_float32(numbers.astype("<f2").view(np.uint8), "float16"), numbers)
    assert np.array_equal(as_float32((numbers.view("<u4") >> 16).astype("<u2").view(np.uint8), "bfloat16"), numbers)


@pytest.mark.parametrize("depth", ["open", "semantic", "full", "all"])
def test_it_is_verified_at_every_depth(store: Store, depth: str) -> None:
    report = verify(store.root, depth=depth)  # type: ignore[arg-type]
    assert report.ok
    assert report.counts["trunks"] == 1
    assert (report.counts["specs"], report.counts["rows"], report.counts["texts"]) == (1, 5, len(texts(5)))
    path = largest_object(store)
    data = bytearray(path.read_bytes())
    begin = data.index(texts(3)[0][1].tobytes())
    data[begin + 1] = 0x7F  # the exponent of a bfloat16
    data[begin] |= 0x80
    path.write_bytes(data)
    assert verify(store.root, depth=depth).ok == (depth == "open")  # type: ignore[arg-type]
    path.write_bytes(data[:-8])
    assert not verify(store.root, depth=depth).ok  # type: ignore[arg-type]


def largest_object(store: Store) -> Path:
    """Of the trunk."""
    commits = store.commits(TRUNK.digest, [])
    return store.root / object_name(max(commits, key=lambda commit: commit.object.rows).object.name)


def test_damage_is_set_aside_by_a_writer_and_refused_by_a_reader(store: Store) -> None:
    path = largest_object(store)
    data = bytearray(path.read_bytes())
    data[data.index(texts(3)[0][1].tobytes())] ^= 1
    path.write_bytes(data)
    index = TrunkIndex.open(store, TRUNK.digest)  # its structure is sound
    with pytest.raises(CacheError) as caught:
        index.check(row.ids for row in ROWS)
    assert caught.value.code == "cache-corrupt"
    assert path.exists()
    index = TrunkIndex.look_up(store, TRUNK.digest)
    assert [damage.rows for damage in index.quarantined] == [len(texts(3))]
    assert not path.exists()
    assert [index.holds(row.ids) for row in ROWS] == [False, False, False, True, True]
    commit_states(store, TRUNK, texts(3), {})
    store.seal(TRUNK.digest)
    assert verify(store.root, depth="all").ok


def test_it_goes_with_its_reference_or_alone(store: Store) -> None:
    assert collect(store.root, grace_s=0) == []
    alone = collect(store.root, grace_s=0, drop_specs=[TRUNK.digest], dry_run=True)
    assert {item.kind for item in alone} == {"spec", "orphan"}
    assert object_name(store.commits(SPEC.digest, [])[0].object.name) not in {item.name for item in alone}
    collect(store.root, grace_s=0, drop_specs=[SPEC.digest], dry_run=False)
    assert store.specs() == {}
    assert not list((store.root / "objects").rglob("*.arrow"))


def test_it_is_copied_and_counted(store: Store, tmp_path: Path) -> None:
    other = Store.open(tmp_path / "other", create=True)
    assert merge(other, store) == (3, [])
    assert other.format == FORMAT_WITH_TRUNK
    assert verify(other.root, depth="all").ok
    (trunk,) = cache_info(other.root).trunks
    assert (trunk.layer, trunk.dtype, trunk.width, trunk.texts) == (3, "bfloat16", 4, len(texts(5)))
    assert [reference.digest for reference in cache_info(other.root).references] == [SPEC.digest]

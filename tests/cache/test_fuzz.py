"""Random rows, random operations and random damage. `DPOENG_FUZZ=10000` turns the small default count up.

Inputs that could end the interpreter are tried in a separate process, so that a crash is a failure and not the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dpoeng.bench.cache import synthetic_rows
from dpoeng.cache.files import Disk
from dpoeng.cache.gc import collect
from dpoeng.cache.reader import View
from dpoeng.cache.records import canonical_json, parse_canonical, seal, unseal
from dpoeng.cache.schema import PairIds, ScoredPair, as_ids, pair_key
from dpoeng.cache.shard import Shard, encode_shard
from dpoeng.cache.spec import ReferenceSpec, diff_specs
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry
from dpoeng.cache.verify import verify

COUNT = int(os.environ.get("DPOENG_FUZZ", "500"))
EXAMPLES = settings(
    max_examples=min(COUNT, 10_000) // 5,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    derandomize=COUNT == 500,
)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6)
LOGPS = st.floats(max_value=0, allow_infinity=False, allow_nan=False, width=32)


@st.composite
def scored_pairs(draw: st.DrawFn) -> ScoredPair:
    sides = []
    for _ in range(2):
        logps = draw(st.lists(LOGPS, min_size=1, max_size=5))
        start = draw(st.integers(0, 2))
        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(logps) + start, max_size=len(logps) + start))
        sides.append((as_ids(ids), start, np.array(logps, np.float32)))
    (chosen, chosen_start, chosen_logps), (rejected, rejected_start, rejected_logps) = sides
    ids = PairIds(as_ids(draw(IDS)), chosen, rejected, chosen_start, rejected_start)
    return ScoredPair(ids, chosen_logps, rejected_logps)


@EXAMPLES
@given(st.lists(scored_pairs(), min_size=1, max_size=8))
def test_any_rows_come_back_from_a_shard_bit_for_bit(drawn: list[ScoredPair]) -> None:
    rows = list({pair_key(row.ids): row for row in drawn}.values())
    shard = Shard(encode_shard(rows), "here")
    shard.check_values()
    shard.check_sums_and_keys()
    assert len(shard) == len(rows)
    for i, row in enumerate(rows):
        assert shard[i].ids.same_as(row.ids)
        assert shard[i].chosen_logps.tobytes() == row.chosen_logps.tobytes()
        assert shard[i].rejected_logps.tobytes() == row.rejected_logps.tobytes()
    assert shard.keys().tobytes() == b"".join(pair_key(row.ids) for row in rows)
    assert shard.numbers().chosen_sum.tolist() == [row.chosen_sum for row in rows]


@EXAMPLES
@given(scored_pairs(), scored_pairs())
def test_keys_are_equal_exactly_if_pairs_are(one: ScoredPair, other: ScoredPair) -> None:
    assert (pair_key(one.ids) == pair_key(other.ids)) == one.ids.same_as(other.ids)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=5)


@EXAMPLES
@given(OBJECTS)
def test_any_json_has_one_spelling_and_a_seal_that_holds(value: dict[str, Any]) -> None:
    spelt = canonical_json(value)
    assert canonical_json(parse_canonical(spelt, "here")) == spelt
    assert canonical_json(dict(reversed(value.items()))) == spelt
    assert canonical_json(unseal(seal(value), "here")) == spelt


@EXAMPLES
@given(OBJECTS, OBJECTS)
def test_specs_differ_exactly_if_their_digests_do(one: dict[str, Any], other: dict[str, Any]) -> None:
    old, new = ReferenceSpec.from_fields(one), ReferenceSpec.from_fields(other)
    assert (old.digest == new.digest) == (diff_specs(old, new) == [])


# -- any order of operations against a model --------------------------------------------------------------------------

POOL = synthetic_rows(8, mean_prompt=3, mean_response=3)
SPEC = ReferenceSpec.from_fields({"model": "machine"})


class NoSyncDisk(Disk):
    def fsync(self, descriptor: int) -> None: ...

    def sync_dir(self, path: Path) -> None: ...


class CacheMachine(RuleBasedStateMachine):
    """A cache and what it should hold: rows by object. Damage takes an object's rows away, nothing else does."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.store = Store.open(self.root / "cache", create=True, disk=NoSyncDisk())
        self.spec = self.store.put_spec(SPEC)
        self.objects: dict[str, list[int]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(rows=st.lists(st.integers(0, len(POOL) - 1), min_size=1, max_size=4, unique=True))
    def commit(self, rows: list[int]) -> None:
        name = self.store.commit_shard(self.spec, [POOL[i] for i in rows], {})
        self.objects[name] = rows

    @rule()
    def seal(self) -> None:
        self.store.seal(self.spec)
        problems = verify(self.store.root, depth="all").problems
        lost = self.store.views() and not {item.name for item in self.store.view_record("v").objects} <= {*self.objects}
        assert [Path(problem.where).name for problem in problems] == (["v.json"] if lost else [])

    @rule()
    def open_again(self) -> None:
        self.store = Store.open(self.root / "cache", disk=NoSyncDisk())

    @rule(
        choose=st.integers(0, 100), how=st.sampled_from(["cut", "flip", "delete", "record"]), place=st.integers(0, 2000)
    )
    def damage(self, choose: int, how: str, place: int) -> None:
        if not self.objects:
            return
        name = sorted(self.objects)[choose % len(self.objects)]
        path = self.store.root / "objects" / name[:2] / f"{name}.arrow"
        record = self.store.root / "runs" / self.spec / "commits" / f"{name}.json"
        data = path.read_bytes()
        match how:
            case "cut":
                path.write_bytes(data[: place % len(data)])
            case "flip":
                at = place % len(data)
                path.write_bytes(data[:at] + bytes([data[at] ^ 1 << place % 8]) + data[at + 1 :])
            case "delete":
                path.unlink()
            case "record":
                record.write_bytes(record.read_bytes()[:-2])
        assert not verify(self.store.root).ok
        del self.objects[name]
        assert len(self.store.lookup(self.spec).quarantined) == 1

    @rule()
    def collect(self) -> None:
        collect(self.store.root, dry_run=False, grace_s=0, quarantine=True)

    @rule(rows=st.lists(st.integers(0, len(POOL) - 1), min_size=1, max_size=6))
    def view(self, rows: list[int]) -> None:
        held = {i for committed in self.objects.values() for i in committed}
        rows = [i for i in rows if i in held]
        if rows:
            entries = [ViewEntry("f", n, pair_key(POOL[i].ids)) for n, i in enumerate(rows)]
            self.store.write_view(self.spec, "v", entries, {})
            view = View.open(self.store.root, "v")
            assert [view[n].chosen_sum for n in range(len(view))] == [POOL[i].chosen_sum for i in rows]

    @invariant()
    def holds_what_it_should(self) -> None:
        index = self.store.lookup(self.spec)
        held = {i for rows in self.objects.values() for i in rows}
        for i, row in enumerate(POOL):
            found = index.get(row.ids)
            assert (found is not None) == (i in held)
            assert found is None or found.chosen_logps.tobytes() == row.chosen_logps.tobytes()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=max(20, COUNT // 50), stateful_step_count=20, deadline=None, derandomize=COUNT == 500
)


# -- inputs that might end the interpreter ----------------------------------------------------------------------------

HAMMER = """
import json, sys, tempfile
from pathlib import Path
import numpy as np
from dpoeng.bench.cache import synthetic_rows
from dpoeng.cache.errors import CacheError
from dpoeng.cache.fingerprint import weight_digests
from dpoeng.cache.records import Commit, ObjectRef, ViewRecord, canonical_json, seal
from dpoeng.cache.schema import pair_key
from dpoeng.cache.shard import Shard, encode_shard
from dpoeng.cache.table import Entries, Table, ViewEntry, encode_table

kind, count = sys.argv[1], int(sys.argv[2])
random = np.random.default_rng(int(sys.argv[3]))
rows = synthetic_rows(5, mean_prompt=4, mean_response=4)
zero = np.zeros(5, np.int32)

def shard(data):
    read = Shard(memoryview(data), "x")
    for i in range(len(read)):
        read[i]
    read.numbers()
    read.check_values()
    read.check_sums_and_keys()

def table(data):
    read = Table(memoryview(data), "x", [5], 1)
    for i in range(len(read)):
        try:
            read.extra(i), read.keys[i].tobytes(), read.row[i]
        except ValueError:  # of JSON: the hash is what guards a user's columns
            pass

def record(data):
    body = data.partition(b"\\n")[0] + b"\\n"
    import xxhash
    for given in (data, body + canonical_json({"xxh3_128": xxhash.xxh3_128_hexdigest(body)}) + b"\\n"):
        for decode in (lambda: Commit.decode(given, "x", spec="a" * 32, name="0" * 32),
                       lambda: ViewRecord.decode(given, "x", name="v")):
            try:
                decode()
            except CacheError:
                pass

path = Path(tempfile.mkdtemp()) / "w.safetensors"
def weights(data):
    path.write_bytes(data)
    weight_digests([path])

header = json.dumps({"__metadata__": {"a": "b"}, "w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
                     "v": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}).encode()
entries = [ViewEntry("f", i, pair_key(row.ids), {"i": i}) for i, row in enumerate(rows)]
base, use = {
    "shard": (bytes(encode_shard(rows)), shard),
    "table": (bytes(encode_table(Entries(entries), zero, np.arange(5, dtype=np.int32))), table),
    "record": (Commit("a" * 32, ObjectRef("0" * 32, 3, 1000), {"torch": "2.13.0"}).encode(), record),
    "weights": (len(header).to_bytes(8, "little") + header + bytes(range(22)), weights),
}[kind]
use(base)
SPECIAL = [b"\\xff" * 4, b"\\0" * 4, b"\\xff\\xff\\xff\\x7f", b"\\1\\0\\0\\0", b"\\0\\0\\0\\x80", b"\\xff" * 8]
SPECIAL += [b'"', b"9" * 9, b"["]
refused = 0
for _ in range(count):
    data = bytearray(base)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(len(data)))
        match random.integers(5):
            case 0: data[at] ^= 1 << int(random.integers(8))
            case 1: data[at] = random.integers(256)
            case 2: data[at : at + 8] = random.bytes(len(data[at : at + 8]))
            case 3: word = SPECIAL[random.integers(len(SPECIAL))]; data[at : at + len(word)] = word
            case 4: del data[at : at + int(random.integers(1, 20))]
    try:
        use(bytes(data))
    except CacheError:
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("kind", ["shard", "table", "record", "weights"])
def test_no_damage_ends_the_interpreter_or_escapes_as_another_error(kind: str) -> None:
    """What is not hashed (depth "open", foreign files) must still be refused in words, or read without harm."""
    done = subprocess.run(
        [sys.executable, "-c", HAMMER, kind, str(COUNT), "1"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    if kind != "record":  # the decoders of records are called inside
        assert int(done.stdout) > COUNT / 4

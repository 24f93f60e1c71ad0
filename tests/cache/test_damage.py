"""Damaged and hostile files: each is noticed, named, set aside and recomputed, or refused. Faults 22 to 36."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import xxhash

from dpoeng.bench.cache import synthetic_rows
from dpoeng.cache import framing
from dpoeng.cache.errors import CacheError
from dpoeng.cache.folder import commit_name, manifest_name, object_name, spec_name, table_name, view_name
from dpoeng.cache.framing import FramingError, check_plain
from dpoeng.cache.reader import View, open_table
from dpoeng.cache.records import Commit, Manifest, ObjectRef, canonical_json, seal, unseal
from dpoeng.cache.schema import pair_key
from dpoeng.cache.shard import Shard, encode_shard
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.table import Table, ViewEntry
from dpoeng.cache.verify import Depth, verify

SPEC = ReferenceSpec.from_fields({"model": "damage"})
ROWS = synthetic_rows(6, mean_prompt=4, mean_response=3)
DEPTHS: list[Depth] = ["open", "semantic", "full", "all"]
ATTACKS = sorted((Path(__file__).parent / "attacks").glob("*.arrow"))


def work(root: Path) -> Store:
    """Phase one in small; the same however often it runs."""
    store = Store.open(root, create=True)
    spec = store.put_spec(SPEC)
    index = store.lookup(spec)
    for rows in (ROWS[:3], ROWS[3:]):
        if not all(row.ids in index for row in rows):
            store.commit_shard(spec, rows, {"torch": "2.13.0"})
    store.seal(spec)
    entries = [ViewEntry("pairs.jsonl", i + 1, pair_key(row.ids), {"n": i}) for i, row in enumerate(ROWS)]
    store.write_view(spec, "pairs", entries, {})
    return store


def result(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in ("tmp", "quarantine")
    }


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound") / "cache"
    work(root)
    return root


@pytest.fixture
def root(tmp_path: Path, sound: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "cache"))


@pytest.fixture(scope="module")
def names(sound: Path) -> dict[str, str]:
    """One file of each kind."""
    store = Store.open(sound)
    record = store.view_record("pairs")
    one, other = (reference.name for reference in record.objects)
    return {
        "spec": spec_name(SPEC.digest),
        "object": object_name(one),
        "other object": object_name(other),
        "record": commit_name(SPEC.digest, one),
        "manifest": manifest_name(SPEC.digest, 1),
        "view": view_name("pairs"),
        "table": table_name(record.table.name),
    }


def readers(root: Path, names: dict[str, str]) -> dict[str, Callable[[], object]]:
    """What must refuse a file of each kind, once it is damaged."""
    store = Store.open(root)
    record = store.view_record("pairs")
    one = record.objects[0]
    return {
        "spec": lambda: store.spec(SPEC.digest),
        "object": lambda: store.open_shard(one),
        "record": lambda: Commit.decode(store.files.read(names["record"]), "here", spec=SPEC.digest, name=one.name),
        "manifest": lambda: store.manifest(SPEC.digest, 1),
        "view": lambda: store.view_record("pairs"),
        "table": lambda: open_table(store, record, check=True),
    }


def refused(read: Callable[[], object]) -> bool:
    try:
        read()
    except CacheError as error:
        return error.code == "cache-corrupt"
    return False


KINDS = ["spec", "object", "record", "manifest", "view", "table"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_flip_is_found(root: Path, names: dict[str, str], kind: str) -> None:
    """Fault 23: all bits of one file of every kind."""
    path, read = root / names[kind], readers(root, names)[kind]
    data = path.read_bytes()
    read()
    missed = []
    with path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(data):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), place)
                if not refused(read):
                    missed.append((place, bit))
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert missed == []
    read()


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_found(root: Path, names: dict[str, str], kind: str) -> None:
    """Fault 22: every length of one file of every kind."""
    path, read = root / names[kind], readers(root, names)[kind]
    missed = []
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        if not refused(read):
            missed.append(length)
    assert missed == []


def test_every_truncation_of_an_object_is_found_by_its_structure_alone(root: Path, names: dict[str, str]) -> None:
    """At depth "open" nothing is hashed, and a reader without our records has no size to compare."""
    for name, make in (("object", lambda part: Shard(part, "x")), ("table", lambda part: Table(part, "x", [3, 3], 1))):
        data = memoryview((root / names[name]).read_bytes())
        make(data)
        for length in range(len(data)):
            with pytest.raises(CacheError):
                make(data[:length])


def damage_kinds(root: Path, names: dict[str, str]) -> dict[str, tuple[str, Callable[[], object]]]:
    """Name of each damage: the file that must be named, and how to do it."""

    def change(kind: str, edit: Callable[[bytes], bytes]) -> tuple[str, Callable[[], object]]:
        path = root / names[kind]
        return names[kind], lambda: path.write_bytes(edit(path.read_bytes()))

    def swap() -> None:
        one, other = root / names["object"], root / names["other object"]
        one.rename(root / "between")
        other.rename(one)
        (root / "between").rename(other)

    made: dict[str, tuple[str, Callable[[], object]]] = {"objects swapped": (names["object"], swap)}
    for kind in KINDS:
        made[f"{kind} cut"] = change(kind, lambda data: data[: len(data) // 2])
        made[f"{kind} emptied"] = change(kind, lambda data: b"")
        made[f"{kind} flipped"] = change(kind, lambda data: data[:9] + bytes([data[9] ^ 4]) + data[10:])
        made[f"{kind} zeroed"] = change(kind, lambda data: bytes(len(data)))
        made[f"{kind} longer"] = change(kind, lambda data: data + b"\n")
        if kind != "manifest" and kind != "view":  # nothing but itself names it
            made[f"{kind} deleted"] = names[kind], (root / names[kind]).unlink
    return made


DAMAGE = [
    "objects swapped",
    *(f"{kind} {how}" for kind in KINDS for how in ("cut", "emptied", "flipped", "zeroed", "longer", "deleted")),
]
DAMAGE = [kind for kind in DAMAGE if kind not in ("manifest deleted", "view deleted")]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_set_aside_and_mended_by_the_same_command(
    root: Path, names: dict[str, str], sound: Path, damage: str
) -> None:
    """Faults 22 to 27, from the damage to the cache that is as it was."""
    name, apply = damage_kinds(root, names)[damage]
    apply()
    found = verify(root)
    assert not found.ok
    assert any(name in problem.where or Path(name).stem in problem.where for problem in found.problems)
    spoilt = (root / name).read_bytes() if (root / name).exists() else None
    work(root)
    assert result(root) == result(sound)
    assert verify(root, depth="all").ok
    if spoilt is not None and not name.startswith("views/pairs"):  # a view's record is replaced, not set aside
        assert spoilt in [path.read_bytes() for path in (root / "quarantine").iterdir()]


@pytest.mark.parametrize("kind", ["object", "record", "manifest"])
def test_a_look_up_lists_what_it_set_aside(root: Path, names: dict[str, str], kind: str) -> None:
    path = root / names[kind]
    path.write_bytes(path.read_bytes()[:-3])
    index = Store.open(root).lookup(SPEC.digest)
    [damage] = index.quarantined
    assert damage.where == str(path)
    assert damage.moved_to is not None
    assert damage.moved_to.parent == root / "quarantine"
    assert not path.exists()
    assert len(index) == {"object": 3, "record": 3, "manifest": 6}[kind]
    assert damage.rows == {"object": 3, "record": None, "manifest": None}[kind]
    again = Store.open(root).lookup(SPEC.digest)
    assert again.quarantined == []
    assert len(again) == len(index)


def test_training_refuses_damage_and_says_how_to_mend_it(root: Path, names: dict[str, str]) -> None:
    path = root / names["object"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError) as caught:
        View.open(root)
    assert caught.value.where == str(path)
    assert "precompute-ref" in str(caught.value.remedy)
    assert path.read_bytes() == data  # a reader moves nothing


def test_a_record_of_one_reference_does_not_count_for_another(root: Path, names: dict[str, str]) -> None:
    """A record copied to another spec's folder would make its numbers that spec's."""
    store = Store.open(root)
    other = store.put_spec(ReferenceSpec.from_fields({"model": "another"}))
    target = root / commit_name(other, Path(names["record"]).stem)
    target.parent.mkdir(parents=True)
    shutil.copy(root / names["record"], target)
    index = store.lookup(other)
    assert len(index) == 0
    assert [damage.where for damage in index.quarantined] == [str(target)]


# -- hostile files under their true hash ------------------------------------------------------------------------------


def plant(root: Path, data: bytes, rows: int = 3) -> ObjectRef:
    """Puts bytes into a cache as an object, with a record that is right about them."""
    store = Store.open(root)
    reference = ObjectRef(xxhash.xxh3_128_hexdigest(data), rows, len(data))
    store.put_object(reference.name, memoryview(data))
    store.put_commit(Commit(SPEC.digest, reference, {}))
    return reference


@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.stem)
def test_attacks_under_a_true_hash_are_refused(root: Path, path: Path) -> None:
    """Faults 30 to 32: the hash says only that these are the bytes that somebody wrote."""
    before = len(Store.open(root).lookup(SPEC.digest))
    reference = plant(root, path.read_bytes())
    used = pa.default_memory_pool().max_memory()
    values_only = "log-prob" in path.stem or path.stem == "ids-negative"
    for depth in DEPTHS[values_only:]:  # a wrong structure is found before any value is read
        report = verify(root, depth=depth)
        assert [reference.name in problem.where for problem in report.problems] == [True]
    index = Store.open(root).lookup(SPEC.digest)
    assert len(index) == before
    assert [reference.name in damage.where for damage in index.quarantined] == [True]
    assert pa.default_memory_pool().max_memory() - used < 1 << 20, "something was decompressed"


def test_there_are_attacks() -> None:
    assert len(ATTACKS) >= 25


def test_a_wrong_sum_or_key_is_found_by_the_semantic_depth(root: Path) -> None:
    for column, value in (("chosen_sum", -3.0), ("pair_key", b"0" * 16)):
        data = bytes(encode_shard(ROWS[:2]))
        batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
        place = batch.schema.get_field_index(column)
        old = batch.column(place).buffers()[1].to_pybytes()
        new = pa.array([value] * 2, batch.schema.field(place).type).buffers()[1].to_pybytes()
        reference = plant(root, data.replace(old[: len(new)], new), rows=2)
        report = verify(root, depth="semantic")
        assert [f"{reference.name}.arrow, row 0" in problem.where for problem in report.problems] == [True]
        assert column in report.problems[0].expected
        (root / commit_name(SPEC.digest, reference.name)).unlink()


@pytest.mark.parametrize(("relative", "passes"), [(1e-7, False), (-1e-8, False), (1e-11, True)])
def test_a_sum_may_differ_by_its_rounding_alone(root: Path, relative: float, passes: bool) -> None:
    data = bytes(encode_shard(ROWS[:1]))
    old, new = (struct.pack("<d", ROWS[0].chosen_sum * (1 + change)) for change in (0, relative))
    assert data.count(old) == 1
    plant(root, data.replace(old, new), rows=1)
    named = [problem for problem in verify(root, depth="semantic").problems if "chosen_sum" in str(problem.expected)]
    assert (not named) == passes


def test_a_record_with_another_row_count_is_refused(root: Path) -> None:
    reference = plant(root, bytes(encode_shard(ROWS[:2])), rows=3)
    with pytest.raises(CacheError) as caught:
        Store.open(root).open_shard(reference)
    assert (caught.value.expected, caught.value.found) == ("3 rows", "2 rows")


def record_bodies() -> Iterator[tuple[str, bytes]]:
    """First lines of commit records that are wrong, whatever their checksum says."""
    good: dict[str, Any] = {
        "kind": "commit",
        "spec": SPEC.digest,
        "object": ["0" * 32, 3, 1000],
        "provenance": {},
    }

    def changed(**fields: Any) -> bytes:
        return canonical_json(good | fields)

    yield "path in the object's name", changed(object=["../../../etc/passwd", 3, 1000])
    yield "absolute path", changed(object=["/etc/passwd", 3, 1000])
    yield "another object", changed(object=["1" * 32, 3, 1000])
    yield "negative rows", changed(object=["0" * 32, -1, 1000])
    yield "boolean rows", changed(object=["0" * 32, True, 1000])
    yield "no bytes", changed(object=["0" * 32, 3, 0])
    yield "object is a number", changed(object=3)
    yield "object too long", changed(object=["0" * 32, 3, 1000, 4])
    yield "another kind", changed(kind="view")
    yield "another spec", changed(spec="f" * 32)
    yield "no provenance", canonical_json({key: good[key] for key in good if key != "provenance"})
    yield "provenance is a list", changed(provenance=[])
    yield "a list", canonical_json([good])
    yield "spaces", json.dumps(good, sort_keys=True).encode()
    yield "keys not sorted", json.dumps(good, separators=(",", ":")).encode()
    yield "key twice", changed().replace(b'{"kind"', b'{"kind":"view","kind"')
    yield "NaN", changed(provenance={"x": 1}).replace(b'"x":1', b'"x":NaN')
    yield "float for a whole number", changed(provenance={"x": 1}).replace(b'"x":1', b'"x":1.0')
    yield "a number of 5000 digits", changed(provenance={"x": 1}).replace(b'"x":1', b'"x":' + b"9" * 5000)
    yield "nested 100000 deep", b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield "not UTF-8", b'{"x":"\xff"}'
    yield "nothing", b""


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in record_bodies()])
def test_records_that_are_wrong_under_a_true_checksum_are_refused(root: Path, body: bytes) -> None:
    """Faults 27 and 29."""
    line = body + b"\n"
    path = root / commit_name(SPEC.digest, "0" * 32)
    path.write_bytes(line + canonical_json({"xxh3_128": xxhash.xxh3_128_hexdigest(line)}) + b"\n")
    assert any(path.name in problem.where for problem in verify(root).problems)
    index = Store.open(root).lookup(SPEC.digest)
    assert [damage.where.partition(": ")[0] for damage in index.quarantined] == [str(path)]
    assert len(index) == 6


@pytest.mark.parametrize("member", ["table", "objects", "spec", "files", "name"])
def test_a_view_that_names_a_path_is_refused(root: Path, names: dict[str, str], member: str) -> None:
    """Fault 29: a view's record, too, may be wrong under a true checksum."""
    body = unseal((root / names["view"]).read_bytes(), "")
    path = "../" * 8 + "etc/passwd"
    forged: Any = {
        "table": [path, 6, 100],
        "objects": [[path, 3, 100]],
        "spec": path,
        "files": [{"path": path}],
        "name": path,
    }[member]
    (root / names["view"]).write_bytes(seal(body | {member: forged}))
    with pytest.raises(CacheError) as caught:
        View.open(root)
    assert caught.value.code == "cache-corrupt"
    assert str(caught.value.where) == f"{root / names['view']}: {member}"
    assert not verify(root).ok


@pytest.mark.parametrize("objects", [[["b" * 32, 1, 1], ["a" * 32, 1, 1]], [["a" * 32, 1, 1]] * 2, [["../x", 1, 1]]])
def test_a_manifest_whose_objects_are_not_sorted_digests_is_refused(root: Path, objects: Any) -> None:
    path = root / manifest_name(SPEC.digest, 1)
    path.write_bytes(seal(unseal(path.read_bytes(), "") | {"objects": objects}))
    [damage] = Store.open(root).lookup(SPEC.digest).quarantined
    assert damage.where == str(path)


def test_a_sealed_record_reads_back(root: Path) -> None:
    body = {"b": [1, 2.5, None, True], "a": {"ü": "\ud800"}, "c": 16.0}
    assert unseal(seal(body), "here") == body
    assert seal(body).splitlines()[0] == b'{"a":{"\\u00fc":"\\ud800"},"b":[1,2.5,null,true],"c":16}'
    for bad in ({1: 2}, {"x": float("nan")}, {"x": object()}, {"x": {2}}):
        with pytest.raises((TypeError, ValueError)):
            seal(bad)  # type: ignore[dict-item]


def test_a_manifest_that_claims_what_is_not_there_misleads_nobody(root: Path) -> None:
    """Fault 27: edited by somebody who knows how to make a checksum."""
    store = Store.open(root)
    real = store.manifest(SPEC.digest, 1)
    forged = Manifest(SPEC.digest, 1, tuple(sorted((*real.objects, ObjectRef("f" * 32, 9, 9)))))
    (root / manifest_name(SPEC.digest, 1)).write_bytes(forged.encode())
    assert [problem.found for problem in verify(root).problems] == ["no such record"]
    assert len(store.lookup(SPEC.digest)) == 6
    assert store.seal(SPEC.digest).name == "manifest-000002.json"
    assert store.manifest(SPEC.digest, 2).objects == real.objects
    assert verify(root).ok


@pytest.mark.parametrize("column", ["object", "row", "file"])
@pytest.mark.parametrize("value", [-1, 7])
def test_a_table_that_points_outside_is_refused(root: Path, names: dict[str, str], column: str, value: int) -> None:
    data = (root / names["table"]).read_bytes()
    batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
    place = batch.schema.get_field_index(column)
    array = pa.array([value, *batch.column(place).to_pylist()[1:]], pa.int32())
    forged = pa.RecordBatch.from_arrays(
        [*batch.columns[:place], array, *batch.columns[place + 1 :]], schema=batch.schema
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(forged)
    with pytest.raises(CacheError) as caught:
        Table(memoryview(sink.getvalue()), "here", [3, 3], 1)
    assert caught.value.where == "here"


@pytest.mark.parametrize("depth", ["semantic", "all"])
def test_a_view_whose_entry_names_another_row_is_found(root: Path, names: dict[str, str], depth: Depth) -> None:
    store = Store.open(root)
    data = (root / names["table"]).read_bytes()
    batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
    old = batch.column("row").to_numpy().astype("<i4").tobytes()
    forged = data.replace(old, (2 - batch.column("row").to_numpy()).astype("<i4").tobytes())
    record = store.view_record("pairs")
    reference = ObjectRef(xxhash.xxh3_128_hexdigest(forged), 6, len(forged))
    (root / table_name(reference.name)).write_bytes(forged)
    body = unseal(record.encode(), "") | {"table": reference.to_json()}
    (root / names["view"]).write_bytes(seal(body))
    assert verify(root, depth="full").ok  # every byte is what the record says it is
    assert [problem.expected for problem in verify(root, depth=depth).problems] == ["rows with the view's keys"]


def test_framing_says_what_is_wrong() -> None:
    said = {
        "compressed-bomb-of-256-MiB": "compressed",
        "compressed-with-lz4": "compressed",
        "dictionary": "dictionaries",
        "record-batch-listed-twice": "overlap",
        "footer-longer-than-the-file": "footer",
        "footer-of-negative-length": "footer",
        "nothing-but-magic": "footer",
        "stream-format": "not an Arrow IPC file",
    }
    for path in ATTACKS:
        if words := said.pop(path.stem, None):
            with pytest.raises(FramingError, match=words):
                check_plain(memoryview(path.read_bytes()))
    assert said == {}


@pytest.mark.parametrize(
    ("buffer", "message", "words"),
    [
        ((4, 8), 64, "past its record batch"),  # not a multiple of 8
        ((64, 8), 64, "past its record batch"),
        ((-8, 8), 64, "past its record batch"),
        ((0, -8), 64, "past its record batch"),
        ((0, 8), 72, "differ on the size"),
        ((56, 8), 64, None),
    ],
)
def test_framing_holds_each_buffer_to_its_body(buffer: tuple[int, int], message: int, words: str | None) -> None:
    class Batch:
        def scalar(self, field: int, kind: str) -> int:
            return {1: 3, 3: message}[field]

        def table(self, field: int) -> Batch:
            return self

        def offset_of(self, field: int) -> int:
            return 0

        def vector_length(self, field: int, item_size: int) -> int:
            return 1

        def vector_item(self, field: int, item_size: int, index: int) -> bytes:
            return struct.pack("<qq", *buffer)

    header: Any = Batch()
    if words is None:
        framing._check_batch(header, 64)
        return
    with pytest.raises(FramingError, match=words):
        framing._check_batch(header, 64)


# -- while it is read -------------------------------------------------------------------------------------------------


def test_a_file_cut_while_it_is_mapped_is_named_when_it_is_opened_again(root: Path, names: dict[str, str]) -> None:
    """Fault 35: the kernel ends the reader with SIGBUS; no exception can be raised there."""
    store = Store.open(root)
    big = synthetic_rows(400, seed=2)
    name = store.commit_shard(SPEC.digest, big, {})
    store.write_view(SPEC.digest, "big", [ViewEntry("f", i, pair_key(row.ids)) for i, row in enumerate(big)], {})
    view = View.open(root, "big")
    start, end = os.pipe()
    if (child := os.fork()) == 0:
        faulthandler.disable()
        os.read(start, 1)
        for i in range(len(view)):
            _ = view[i].chosen_sum
        os._exit(0)
    path = root / object_name(name)
    os.truncate(path, 5000)
    os.write(end, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS
    with pytest.raises(CacheError) as caught:
        View.open(root, "big")
    assert (caught.value.where, caught.value.found) == (str(path), "5000 bytes")
    os.close(start)
    os.close(end)

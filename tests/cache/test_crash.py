"""Kills, power losses and failing disks at every single operation; afterwards the same command must finish the same.

Everything the cache changes goes through `files.Disk`. `ModelDisk` stands in for it: it performs each operation on a
real folder and also keeps a model of what would be on the platter: an inode's bytes are durable after its fsync, a
folder's entries after the folder's. A power loss keeps any subset of what was not synced, not just the oldest, since
file systems reorder. Faults 38 to 44.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpoeng.bench.cache import synthetic_rows
from dpoeng.cache.errors import CacheError
from dpoeng.cache.files import Disk
from dpoeng.cache.schema import pair_key
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry
from dpoeng.cache.verify import verify

SPEC = ReferenceSpec.from_fields({"model": "crash"})
ROWS = synthetic_rows(6, mean_prompt=4, mean_response=3)
PLAN = [ROWS[:3], ROWS[3:]]
RESULT = ("FORMAT", "specs", "objects", "runs", "views")


class PowerCutError(BaseException):
    """The process is gone. No `except Exception` may catch it, as none catches a kill."""


@dataclasses.dataclass(eq=False)
class Node:
    """An inode: what the kernel shows, what the disk holds, and what waits in between."""

    data: bytearray | None = None  # None: a folder
    durable_data: bytes | None = None
    entries: dict[str, Node] = dataclasses.field(default_factory=dict)
    durable_entries: dict[str, Node] = dataclasses.field(default_factory=dict)
    pending: list[tuple[str, Node | None]] = dataclasses.field(default_factory=list)
    poisoned: bool = False

    def put(self, name: str, node: Node | None) -> None:
        if node is None:
            self.entries.pop(name)
        else:
            self.entries[name] = node
        self.pending.append((name, node))


class ModelDisk(Disk):
    """A disk on which operation number `fault_at` goes wrong.

    Args:
        base: an existing, durable folder above the cache.
        fault_at: number of the operation, from 0; None for a good disk.
        fault: "kill" before it; "torn": a write is done by half, then kill; an errno: it fails (a write by half), once,
            or until `mend` for a full disk.
    """

    def __init__(self, base: Path, fault_at: int | None = None, fault: str | int = "kill") -> None:
        self.base = base
        self.tree = Node()
        self.fault_at = fault_at
        self.fault = fault
        self.operations: list[str] = []
        self.committed = 0  # shards whose commit has returned
        self._open: dict[int, Node] = {}
        self._dead = False

    def _node(self, path: Path) -> Node:
        node = self.tree
        for part in path.relative_to(self.base).parts:
            node = node.entries[part]
        return node

    def _step(self, operation: str, half: Callable[[], object] = lambda: None) -> None:
        number = len(self.operations)
        self.operations.append(operation)
        if self._dead:
            raise PowerCutError
        if self.fault_at is None or number < self.fault_at:
            return
        if self.fault in ("kill", "torn"):
            self._dead = True
            if self.fault == "torn":
                half()
            raise PowerCutError
        full = self.fault == errno.ENOSPC and operation in ("create", "write", "mkdir", "link")
        if full or number == self.fault_at:
            half()
            assert isinstance(self.fault, int)
            raise OSError(self.fault, os.strerror(self.fault))

    def mend(self) -> None:
        self.fault_at = None

    def mkdir(self, path: Path) -> None:
        self._step("mkdir")
        path.mkdir()
        self._node(path.parent).put(path.name, Node())

    def create(self, path: Path) -> int:
        self._step("create")
        descriptor = super().create(path)
        self._open[descriptor] = node = Node(data=bytearray())
        self._node(path.parent).put(path.name, node)
        return descriptor

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        def put(part: bytes) -> None:
            buffer = self._open[descriptor].data
            assert buffer is not None
            buffer += part
            os.write(descriptor, part)

        whole = bytes(data)
        self._step("write", lambda: put(whole[: len(whole) // 2]))
        put(whole)

    def fsync(self, descriptor: int) -> None:
        node = self._open[descriptor]
        assert not node.poisoned, "a failed fsync was tried again on the same file"
        try:
            self._step("fsync")
        except OSError:
            node.poisoned = True  # the kernel has dropped the dirty pages; a second fsync would succeed and lie
            raise
        assert node.data is not None
        node.durable_data = bytes(node.data)

    def link(self, source: Path, target: Path) -> None:
        self._step("link")
        super().link(source, target)
        self._node(target.parent).put(target.name, self._node(source))

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        super().rename(source, target)
        self._node(target.parent).put(target.name, self._node(source))
        self._node(source.parent).put(source.name, None)

    def unlink(self, path: Path) -> None:
        self._step("unlink")
        super().unlink(path)
        self._node(path.parent).put(path.name, None)

    def sync_dir(self, path: Path) -> None:
        self._step("sync_dir")
        node = self._node(path)
        node.durable_entries, node.pending = dict(node.entries), []

    def after_power_loss(self, target: Path, keep: Callable[[], bool], choose: random.Random) -> None:
        """Writes to `target` what a machine might find when it is switched on again."""

        def restore(node: Node, path: Path) -> None:
            if node.data is not None:
                whole = bytes(node.data)
                unsynced = [b"", whole, whole[: len(whole) // 2], bytes(len(whole))]
                path.write_bytes(whole if node.durable_data == whole else choose.choice(unsynced))
                return
            path.mkdir()
            entries = dict(node.durable_entries)
            for name, child in node.pending:
                if keep():
                    entries.pop(name, None)
                    if child is not None:
                        entries[name] = child
            for name, child in entries.items():
                restore(child, path / name)

        restore(self.tree, target)


def work(root: Path, disk: Disk) -> None:
    """Phase one in small: what is missing is committed, then the run is sealed. Always the same, however often."""
    store = Store.open(root, create=True, disk=disk)
    spec = store.put_spec(SPEC)
    index = store.lookup(spec)
    for rows in PLAN:
        if not all(row.ids in index for row in rows):
            store.commit_shard(spec, rows, {"torch": "2.13.0"})
        if isinstance(disk, ModelDisk):
            disk.committed += 1
    store.seal(spec)
    entries = [ViewEntry("pairs.jsonl", i + 1, pair_key(row.ids)) for i, row in enumerate(ROWS)]
    store.write_view(spec, "pairs", entries, {})


def result(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.relative_to(root).parts[0] in RESULT
    }


class NoSyncDisk(Disk):
    """The real disk without its slow part, for runs whose durability is not in question."""

    def fsync(self, descriptor: int) -> None: ...

    def sync_dir(self, path: Path) -> None: ...


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[str]]:
    """The files of a run that nothing disturbed, and its operations."""
    base = tmp_path_factory.mktemp("undisturbed")
    disk = ModelDisk(base)
    work(base / "cache", disk)
    assert len(disk.operations) > 60
    return result(base / "cache"), disk.operations


def places(base: Path) -> Iterator[Path]:
    """Fresh folders, one a case."""
    for number in itertools.count():
        folder = base / str(number)
        folder.mkdir()
        yield folder


def crashes(operations: list[str]) -> Iterator[tuple[int, str]]:
    """Every operation, killed before it; and every write, killed in the middle."""
    for number, operation in enumerate(operations):
        yield number, "kill"
        if operation == "write":
            yield number, "torn"


def assert_finishes(root: Path, expected: dict[str, str], said: str) -> None:
    work(root, NoSyncDisk())
    assert result(root) == expected, said
    assert verify(root, depth="all").ok, said


def test_killed_at_any_operation(tmp_path: Path, undisturbed: tuple[dict[str, str], list[str]]) -> None:
    """Faults 38 and 39: everything that was done is still there, the rest is not; the next run ends the same."""
    expected, operations = undisturbed
    for (number, fault), base in zip(crashes(operations), places(tmp_path), strict=False):
        with pytest.raises(PowerCutError):
            work(base / "cache", ModelDisk(base, number, fault))
        assert_finishes(base / "cache", expected, f"{fault} at operation {number}, {operations[number]}")


def test_power_lost_at_any_operation(tmp_path: Path, undisturbed: tuple[dict[str, str], list[str]]) -> None:
    """Fault 40, and that `commit_shard` keeps its word: what it has returned for survives every subset."""
    expected, operations = undisturbed
    fresh = places(tmp_path)
    for number, fault in crashes(operations):
        disk = ModelDisk(base := next(fresh), number, fault)
        with pytest.raises(PowerCutError):
            work(base / "cache", disk)
        for k, found in enumerate(power_losses(disk, fresh, seed=number)):
            said = f"power lost at operation {number} ({fault}), subset {k}"
            if disk.committed:
                index = Store.open(found / "cache").lookup(SPEC.digest)
                for rows in PLAN[: disk.committed]:
                    assert all(row.ids in index for row in rows), f"{said}: a committed row is lost"
            assert_finishes(found / "cache", expected, said)


def test_power_lost_after_the_end_loses_nothing(tmp_path: Path, undisturbed: tuple[dict[str, str], list[str]]) -> None:
    """Fault 40: the crash after exit."""
    fresh = places(tmp_path)
    disk = ModelDisk(base := next(fresh))
    work(base / "cache", disk)
    for found in power_losses(disk, fresh, seed=0, random_subsets=50):
        assert result(found / "cache") == undisturbed[0]


def power_losses(disk: ModelDisk, fresh: Iterator[Path], seed: int, random_subsets: int = 3) -> Iterator[Path]:
    """What is found when nothing, all, or a random half of the unsynced operations reached the disk."""
    choose = random.Random(seed)
    subsets: list[Callable[[], bool]] = [lambda: False, lambda: True]
    for keep in subsets + [lambda: choose.random() < 0.5] * random_subsets:
        disk.after_power_loss(found := next(fresh) / "disk", keep, choose)
        yield found


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "cache-disk-full"), (errno.EIO, "cache-disk-error")])
def test_a_failing_disk_is_reported_and_the_next_run_ends_the_same(
    tmp_path: Path, undisturbed: tuple[dict[str, str], list[str]], number: int, code: str
) -> None:
    """Faults 41 and 42, at every operation; then the power goes as well, so that nothing unsynced was trusted.

    `ModelDisk.fsync` itself asserts that a failed fsync is not tried again on the same file.
    """
    expected, operations = undisturbed
    fresh = places(tmp_path)
    for at, operation in enumerate(operations):
        said = f"{os.strerror(number)} at operation {at}, {operation}"
        disk = ModelDisk(base := next(fresh), at, number)
        # The one failure that may pass in silence is that of tidying up: removing a temporary file.
        if operation == "unlink":
            with contextlib.suppress(CacheError):
                work(base / "cache", disk)
        else:
            with pytest.raises(CacheError) as caught:
                work(base / "cache", disk)
            assert (caught.value.code, caught.value.exit_status) == (code, 5), said
            assert str(base) in str(caught.value.where), said
        disk.mend()
        work(base / "cache", disk)
        assert result(base / "cache") == expected, said
        disk.after_power_loss(found := next(fresh) / "disk", lambda: False, random.Random(at))
        assert result(found / "cache") == expected, f"{said}, then power lost"


@pytest.mark.parametrize("operation", ["mkdir", "create"])
@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EMFILE, "cache-too-many-files"), (errno.EROFS, "cache-read-only"), (errno.EACCES, "cache-read-only")],
)
def test_a_system_that_refuses_an_operation_is_reported(
    tmp_path: Path, undisturbed: tuple[dict[str, str], list[str]], operation: str, number: int, code: str
) -> None:
    """Fault 43."""
    with pytest.raises(CacheError) as caught:
        work(tmp_path / "cache", ModelDisk(tmp_path, undisturbed[1].index(operation), number))
    assert (caught.value.code, caught.value.exit_status) == (code, 5)
    assert caught.value.remedy


def test_a_file_system_without_hard_links_works_too(
    tmp_path: Path, undisturbed: tuple[dict[str, str], list[str]]
) -> None:
    class NoLinks(NoSyncDisk):
        def link(self, source: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted", str(source))

    work(tmp_path / "cache", NoLinks())
    assert result(tmp_path / "cache") == undisturbed[0]
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []


NURSERY = """
import os, random, signal, sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + '/../support']
import test_crash as crash
from pathlib import Path

base, kills, choose = Path(sys.argv[2]), int(sys.argv[3]), random.Random(7)
whole = 1.0
for k in range(3):
    started = time.perf_counter()
    crash.work(base / f"undisturbed{k}", crash.NoSyncDisk())
    whole = min(whole, time.perf_counter() - started)
expected = crash.result(base / "undisturbed0")
done = attempt = 0
while done < kills:
    root = base / str(attempt)
    attempt += 1
    for _ in range(5):  # several kills on the way of one run
        if (child := os.fork()) == 0:
            crash.work(root, crash.NoSyncDisk())
            os._exit(0)
        time.sleep(choose.uniform(0, 1.2 * whole))
        os.kill(child, signal.SIGKILL)
        done += os.waitpid(child, 0)[1] == signal.SIGKILL
    crash.work(root, crash.NoSyncDisk())
    assert crash.result(root) == expected, root
    assert crash.verify(root, depth="all").ok, root
print(done)
"""


@pytest.mark.timeout(900)
def test_two_hundred_random_kills(tmp_path: Path) -> None:
    """Fault 44. One process imports everything once and forks the ones that are killed, so that a kill takes 20 ms."""
    done = subprocess.run(
        [sys.executable, "-c", NURSERY, str(Path(__file__).parent), str(tmp_path), "200"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 200

"""Looks over a whole cache and says what is wrong, changing nothing.

Four depths. `open`: every record's checksum, every file's presence, size, framing, schema and offsets. `full` adds the
hash of every byte and a look at every log-prob: the bytes are those that were written. `semantic` adds, instead, every
sum, every key and every entry of every view: the rows make sense, whoever wrote them. `all` is both. Of hidden states
`semantic` looks at every number. The fifth, a
comparison with the model itself, needs a model and so lives in `dpoeng.engine`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np

from dpoeng.cache.errors import CacheError
from dpoeng.cache.files import QUARANTINE, TMP
from dpoeng.cache.folder import commit_name, manifest_name, view_name
from dpoeng.cache.reader import open_table
from dpoeng.cache.records import DIGEST, Commit, Manifest, ObjectRef, damaged
from dpoeng.cache.shard import Shard
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import THREADS, Store
from dpoeng.cache.trunk.index import open_states
from dpoeng.cache.trunk.objects import StatesObject
from dpoeng.cache.words import counted

Depth = Literal["open", "semantic", "full", "all"]
Progress = Callable[[int, int], None]
Opener = Callable[[ObjectRef], Shard | StatesObject]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    where: str
    expected: str
    found: str


@dataclass
class VerifyReport:
    """Result of a verification.

    Attributes:
        depth: how deep it looked.
        problems: empty for a sound cache.
        counts: specs, trunks, objects, rows, texts (of trunks), manifests, views; and what harms nothing: orphans
            (objects without a record), temporary, quarantined.
        bytes: size of all objects and tables.
        seconds: how long it took.
    """

    depth: Depth
    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(root: Path | str, *, depth: Depth = "full", progress: Progress | None = None) -> VerifyReport:
    """Verifies a cache.

    Args:
        root: the cache folder.
        depth: see above.
        progress: called with (bytes done, bytes in all) after each object.

    Raises:
        CacheError: there is no cache of this version at all. Everything else is a problem in the report.
    """
    started = time.perf_counter()
    store = Store.open(root)
    report = VerifyReport(depth)
    commits, manifests = _records(store, report)
    trunks = store.trunks()
    objects = sorted({commit.object for commit in commits})
    openers = {commit.object: _opener(store, trunks.get(commit.spec), report.depth) for commit in commits}
    _check_manifests(store, commits, manifests, report)
    shards = _check_objects(openers, report, progress)
    _check_views(store, shards, report)
    orphans = set(object_names(store)) - {reference.name for reference in objects}
    report.counts |= {
        "specs": len(store.spec_digests()) - len(trunks),
        "trunks": len(trunks),
        "objects": len(objects),
        "rows": sum(reference.rows for reference in {commit.object for commit in commits if commit.spec not in trunks}),
        "texts": sum(reference.rows for reference in {commit.object for commit in commits if commit.spec in trunks}),
        "manifests": len(manifests),
        "views": len(store.views()),
        "orphans": len(orphans),
        "temporary": len(store.files.names(TMP)),
        "quarantined": len(store.files.names(QUARANTINE)),
    }
    report.bytes += sum(reference.bytes for reference in objects)
    report.seconds = time.perf_counter() - started
    return report


def object_names(store: Store) -> list[str]:
    """The names of all objects in the folder, whether a record names them or not."""
    folders = [name for name in store.files.names("objects") if len(name) == 2]
    names = [name for folder in folders for name in store.files.names(f"objects/{folder}", ".arrow")]
    return [name for name in names if DIGEST.fullmatch(name)]


@contextlib.contextmanager
def _noting(report: VerifyReport, where: Path | str) -> Iterator[None]:
    """Turns what is raised into a problem of the report."""
    try:
        yield
    except CacheError as error:
        report.problems.append(
            Problem(error.where or str(where), error.expected or "a sound file", error.found or error.message)
        )
    except FileNotFoundError:
        report.problems.append(Problem(str(where), "a file", "none"))


def _records(store: Store, report: VerifyReport) -> tuple[list[Commit], list[Manifest]]:
    """All sound records; what is wrong with the others goes into the report."""
    commits: list[Commit] = []
    manifests: list[Manifest] = []
    for digest in sorted({*store.spec_digests(), *filter(DIGEST.fullmatch, store.files.names("runs"))}):
        outcomes = store.read_commits(digest)
        generations = store.generations(digest)
        if digest in store.spec_digests() or outcomes or generations:  # else an empty folder, which `gc` may leave
            with _noting(report, store.root / "specs"):
                store.spec(digest)
        for path, outcome in outcomes:
            with _noting(report, path):
                if isinstance(outcome, CacheError):
                    raise outcome
                commits.append(outcome)
        for generation in generations:
            with _noting(report, store.root / manifest_name(digest, generation)):
                manifests.append(store.manifest(digest, generation))
    return commits, manifests


def _check_manifests(store: Store, commits: list[Commit], manifests: list[Manifest], report: VerifyReport) -> None:
    """Check that everything the last finished run of a spec left still has its records."""
    recorded = {(commit.spec, commit.object) for commit in commits}
    for manifest in {manifest.spec: manifest for manifest in manifests}.values():
        for reference in manifest.objects:
            if (manifest.spec, reference) not in recorded:
                where = store.root / commit_name(manifest.spec, reference.name)
                report.problems.append(
                    Problem(
                        str(where),
                        f"the record of {counted(reference.rows, 'row')} that a finished run left",
                        "no such record",
                    )
                )


def _opener(store: Store, trunk: ReferenceSpec | None, depth: Depth) -> Opener:
    """What opens and checks an object of a spec; `trunk` is the spec where it is one of hidden states."""

    def states(reference: ObjectRef) -> Shard | StatesObject:
        assert trunk is not None
        found = open_states(store, trunk, reference, check=depth in ("full", "all"))
        if depth == "semantic":
            found.check_values()
        found.release()
        return found

    def shard(reference: ObjectRef) -> Shard | StatesObject:
        found = store.open_shard(reference, check=depth in ("full", "all"))
        if depth in ("semantic", "all"):
            found.check_values()
            found.check_sums_and_keys()
            found.release()
        return found

    return shard if trunk is None else states


def _check_objects(
    openers: Mapping[ObjectRef, Opener], report: VerifyReport, progress: Progress | None
) -> dict[ObjectRef, Shard]:
    """Opens and checks every object, in parallel; returns the sound ones that hold log-probs."""
    references = sorted(openers)
    total = sum(reference.bytes for reference in references)
    done = 0
    lock = Lock()

    def check(reference: ObjectRef) -> Shard | StatesObject | None:
        nonlocal done
        found = None
        with _noting(report, reference.name):
            found = openers[reference](reference)
        with lock:
            done += reference.bytes
            if progress:
                progress(done, total)
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        opened = list(pool.map(check, references))
    return {reference: one for reference, one in zip(references, opened, strict=True) if isinstance(one, Shard)}


def _check_views(store: Store, shards: dict[ObjectRef, Shard], report: VerifyReport) -> None:
    for name in store.views():
        where = store.root / "views" / name
        with _noting(report, where):
            record = store.view_record(name)
            store.spec(record.spec)
            table = open_table(store, record, check=report.depth in ("full", "all"))
            report.bytes += record.table.bytes
            for k, reference in enumerate(record.objects):
                if (shard := shards.get(reference)) is None:
                    raise damaged(str(store.root / view_name(name)), f"object {reference.name}", "none that is sound")
                mine = np.flatnonzero(table.object == k)
                if report.depth in ("semantic", "all") and (table.keys[mine] != shard.keys()[table.row[mine]]).any():
                    raise damaged(str(store.root / view_name(name)), "rows with the keys that the view names", "others")

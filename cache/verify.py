"""Verifies a whole cache and reports what is wrong. Changes nothing.

There are four depths. `open` checks every record's checksum and every file's presence, size, framing, schema and
offsets. `full` also hashes every byte and checks every log-prob: the bytes are those that were written. `semantic`
instead checks every sum, every key and every entry of every view, and every number of hidden states: the rows make
sense, whoever wrote them. `all` does both. The comparison with the model itself needs a model, so `dpoeng.engine` has
it.
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
    """One problem."""

    where: str
    expected: str
    found: str


@dataclass
class VerifyReport:
    """Result of a verification.

    Attributes:
        depth: depth of the verification.
        problems: empty if the cache is undamaged.
        counts: specs, trunks, objects, rows, texts (of trunks), manifests, views; and three harmless kinds: orphans
            (objects without a record), temporary, quarantined.
        bytes: total size of all objects and tables.
        seconds: duration.
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
        depth: see the module.
        progress: called with (bytes done, total bytes) after each object.

    Raises:
        CacheError: there is no cache of this version. Everything else is a problem in the report.
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
    """The names of all objects in the folder, with or without a record."""
    folders = [name for name in store.files.names("objects") if len(name) == 2]
    names = [name for folder in folders for name in store.files.names(f"objects/{folder}", ".arrow")]
    return [name for name in names if DIGEST.fullmatch(name)]


@contextlib.contextmanager
def _noting(report: VerifyReport, where: Path | str) -> Iterator[None]:
    """Adds exceptions to the report as problems."""
    try:
        yield
    except CacheError as error:
        report.problems.append(
            Problem(error.where or str(where), error.expected or "a sound file", error.found or error.message)
        )
    except FileNotFoundError:
        report.problems.append(Problem(str(where), "a file", "none"))


def _records(store: Store, report: VerifyReport) -> tuple[list[Commit], list[Manifest]]:
    """All undamaged records; problems of the others go into the report."""
    commits: list[Commit] = []
    manifests: list[Manifest] = []
    for digest in sorted({*store.spec_digests(), *filter(DIGEST.fullmatch, store.files.names("runs"))}):
        outcomes = store.read_commits(digest)
        generations = store.generations(digest)
        if digest in store.spec_digests() or outcomes or generations:  # an empty folder is fine: `gc` may leave one
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
    """Checks that everything that the last finished run left still has its record."""
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
    """Returns the function that opens and checks an object; `trunk` is the spec if it has hidden states."""

    def states(reference: ObjectRef) -> Shard | StatesObject:
        assert trunk is not None
        states_object = open_states(store, trunk, reference, check=depth in ("full", "all"))
        if depth == "semantic":
            states_object.check_values()
        states_object.release()
        return states_object

    def shard(reference: ObjectRef) -> Shard | StatesObject:
        opened = store.open_shard(reference, check=depth in ("full", "all"))
        if depth in ("semantic", "all"):
            opened.check_values()
            opened.check_sums_and_keys()
            opened.release()
        return opened

    return shard if trunk is None else states


def _check_objects(
    openers: Mapping[ObjectRef, Opener], report: VerifyReport, progress: Progress | None
) -> dict[ObjectRef, Shard]:
    """Opens and checks every object, in parallel; returns the undamaged ones that contain log-probs."""
    references = sorted(openers)
    total = sum(reference.bytes for reference in references)
    done = 0
    lock = Lock()

    def check(reference: ObjectRef) -> Shard | StatesObject | None:
        nonlocal done
        opened = None
        with _noting(report, reference.name):
            opened = openers[reference](reference)
        with lock:
            done += reference.bytes
            if progress:
                progress(done, total)
        return opened

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
            order = np.argsort(table.object, kind="stable")  # the rows of each object, whatever the number of objects
            ends = np.searchsorted(table.object[order], np.arange(len(record.objects) + 1))
            for k, reference in enumerate(record.objects):
                if (shard := shards.get(reference)) is None:
                    raise damaged(str(store.root / view_name(name)), f"object {reference.name}", "none undamaged")
                mine = order[ends[k] : ends[k + 1]]
                if report.depth in ("semantic", "all") and (table.keys[mine] != shard.keys()[table.row[mine]]).any():
                    raise damaged(str(store.root / view_name(name)), "rows with the view's keys", "other keys")
                shard.release()

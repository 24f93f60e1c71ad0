"""A cache folder: specs, objects, commit records, manifests and views, written so that no committed row is ever lost.

The commit protocol needs no locks, for any number of writers: an object is published under the hash of its bytes, then
its record; each is whole and durable before the next. A manifest of all records comes last. Records are the truth. A
manifest states what a finished run left, so that a later loss is noticed. A damaged file is moved to quarantine/ with
its record; its rows are then missing until they are recomputed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import numpy as np
import xxhash

from dpoeng.cache.errors import CacheError
from dpoeng.cache.files import Disk, Files
from dpoeng.cache.folder import (
    FORMAT_NAME,
    FORMAT_WITH_GAPS,
    FORMAT_WITH_ROWS,
    FORMAT_WITH_TRUNK,
    FORMATS,
    commit_name,
    commits_folder,
    manifest_name,
    object_name,
    open_folder,
    run_folder,
    spec_name,
    table_name,
    view_name,
)
from dpoeng.cache.index import Damage as Damage
from dpoeng.cache.index import KeyIndex as KeyIndex
from dpoeng.cache.records import DIGEST, Commit, Manifest, ObjectRef, ViewRecord, damaged
from dpoeng.cache.schema import ScoredPair
from dpoeng.cache.shard import Shard, check_hash, encode_shard
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.table import Entries, encode_table
from dpoeng.cache.table import ViewEntry as ViewEntry
from dpoeng.cache.words import counted

T = TypeVar("T")
THREADS: Final = min(8, os.cpu_count() or 1)
_MANIFEST = re.compile(r"manifest-([0-9]{6})\.json")


class Store:
    """A cache folder. Create it with `open`.

    Attributes:
        root: the cache folder.
        files: access to the files in it.
    """

    def __init__(self, root: Path, disk: Disk) -> None:
        self.root = root
        self.files = Files(root, disk)

    @classmethod
    def open(cls, root: Path | str, *, create: bool = False, disk: Disk | None = None) -> Self:
        """Opens a cache. Writes nothing unless `create` is set.

        Raises:
            CacheError: no cache there, one of a later version, or (with `create`) a folder with other files in it.
        """
        store = cls(Path(root), disk or Disk())
        open_folder(store.files, create=create)
        return store

    # -- specs --------------------------------------------------------------------------------------------------------

    def put_spec(self, spec: ReferenceSpec) -> str:
        """Writes a spec, replaces a damaged copy, and returns its digest."""
        self._put(spec_name(spec.digest), spec.canonical)
        return spec.digest

    def spec(self, digest: str) -> ReferenceSpec:
        """One spec. Raises CacheError if it is missing or damaged."""
        name = spec_name(digest)
        where = str(self.root / name)
        try:
            spec = ReferenceSpec.from_json(self.files.read(name), where)
        except FileNotFoundError:
            raise damaged(where, "the spec of a reference", "no file") from None
        if spec.digest != digest:
            raise damaged(where, f"bytes with hash {digest}", f"hash {spec.digest}")
        return spec

    def spec_digests(self) -> list[str]:
        """The digests of all specs, including damaged ones."""
        return [name for name in self.files.names("specs", ".json") if DIGEST.fullmatch(name)]

    def specs(self) -> dict[str, ReferenceSpec]:
        """All specs by digest, including trunks. Raises CacheError for a damaged one."""
        return {digest: self.spec(digest) for digest in self.spec_digests()}

    def trunks(self) -> dict[str, ReferenceSpec]:
        """The specs of stored hidden states by digest; damaged specs are left out."""
        specs_by_digest = {}
        for digest in self.spec_digests():
            with contextlib.suppress(CacheError):
                if (spec := self.spec(digest)).holds_states:
                    specs_by_digest[digest] = spec
        return specs_by_digest

    def reference_digests(self) -> list[str]:
        """The digests of all specs except trunks, including damaged ones."""
        trunks = self.trunks()
        return [digest for digest in self.spec_digests() if digest not in trunks]

    # -- rows ---------------------------------------------------------------------------------------------------------

    def lookup(self, spec_digest: str, *, sealed: bool = False, known: KeyIndex | None = None) -> KeyIndex:
        """All undamaged rows of a spec; hashes every byte and checks every value.

        Moves damaged objects, records and manifests to quarantine/ (if the folder is writable) and lists them, and
        missing ones, in the result, which lacks their rows.

        Args:
            spec_digest: the reference.
            sealed: only rows that the last finished run left. A plan made from these is the same however often the
                following run is killed and restarted.
            known: an earlier result; its objects are reused without hashing them again.

        Raises:
            CacheError: something that no accident causes: a link, a device, a record of a later version.
        """
        open_shards = known.shards() if known is not None else {}
        opened, damage = self.sound_objects(spec_digest, self.open_shard, sealed=sealed, held=open_shards)
        if known is not None and known.objects == [reference for reference, _ in opened]:
            return known.with_damage(damage)
        return KeyIndex(opened, damage)

    def sound_objects(
        self, spec_digest: str, open_object: Callable[[ObjectRef], T], *, sealed: bool, held: Mapping[ObjectRef, T]
    ) -> tuple[list[tuple[ObjectRef, T]], list[Damage]]:
        """The objects of a spec, opened and checked, and the damage; see `lookup`.

        Args:
            spec_digest: digest of a reference or a trunk.
            open_object: maps and checks one object; raises CacheError.
            sealed: as in `lookup`.
            held: objects that are open already.
        """
        damage: list[Damage] = []
        commits = self.commits(spec_digest, damage)
        manifest = self.latest_manifest(spec_digest, damage)
        if sealed:
            names = {reference.name for reference in manifest.objects} if manifest else set()
            commits = [commit for commit in commits if commit.object.name in names]

        def attempt(reference: ObjectRef) -> tuple[T | None, CacheError | None]:
            try:
                return held[reference] if reference in held else open_object(reference), None
            except CacheError as error:
                if error.code != "cache-corrupt":
                    raise
                return None, error

        with ThreadPoolExecutor(THREADS) as pool:
            outcomes = list(pool.map(lambda commit: attempt(commit.object), commits))
        opened = []
        for commit, (opened_object, error) in zip(commits, outcomes, strict=True):
            if error is None:
                assert opened_object is not None
                opened.append((commit.object, opened_object))
            else:
                damage.append(self._set_aside(object_name(commit.object.name), error, commit.object.rows))
                # Records are the truth: without its record the object's rows are missing, and are recomputed.
                self.files.set_aside(commit_name(spec_digest, commit.object.name))
        return opened, damage

    def open_shard(self, reference: ObjectRef, *, check: bool = True) -> Shard:
        """Maps an object.

        Args:
            reference: name and size of the object.
            check: hash every byte and check every value, besides the structure.

        Raises:
            CacheError: it is missing or does not match the reference.
        """
        name = object_name(reference.name)
        where = str(self.root / name)
        data = self.map(name, reference.bytes)
        if check:
            check_hash(data, reference.name, where)
        shard = Shard(data, where)
        if len(shard) != reference.rows:
            raise damaged(where, counted(reference.rows, "row"), counted(len(shard), "row"))
        if check:
            shard.check_values()
            shard.release()
        return shard

    def map(self, name: str, size: int) -> memoryview:
        """Maps a file of the cache. Raises CacheError if it is missing or has another size."""
        try:
            return memoryview(self.files.map(name, size))
        except FileNotFoundError:
            raise damaged(str(self.root / name), f"{size} bytes", "no file") from None

    def commit_shard(self, spec_digest: str, rows: Sequence[ScoredPair], provenance: Mapping[str, Any]) -> str:
        """Writes rows durably: when this returns, they survive a kill and a power loss.

        Args:
            spec_digest: the reference that computed the numbers; its spec must be written already.
            rows: no duplicates. The same rows in the same order give the same bytes and so the same name.
            provenance: JSON: library versions, device. No time, host or path. The first writer's record stays.

        Returns:
            The object's name.

        Raises:
            ValueError: rows that cannot be correct (see `shard.encode_shard`).
            CacheError: the disk is full, read-only or broken. Rows committed before are untouched.
        """
        data = encode_shard(rows)
        if any(row.ids.chosen_gaps or row.ids.rejected_gaps for row in rows):
            # Before the object: a reader of version 1 would take unscored tokens in a gap for scored ones.
            self.raise_format(FORMAT_WITH_GAPS)
        return self.commit_object(spec_digest, data, len(rows), provenance)

    def commit_object(self, spec_digest: str, data: memoryview, rows: int, provenance: Mapping[str, Any]) -> str:
        """Publishes an object's bytes, then its record; returns its name."""
        reference = ObjectRef(xxhash.xxh3_128_hexdigest(data), rows, len(data))
        # This order matters: after a kill between the two, an object without a record is garbage, but never a loss.
        self._put(object_name(reference.name), data)
        self.put_commit(Commit(spec_digest, reference, provenance))
        return reference.name

    @property
    def format(self) -> bytes:
        """The line in FORMAT: the version that readers must know to read this cache."""
        return self.files.read(FORMAT_NAME)

    def raise_format(self, wanted: bytes) -> None:
        """Writes a later version into FORMAT, before anything that earlier readers would misread."""
        if FORMATS.index(self.format) < FORMATS.index(wanted):
            self.files.replace(FORMAT_NAME, wanted)

    def put_trunk_spec(self, spec: ReferenceSpec) -> str:
        """Like `put_spec`, for a trunk; first raises the version in FORMAT."""
        self.raise_format(FORMAT_WITH_TRUNK)
        return self.put_spec(spec)

    def put_commit(self, commit: Commit) -> None:
        """Publishes a record, unless an undamaged one exists. Its object must be durable already."""
        name = commit_name(commit.spec, commit.object.name)
        data = commit.encode()
        if self.files.publish(name, data):
            return
        try:
            existing = Commit.decode(self.files.read(name), name, spec=commit.spec, name=commit.object.name)
        except (CacheError, FileNotFoundError):
            existing = None
        # The first writer's record stays, since its provenance may differ, unless it is damaged.
        if existing is None or existing.object != commit.object:
            self.files.set_aside(name)
            self.files.replace(name, data)

    def put_object(self, name: str, data: memoryview) -> None:
        """Publishes an object under an existing name. Raises CacheError if the bytes do not hash to it."""
        check_hash(data, name, object_name(name))
        self._put(object_name(name), data)

    def _put(self, name: str, data: bytes | memoryview) -> None:
        """Publishes bytes under a name that is their hash.

        An existing undamaged file is touched. Otherwise `gc` could take it for the leftover of a dead writer just
        before its record appears.
        """
        if self.files.publish(name, data):
            return
        if self._holds(name, data):
            self.files.touch(name)
        else:
            self.files.set_aside(name)
            self.files.replace(name, data)

    def _holds(self, name: str, data: bytes | memoryview) -> bool:
        try:
            return self.files.read(name) == data
        except FileNotFoundError:
            return False

    # -- records and manifests ----------------------------------------------------------------------------------------

    def read_commits(self, spec_digest: str) -> list[tuple[str, Commit | CacheError]]:
        """The object name of every record of a spec, with the record or the error in it."""
        folder = commits_folder(spec_digest)
        records: list[tuple[str, Commit | CacheError]] = []
        for name in self.files.names(folder, ".json"):
            path = f"{folder}/{name}.json"
            where = str(self.root / path)
            try:
                records.append((path, Commit.decode(self.files.read(path), where, spec=spec_digest, name=name)))
            except FileNotFoundError:
                continue  # another process has just moved it to quarantine
            except CacheError as error:
                records.append((path, error))
        return records

    def commits(self, spec_digest: str, damage: list[Damage]) -> list[Commit]:
        """All undamaged records of a spec, by object. Moves damaged ones to quarantine/ and adds them to `damage`."""
        sound = []
        for path, outcome in self.read_commits(spec_digest):
            if isinstance(outcome, Commit):
                sound.append(outcome)
            else:
                damage.append(self._set_aside(path, outcome))
        return sound

    def generations(self, spec_digest: str) -> list[int]:
        """The numbers of a spec's manifests, ascending."""
        names = self.files.names(run_folder(spec_digest))
        return [int(match[1]) for name in names if (match := _MANIFEST.fullmatch(name))]

    def manifest(self, spec_digest: str, generation: int) -> Manifest:
        """One manifest. Raises CacheError if it is damaged, FileNotFoundError if it is missing."""
        name = manifest_name(spec_digest, generation)
        return Manifest.decode(self.files.read(name), str(self.root / name), spec=spec_digest, generation=generation)

    def latest_manifest(self, spec_digest: str, damage: list[Damage]) -> Manifest | None:
        """The newest undamaged manifest. Moves damaged ones to quarantine/ and adds them to `damage`."""
        for generation in reversed(self.generations(spec_digest)):
            try:
                return self.manifest(spec_digest, generation)
            except FileNotFoundError:
                continue
            except CacheError as error:
                damage.append(self._set_aside(manifest_name(spec_digest, generation), error))
        return None

    def seal(self, spec_digest: str) -> Path:
        """Ends a run: writes the next manifest if the records changed since the last one. Returns the newest one."""
        while True:
            objects = tuple(sorted(commit.object for commit in self.commits(spec_digest, [])))
            latest = self.latest_manifest(spec_digest, [])
            generation = latest.generation if latest else 0
            if latest and latest.objects == objects:
                break
            generation += 1
            # If another process took this generation, the next round reads what it wrote.
            self.files.publish(
                manifest_name(spec_digest, generation), Manifest(spec_digest, generation, objects).encode()
            )
        return self.root / manifest_name(spec_digest, generation)

    def _set_aside(self, name: str, error: CacheError, rows: int | None = None) -> Damage:
        if error.code != "cache-corrupt":
            raise error
        problem = f"expected {error.expected}, found {error.found}"
        return Damage(str(self.root / name), problem, self.files.set_aside(name), rows)

    # -- views --------------------------------------------------------------------------------------------------------

    def write_view(
        self,
        spec_digest: str,
        name: str,
        entries: Iterable[ViewEntry],
        meta: Mapping[str, Any],
        *,
        known: KeyIndex | None = None,
    ) -> None:
        """Writes (or atomically replaces) a view.

        Args:
            spec_digest: the reference.
            name: letters, digits, `.`, `_`, `-`.
            entries: the source's rows in order, at least one; every pair must be committed. Read once, in a stream.
            meta: JSON: how the pairs were built.
            known: as in `lookup`.

        Raises:
            CacheError: a pair has no row.
        """
        if meta.get("rows", "pairs") != "pairs":
            self.raise_format(FORMAT_WITH_ROWS)
        view_name(name)  # before the work
        index = self.lookup(spec_digest, known=known)
        columns = Entries(entries)
        shards, rows = index.locate(columns.keys)
        if missing := np.flatnonzero(shards < 0).tolist():
            raise CacheError(
                "the cache lacks pairs of this view",
                code="cache-incomplete",
                where=columns.place(missing[0]) + (" and others" if len(missing) > 1 else ""),
                expected=counted(len(columns), "pair"),
                found=f"{len(missing)} of them missing",
                remedy="run the same `dpoeng precompute-ref` again: it computes what is missing",
            )
        used = np.unique(shards)
        data = encode_table(columns, np.searchsorted(used, shards).astype(np.int32), rows)
        table = ObjectRef(xxhash.xxh3_128_hexdigest(data), len(columns), len(data))
        objects = tuple(index.objects[k] for k in used)
        self.put_view(ViewRecord(name, spec_digest, table, objects, tuple(columns.files), meta), data)

    def put_view(self, record: ViewRecord, table: memoryview) -> None:
        """Publishes a view's table, then its record, replacing any other. Raises CacheError as `write_view`."""
        path = view_name(record.name)
        check_hash(table, record.table.name, path)
        self._put(table_name(record.table.name), table)
        data = record.encode()
        if not self._holds(path, data):  # a complete cache may be read-only
            self.files.replace(path, data)

    def views(self) -> list[str]:
        """The names of all views, sorted."""
        return self.files.names("views", ".json")

    def view_record(self, name: str) -> ViewRecord:
        """A view's record. Raises CacheError if it is damaged, FileNotFoundError if it is missing."""
        path = view_name(name)
        return ViewRecord.decode(self.files.read(path), str(self.root / path), name=name)

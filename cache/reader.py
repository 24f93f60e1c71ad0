"""Reads a view: a data set's rows in the order of their source, memory-mapped and zero-copy where they are few."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self, SupportsIndex

import numpy as np
import numpy.typing as npt
import xxhash

from dpoeng.cache.errors import CacheError
from dpoeng.cache.folder import object_name, table_name, view_name
from dpoeng.cache.mapped import RESIDENT_LIMIT
from dpoeng.cache.records import MAX_RESPONSES, ROW_KINDS, ObjectRef, ViewRecord, damaged
from dpoeng.cache.schema import IdArray, ScoredGroup, ScoredPair, ScoredRow
from dpoeng.cache.shard import Numbers, Shard, check_hash
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import THREADS, Store
from dpoeng.cache.table import Table
from dpoeng.cache.words import counted


class View:
    """The rows of one data set with their reference log-probs. Create it with `open`; it can be pickled and forked.

    Attributes:
        name: name of the view.
        meta: how the pairs were built.
        rows: kind of its rows, one of `records.ROW_KINDS`.
        spec: the reference that computed the numbers.
    """

    def __init__(
        self, store: Store, record: ViewRecord, spec: ReferenceSpec, table: Table, shards: list[Shard]
    ) -> None:
        self.name = record.name
        self.meta: dict[str, Any] = dict(record.meta)
        self.rows: str = record.meta.get("rows", "pairs")
        self.spec = spec
        self._store = store
        self._record = record
        self._table = table
        self._shards = shards
        self._length = len(table)
        self._object_at, self._row_at = table.object.data, table.row.data  # items are plain ints: fast to read

    @classmethod
    def open(
        cls,
        root: Path | str,
        name: str | None = None,
        *,
        beside: str | None = None,
        rows: Collection[str] = ("pairs",),
        verify: Literal["open", "full"] = "full",
    ) -> Self:
        """Opens a view.

        Args:
            root: the cache folder.
            name: the view; None if there is only one, or one besides `beside`.
            beside: a view that is in use already and is not chosen when `name` is None.
            rows: the kinds of rows that the caller can handle; another kind is refused.
            verify: "open" checks records, sizes, schema and offsets; "full" also hashes every byte of the objects in
                use and checks every log-prob (about 0.1 s/GB with the files in the page cache).

        Raises:
            CacheError: no such view; several views and no name; a missing or damaged file; or other kinds of rows.
        """
        store = Store.open(root)
        name = _choose(store, name, beside)
        record = _record(store, name)
        _check_rows(record, rows)
        full = verify == "full"
        # In any order maps would soon be resident as a whole; and bringing a page in takes longer than a copy.
        large = sum(reference.bytes for reference in record.objects) > RESIDENT_LIMIT

        def opened(reference: ObjectRef) -> Shard:
            shard = store.open_shard(reference, check=full)
            return shard.unmapped(store.files.open(object_name(reference.name), reference.bytes)) if large else shard

        with ThreadPoolExecutor(THREADS) as pool:
            shards = list(pool.map(opened, record.objects))
        return cls(store, record, store.spec(record.spec), open_table(store, record, check=full), shards)

    @property
    def root(self) -> Path:
        """The cache folder."""
        return self._store.root

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: SupportsIndex) -> ScoredPair:
        """Row i of the source. The arrays are read-only: views of the file, or of a large cache copies of it."""
        if type(i) is not int or not 0 <= i < self._length:  # the common case needs no call
            i = self._position(i)
        row = self._shards[self._object_at[i]][self._row_at[i]]
        if self.rows != "pairs":
            row.scores = self.scores(i)
        return row

    def prompt_ids(self, i: SupportsIndex) -> IdArray:
        """The prompt of row i, [P]; sooner than by way of the whole row."""
        i = self._position(i)
        return self._shards[self._object_at[i]].prompt_ids(self._row_at[i])

    def scores(self, i: SupportsIndex) -> tuple[float, ...]:
        """What the data set says of the responses of row i, see `ScoredPair.scores`; empty for a pair."""
        if self.rows == "pairs":
            return ()
        if self.rows == "ranked":
            return self._ranking(self._position(i))
        label = self.extra(i).get("label")
        if not isinstance(label, bool):
            raise damaged(f"view {self.name}, row {self._position(i)}: label", "true or false", repr(label)[:200])
        return (float(label),)

    def _ranking(self, row: int) -> tuple[float, ...]:
        scores = self.extra(row).get("scores", ())
        fits = all(isinstance(score, int | float) and math.isfinite(score) for score in scores)
        if not fits or (scores and not 2 <= len(scores) <= MAX_RESPONSES):
            expected = f"2 to {MAX_RESPONSES:,} finite numbers"
            raise damaged(f"view {self.name}, row {row}: scores", expected, repr(scores)[:200])
        return tuple(map(float, scores))

    def row_starts(self) -> Sequence[int]:
        """The places at which rows of the data set begin: all, but of a ranked row the first of its pairs alone."""
        if self.rows != "ranked":
            return range(self._length)
        source = np.stack([self._table.file.astype(np.int64), self._table.source_row.astype(np.int64)])
        changes = np.flatnonzero((source[:, 1:] != source[:, :-1]).any(axis=0)) + 1
        starts: list[int] = [0, *changes.tolist()]
        return starts

    def row(self, i: SupportsIndex) -> ScoredRow:
        """The row of the data set that begins at place i: of a ranked view the whole group.

        Raises:
            CacheError: the pairs of a ranked row do not fit together.
        """
        first = self[i]
        if self.rows != "ranked":
            return first
        i = self._position(i)
        count = (len(first.scores) + 1) // 2
        pairs = [first, *(self[place] for place in range(i + 1, min(i + count, self._length)))]
        prompt, source = first.ids.prompt_ids, self.source(i)
        same = all(np.array_equal(pair.ids.prompt_ids, prompt) for pair in pairs)
        if len(pairs) != count or not count or not same or self.source(i + count - 1) != source:
            raise damaged(f"view {self.name}, row {i}", "a ranked row with all its responses", "another row among them")
        return ScoredGroup(tuple(pairs), first.scores)

    def place(self, i: SupportsIndex) -> tuple[int, int]:
        """(index of the object, row in it) where the numbers of row i are stored."""
        i = self._position(i)
        return self._object_at[i], self._row_at[i]

    def places(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """`place` of rows in [0, N): numbers of objects [n], rows in them [n]."""
        return self._table.object[rows], self._table.row[rows]

    def writable_shards(self) -> list[Shard]:
        """The objects, mapped again copy-on-write: changes to `Shard.data` stay in this process.

        For libraries such as torch without read-only arrays: writing to the view's own map would crash the process.
        """
        maps = (self._store.files.map(object_name(o.name), o.bytes, copy_on_write=True) for o in self._record.objects)
        return [Shard(memoryview(data), shard.where) for data, shard in zip(maps, self._shards, strict=True)]

    def source(self, i: SupportsIndex) -> tuple[str, int]:
        """(file, 1-based row) that row i came from."""
        i = self._position(i)
        return self._record.files[self._table.file[i]], int(self._table.source_row[i])

    def extra(self, i: SupportsIndex) -> dict[str, Any]:
        """The user's other columns in row i."""
        return self._table.extra(self._position(i))

    def key(self, i: SupportsIndex) -> bytes:
        """The pair key of row i; equal pairs have equal keys."""
        key: bytes = self._table.keys[self._position(i)].tobytes()
        return key

    def numbers(self) -> Numbers:
        """Lengths and sums of all rows, in source order."""
        starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        places = starts[self._table.object] + self._table.row
        return Numbers.join([shard.numbers() for shard in self._shards]).at(places)

    def keys(self) -> npt.NDArray[np.uint8]:
        """[N, 16] pair keys in source order."""
        return self._table.keys

    def _position(self, i: SupportsIndex) -> int:
        i = operator.index(i)
        if not -self._length <= i < self._length:
            raise IndexError(f"row {i} of a view with {self._length} rows")
        return i % self._length

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self._store.root.absolute(), self.name, _fingerprint(self._record))


def open_table(store: Store, record: ViewRecord, *, check: bool) -> Table:
    """Maps a view's table; `check` hashes every byte of it. Raises CacheError if it is damaged."""
    name = table_name(record.table.name)
    where = str(store.root / name)
    data = store.map(name, record.table.bytes)
    if check:
        check_hash(data, record.table.name, where)
    table = Table(data, where, [reference.rows for reference in record.objects], len(record.files))
    if len(table) != record.table.rows:
        raise damaged(where, counted(record.table.rows, "row"), counted(len(table), "row"))
    return table


def _reopen(kind: type[View], root: Path, name: str, fingerprint: str) -> View:
    """Called by unpickling. The process that pickled the view verified the bytes, so a worker only opens them."""
    view = kind.open(root, name, rows=ROW_KINDS, verify="open")
    if _fingerprint(view._record) != fingerprint:
        raise CacheError(
            "the view was rewritten after this run opened it",
            code="cache-changed",
            where=str(root / view_name(name)),
            remedy="start the run again, and keep other processes from writing this view",
        )
    return view


def _fingerprint(record: ViewRecord) -> str:
    return xxhash.xxh3_128_hexdigest(record.encode())


def _choose(store: Store, name: str | None, beside: str | None) -> str:
    names = store.views()
    free = [one for one in names if one != beside] or names
    if name is None and len(free) == 1:
        return free[0]
    if name in names:
        return name
    listed = ", ".join(names) or "no view at all"
    if name is None and names:
        raise CacheError(
            "the cache contains several views",
            code="cache-view-unnamed",
            where=str(store.root),
            expected="one view, named with --view",
            found=listed,
            remedy=f"choose one, e.g. --view {free[0]}",
            exit_status=2,
        )
    raise CacheError(
        f"the cache has no view {name!r}" if name else "the cache has no view yet",
        code="cache-no-view",
        where=str(store.root),
        found=listed,
        remedy=(f"name one of these: {listed}; or " if names else "")
        + "run `dpoeng precompute-ref` to its end: it writes the view last",
        exit_status=2,
    )


def _check_rows(record: ViewRecord, wanted: Collection[str]) -> None:
    kind = record.meta.get("rows", "pairs")
    if kind not in ROW_KINDS:
        raise damaged(f"{record.name}: meta.rows", ", ".join(ROW_KINDS), repr(kind)[:200])
    if kind not in wanted:
        raise CacheError(
            "this command does not work on this view's kind of rows",
            code="cache-rows",
            where=f"view {record.name}",
            expected=" or ".join(wanted),
            found=kind,
            remedy="name another view, or run `dpoeng precompute-ref` on such rows (--ranked-pairs best makes pairs of "
            "ranked ones); docs/data.md explains the kinds. In Python dpoeng.open_responses reads all",
            exit_status=2,
        )


def _record(store: Store, name: str) -> ViewRecord:
    try:
        return store.view_record(name)
    except FileNotFoundError:  # another process has just removed it
        raise damaged(str(store.root / view_name(name)), "the record of a view", "no file") from None

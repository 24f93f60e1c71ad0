"""Finds a pair among the shards of one reference. A key only suggests a row; the token ids decide."""

from __future__ import annotations

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpoeng.cache.errors import CacheError
from dpoeng.cache.mapped import MappedPages
from dpoeng.cache.records import ObjectRef
from dpoeng.cache.schema import PairIds, ScoredPair, pair_key
from dpoeng.cache.shard import Shard


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is damaged or missing.

    Attributes:
        where: the file.
        problem: what is wrong with it.
        moved_to: its place in quarantine; None if it is gone or the cache is read-only.
        rows: how many rows must be recomputed; None if the damage hides that.
    """

    where: str
    problem: str
    moved_to: Path | None
    rows: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


class KeyIndex:
    """All undamaged rows of one reference that are on disk.

    Args:
        shards: each with its name, in the order that decides between equal rows (two writers may race).
        quarantined: the damage found while opening them.

    Attributes:
        objects: the names, in that order.
        quarantined: as given.
    """

    def __init__(self, shards: Sequence[tuple[ObjectRef, Shard]], quarantined: Sequence[Damage] = ()) -> None:
        self.objects = [reference for reference, _ in shards]
        self.quarantined = list(quarantined)
        self._shards = [shard for _, shard in shards]
        self._starts = [0, *np.cumsum([len(shard) for shard in self._shards], dtype=np.int64).tolist()]
        self._pages = MappedPages([shard.data for shard in self._shards])
        self._keys = np.empty((self._starts[-1], 16), np.uint8)
        for begin, shard in zip(self._starts, self._shards, strict=False):
            self._keys[begin : begin + len(shard)] = shard.keys()
            if not self._pages.bounded:
                shard.release()  # reading the keys may have mapped all of it
        heads = _heads(self._keys)
        self._order = np.argsort(heads, kind="stable")  # stable: among equal heads the first row wins
        self._heads = heads[self._order]
        self._head_at = self._heads.data  # a memoryview's items are plain ints: faster single look-ups
        self._unseen = 0  # rows until the next look at what is resident

    def with_damage(self, quarantined: Sequence[Damage]) -> KeyIndex:
        """The same rows with other damage; nothing of a million rows is copied."""
        found = copy.copy(self)
        found.quarantined = list(quarantined)
        return found

    def shards(self) -> dict[ObjectRef, Shard]:
        """The open objects by name."""
        return dict(zip(self.objects, self._shards, strict=True))

    def __len__(self) -> int:
        """Number of rows; equal rows count separately."""
        return len(self._keys)

    def __contains__(self, ids: PairIds) -> bool:
        return self.get(ids) is not None

    def get(self, ids: PairIds) -> ScoredPair | None:
        """The row with exactly these ids (zero-copy), or None. An equal key alone is not a hit."""
        for place in self._places(pair_key(ids)):
            row = self._row(place)
            if row.ids.same_as(ids):
                return row
        return None

    def locate(self, keys: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Finds the rows with these keys.

        Args:
            keys: [N, 16].

        Returns:
            index into `objects` [N] and row in that object [N]; object -1 if there is no such row.

        Raises:
            CacheError: two pairs with different ids share a key (chance: 2^-128 a pair).
        """
        heads = _heads(keys)
        left = np.searchsorted(self._heads, heads, side="left")
        count = np.searchsorted(self._heads, heads, side="right") - left
        places = np.full(len(keys), -1, dtype=np.int64)
        single = np.flatnonzero(count == 1)
        candidates = self._order[left[single]]
        places[single] = np.where((self._keys[candidates] == keys[single]).all(axis=1), candidates, -1)
        for i in np.flatnonzero(count > 1):
            places[i] = self._one_place(keys[i].tobytes())
        starts = np.asarray(self._starts)
        shard = np.where(places >= 0, np.searchsorted(starts, places, side="right") - 1, -1)
        return shard.astype(np.int32), (places - starts[shard]).astype(np.int32)

    def _one_place(self, key: bytes) -> int:
        places = list(self._places(key))
        if any(not self._row(place).ids.same_as(self._row(places[0]).ids) for place in places[1:]):
            raise CacheError(
                "two different pairs share a key",
                code="cache-key-collision",
                where=f"pair_key {key.hex()}",
                expected="one pair a key",
                found=f"{len(places)} rows with different token ids",
                remedy="remove one of the two pairs from the data",
            )
        return places[0] if places else -1

    def _places(self, key: bytes) -> Iterator[int]:
        head = int.from_bytes(key[:8], "little")
        i = bisect_left(self._head_at, head)
        while i < len(self._head_at) and self._head_at[i] == head:
            place = int(self._order[i])
            if self._keys[place].tobytes() == key:
                yield place
            i += 1

    def _row(self, place: int) -> ScoredPair:
        self._unseen -= 1
        if self._unseen < 0:
            self._unseen = self._pages.look()
        k = bisect_right(self._starts, place) - 1
        return self._shards[k][place - self._starts[k]]


def _heads(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of each key [N] as integers: sorting these is a hundred times faster than sorting bytes."""
    return np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)[:, 0].copy()

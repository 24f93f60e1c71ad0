"""Finds texts among the objects of a trunk, and commits new ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from dpoeng.cache.errors import CacheError
from dpoeng.cache.folder import object_name
from dpoeng.cache.index import Damage
from dpoeng.cache.mapped import MappedPages
from dpoeng.cache.records import Commit, ObjectRef, damaged
from dpoeng.cache.schema import IdArray, PairIds
from dpoeng.cache.shard import check_hash
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.trunk.objects import ByteArray, StatesObject, encode_states
from dpoeng.cache.trunk.texts import text_key, texts_of
from dpoeng.cache.words import counted


class TrunkIndex:
    """The texts of one trunk that are on disk.

    Args:
        spec: the trunk's spec.
        objects: each with its name.
        quarantined: the damage found while opening them.
    """

    def __init__(
        self,
        spec: ReferenceSpec,
        objects: Sequence[tuple[ObjectRef, StatesObject]],
        quarantined: Sequence[Damage] = (),
    ) -> None:
        self.spec = spec
        self.quarantined = list(quarantined)
        self._objects = list(objects)
        self._places = {
            key.tobytes(): (number, row)
            for number, (_, one) in reversed(list(enumerate(self._objects)))
            for row, key in enumerate(one.keys)
        }
        self._pages = MappedPages([one.data for _, one in self._objects])
        self._unseen = 0  # texts until the next look at what is resident

    @classmethod
    def look_up(cls, store: Store, digest: str, *, sealed: bool = False, known: Self | None = None) -> Self:
        """All undamaged texts of a trunk, every byte hashed; see `Store.lookup`. Damaged objects go to quarantine."""
        spec = store.spec(digest)
        open_objects = dict(known._objects) if known is not None else {}
        lookup = store.sound_objects(
            digest, lambda reference: open_states(store, spec, reference), sealed=sealed, held=open_objects
        )
        return cls(spec, *lookup)

    @classmethod
    def open(cls, store: Store, digest: str) -> Self:
        """The texts of a trunk for a reader, which moves no files; `check` hashes the objects in use.

        Raises:
            CacheError: a record or an object is missing or damaged.
        """
        spec, objects = store.spec(digest), []
        for _, commit in store.read_commits(digest):
            if not isinstance(commit, Commit):
                raise commit
            objects.append((commit.object, open_states(store, spec, commit.object, check=False)))
        return cls(spec, objects)

    @property
    def layer(self) -> int:
        """The decoder layer whose input the states are, counted from 0."""
        return int(self.spec.fields["layer"])

    @property
    def dtype(self) -> str:
        """The dtype of the states."""
        return str(self.spec.fields["dtype"])

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def holds(self, ids: PairIds) -> bool:
        """Whether the trunk has all texts of a pair."""
        return all(key in self._places for key in texts_of(ids))

    def states(self, prompt_ids: IdArray, response_ids: IdArray | None = None) -> ByteArray:
        """States [tokens, token_bytes] of a prompt, or of a response after it; a read-only view of the mapped file.

        Raises:
            CacheError: the trunk does not have this text.
        """
        place = self._places.get(text_key(prompt_ids, response_ids))
        if place is None:
            raise CacheError(
                "the trunk has no states of this text",
                code="cache-incomplete",
                where=f"layer {self.layer}, {counted(len(prompt_ids), 'prompt token')}",
                remedy=f"run the same `dpoeng precompute-ref` again with --trunk-layer {self.layer}",
            )
        self._unseen -= 1
        if self._unseen < 0:
            self._unseen = self._pages.look()
        number, row = place
        return self._objects[number][1][row]

    def check(self, pairs: Iterable[PairIds]) -> int:
        """Hashes every byte of the objects that these pairs use, and checks every number; returns the number of bytes.

        Raises:
            CacheError: one of them is damaged.
        """
        used = {self._places[key][0] for ids in pairs for key in texts_of(ids)}
        for number in sorted(used):
            reference, one = self._objects[number]
            check_hash(one.data, reference.name, one.where)
            one.check_values()
            one.release()
        return sum(self._objects[number][0].bytes for number in used)


def open_states(store: Store, spec: ReferenceSpec, reference: ObjectRef, *, check: bool = True) -> StatesObject:
    """Maps an object of a trunk; `check` hashes every byte and checks every number.

    Raises:
        CacheError: it is missing or does not match the reference.
    """
    name = object_name(reference.name)
    where = str(store.root / name)
    data = store.map(name, reference.bytes)
    if check:
        check_hash(data, reference.name, where)
    states = StatesObject(data, where, spec)
    if len(states) != reference.rows:
        raise damaged(where, counted(reference.rows, "text"), counted(len(states), "text"))
    if check:
        states.check_values()
    return states


def commit_states(
    store: Store, spec: ReferenceSpec, texts: Sequence[tuple[bytes, ByteArray]], provenance: Mapping[str, Any]
) -> str:
    """Writes texts durably; see `Store.commit_shard`. The trunk's spec must be written. Returns the object's name."""
    return store.commit_object(spec.digest, encode_states(spec, texts), len(texts), provenance)


def trunks_of(store: Store, reference: str) -> dict[int, ReferenceSpec]:
    """The trunks of a reference by layer, ascending; one per layer, since the reference fixes the precision."""
    specs = [spec for spec in store.trunks().values() if spec.fields.get("reference") == reference]
    return {spec.fields["layer"]: spec for spec in sorted(specs, key=lambda spec: spec.fields["layer"])}

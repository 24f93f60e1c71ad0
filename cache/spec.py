"""The identity of a reference: everything that determines its numbers, and nothing else. Pure; knows no files."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from dpoeng.cache.records import canonical_json, parse_canonical

ABSENT = "(absent)"
SUMS = "sums"
STATES = "states"


@dataclass(frozen=True)
class ReferenceSpec:
    """A reference as canonical JSON. Equal specs give equal numbers; that is the whole meaning of the cache.

    Make it with `from_fields`. What belongs in it (weights, adapter, quantiser, dtype, attention) and what does not
    (paths, learning rate, beta, seed) is decided by `dpoeng.engine`, which knows models.

    Attributes:
        canonical: canonical JSON of the fields; these bytes are the file `specs/<digest>.json`.
    """

    canonical: bytes

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ReferenceSpec:
        """Args: fields: JSON values, nested at will. Raises TypeError or ValueError for what JSON cannot hold."""
        return cls(canonical_json(fields))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "spec") -> ReferenceSpec:
        """Reads `to_json`'s output. Raises CacheError where it is not canonical."""
        data = text.encode() if isinstance(text, str) else text
        parse_canonical(data, where)
        return cls(data)

    def to_json(self) -> str:
        return self.canonical.decode("ascii")

    @functools.cached_property
    def digest(self) -> str:
        """32 hex digits: xxh3_128 of the canonical JSON."""
        return xxhash.xxh3_128_hexdigest(self.canonical)

    def of_states(self, layer: int, dtype: str, width: int) -> ReferenceSpec:
        """The trunk of this reference at a layer: its rows are hidden states, see `dpoeng.cache.trunk`.

        Args:
            layer: the decoder layer that they enter, counted from 0.
            dtype: float32, bfloat16 or float16.
            width: numbers a token.
        """
        fields = {"values": STATES, "reference": self.digest, "layer": layer, "dtype": dtype, "width": width}
        return ReferenceSpec.from_fields(fields)

    @property
    def holds_states(self) -> bool:
        """Whether rows hold hidden states, so that this is a trunk and no reference."""
        return bool(self.fields.get("values") == STATES)

    def of_sums(self) -> ReferenceSpec:
        """The same reference, where only the sum over each response is known: its rows never mix with others."""
        return ReferenceSpec.from_fields({**self.fields, "values": SUMS})

    @property
    def holds_sums(self) -> bool:
        """Whether rows hold sums: the first scored token of a response carries it, the others are 0."""
        return bool(self.fields.get("values") == SUMS)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields, as a new dict at every call, so that nobody can change the spec through it."""
        loaded: dict[str, Any] = json.loads(self.canonical)
        return loaded


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One field that differs between two specs; `ABSENT` stands where a side lacks it."""

    field: str
    old: Any
    new: Any


def diff_specs(old: ReferenceSpec, new: ReferenceSpec) -> list[FieldChange]:
    """Every leaf that differs, sorted by its dotted path. Empty exactly when the digests are equal."""
    before, after = _leaves(old.fields), _leaves(new.fields)
    return [
        FieldChange(".".join(path), before.get(path, ABSENT), after.get(path, ABSENT))
        for path in sorted(before.keys() | after.keys())
        if path not in before or path not in after or not _same(before[path], after[path])
    ]


def explain_miss(wanted: ReferenceSpec, known: Mapping[str, ReferenceSpec]) -> tuple[str, list[FieldChange]] | None:
    """Why a cache has no numbers for `wanted`: the known spec with the fewest differences, and those differences.

    Returns:
        (digest of the nearest spec, changes from it to `wanted`), or None where the cache holds no other spec.
    """
    others = {digest: diff_specs(spec, wanted) for digest, spec in known.items() if digest != wanted.digest}
    if not others:
        return None
    nearest = min(others, key=lambda digest: (len(others[digest]), digest))
    return nearest, others[nearest]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Maps paths to leaves. Lists are leaves: their items have no names. So are empty objects."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    flat: dict[tuple[str, ...], Any] = {}
    for key, item in value.items():
        flat |= _leaves(item, (*path, key))
    return flat


def _same(old: Any, new: Any) -> bool:
    """JSON equality: unlike Python's, true is not 1."""
    return canonical_json(old) == canonical_json(new)

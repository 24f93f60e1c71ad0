"""The identity of a reference: everything that determines its numbers, and nothing else. Knows no files."""

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
    """A reference as canonical JSON. Equal specs give equal numbers: the cache depends on that.

    Create it with `from_fields`. `dpoeng.engine`, which knows models, decides what belongs in it (weights, adapter,
    quantiser, dtype, attention) and what does not (paths, learning rate, beta, seed).

    Attributes:
        canonical: canonical JSON of the fields, byte for byte the file `specs/<digest>.json`.
    """

    canonical: bytes

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ReferenceSpec:
        """Args: fields: JSON values, nested freely. Raises TypeError or ValueError for what JSON cannot express."""
        return cls(canonical_json(fields))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "spec") -> ReferenceSpec:
        """Reads the output of `to_json`. Raises CacheError if it is not canonical."""
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
        """The spec of this reference's trunk at a layer: its rows are hidden states, see `dpoeng.cache.trunk`.

        Args:
            layer: the decoder layer whose input they are, counted from 0.
            dtype: float32, bfloat16 or float16.
            width: numbers per token.
        """
        fields = {"values": STATES, "reference": self.digest, "layer": layer, "dtype": dtype, "width": width}
        return ReferenceSpec.from_fields(fields)

    @property
    def holds_states(self) -> bool:
        """Whether rows are hidden states: a trunk, not a reference."""
        return bool(self.fields.get("values") == STATES)

    def of_sums(self) -> ReferenceSpec:
        """The same reference with only sums over responses; its rows never mix with token log-probs."""
        return ReferenceSpec.from_fields({**self.fields, "values": SUMS})

    @property
    def holds_sums(self) -> bool:
        """Whether rows have only sums: a response's first scored token carries the sum, the others are 0."""
        return bool(self.fields.get("values") == SUMS)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields, as a new dict at every call, so that callers cannot change the spec."""
        loaded: dict[str, Any] = json.loads(self.canonical)
        return loaded


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One field that differs between two specs; `ABSENT` if one side lacks it."""

    field: str
    old: Any
    new: Any


def diff_specs(old: ReferenceSpec, new: ReferenceSpec) -> list[FieldChange]:
    """Every leaf that differs, sorted by dotted path. Empty exactly if the digests are equal."""
    before, after = _leaves(old.fields), _leaves(new.fields)
    return [
        FieldChange(".".join(path), before.get(path, ABSENT), after.get(path, ABSENT))
        for path in sorted(before.keys() | after.keys())
        if path not in before or path not in after or not _same(before[path], after[path])
    ]


def explain_miss(wanted: ReferenceSpec, known: Mapping[str, ReferenceSpec]) -> tuple[str, list[FieldChange]] | None:
    """Explains why a cache has no numbers for `wanted`: the most similar known spec, and how it differs.

    Returns:
        (digest of the most similar spec, changes from it to `wanted`), or None if the cache has no other spec.
    """
    others = {digest: diff_specs(spec, wanted) for digest, spec in known.items() if digest != wanted.digest}
    if not others:
        return None
    nearest = min(others, key=lambda digest: (len(others[digest]), digest))
    return nearest, others[nearest]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Maps paths to leaves. Lists are leaves, since their items have no names. So are empty objects."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    flat: dict[tuple[str, ...], Any] = {}
    for key, item in value.items():
        flat |= _leaves(item, (*path, key))
    return flat


def _same(old: Any, new: Any) -> bool:
    """JSON equality: unlike in Python, true is not 1."""
    return canonical_json(old) == canonical_json(new)

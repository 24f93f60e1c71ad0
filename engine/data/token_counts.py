"""Counts the effects of tokenisation over many pairs, and keeps each pair's key. Takes 48 bytes a pair."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dpoeng.cache.schema import pair_key
from dpoeng.engine.data.token_rows import TokenizedPair

_PARTS = ("prompt", "chosen", "rejected")
_NAMES = {"pairs": _PARTS, "unpaired": ("prompt", "completion", "mismatched")}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts of one part, over all pairs."""

    count: int
    mean: float
    p50: int
    p95: int
    max: int


@dataclass(slots=True)
class TokenCounts:
    """Counts of tokenisation, in pairs unless noted.

    Attributes:
        truncated: something was cut off.
        merged: the prompt has other tokens before a response than alone.
        unshared: the sides' last prompt tokens differ and were moved, unscored, to the responses.
        duplicates: all ids equal an earlier pair's.
        contradictions: an earlier pair has the responses swapped.
        separate: responses (not pairs) tokenised apart from their prompt, because the tokenizer gives no offsets.
        turns: pairs with other speakers' tokens inside a response, which are not scored.
        swallowed: a special token absorbed the white space at a response's beginning.
        thoughts: the template left out thoughts of earlier turns, by design.
        lengths: `prompt`, `chosen`, `rejected`, `total` (prompt once), after truncation.
    """

    truncated: int = 0
    merged: int = 0
    unshared: int = 0
    duplicates: int = 0
    contradictions: int = 0
    separate: int = 0
    turns: int = 0
    swallowed: int = 0
    thoughts: int = 0
    lengths: dict[str, Lengths] = field(default_factory=dict)


class Counter:
    """Counts pairs one by one.

    Attributes:
        counts: complete after `finish`.
    """

    def __init__(self) -> None:
        self.counts = TokenCounts()
        self._names = _NAMES["pairs"]
        self._keys, self._swapped = bytearray(), bytearray()
        self._lengths = {part: array("i") for part in _PARTS}

    @property
    def keys(self) -> npt.NDArray[np.uint8]:
        """[N, 16], the pairs' keys."""
        return _as_keys(self._keys)

    def add(self, pair: TokenizedPair, kind: str) -> None:
        """Counts a row of one of `shapes.KIND_FIELDS`."""
        self._names = _NAMES[kind]
        ids, counts = pair.ids, self.counts
        counts.truncated += pair.truncated
        counts.merged += pair.merged
        counts.unshared += ids.chosen_start > 0 or ids.rejected_start > 0
        counts.turns += bool(ids.chosen_gaps or ids.rejected_gaps)
        counts.swallowed += pair.swallowed
        counts.thoughts += pair.thoughts > 0
        self._keys += pair_key(ids)
        self._swapped += pair_key(ids.swapped()) if kind == "pairs" else bytes(16)  # matches no pair's key
        for lengths, part in zip(
            self._lengths.values(), (ids.prompt_ids, ids.chosen_ids, ids.rejected_ids), strict=True
        ):
            lengths.append(len(part))

    def finish(self) -> TokenCounts:
        """The counts that need all pairs: duplicates and lengths."""
        keys = self.keys
        if not len(keys):
            return self.counts
        both = np.concatenate([keys, _as_keys(self._swapped)]).view("V16").ravel()
        which = np.unique(both, return_inverse=True)[1]
        rows = np.arange(len(keys))
        first = np.full(len(both), len(keys))
        first[which[: len(keys)][::-1]] = rows[::-1]  # of equal rows the last write stays, which is the first row
        self.counts.duplicates = int((first[which[: len(keys)]] < rows).sum())
        self.counts.contradictions = int((first[which[len(keys) :]] < rows).sum())
        parts = {name: np.asarray(lengths) for name, lengths in zip(self._names, self._lengths.values(), strict=True)}
        parts["total"] = np.sum(list(parts.values()), axis=0)
        self.counts.lengths = {name: _lengths(values) for name, values in parts.items()}
        return self.counts


def _as_keys(data: bytearray) -> npt.NDArray[np.uint8]:
    return np.frombuffer(bytes(data), np.uint8).reshape(-1, 16)


def _lengths(values: npt.NDArray[np.int32]) -> Lengths:
    p50, p95 = np.percentile(values, [50, 95], method="nearest")
    return Lengths(len(values), float(np.mean(values)), int(p50), int(p95), int(values.max()))

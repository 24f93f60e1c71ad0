"""Counts the effects of tokenisation over many pairs, and keeps each pair's key. Takes 64 bytes a pair."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from dpoeng.cache.schema import pair_key
from dpoeng.engine.data.token_rows import TokenizedPair

_PARTS = ("prompt", "chosen", "rejected")
_NAMES = {"pairs": _PARTS, "unpaired": ("prompt", "completion", "mismatched"), "ranked": ("prompt", "response")}


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
    """Counts of tokenisation, in pairs unless noted; of ranked rows, in rows.

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
        lengths: `prompt`, `chosen`, `rejected`, `total` (prompt once), after truncation; of ranked rows `prompt`,
            `response`, `total`.
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
        rows: of the pairs; a ranked row is several.
    """

    def __init__(self) -> None:
        self.counts = TokenCounts()
        self.rows = 0
        self._names = _NAMES["pairs"]
        # Of each pair; and of each row as it is, and the other way round.
        self._keys, self._own, self._swapped = bytearray(), bytearray(), bytearray()
        self._lengths = tuple(array("i") for _ in _PARTS)
        self._totals = array("q")

    @property
    def keys(self) -> npt.NDArray[np.uint8]:
        """[N, 16], the pairs' keys."""
        return _as_keys(self._keys)

    def add(self, row: Sequence[TokenizedPair], kind: str, responses: int) -> None:
        """Counts a row of one of `shapes.KIND_FIELDS` and so many responses."""
        self.rows += 1
        self._names = _NAMES[kind]
        first, counts = row[0], self.counts
        counts.truncated += first.truncated
        counts.merged += first.merged
        counts.unshared += any(pair.ids.chosen_start > 0 or pair.ids.rejected_start > 0 for pair in row)
        counts.turns += any(bool(pair.ids.chosen_gaps or pair.ids.rejected_gaps) for pair in row)
        counts.swallowed += first.swallowed
        counts.thoughts += first.thoughts > 0
        keys = b"".join(pair_key(pair.ids) for pair in row)
        self._keys += keys
        self._own += keys if len(row) == 1 else xxhash.xxh3_128_digest(keys)
        self._swapped += pair_key(first.ids.swapped()) if kind == "pairs" else bytes(16)  # matches no row's key
        sides = [len(side) for pair in row for side in (pair.ids.chosen_ids, pair.ids.rejected_ids)][:responses]
        prompt, *parts = self._lengths
        prompt.append(len(first.ids.prompt_ids))
        for i, length in enumerate(sides):
            parts[i if kind != "ranked" else 0].append(length)
        self._totals.append(prompt[-1] + sum(sides))

    def finish(self) -> TokenCounts:
        """The counts that need all rows: duplicates and lengths."""
        own = _as_keys(self._own)
        if not len(own):
            return self.counts
        both = np.concatenate([own, _as_keys(self._swapped)]).view("V16").ravel()
        which = np.unique(both, return_inverse=True)[1]
        rows = np.arange(len(own))
        first = np.full(len(both), len(own))
        first[which[: len(own)][::-1]] = rows[::-1]  # of equal rows the last write stays, which is the first row
        self.counts.duplicates = int((first[which[: len(own)]] < rows).sum())
        self.counts.contradictions = int((first[which[len(own) :]] < rows).sum())
        parts = dict(zip(self._names, map(np.asarray, self._lengths), strict=False))
        parts["total"] = np.asarray(self._totals)
        self.counts.lengths = {name: _lengths(values) for name, values in parts.items()}
        return self.counts


def _as_keys(data: bytearray) -> npt.NDArray[np.uint8]:
    return np.frombuffer(bytes(data), np.uint8).reshape(-1, 16)


def _lengths(values: npt.NDArray[np.integer[Any]]) -> Lengths:
    p50, p95 = np.percentile(values, [50, 95], method="nearest")
    return Lengths(len(values), float(np.mean(values)), int(p50), int(p95), int(values.max()))

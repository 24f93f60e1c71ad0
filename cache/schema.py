"""Defines a row of the cache and the key that identifies it.

Independent of files: see `writer` and `reader`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

IdArray = npt.NDArray[np.int32]
LogpArray = npt.NDArray[np.float32]
Gaps = tuple[tuple[int, int], ...]

PAIR_KEY_TAG = b"dpoeng.pair.v1"
PAIR_KEY_TAG_WITH_GAPS = b"dpoeng.pair.v2"
_COUNTS = struct.Struct("<5q")


# Neither class is frozen: each row that is read creates one of each, and frozen ones take three times as long.
@dataclass(slots=True, eq=False)
class PairIds:
    """The token ids of one preference pair: two responses to one shared prompt.

    A tokenizer may merge the last characters of the prompt with the first of a response. Tokens from where the two
    sides differ belong to the responses, but those that contain only prompt characters are not scored:
    `chosen_ids[:chosen_start]` and `rejected_ids[:rejected_start]` (usually empty). Tokens that others say within a
    response of several turns (tool results, further questions) are not scored either: they are the gaps.

    Attributes:
        prompt_ids: [P] int32, common to both responses; empty only if both starts are > 0.
        chosen_ids: [C] int32.
        rejected_ids: [R] int32.
        chosen_start: index of the first scored token in `chosen_ids`; 0 <= chosen_start < C.
        rejected_start: the same in `rejected_ids`.
        chosen_gaps: [begin, end) of unscored tokens in `chosen_ids` behind the start: ascending, not adjacent, before
            the last token.
        rejected_gaps: the same in `rejected_ids`.
    """

    prompt_ids: IdArray
    chosen_ids: IdArray
    rejected_ids: IdArray
    chosen_start: int = 0
    rejected_start: int = 0
    chosen_gaps: Gaps = ()
    rejected_gaps: Gaps = ()

    def swapped(self) -> PairIds:
        """The same pair with chosen and rejected exchanged."""
        starts, gaps = (self.rejected_start, self.chosen_start), (self.rejected_gaps, self.chosen_gaps)
        return PairIds(self.prompt_ids, self.rejected_ids, self.chosen_ids, *starts, *gaps)

    @property
    def total_tokens(self) -> int:
        """Tokens to compute when the prompt is computed once: P + C + R."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    def same_as(self, other: PairIds) -> bool:
        """Whether all ids and starts are equal, compared one by one."""
        return _content(self) == _content(other)


@dataclass(slots=True, eq=False)
class ScoredPair:
    """A pair with the reference's log-prob of every scored token.

    Attributes:
        ids: the tokens.
        chosen_logps: float32, log p_ref(token | previous tokens) of each scored token, in nats, each <= 0.
            [C - chosen_start] if there are no gaps.
        rejected_logps: float32, the same.
        scores: the data set's scores of the responses; empty for a pair, whose first response is preferred. For an
            unpaired row 1 (desirable) or 0 (undesirable); its second response is then the mismatched one. Of the
            first pair of a ranked row the score of each of the row's responses; empty for those after it.
    """

    ids: PairIds
    chosen_logps: LogpArray
    rejected_logps: LogpArray
    scores: tuple[float, ...] = ()

    def check(self) -> None:
        """Raises ValueError if lengths do not fit, an id is negative, or a value cannot be a log-prob."""
        ids = self.ids
        for side, tokens, start, gaps, logps in (
            ("chosen", ids.chosen_ids, ids.chosen_start, ids.chosen_gaps, self.chosen_logps),
            ("rejected", ids.rejected_ids, ids.rejected_start, ids.rejected_gaps, self.rejected_logps),
        ):
            if not gaps_fit(gaps, start, len(tokens)):
                raise ValueError(f"the gaps {gaps} do not lie between scored tokens of {len(tokens)} {side} tokens")
            unscored = start + gap_tokens(gaps)
            if not 0 <= start < len(tokens) or len(logps) != len(tokens) - unscored:
                raise ValueError(f"{len(logps)} {side} log-probs for {len(tokens)} tokens, {unscored} of them unscored")
            if not (logps.max() <= 0 and logps.min() > -np.inf):  # NaN fails the first comparison
                raise ValueError(f"a {side} log-prob is NaN, infinite or positive")
        if any(len(part) and part.min() < 0 for part in (ids.prompt_ids, ids.chosen_ids, ids.rejected_ids)):
            raise ValueError("a token id is negative")

    @property
    def chosen_sum(self) -> float:
        """log p_ref(chosen | prompt) in nats, summed in float64."""
        return float(self.chosen_logps.sum(dtype=np.float64))

    @property
    def rejected_sum(self) -> float:
        """log p_ref(rejected | prompt) in nats, summed in float64."""
        return float(self.rejected_logps.sum(dtype=np.float64))


@dataclass(slots=True, eq=False)
class ScoredGroup:
    """A ranked row: a prompt with N >= 2 responses, each with the reference's log-probs, and their scores.

    Attributes:
        pairs: the responses two by two, in their order; of an odd number the last is beside the first.
        scores: [N], more is better; not all equal.
    """

    pairs: tuple[ScoredPair, ...]
    scores: tuple[float, ...]

    @property
    def ids(self) -> PairIds:
        """The prompt, and the first two responses."""
        return self.pairs[0].ids

    @property
    def logps(self) -> list[LogpArray]:
        """The log-probs of each response's scored tokens, [N] arrays."""
        every = [logps for pair in self.pairs for logps in (pair.chosen_logps, pair.rejected_logps)]
        return every[: len(self.scores)]


ScoredRow = ScoredPair | ScoredGroup
"""A row of a data set with its reference log-probs."""


def lengths_of(row: ScoredRow | PairIds) -> tuple[int, ...]:
    """Tokens of a row: those of its prompt, then those of each response that runs behind it."""
    pairs = [pair.ids for pair in row.pairs] if isinstance(row, ScoredGroup) else [pair_ids(row)]
    responses = [len(side) for ids in pairs for side in (ids.chosen_ids, ids.rejected_ids)]
    count = len(row.scores) if isinstance(row, ScoredGroup) else len(responses)
    return len(pairs[0].prompt_ids), *responses[:count]


def pair_ids(row: ScoredPair | PairIds) -> PairIds:
    """The ids of a pair."""
    return row.ids if isinstance(row, ScoredPair) else row


def as_ids(values: Any) -> IdArray:
    """A sequence of token ids as a contiguous little-endian int32 array."""
    return np.ascontiguousarray(values, dtype=np.dtype("<i4"))


def pair_key(ids: PairIds) -> bytes:
    """16 bytes that identify a pair by its token ids: xxh3_128 over a tag, five counts and the ids.

    The counts distinguish `ab|c` from `a|bc`. Text, template and source matter only through the ids.
    """
    tag = PAIR_KEY_TAG_WITH_GAPS if ids.chosen_gaps or ids.rejected_gaps else PAIR_KEY_TAG
    return xxhash.xxh3_128_digest(tag + _content(ids))


def as_keys(keys: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    """Keys as one array [N, 16]."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)


def first_of_each(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The first row of each distinct key, ascending. `keys`: [N, 16]."""
    _, first = np.unique(whole_keys(keys), return_index=True)
    return np.sort(first)


def whole_keys(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """Keys [N, 16] as N items, to be sorted and compared as bytes are."""
    return np.ascontiguousarray(keys).view("V16").ravel()


def gap_tokens(gaps: Gaps) -> int:
    """Number of tokens in gaps."""
    return sum(end - begin for begin, end in gaps)


def gaps_fit(gaps: Gaps, start: int, length: int) -> bool:
    """Whether every gap lies between scored tokens: behind `start`, before the last of `length`, not adjacent."""
    edges = [edge for gap in gaps for edge in gap]
    return all(a < b for a, b in zip([start, *edges], [*edges, length], strict=True))


def _content(ids: PairIds) -> bytes:
    """Everything that defines a pair, as bytes: five counts as little-endian int64, then the ids as int32.

    If there are gaps, their numbers in chosen and rejected follow, then all their ends.
    """
    parts = [as_ids(part) for part in (ids.prompt_ids, ids.chosen_ids, ids.rejected_ids)]
    counts = _COUNTS.pack(*map(len, parts), ids.chosen_start, ids.rejected_start)
    if ids.chosen_gaps or ids.rejected_gaps:
        ends = [edge for gap in (*ids.chosen_gaps, *ids.rejected_gaps) for edge in gap]
        parts.append(as_ids([len(ids.chosen_gaps), len(ids.rejected_gaps), *ends]))
    return b"".join((counts, *(part.data for part in parts)))

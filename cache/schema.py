"""What one row of the cache holds, and the key by which it is found again.

Knows nothing of files: see `writer` and `reader`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

IdArray = npt.NDArray[np.int32]
LogpArray = npt.NDArray[np.float32]

PAIR_KEY_TAG = b"dpoeng.pair.v1"
_COUNTS = struct.Struct("<5q")


# Neither class is frozen: that would take thrice as long to make, and every row that is read is one of each.
@dataclass(slots=True, eq=False)
class PairIds:
    """The token ids of one preference pair: two continuations of one shared prompt.

    A tokenizer may merge the last characters of the prompt with the first of a response. The tokens from where the two
    sides differ then belong to the responses, but those among them that hold prompt characters only are not scored:
    `chosen_ids[:chosen_start]` and `rejected_ids[:rejected_start]` are such tokens (usually none).

    Attributes:
        prompt_ids: [P] int32, common to both sides; may be empty only if both starts are > 0.
        chosen_ids: [C] int32.
        rejected_ids: [R] int32.
        chosen_start: the first scored token of `chosen_ids`; 0 <= chosen_start < C.
        rejected_start: the first scored token of `rejected_ids`.
    """

    prompt_ids: IdArray
    chosen_ids: IdArray
    rejected_ids: IdArray
    chosen_start: int = 0
    rejected_start: int = 0

    def swapped(self) -> PairIds:
        """The same pair the other way round."""
        return PairIds(self.prompt_ids, self.rejected_ids, self.chosen_ids, self.rejected_start, self.chosen_start)

    @property
    def total_tokens(self) -> int:
        """Tokens computed when the prompt is run once: P + C + R."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    def same_as(self, other: PairIds) -> bool:
        """Whether all ids and starts are equal, compared one by one."""
        return _content(self) == _content(other)


@dataclass(slots=True, eq=False)
class ScoredPair:
    """A pair with the reference's log-probability of every scored token.

    Attributes:
        ids: the tokens.
        chosen_logps: [C - chosen_start] float32, log p_ref(token | what precedes it), in nats, each <= 0.
        rejected_logps: [R - rejected_start] float32.
    """

    ids: PairIds
    chosen_logps: LogpArray
    rejected_logps: LogpArray

    def check(self) -> None:
        """Raises ValueError where lengths do not fit, an id is negative, or a number cannot be a log-probability."""
        ids = self.ids
        for side, tokens, start, logps in (
            ("chosen", ids.chosen_ids, ids.chosen_start, self.chosen_logps),
            ("rejected", ids.rejected_ids, ids.rejected_start, self.rejected_logps),
        ):
            if not 0 <= start < len(tokens) or len(logps) != len(tokens) - start:
                raise ValueError(f"{len(logps)} {side} log-probs for {len(tokens)} tokens, the first {start} unscored")
            if not (logps.max() <= 0 and logps.min() > -np.inf):  # NaN fails the first
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


def as_ids(values: Any) -> IdArray:
    """Any sequence of token ids as a contiguous little-endian int32 array."""
    return np.ascontiguousarray(values, dtype=np.dtype("<i4"))


def pair_key(ids: PairIds) -> bytes:
    """16 bytes that identify a pair by its token ids alone: xxh3_128 over a tag, five counts and the ids.

    The counts keep `ab|c` and `a|bc` apart. Text, template and source do not enter: they act only through the ids.
    """
    return xxhash.xxh3_128_digest(PAIR_KEY_TAG + _content(ids))


def _content(ids: PairIds) -> bytes:
    """All that makes a pair, as bytes: five counts as little-endian int64, then the ids as little-endian int32."""
    parts = [as_ids(part) for part in (ids.prompt_ids, ids.chosen_ids, ids.rejected_ids)]
    counts = _COUNTS.pack(*map(len, parts), ids.chosen_start, ids.rejected_start)
    return b"".join((counts, *(part.data for part in parts)))

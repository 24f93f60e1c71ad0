"""Stores any number of tokenised pairs: tokens in a temporary file, and some bytes per pair in memory.

A million pairs of 300 tokens have 1.2 GB of ids, and several times that as Python objects. Needs no tokenizer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from dpoeng.cache.schema import Gaps, IdArray, PairIds, as_ids
from dpoeng.cache.spool import Spool

# row, file, lengths of prompt, chosen and rejected, both starts, gaps of either side, needed, thoughts, flags
_HEAD: Final = struct.Struct("<q11i")


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One row's tokens.

    Attributes:
        ids: shared prompt and both responses, after truncation.
        extra: the row's other columns.
        truncated: whether anything was cut off.
        merged: whether the prompt alone has other tokens than before a response.
        needed: positions of prompt + longer response before truncation: the `max_length` that cuts nothing.
        swallowed: whether a special token absorbed the white space at a response's beginning.
        thoughts: number of thoughts of earlier turns that the template leaves out.
    """

    ids: PairIds
    source_file: str
    source_row: int
    extra: dict[str, Any]
    truncated: bool
    merged: bool
    needed: int
    swallowed: bool = False
    thoughts: int = 0


class TokenRows(Sequence[TokenizedPair]):
    """Pairs appended one by one and read in any order; each read builds a new object."""

    def __init__(self) -> None:
        self._spool = Spool()
        self._names: dict[str, int] = {}
        self._files: list[str] = []

    def append(self, pair: TokenizedPair) -> None:
        """Stores a pair.

        Raises:
            UserError: the temporary folder is full.
        """
        file = self._names.setdefault(pair.source_file, len(self._names))
        if file == len(self._files):
            self._files.append(pair.source_file)
        ids = pair.ids
        head = _HEAD.pack(
            pair.source_row,
            file,
            len(ids.prompt_ids),
            len(ids.chosen_ids),
            len(ids.rejected_ids),
            ids.chosen_start,
            ids.rejected_start,
            len(ids.chosen_gaps),
            len(ids.rejected_gaps),
            pair.needed,
            pair.thoughts,
            pair.truncated | pair.merged << 1 | pair.swallowed << 2,
        )
        gaps = as_ids([edge for gap in (*ids.chosen_gaps, *ids.rejected_gaps) for edge in gap])
        # Values that JSON has no form for are stored as str(), as in the view.
        extra = json.dumps(pair.extra, default=str).encode("ascii")
        parts = (head, ids.prompt_ids, ids.chosen_ids, ids.rejected_ids, gaps, extra)
        self._spool.append(b"".join(bytes(part) for part in parts))

    def __len__(self) -> int:
        return len(self._spool)

    @overload
    def __getitem__(self, i: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, i: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, i: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(i, slice):
            return [self[at] for at in range(*i.indices(len(self)))]
        data, head, ids = self._read(i)
        row, file, *_, needed, thoughts, flags = head
        behind = _HEAD.size + 4 * (ids.total_tokens + 2 * (len(ids.chosen_gaps) + len(ids.rejected_gaps)))
        extra = json.loads(data[behind:])
        truncated, merged, swallowed = (bool(flags & bit) for bit in (1, 2, 4))
        return TokenizedPair(ids, self._files[file], row, extra, truncated, merged, needed, swallowed, thoughts)

    def ids(self, i: int) -> PairIds:
        """The tokens of a pair; the arrays are read-only."""
        return self._read(i)[2]

    def _read(self, i: int) -> tuple[bytes, tuple[int, ...], PairIds]:
        data = self._spool[i]
        head = _HEAD.unpack_from(data)
        _, _, prompt, chosen, rejected, chosen_start, rejected_start, first, second, *_ = head
        numbers: IdArray = np.frombuffer(data, "<i4", prompt + chosen + rejected + 2 * (first + second), _HEAD.size)
        at = prompt + chosen
        ids = PairIds(numbers[:prompt], numbers[prompt:at], numbers[at : at + rejected], chosen_start, rejected_start)
        if first or second:
            gaps = numbers[at + rejected :].tolist()
            ids.chosen_gaps, ids.rejected_gaps = _gaps(gaps[: 2 * first]), _gaps(gaps[2 * first :])
        return data, head, ids


@dataclass(frozen=True, slots=True)
class SomeIds(Sequence[PairIds]):
    """The tokens of selected pairs in a given order, read on demand. Copies nothing up front.

    Attributes:
        rows: all pairs.
        places: [N] indices into `rows`.
    """

    rows: TokenRows
    places: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, i: int) -> PairIds: ...
    @overload
    def __getitem__(self, i: slice) -> SomeIds: ...
    def __getitem__(self, i: int | slice) -> PairIds | SomeIds:
        if isinstance(i, slice):
            return SomeIds(self.rows, self.places[i])
        return self.rows.ids(int(self.places[i]))

    def at(self, chosen: npt.NDArray[np.int64]) -> SomeIds:
        """The tokens of these items, in this order."""
        return SomeIds(self.rows, self.places[chosen])


def _gaps(edges: Sequence[int]) -> Gaps:
    return tuple(zip(edges[::2], edges[1::2], strict=True))

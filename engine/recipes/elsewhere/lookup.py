"""Finds another trainer's rows in a cache by their token ids. Independent of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import Gaps, IdArray, LogpArray, PairIds, ScoredPair, as_ids
from dpoeng.cache.store import Store
from dpoeng.cache.words import counted


@dataclass(frozen=True, slots=True)
class Side:
    """One prompt with a response, as another trainer tokenised it.

    Attributes:
        ids: [T], token ids of prompt and response.
        scored: [T], true for tokens whose log-prob enters the loss.
    """

    ids: IdArray
    scored: npt.NDArray[np.bool_]


def pair_of(chosen: Side, rejected: Side) -> PairIds | None:
    """The pair in the cache's form; None if a side has no scored token.

    Trainers need not tell prompt and response apart, so the prompt is the longest beginning that both sides share
    before the first scored token. Tokens after the last scored one are dropped: no log-prob depends on them.
    """
    places = [np.flatnonzero(side.scored) for side in (chosen, rejected)]
    if not all(len(place) for place in places):
        return None
    ids = [side.ids[: place[-1] + 1] for side, place in zip((chosen, rejected), places, strict=True)]
    first = min(int(place[0]) for place in places)
    differ = np.flatnonzero(ids[0][:first] != ids[1][:first])
    prompt = int(differ[0]) if len(differ) else first
    starts = (int(places[0][0]) - prompt, int(places[1][0]) - prompt)
    gaps = (_gaps(places[0] - prompt), _gaps(places[1] - prompt))
    return PairIds(as_ids(ids[0][:prompt]), as_ids(ids[0][prompt:]), as_ids(ids[1][prompt:]), *starts, *gaps)


def _gaps(places: npt.NDArray[np.int64]) -> Gaps:
    """The gaps [begin, end) of unscored tokens between scored ones."""
    jumps = np.flatnonzero(np.diff(places) > 1)
    return tuple((int(places[i]) + 1, int(places[i + 1])) for i in jumps)


def sums_of(pair: ScoredPair, ld_alpha: float | None = None) -> tuple[float, float]:
    """Sums log p_ref over each response, in nats.

    `ld_alpha` weights the tokens beyond the shorter response's length, as in LD-DPO, https://arxiv.org/abs/2409.06411.
    """
    if ld_alpha is None:
        return pair.chosen_sum, pair.rejected_sum
    shared = min(len(pair.chosen_logps), len(pair.rejected_logps))

    def weighted(logps: LogpArray) -> float:
        head, tail = logps[:shared].sum(dtype=np.float64), logps[shared:].sum(dtype=np.float64)
        return float(head + ld_alpha * tail)

    return weighted(pair.chosen_logps), weighted(pair.rejected_logps)


class Lookup:
    """All rows that a view's reference has scored, including those of other views."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._index = Store.open(view.root).lookup(view.spec.digest)

    def find(self, pairs: Sequence[PairIds | None], *, where: str, remedy: str) -> list[ScoredPair]:
        """Returns the rows of these pairs, in order.

        Args:
            pairs: None for a row without a scored token.
            where: the name of the rows in messages.
            remedy: the message's remedy.

        Raises:
            UserError: the cache does not have one of them.
        """
        found = [None if ids is None else self._index.get(ids) for ids in pairs]
        lacking = [i for i, row in enumerate(found) if row is None]
        if lacking:
            raise UserError(
                f"{len(lacking):,} of {counted(len(found), 'row')} are not in the cache with these tokens",
                code="reference-tokens",
                where=f"{where}, row {lacking[0] + 1}",
                expected=f"the tokens of a pair that the reference of view {self.view.name} scored",
                found=self._describe(pairs[lacking[0]]),
                remedy=remedy,
                exit_status=3,
            )
        return [row for row in found if row is not None]

    def _describe(self, ids: PairIds | None) -> str:
        """Describes how a missing pair differs from the nearest one of the view."""
        if ids is None:
            return "one response has no scored token: truncation removed it"
        sizes = (
            f"prompt of {len(ids.prompt_ids)} tokens, chosen {len(ids.chosen_ids)}, rejected {len(ids.rejected_ids)}"
        )
        for i in range(len(self.view)):
            cached = self.view[i].ids
            if np.array_equal(cached.prompt_ids, ids.prompt_ids):
                file, number = self.view.source(i)
                return f"{sizes}; {file}:{number} has this prompt and {_difference(ids, cached)}"
        return f"{sizes}; no pair of the view has this prompt"


def _difference(ids: PairIds, cached: PairIds) -> str:
    for name in ("chosen", "rejected"):
        here: Any = getattr(ids, f"{name}_ids")
        there: Any = getattr(cached, f"{name}_ids")
        if not np.array_equal(here, there):
            shared = min(len(here), len(there))
            differ = np.flatnonzero(here[:shared] != there[:shared])
            at = int(differ[0]) if len(differ) else shared
            ends = [side[at : at + 4].tolist() or "the end" for side in (here, there)]
            return f"another {name} response: from token {at + 1} on, {ends[0]} here and {ends[1]} in the cache"
    return "the same responses, but with other scored tokens"

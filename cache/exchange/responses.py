"""Converts rows of any kind to a prompt and its responses, for exports and statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dpoeng.cache.analytics import Distribution, Floats, PairNote, distribution
from dpoeng.cache.reader import View
from dpoeng.cache.records import damaged
from dpoeng.cache.schema import Gaps, IdArray, LogpArray, ScoredGroup
from dpoeng.cache.selection.mixed import AnyView
from dpoeng.cache.trunk.texts import text_key


class Response(NamedTuple):
    """One response: `ids` [R]; tokens from `start` on and outside `gaps` have a log-prob in `logps`."""

    ids: IdArray
    start: int
    gaps: Gaps
    logps: LogpArray


def responses_of(view: AnyView, place: int) -> list[Response]:
    """The responses of the row that starts at `place`: chosen and rejected; own and mismatched if unpaired."""
    row = view.row(place)
    pairs = row.pairs if isinstance(row, ScoredGroup) else (row,)
    found = []
    for pair in pairs:
        ids = pair.ids
        found.append(Response(ids.chosen_ids, ids.chosen_start, ids.chosen_gaps, pair.chosen_logps))
        found.append(Response(ids.rejected_ids, ids.rejected_start, ids.rejected_gaps, pair.rejected_logps))
    return found[: len(row.scores)] if isinstance(row, ScoredGroup) else found


class OfRow(NamedTuple):
    """A row's own responses in numbers, [N] each: scores of the data, scored tokens, sums of log-probs in nats."""

    scores: Floats
    tokens: npt.NDArray[np.int32]
    sums: Floats

    @property
    def ends(self) -> tuple[int, int]:
        """The first of the best responses, and the first of the worst."""
        return int(self.scores.argmax()), int(self.scores.argmin())

    def margin(self, values: Floats) -> float:
        """A value of the best response less that of the worst."""
        best, worst = self.ends
        return float(values[best] - values[worst])

    def in_order(self, values: Floats) -> tuple[int, int]:
        """Pairs of a better and a worse response of which the former has the higher value; and all such pairs."""
        better, worse = np.nonzero(self.scores[:, None] > self.scores[None, :])
        return int((values[better] > values[worse]).sum()), len(better)


def rows_in_numbers(view: AnyView, sums: Floats | None = None) -> list[OfRow]:
    """The rows of a view of unpaired or ranked rows. `sums`: other values than log-probs, [rows of the view, 2].

    Raises:
        CacheError: a row's responses do not fit its scores.
    """
    numbers = view.numbers()
    tokens = np.stack([numbers.chosen_tokens, numbers.rejected_tokens], 1)
    if sums is None:
        sums = np.stack([numbers.chosen_sum, numbers.rejected_sum], 1)
    found = []
    for place, end in pairwise([*view.row_starts(), len(view)]):
        scores = np.array(view.scores(place))
        # Responses are stored two by two; the last one of an odd number has the first beside it.
        if (len(scores) + 1) // 2 != end - place:
            raise damaged(f"view {view.name}, row {place}", "a row with all its responses", f"{len(scores)} scores")
        of_row = slice(place, end)
        found.append(OfRow(scores, tokens[of_row].ravel()[: len(scores)], sums[of_row].ravel()[: len(scores)]))
    return found


class RowKey(NamedTuple):
    """What a row asks, and what it says.

    Attributes:
        texts: identifies the prompt and its responses, in any order; an unpaired row's own response alone.
        scores: of the responses in the order of their keys; none of a pair, whose order is part of `texts`.
    """

    texts: bytes
    scores: tuple[float, ...]

    def contradicts(self, other: tuple[float, ...]) -> bool:
        """Whether other scores of the same texts order two responses the other way, or give the other label."""
        if len(other) == 1:
            return self.scores != other
        a, b = np.array(self.scores), np.array(other)
        return bool(((a[:, None] - a) * (b[:, None] - b) < 0).any())


def row_key(view: AnyView, place: int) -> RowKey:
    """The key of the row that begins at a place."""
    if view.rows == "pairs":
        return RowKey(view.key(place), ())
    prompt, scores = view.prompt_ids(place), view.scores(place)
    keys = [text_key(prompt, one.ids) for one in responses_of(view, place)[: len(scores)]]
    ordered = sorted(zip(keys, scores, strict=True))
    return RowKey(b"".join(key for key, _ in ordered), tuple(score for _, score in ordered))


@dataclass(frozen=True, slots=True)
class ResponseStats:
    """Rows that are no pairs as their reference sees them.

    Attributes:
        kind: of the rows, see `records.ROW_KINDS`.
        rows: of the data set.
        responses: of all rows; of unpaired ones the mismatched responses are not among them.
        desirable: unpaired rows with a desirable response; else None.
        prompt_tokens: lengths.
        response_tokens: scored tokens of each response.
        responses_a_row: how many; None for unpaired rows, which have one.
        logp_per_token: mean log p_ref of each response, in nats.
        margin: of ranked rows, log p_ref of a best response less that of a worst one, in nats; else None, as are the
            others that follow.
        margin_per_token: the same of the means.
        spread: score of a best response less that of a worst one.
        best_less_worst: per token, in nats: of ranked rows the mean of `margin_per_token`; of unpaired rows the mean
            of desirable ones less that of the others. None where there is no such difference.
        accuracy: ranked rows: share of pairs of a better and a worse response of a row of which the reference finds the
            former likelier, by sums; `accuracy_per_token` likewise. Else None.
        strongly_right, strongly_wrong: ranked rows with the largest and the smallest margins.
    """

    kind: str
    rows: int
    responses: int
    desirable: int | None
    prompt_tokens: Distribution
    response_tokens: Distribution
    responses_a_row: Distribution | None
    logp_per_token: Distribution
    margin: Distribution | None
    margin_per_token: Distribution | None
    spread: Distribution | None
    best_less_worst: float | None
    accuracy: float | None
    accuracy_per_token: float | None
    strongly_right: tuple[PairNote, ...] = ()
    strongly_wrong: tuple[PairNote, ...] = ()


def response_stats(view: View, *, notes: int = 10) -> ResponseStats:
    """Computes the above of a view of unpaired or ranked rows, at least one; `notes`: how many to list at each end."""
    starts, rows = np.asarray(view.row_starts()), rows_in_numbers(view)
    labels, lengths, totals = map(np.concatenate, zip(*rows, strict=True))
    means, ranked = totals / lengths, view.rows == "ranked"
    common: dict[str, Any] = {
        "kind": view.rows,
        "rows": len(rows),
        "responses": len(totals),
        "prompt_tokens": distribution(view.numbers().prompt_tokens[starts]),
        "response_tokens": distribution(lengths),
        "responses_a_row": distribution(np.array([len(row.scores) for row in rows])) if ranked else None,
        "logp_per_token": distribution(means),
    }
    if not ranked:
        both = 0 < labels.sum() < len(labels)
        difference = float(means[labels > 0].mean() - means[labels == 0].mean()) if both else None
        return ResponseStats(
            **common, desirable=int(labels.sum()), margin=None, margin_per_token=None, spread=None,
            best_less_worst=difference, accuracy=None, accuracy_per_token=None,
        )  # fmt: skip
    margin = np.array([row.margin(row.sums) for row in rows])
    per_token = np.array([row.margin(row.sums / row.tokens) for row in rows])
    right, right_per_token = (np.array([row.in_order(of(row)) for row in rows]).sum(0) for of in (_sums, _means))
    order = np.argsort(margin, kind="stable")

    def named(places: Iterable[int]) -> tuple[PairNote, ...]:
        return tuple(
            PairNote(int(k), *view.source(int(starts[k])), float(margin[k]), float(per_token[k])) for k in places
        )

    return ResponseStats(
        **common,
        desirable=None,
        margin=distribution(margin),
        margin_per_token=distribution(per_token),
        spread=distribution(np.array([row.margin(row.scores) for row in rows])),
        best_less_worst=float(per_token.mean()),
        accuracy=float(right[0] / right[1]),
        accuracy_per_token=float(right_per_token[0] / right_per_token[1]),
        strongly_right=named(k for k in order[::-1][:notes] if margin[k] > 0),
        strongly_wrong=named(k for k in order[:notes] if margin[k] < 0),
    )


def _sums(row: OfRow) -> Floats:
    return row.sums


def _means(row: OfRow) -> Floats:
    return row.sums / row.tokens

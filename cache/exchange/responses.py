"""Converts rows of any kind to a prompt and its responses, for exports and statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dpoeng.cache.analytics import Distribution, distribution
from dpoeng.cache.reader import View
from dpoeng.cache.schema import Gaps, IdArray, LogpArray, ScoredGroup


class Response(NamedTuple):
    """One response: `ids` [R]; tokens from `start` on and outside `gaps` have a log-prob in `logps`."""

    ids: IdArray
    start: int
    gaps: Gaps
    logps: LogpArray


def responses_of(view: View, place: int) -> list[Response]:
    """The responses of the row that starts at `place`: chosen and rejected; own and mismatched if unpaired."""
    row = view.row(place)
    pairs = row.pairs if isinstance(row, ScoredGroup) else (row,)
    found = []
    for pair in pairs:
        ids = pair.ids
        found.append(Response(ids.chosen_ids, ids.chosen_start, ids.chosen_gaps, pair.chosen_logps))
        found.append(Response(ids.rejected_ids, ids.rejected_start, ids.rejected_gaps, pair.rejected_logps))
    return found[: len(row.scores)] if isinstance(row, ScoredGroup) else found


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
        responses_a_row: how many.
        logp_per_token: mean log p_ref of each response, in nats.
        best_less_worst: per token, in nats: of ranked rows a best response less a worst one; of unpaired rows the mean
            of desirable ones less that of the others. None where there is no such difference.
        accuracy: ranked rows: share of pairs of a better and a worse response of a row of which the reference finds the
            former likelier, by sums; `accuracy_per_token` likewise. Else None.
    """

    kind: str
    rows: int
    responses: int
    desirable: int | None
    prompt_tokens: Distribution
    response_tokens: Distribution
    responses_a_row: Distribution
    logp_per_token: Distribution
    best_less_worst: float | None
    accuracy: float | None
    accuracy_per_token: float | None


def response_stats(view: View) -> ResponseStats:
    """Computes the above of a view of unpaired or ranked rows, at least one."""
    starts = np.asarray(view.row_starts())
    scores = [np.array(view.scores(place)) for place in starts.tolist()]
    counts = np.array([len(of_row) for of_row in scores])
    numbers = view.numbers()
    tokens = np.stack([numbers.chosen_tokens, numbers.rejected_tokens], 1)
    sums = np.stack([numbers.chosen_sum, numbers.rejected_sum], 1)
    of_rows = [
        (
            of_row,
            tokens[place : place + len(of_row)].ravel()[: len(of_row)],
            sums[place : place + len(of_row)].ravel()[: len(of_row)],
        )
        for place, of_row in zip(starts.tolist(), scores, strict=True)
    ]
    lengths, totals = (np.concatenate([of_row[k] for of_row in of_rows]) for k in (1, 2))
    means = totals / lengths
    ranked = view.rows == "ranked"
    found = _compared(of_rows) if ranked else None
    labels = np.concatenate(scores)
    if found is not None:
        difference: float | None = found[2]
    else:
        both = 0 < labels.sum() < len(labels)
        difference = float(means[labels > 0].mean() - means[labels == 0].mean()) if both else None
    return ResponseStats(
        kind=view.rows,
        rows=len(starts),
        responses=len(totals),
        desirable=None if ranked else int(labels.sum()),
        prompt_tokens=distribution(numbers.prompt_tokens[starts]),
        response_tokens=distribution(lengths),
        responses_a_row=distribution(counts),
        logp_per_token=distribution(means),
        best_less_worst=difference,
        accuracy=found[0] if found else None,
        accuracy_per_token=found[1] if found else None,
    )


_OfRow = tuple[npt.NDArray[np.float64], npt.NDArray[np.int32], npt.NDArray[np.float64]]


def _compared(of_rows: list[_OfRow]) -> tuple[float, float, float]:
    """Accuracies by sums and by means, and the mean difference of a best and a worst response's mean."""
    right = right_per_token = pairs = 0
    differences = []
    for scores, tokens, sums in of_rows:
        means = sums / tokens
        better, worse = np.nonzero(scores[:, None] > scores[None, :])
        right += int((sums[better] > sums[worse]).sum())
        right_per_token += int((means[better] > means[worse]).sum())
        pairs += len(better)
        differences.append(means[scores.argmax()] - means[scores.argmin()])
    return right / pairs, right_per_token / pairs, float(np.mean(differences))

"""What the reference thinks of a data set: margins, lengths, pairs that look mislabelled. Reads a view; no model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpoeng.cache.reader import View
from dpoeng.cache.schema import first_of_each, pair_key

Floats = npt.NDArray[np.float64]
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 40


@dataclass(frozen=True, slots=True)
class Distribution:
    """One number over all distinct pairs.

    Attributes:
        mean, std: of all values (population).
        quantiles: at `QUANTILES`, so least, median and greatest are among them.
        edges: [BINS + 1] of a histogram from the 0.5 to the 99.5 percentile; what lies outside counts in the end bins.
        counts: [BINS].
    """

    mean: float
    std: float
    quantiles: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PairNote:
    """A pair worth a look.

    Attributes:
        row: in the view.
        source_file, source_row: where it came from.
        margin: log p_ref(chosen) - log p_ref(rejected), in nats.
        margin_per_token: the difference of the means per token, in nats.
    """

    row: int
    source_file: str
    source_row: int
    margin: float
    margin_per_token: float


@dataclass(frozen=True, slots=True)
class ReferenceStats:
    """A data set as its reference sees it. Duplicates count once, except in `rows`.

    Attributes:
        rows: rows of the view.
        pairs: distinct pairs among them.
        contradictions: (row, row) of two pairs that are each other with chosen and rejected swapped.
        prompt_tokens, chosen_tokens, rejected_tokens: lengths; of the responses, the scored tokens.
        length_difference: chosen - rejected tokens.
        margin: log p_ref(chosen) - log p_ref(rejected), in nats. The loss at step one of a policy that has learnt
            nothing is ln 2 whatever this is; what it shows is how far the data lies from the reference.
        margin_per_token: difference of the mean log-probs, which length does not drown.
        accuracy: share of pairs with margin > 0; `accuracy_per_token` likewise.
        length_correlation: Pearson's r of `margin` and `length_difference`; 0 where one of them does not vary.
        strongly_right, strongly_wrong: the pairs with the greatest and the least margin.
    """

    rows: int
    pairs: int
    contradictions: tuple[tuple[int, int], ...]
    prompt_tokens: Distribution
    chosen_tokens: Distribution
    rejected_tokens: Distribution
    length_difference: Distribution
    margin: Distribution
    margin_per_token: Distribution
    accuracy: float
    accuracy_per_token: float
    length_correlation: float
    strongly_right: tuple[PairNote, ...]
    strongly_wrong: tuple[PairNote, ...]


def reference_stats(view: View, *, notes: int = 10) -> ReferenceStats:
    """Computes the above.

    Args:
        view: at least one row.
        notes: how many pairs to name at either end.
    """
    first = first_of_each(view.keys())
    numbers = view.numbers().at(first)
    margin = numbers.chosen_sum - numbers.rejected_sum
    per_token = numbers.chosen_sum / numbers.chosen_tokens - numbers.rejected_sum / numbers.rejected_tokens
    difference = (numbers.chosen_tokens - numbers.rejected_tokens).astype(np.float64)
    order = np.argsort(margin, kind="stable")

    def named(places: Iterable[int]) -> tuple[PairNote, ...]:
        return tuple(
            PairNote(int(first[k]), *view.source(int(first[k])), float(margin[k]), float(per_token[k])) for k in places
        )

    return ReferenceStats(
        rows=len(view),
        pairs=len(first),
        contradictions=_contradictions(view, first),
        prompt_tokens=_distribution(numbers.prompt_tokens),
        chosen_tokens=_distribution(numbers.chosen_tokens),
        rejected_tokens=_distribution(numbers.rejected_tokens),
        length_difference=_distribution(difference),
        margin=_distribution(margin),
        margin_per_token=_distribution(per_token),
        accuracy=float((margin > 0).mean()),
        accuracy_per_token=float((per_token > 0).mean()),
        length_correlation=correlation(margin, difference) or 0.0,
        strongly_right=named(k for k in order[::-1][:notes] if margin[k] > 0),
        strongly_wrong=named(k for k in order[:notes] if margin[k] < 0),
    )


def _contradictions(view: View, first: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    seen: dict[bytes, int] = {}
    found = []
    for row in first.tolist():
        ids = view[row].ids
        if (other := seen.get(pair_key(ids.swapped()))) is not None:
            found.append((other, row))
        seen[view.key(row)] = row
    return tuple(found)


def _distribution(values: npt.NDArray[np.float64] | npt.NDArray[np.int32]) -> Distribution:
    values = values.astype(np.float64)
    low, high = np.quantile(values, (0.005, 0.995))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values.clip(low, high), BINS, (low, high))
    return Distribution(
        float(values.mean()),
        float(values.std()),
        tuple(np.quantile(values, QUANTILES).tolist()),
        tuple(edges.tolist()),
        tuple(counts.tolist()),
    )


def correlation(left: Floats, right: Floats) -> float | None:
    """Pearson's r; None where a side does not vary, and of fewer than three values, for which it is 1 or -1."""
    if len(left) < 3 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    value = float(np.corrcoef(left, right)[0, 1])
    return value if math.isfinite(value) else None

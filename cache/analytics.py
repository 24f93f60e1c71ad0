"""Statistics of a data set under its reference: margins, lengths, pairs that look mislabelled. Needs no model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpoeng.cache.reader import View
from dpoeng.cache.schema import as_keys, first_of_each, pair_key, whole_keys

Floats = npt.NDArray[np.float64]
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 40


@dataclass(frozen=True, slots=True)
class Distribution:
    """Statistics of one number over all distinct pairs.

    Attributes:
        mean, std: of all values (population standard deviation).
        quantiles: at the probabilities `QUANTILES`, which include the minimum, the median and the maximum.
        edges: [n + 1], the histogram's edges, from about the 0.5 to the 99.5 percentile; see `histogram`.
        counts: [n], values in each bar.
    """

    mean: float
    std: float
    quantiles: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PairNote:
    """A pair that may deserve a look.

    Attributes:
        row: its row in the view.
        source_file, source_row: where the pair was read.
        margin: log p_ref(chosen) - log p_ref(rejected), in nats.
        margin_per_token: difference of the mean log-probs per token, in nats.
    """

    row: int
    source_file: str
    source_row: int
    margin: float
    margin_per_token: float


@dataclass(frozen=True, slots=True)
class ReferenceStats:
    """Statistics of a data set under its reference. Duplicates count once, except in `rows`.

    Attributes:
        rows: rows of the view.
        pairs: distinct pairs among them.
        contradictions: (row, row) of two pairs that are equal but for chosen and rejected being swapped.
        prompt_tokens, chosen_tokens, rejected_tokens: lengths in tokens; of a response, its scored tokens.
        length_difference: chosen - rejected tokens.
        margin: log p_ref(chosen) - log p_ref(rejected), in nats. It shows how far the data lies from the reference. The
            loss at step one does not depend on it: an untrained policy starts at ln 2.
        margin_per_token: difference of the mean log-probs, so that long responses do not dominate.
        accuracy: share of pairs with margin > 0; `accuracy_per_token` likewise.
        length_correlation: Pearson's r of `margin` and `length_difference`; 0 if one of them is constant.
        strongly_right, strongly_wrong: the pairs with the largest and the smallest margins.
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
    """Computes the statistics of a view.

    Args:
        view: at least one row.
        notes: how many pairs to list at each end.
    """
    first = first_of_each(view.keys())
    numbers = view.numbers().at(first)
    margin = numbers.chosen_sum - numbers.rejected_sum
    per_token = numbers.chosen_sum / numbers.chosen_tokens - numbers.rejected_sum / numbers.rejected_tokens
    difference = (numbers.chosen_tokens - numbers.rejected_tokens).astype(np.int64)
    order = np.argsort(margin, kind="stable")

    def named(places: Iterable[int]) -> tuple[PairNote, ...]:
        return tuple(
            PairNote(int(first[k]), *view.source(int(first[k])), float(margin[k]), float(per_token[k])) for k in places
        )

    return ReferenceStats(
        rows=len(view),
        pairs=len(first),
        contradictions=contradictions(view, first),
        prompt_tokens=distribution(numbers.prompt_tokens),
        chosen_tokens=distribution(numbers.chosen_tokens),
        rejected_tokens=distribution(numbers.rejected_tokens),
        length_difference=distribution(difference),
        margin=distribution(margin),
        margin_per_token=distribution(per_token),
        accuracy=float((margin > 0).mean()),
        accuracy_per_token=float((per_token > 0).mean()),
        length_correlation=correlation(margin, difference.astype(np.float64)) or 0.0,
        strongly_right=named(k for k in order[::-1][:notes] if margin[k] > 0),
        strongly_wrong=named(k for k in order[:notes] if margin[k] < 0),
    )


def contradictions(view: View, first: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """(row, row) of pairs among the rows `first` that are equal but for chosen and rejected being swapped."""
    swapped = as_keys(pair_key(view[row].ids.swapped()) for row in first.tolist())
    _, earlier, later = np.intersect1d(
        whole_keys(view.keys()[first]), whole_keys(swapped), assume_unique=True, return_indices=True
    )
    both = sorted(
        (int(first[j]), int(first[i])) for i, j in zip(earlier.tolist(), later.tolist(), strict=True) if i < j
    )
    return tuple((other, row) for row, other in both)


def distribution(values: npt.NDArray[Any]) -> Distribution:
    """Mean, spread, quantiles and histogram of some numbers, at least one."""
    whole = np.issubdtype(values.dtype, np.integer)
    values = values.astype(np.float64)
    low, high = np.quantile(values, (0.005, 0.995))
    edges, counts = histogram(values, float(low), float(high), whole=whole)
    return Distribution(
        float(values.mean()),
        float(values.std()),
        tuple(np.quantile(values, QUANTILES).tolist()),
        edges,
        counts,
    )


def histogram(
    values: npt.NDArray[Any], low: float, high: float, *, whole: bool
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Counts values between round edges, in at most `BINS` bars.

    Args:
        values: [n]; values outside the edges count in the first and last bar.
        low: the first edge is at or below this.
        high: the last edge is at or above this; above it with `whole`.
        whole: values and edges are whole numbers; a value on an edge counts in the bar above it.

    Returns:
        edges [bars + 1], multiples of 1, 2, 2.5 or 5 times a power of ten; and counts [bars].
    """
    spread = (high - low) or (1.0 if whole else max(abs(high), 1.0) * 1e-3)
    power = 10.0 ** math.floor(math.log10(spread / BINS))
    power = max(power, 1.0) if whole else power
    steps = [factor * power * scale for scale in (1, 10) for factor in (1, 2, 2.5, 5)]
    step = next(s for s in steps if spread / s <= BINS - 2 and (not whole or s.is_integer()))
    first = math.floor(low / step + 1e-9)
    last = max(math.floor(high / step + 1e-9) + 1 if whole else math.ceil(high / step - 1e-9), first + 1)
    edges = [round(k * step, 12) for k in range(first, last + 1)]
    inside = values.clip(edges[0], np.nextafter(edges[-1], edges[0]))
    counts, _ = np.histogram(inside, edges)
    return tuple(edges), tuple(counts.tolist())


def correlation(left: Floats, right: Floats) -> float | None:
    """Pearson's r; None if one side is constant, or with fewer than three values (r would be 1 or -1)."""
    if len(left) < 3 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    value = float(np.corrcoef(left, right)[0, 1])
    return value if math.isfinite(value) else None

"""Analyses a data set by its reference: margins, lengths, pairs that look mislabelled. Reads a view; no model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
        edges: [n + 1] of a histogram from about the 0.5 to the 99.5 percentile, see `histogram`.
        counts: [n].
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
        prompt_tokens=_distribution(numbers.prompt_tokens),
        chosen_tokens=_distribution(numbers.chosen_tokens),
        rejected_tokens=_distribution(numbers.rejected_tokens),
        length_difference=_distribution(difference),
        margin=_distribution(margin),
        margin_per_token=_distribution(per_token),
        accuracy=float((margin > 0).mean()),
        accuracy_per_token=float((per_token > 0).mean()),
        length_correlation=correlation(margin, difference.astype(np.float64)) or 0.0,
        strongly_right=named(k for k in order[::-1][:notes] if margin[k] > 0),
        strongly_wrong=named(k for k in order[:notes] if margin[k] < 0),
    )


def contradictions(view: View, first: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """(row, row) of two pairs among `first` that are each other with chosen and rejected swapped."""
    seen: dict[bytes, int] = {}
    found = []
    for row in first.tolist():
        ids = view[row].ids
        if (other := seen.get(pair_key(ids.swapped()))) is not None:
            found.append((other, row))
        seen[view.key(row)] = row
    return tuple(found)


def _distribution(values: npt.NDArray[Any]) -> Distribution:
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
    """Counts between round edges, of at most `BINS` bars.

    Args:
        values: [n], any of which may lie outside; those count in the end bars.
        low: the bars begin at or below this.
        high: the bars end at or above this; with `whole` above it.
        whole: the values are whole numbers, and so are the edges; a value on an edge belongs to the bar above.

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
    """Pearson's r; None where a side does not vary, and of fewer than three values, for which it is 1 or -1."""
    if len(left) < 3 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    value = float(np.corrcoef(left, right)[0, 1])
    return value if math.isfinite(value) else None

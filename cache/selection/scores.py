"""The score of each row of a view, by what the cache knows of it: what rows are selected and ordered by."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dpoeng.cache.analytics import Floats
from dpoeng.cache.errors import CacheError
from dpoeng.cache.exchange.responses import OfRow, rows_in_numbers
from dpoeng.cache.reader import View
from dpoeng.cache.schema import whole_keys
from dpoeng.cache.selection.mixed import AnyView
from dpoeng.cache.words import counted

MEASURES = {
    "pairs": ("margin", "margin_per_token", "length_difference"),
    "ranked": ("margin", "margin_per_token", "length_difference", "spread", "agreement"),
    "unpaired": ("logp", "logp_per_token", "length"),
}
"""Kind of rows -> the names of their scores; docs/select.md says what they are."""
COLUMN = "column:"


def row_scores(view: AnyView, by: str, against: View | None = None) -> Floats:
    """The score of every row of the data set, in the order of `row_starts`, [R].

    Args:
        view: rows of any kind. Of a ranked row the best response is compared with the worst.
        by: one of `MEASURES`, or `column:NAME` for one of the user's columns. Log-probs are in nats.
        against: a view of the same rows scored by another model, such as the trained policy. Log-probs are then
            log pi/ref, and margins DPO's implicit reward gaps without their factor beta.

    Raises:
        CacheError: such rows have no such score; a column has no number; or `against` lacks rows.
    """
    if by.startswith(COLUMN):
        places = view.row_starts()
        return np.fromiter((_number(view, row, by.removeprefix(COLUMN)) for row in places), np.float64, len(places))
    if by not in MEASURES[view.rows]:
        raise CacheError(
            f"{view.rows if view.rows == 'pairs' else view.rows + ' rows'} have no score {by}",
            code="select-score",
            where=f"view {view.name}",
            expected=f"{', '.join(MEASURES[view.rows])}, or column:NAME",
            found=by,
            remedy="name one of these with --by, or with --order-by in training; docs/select.md explains them",
            exit_status=2,
        )
    numbers = view.numbers()
    chosen, rejected = numbers.chosen_sum, numbers.rejected_sum
    if against is not None:
        other = against.numbers().at(_same_pairs(view, against))
        chosen, rejected = other.chosen_sum - chosen, other.rejected_sum - rejected
    if view.rows == "ranked":
        return _ranked_scores(view, by, np.stack([chosen, rejected], 1))
    tokens, others = (side.astype(np.float64) for side in (numbers.chosen_tokens, numbers.rejected_tokens))
    if view.rows == "unpaired":
        return {"logp": chosen, "logp_per_token": chosen / tokens, "length": tokens}[by]
    return {
        "margin": chosen - rejected,
        "margin_per_token": chosen / tokens - rejected / others,
        "length_difference": tokens - others,
    }[by]


def _ranked_scores(view: AnyView, by: str, sums: Floats) -> Floats:
    rows = rows_in_numbers(view, sums)
    if by == "agreement":
        shares = [right / pairs for right, pairs in (row.in_order(row.sums) for row in rows)]
        return np.array(shares)
    return np.array([row.margin(_VALUES[by](row)) for row in rows])


_VALUES: dict[str, Callable[[OfRow], Floats]] = {
    "margin": lambda row: row.sums,
    "margin_per_token": lambda row: row.sums / row.tokens,
    "length_difference": lambda row: row.tokens.astype(np.float64),
    "spread": lambda row: row.scores,
}


def _number(view: AnyView, place: int, column: str) -> float:
    value = view.extra(place).get(column)
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer that no float holds
            number = float(value)
    if not math.isfinite(number):
        file, line = view.source(place)
        known = view.extra(place)
        raise CacheError(
            "a column to select by needs a number in every row",
            code="select-column",
            where=f"{file}:{line}",
            expected=f"a number under {column!r}",
            found=repr(value)[:100] if column in known else f"columns {', '.join(known) or 'none'}",
            remedy="name another column, or run phase one on rows that all have it",
            exit_status=2,
        )
    return number


def _same_pairs(view: AnyView, against: View) -> npt.NDArray[np.int64]:
    """For every row of a view, the row of `against` with the same pair of responses."""
    _, pair = np.unique(whole_keys(np.concatenate([against.keys(), view.keys()])), return_inverse=True)
    place = np.full(len(pair), -1)
    place[pair[: len(against)]] = np.arange(len(against))
    places: npt.NDArray[np.int64] = place[pair[len(against) :]]
    if (missing := np.flatnonzero(places < 0)).size:
        file, line = view.source(int(missing[0]))
        raise CacheError(
            "the other view lacks pairs of this one",
            code="select-against",
            where=f"view {against.name}",
            expected=f"every pair of view {view.name}, with the same token ids",
            found=f"{counted(len(missing), 'pair')} missing, the first from {file}:{line}",
            remedy="run phase one with the other model on the same pairs, tokenizer, template and lengths",
            exit_status=2,
        )
    return places

"""Selects rows of a view: filters first, then a rule that ranks the rest, group by group. Pure arithmetic.

Rows are those of the data set: a ranked row is one, however many responses it has.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dpoeng.cache.analytics import contradictions
from dpoeng.cache.errors import CacheError
from dpoeng.cache.exchange.responses import RowKey, row_key, rows_in_numbers
from dpoeng.cache.reader import View
from dpoeng.cache.schema import first_of_each, whole_keys
from dpoeng.cache.selection.scores import row_scores
from dpoeng.cache.words import counted

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Rule = Literal["large", "small", "random"]


@dataclass(frozen=True, slots=True)
class Rules:
    """Which rows to keep.

    Attributes:
        by: the score of a row: one of `scores.MEASURES`, or `column:NAME` for one of the user's columns.
        rule: "large" takes the largest scores first, "small" those nearest to 0, "random" any; None keeps all that pass
            the filters. Deng et al. 2025 take large margins, https://arxiv.org/abs/2502.14560; Qi et al. 2025 small
            gaps, https://arxiv.org/abs/2508.04149.
        share, count: how many of the rows that pass the filters; give one of the two with a rule, none without.
        group_by: a column; groups keep their shares of the whole. With `balanced` all groups get equally many rows, as
            far as they have them.
        least, most: bounds of the score, both inclusive.
        max_tokens: limit for prompt and all responses together.
        drop_duplicates: keep the first of equal rows.
        drop_contradictions: drop both of two rows with the same texts of which one says the opposite of the other:
            chosen and rejected are swapped, two responses are ordered the other way, or the label is the other.
        seed: for "random".
    """

    by: str = "margin"
    rule: Rule | None = None
    share: float | None = None
    count: int | None = None
    group_by: str | None = None
    balanced: bool = False
    least: float | None = None
    most: float | None = None
    max_tokens: int | None = None
    drop_duplicates: bool = False
    drop_contradictions: bool = False
    seed: int = 0

    def record(self) -> dict[str, Any]:
        """The rules that are set, as JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value not in (None, False)}


@dataclass(frozen=True, slots=True)
class Chosen:
    """The selected rows.

    Attributes:
        rows: numbers of rows of the data set, ascending.
        scores: [R], of all of them.
        left_out: reason -> number of rows; a row counts under the first reason that applies.
        groups: value of `group_by` -> (rows kept, rows of the view).
    """

    rows: Rows
    scores: Floats
    left_out: dict[str, int]
    groups: dict[str, tuple[int, int]]


def choose(view: View, rules: Rules, against: View | None = None) -> Chosen:
    """Selects the rows of `view` that fit `rules`.

    Args:
        view: rows of any kind.
        rules: filters, rule and size.
        against: see `row_scores`.

    Raises:
        CacheError: as `row_scores`; no row has the column to group by; or no row is left.
    """
    scores = row_scores(view, rules.by, against)
    open_rows = np.ones(len(scores), bool)
    left_out: dict[str, int] = {}

    def drop(reason: str, rows: npt.NDArray[np.bool_]) -> None:
        nonlocal open_rows
        if count := int((open_rows & rows).sum()):
            left_out[reason] = count
        open_rows = open_rows & ~rows

    _filter(view, rules, scores, drop)
    groups = _groups(view, rules.group_by)
    if rules.rule is not None:
        kept = np.zeros(len(scores), bool)
        kept[_ranked(rules, scores, groups, open_rows)] = True
        drop(f"not among the {_in_words(rules.rule)}", ~kept)
    rows = np.flatnonzero(open_rows)
    if not len(rows):
        raise CacheError(
            "no row is left",
            code="select-nothing",
            where=f"view {view.name}",
            expected="at least one row",
            found="; ".join(f"{count} {reason}" for reason, count in left_out.items()),
            remedy="widen the bounds, or keep a larger share",
            exit_status=2,
        )
    counts = {
        value: (int(open_rows[members].sum()), len(members)) for value, members in groups.items() if rules.group_by
    }
    return Chosen(rows, scores, left_out, counts)


def _in_words(rule: Rule) -> str:
    return {"large": "largest scores", "small": "scores nearest to 0", "random": "rows drawn"}[rule]


_SAID_OTHERWISE = {
    "pairs": "swapped in another pair",
    "ranked": "ordered otherwise in another row",
    "unpaired": "labelled otherwise in another row",
}


def _filter(view: View, rules: Rules, scores: Floats, drop: Any) -> None:
    if rules.drop_duplicates:
        drop(f"equal to an earlier {'pair' if view.rows == 'pairs' else 'row'}", _repeated(view))
    if rules.drop_contradictions:
        drop(_SAID_OTHERWISE[view.rows], _contradicted(view))
    if rules.max_tokens is not None:
        drop(f"longer than {counted(rules.max_tokens, 'token')}", _total_tokens(view) > rules.max_tokens)
    if rules.least is not None:
        drop(f"{rules.by} below {rules.least:g}", scores < rules.least)
    if rules.most is not None:
        drop(f"{rules.by} above {rules.most:g}", scores > rules.most)


def _total_tokens(view: View) -> npt.NDArray[np.int64]:
    """Tokens of each row: its prompt and the scored ones of all its responses."""
    numbers = view.numbers()
    if view.rows == "pairs":
        total: npt.NDArray[np.int64] = numbers.prompt_tokens + numbers.chosen_tokens + numbers.rejected_tokens
    else:
        responses = np.array([int(row.tokens.sum()) for row in rows_in_numbers(view)])
        total = numbers.prompt_tokens[np.asarray(view.row_starts())] + responses
    return total


def _repeated(view: View) -> npt.NDArray[np.bool_]:
    """Rows that are equal to an earlier one, [R]."""
    if view.rows == "pairs":
        again = np.ones(len(view), bool)
        again[first_of_each(view.keys())] = False
        return again
    first: dict[RowKey, int] = {}
    keys = (row_key(view, place) for place in view.row_starts())
    return np.array([first.setdefault(key, row) != row for row, key in enumerate(keys)])


def _contradicted(view: View) -> npt.NDArray[np.bool_]:
    """Rows of which another one says the opposite, [R]."""
    if view.rows == "pairs":
        both = np.array(contradictions(view, first_of_each(view.keys())), np.int64).ravel()
        return np.isin(whole_keys(view.keys()), whole_keys(view.keys()[both]))
    keys = [row_key(view, place) for place in view.row_starts()]
    said: dict[bytes, set[tuple[float, ...]]] = {}
    for key in keys:
        said.setdefault(key.texts, set()).add(key.scores)
    return np.array([any(key.contradicts(scores) for scores in said[key.texts]) for key in keys])


def _groups(view: View, column: str | None) -> dict[str, Rows]:
    """Value of a column -> its rows, in order of first appearance; without a column all rows are one group."""
    if column is None:
        return {"": np.arange(len(view.row_starts()))}
    rows_of_value: dict[str, array[int]] = {}
    for row, place in enumerate(view.row_starts()):
        value = view.extra(place).get(column)
        rows_of_value.setdefault(value if isinstance(value, str) else json.dumps(value), array("q")).append(row)
    if rows_of_value.keys() == {"null"}:
        raise CacheError(
            "no row has the column to group by",
            code="select-column",
            where=f"view {view.name}",
            expected=f"a column {column!r}",
            found=f"columns {', '.join(view.extra(0)) or 'none'}",
            remedy="name another column",
            exit_status=2,
        )
    return {value: np.array(rows, np.int64) for value, rows in rows_of_value.items()}


def _ranked(rules: Rules, scores: Floats, groups: dict[str, Rows], left: npt.NDArray[np.bool_]) -> Rows:
    """The rows among those that are `left` [N] that the rule takes; of equal scores the earlier row."""
    members = [rows[left[rows]] for rows in groups.values()]
    total = round((rules.share or 0) * int(left.sum())) if rules.count is None else rules.count
    sizes = [len(rows) for rows in members]
    draw = np.random.default_rng(rules.seed).random(len(scores))
    rank = {"large": -scores, "small": np.abs(scores), "random": draw}[rules.rule or "large"]
    taken = [
        rows[np.argsort(rank[rows], kind="stable")][:quota]
        for rows, quota in zip(members, quotas(sizes, max(1, total), balanced=rules.balanced), strict=True)
    ]
    return np.concatenate(taken)


def quotas(sizes: Sequence[int], total: int, *, balanced: bool) -> list[int]:
    """How many rows to take from each group so that they add up to `total`, or all rows if there are fewer.

    Balanced: equally many from each group. What a small group lacks comes from the others; a remainder goes to earlier
    groups. Otherwise in proportion to the sizes, with the remainder going to the largest fractions, earlier groups
    first.
    """
    total = min(total, sum(sizes))
    if not balanced:
        exact = [total * size / max(1, sum(sizes)) for size in sizes]
        quota = [int(value) for value in exact]
        order = sorted(range(len(sizes)), key=lambda k: quota[k] - exact[k])
        for k in order[: total - sum(quota)]:
            quota[k] += 1
        return quota
    quota = [0] * len(sizes)
    while (left := total - sum(quota)) > 0:
        with_room = [k for k, size in enumerate(sizes) if quota[k] < size]
        for k in with_room[:left]:
            quota[k] += min(max(1, left // len(with_room)), sizes[k] - quota[k])
    return quota

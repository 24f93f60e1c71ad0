"""Which rows of a view to keep: filters first, then a rule that ranks what is left, group by group. Pure arithmetic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dpoeng.cache.analytics import contradictions
from dpoeng.cache.errors import CacheError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import first_of_each
from dpoeng.cache.selection.mixed import AnyView
from dpoeng.cache.words import counted

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Rule = Literal["large", "small", "random"]
MEASURES = ("margin", "margin_per_token", "length_difference")
COLUMN = "column:"


@dataclass(frozen=True, slots=True)
class Rules:
    """What is kept.

    Attributes:
        by: the score of a pair: one of `MEASURES`, or `column:NAME` for a column of the user's.
        rule: "large" takes the largest scores first, "small" those nearest to 0, "random" any. None: what the filters
            leave. Large margins are what Deng et al. 2025 choose, https://arxiv.org/abs/2502.14560; small gaps what Qi
            et al. 2025 choose, https://arxiv.org/abs/2508.04149.
        share, count: how many of those that the filters leave; one of the two with a rule, none without.
        group_by: a column; groups keep their shares of the whole, or with `balanced` get equally many rows as far as
            they have them.
        least, most: bounds of the score, both inclusive.
        max_tokens: of prompt and both responses together.
        drop_duplicates: keep the first of equal pairs.
        drop_contradictions: leave out both of two pairs that are each other with chosen and rejected swapped.
        seed: of "random".
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
        """Those that were given, as JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value not in (None, False)}


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows that are kept.

    Attributes:
        rows: ascending, so in the order of the source.
        scores: [N] of all rows of the view.
        left_out: reason -> number of rows; a row counts under its first reason.
        groups: value of `group_by` -> (rows kept, rows of the view).
    """

    rows: Rows
    scores: Floats
    left_out: dict[str, int]
    groups: dict[str, tuple[int, int]]


def choose(view: View, rules: Rules, against: View | None = None) -> Chosen:
    """The rows of `view` that `rules` keep.

    Args:
        view: pairs.
        rules: see there.
        against: a view of the same pairs scored by another model, such as the policy after training. Margins are then
            log pi/ref of chosen less that of rejected: DPO's implicit reward gap, but for its factor beta.

    Raises:
        CacheError: a column is not there or holds no number; `against` lacks a pair; or nothing is left.
    """
    scores = pair_scores(view, rules.by, against)
    open_rows = np.ones(len(view), bool)
    left_out: dict[str, int] = {}

    def drop(reason: str, rows: npt.NDArray[np.bool_]) -> None:
        nonlocal open_rows
        if count := int((open_rows & rows).sum()):
            left_out[reason] = count
        open_rows = open_rows & ~rows

    _filter(view, rules, scores, drop)
    groups = _groups(view, rules.group_by)
    if rules.rule is not None:
        kept = _ranked(rules, scores, groups, np.flatnonzero(open_rows))
        drop(f"not among the {_in_words(rules.rule)}", ~np.isin(np.arange(len(view)), kept))
    rows = np.flatnonzero(open_rows)
    if not len(rows):
        raise CacheError(
            "no pair is left",
            code="select-nothing",
            where=f"view {view.name}",
            expected="one pair or more",
            found="; ".join(f"{count} {reason}" for reason, count in left_out.items()),
            remedy="widen the bounds, or keep a larger share",
            exit_status=2,
        )
    counts = {
        value: (int(np.isin(rows, members).sum()), len(members)) for value, members in groups.items() if rules.group_by
    }
    return Chosen(rows, scores, left_out, counts)


def _in_words(rule: Rule) -> str:
    return {"large": "largest scores", "small": "scores nearest to 0", "random": "rows drawn"}[rule]


def _filter(view: View, rules: Rules, scores: Floats, drop: Any) -> None:
    count = np.arange(len(view))
    if rules.drop_duplicates:
        drop("equal to an earlier pair", ~np.isin(count, first_of_each(view.keys())))
    if rules.drop_contradictions:
        both = {row for found in contradictions(view, first_of_each(view.keys())) for row in found}
        keys = {view.key(row) for row in both}
        drop("swapped in another pair", np.array([view.key(row) in keys for row in range(len(view))]))
    numbers = view.numbers()
    if rules.max_tokens is not None:
        total = numbers.prompt_tokens + numbers.chosen_tokens + numbers.rejected_tokens
        drop(f"longer than {counted(rules.max_tokens, 'token')}", total > rules.max_tokens)
    if rules.least is not None:
        drop(f"{rules.by} below {rules.least:g}", scores < rules.least)
    if rules.most is not None:
        drop(f"{rules.by} above {rules.most:g}", scores > rules.most)


def pair_scores(view: AnyView, by: str, against: View | None = None) -> Floats:
    """The score of every row, [N]; see `Rules.by` and `choose`. Margins are in nats. Raises CacheError as `choose`."""
    if by.startswith(COLUMN):
        return np.array([_number(view, row, by.removeprefix(COLUMN)) for row in range(len(view))], np.float64)
    numbers = view.numbers()
    if by == "length_difference":
        return (numbers.chosen_tokens - numbers.rejected_tokens).astype(np.float64)
    assert by in MEASURES, by
    chosen, rejected = numbers.chosen_sum, numbers.rejected_sum
    if against is not None:
        other = against.numbers().at(_same_pairs(view, against))
        chosen, rejected = other.chosen_sum - chosen, other.rejected_sum - rejected
    if by == "margin_per_token":
        chosen, rejected = chosen / numbers.chosen_tokens, rejected / numbers.rejected_tokens
    return chosen - rejected


def _number(view: AnyView, row: int, column: str) -> float:
    value = view.extra(row).get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        file, line = view.source(row)
        raise CacheError(
            "a column to choose by needs a number in every row",
            code="select-column",
            where=f"{file}:{line}",
            expected=f"a number under {column!r}",
            found=repr(value)[:100] if column in view.extra(row) else f"columns {', '.join(view.extra(row)) or 'none'}",
            remedy="name another column, or run phase one on rows that all have it",
            exit_status=2,
        )
    return float(value)


def _same_pairs(view: AnyView, against: View) -> Rows:
    """The row of `against` with the same pair, for every row."""
    place = {against.key(row): row for row in range(len(against))}
    found = np.array([place.get(view.key(row), -1) for row in range(len(view))], np.int64)
    if (missing := np.flatnonzero(found < 0)).size:
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
    return found


def _groups(view: View, column: str | None) -> dict[str, Rows]:
    """Value of a column -> its rows; the values in the order in which they come, all rows as one without a column."""
    if column is None:
        return {"": np.arange(len(view))}
    found: dict[str, list[int]] = {}
    for row in range(len(view)):
        extra = view.extra(row)
        value = extra.get(column)
        found.setdefault(value if isinstance(value, str) else json.dumps(value), []).append(row)
    if found.keys() == {"null"}:
        raise CacheError(
            "no row has the column to group by",
            code="select-column",
            where=f"view {view.name}",
            expected=f"a column {column!r}",
            found=f"columns {', '.join(view.extra(0)) or 'none'}",
            remedy="name another column",
            exit_status=2,
        )
    return {value: np.array(rows, np.int64) for value, rows in found.items()}


def _ranked(rules: Rules, scores: Floats, groups: dict[str, Rows], left: Rows) -> Rows:
    """The rows among `left` that the rule takes; of equal scores the earlier row."""
    members = [rows[np.isin(rows, left)] for rows in groups.values()]
    total = round((rules.share or 0) * len(left)) if rules.count is None else rules.count
    sizes = [len(rows) for rows in members]
    draw = np.random.default_rng(rules.seed).random(len(scores))
    rank = {"large": -scores, "small": np.abs(scores), "random": draw}[rules.rule or "large"]
    kept = [
        rows[np.argsort(rank[rows], kind="stable")][:quota]
        for rows, quota in zip(members, quotas(sizes, max(1, total), balanced=rules.balanced), strict=True)
    ]
    return np.concatenate(kept)


def quotas(sizes: Sequence[int], total: int, *, balanced: bool) -> list[int]:
    """How many rows of each group make `total`, or all rows where there are not so many.

    Balanced: equally many of each; what a small group lacks the others give, the earlier ones one more where it does
    not divide. Else in proportion to the sizes, what is left over going to the largest fractions, earlier ones first.
    """
    total = min(total, sum(sizes))
    if not balanced:
        exact = [total * size / max(1, sum(sizes)) for size in sizes]
        found = [int(value) for value in exact]
        order = sorted(range(len(sizes)), key=lambda k: found[k] - exact[k])
        for k in order[: total - sum(found)]:
            found[k] += 1
        return found
    found = [0] * len(sizes)
    while (left := total - sum(found)) > 0:
        with_room = [k for k, size in enumerate(sizes) if found[k] < size]
        for k in with_room[:left]:
            found[k] += min(max(1, left // len(with_room)), sizes[k] - found[k])
    return found

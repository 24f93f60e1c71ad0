"""Rows of several scored or ranked responses: kept whole, or turned into pairs.

A row that is kept whole leaves to training which of its responses are compared. It is cached as pairs of its responses
in their order, `(r1, r2)`, `(r3, r4)` and so on, which follow each other in the view; of an odd number the last is
beside the first again. So each response is stored and run once (the first of an odd number is stored twice), shards
stay as they are, and everything that reads single rows of a cache works: only training puts rows together again.
Stored as the pairs that are compared, every response of N would stand there N - 1 times, and responses of equal score
might be lost. Independent of files and tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from dpoeng.cache.records import MAX_RESPONSES
from dpoeng.engine.data.prompts import plain
from dpoeng.engine.data.shapes import PreferencePair, Shape, fields_of, to_pair, to_row, turns_of
from dpoeng.engine.data.strict_json import RowFault, json_type
from dpoeng.engine.data.structured import parse_structure

RankedPairs = Literal["best", "all"]

COLUMNS = ("score_chosen", "score_rejected", "score_margin", "pair_share", "pair_of_row")
"""Columns that each pair of a ranked row gets, besides the row's own."""

MAX_COMPARED: Final = MAX_RESPONSES**2
"""Limit for the comparisons of responses that make pairs of one row."""

MAX_REPEATED: Final = 1 << 28
"""Characters of a row's prompt times its responses or pairs. Published rows have less than a million."""

_SCORES_OF_COMPLETIONS = ("overall_score", "score", "rating")


def is_ranked(row: Mapping[str, Any], shape: Shape) -> bool:
    """Whether a row has several responses: in `responses` or `completions`, or as a list of texts in `chosen`."""
    chosen = row.get(shape.column("chosen"))
    if isinstance(chosen, list) and chosen and all(isinstance(text, str) for text in chosen):
        return True
    return shape.kind_of(row) == "ranked"


def to_ranked(row: Mapping[str, Any], shape: Shape, source_file: str, source_row: int) -> PreferencePair:
    """One row with all its responses in their order, and a score for each.

    Raises:
        RowFault: `bad-ranking`, there are not two responses with a number each, or none is better; `same-response`;
            and those of `to_row`.
    """
    responses, scores, used = _ranking(row, shape)
    _check_that_one_is_better(scores)
    if len(responses) > MAX_RESPONSES:
        found = f"{len(responses):,} responses are more than the {MAX_RESPONSES:,} that a row may have"
        raise RowFault("bad-ranking", f"{found}; --ranked-pairs best makes pairs of them")
    rest = {name: value for name, value in row.items() if name not in used}
    if "scores" in rest:
        raise RowFault("unused-column", "`scores` is a column that ranked rows get: rename yours")
    named = {f"response {number}": response for number, response in enumerate(responses, 1)}
    pair = to_row(rest, shape, {name: turns_of(named, name) for name in named}, source_file, source_row)
    _check_repetition(pair, len(scores))
    numbers: dict[str, int] = {}
    for number, side in enumerate(pair.sides, 1):
        first = numbers.setdefault(json.dumps(side, sort_keys=True), number)
        if first != number:
            raise RowFault("same-response", f"responses {first} and {number} are equal")
    # The scores are kept among the columns too, where the cache's view finds them.
    return replace(pair, scores=tuple(scores), extra=pair.extra | {"scores": scores})


def _check_repetition(pair: PreferencePair, times: int) -> None:
    size = len(plain(pair.prompt))
    if size * times > MAX_REPEATED:
        raise RowFault(
            "bad-ranking",
            f"a prompt of {size:,} characters would be stored {times:,} times; the limit of one row is "
            f"{MAX_REPEATED:,} characters",
        )


def _check_that_one_is_better(scores: Sequence[float]) -> None:
    if max(scores) == min(scores):
        raise RowFault("bad-ranking", f"no response is better than another: all scores are {scores[0]:g}")


def to_pairs(
    row: Mapping[str, Any], shape: Shape, source_file: str, source_row: int, wanted: RankedPairs
) -> list[PreferencePair]:
    """The pairs of one row, best responses first; responses of equal score make no pair.

    Args:
        row: column -> value.
        shape: how to read its columns.
        source_file: as the user named it.
        source_row: from 1.
        wanted: `best`: the best response against every worse one; `all`: each response against every worse one.

    Raises:
        RowFault: `bad-ranking`, fewer than two responses have a number, or none is better; and the faults of
            `to_pair`.
    """
    responses, scores, used = _ranking(row, shape)
    _check_that_one_is_better(scores)
    order = sorted(range(len(responses)), key=lambda i: -scores[i])
    better = [i for i in order if scores[i] == scores[order[0]]][:1] if wanted == "best" else order
    if len(better) * len(order) > MAX_COMPARED:
        found = f"{len(responses):,} responses make more pairs than one row may"
        raise RowFault("bad-ranking", f"{found}; --ranked-pairs best takes {len(responses) - 1:,} at most")
    places = [(i, j) for i in better for j in order if scores[i] > scores[j]]
    rest = {name: value for name, value in row.items() if name not in used}
    if taken := [name for name in COLUMNS if name in rest]:
        raise RowFault("unused-column", f"pairs of ranked rows get a column `{taken[0]}`: rename yours")
    unmapped = replace(shape, columns={k: v for k, v in shape.columns.items() if k not in ("chosen", "rejected")})
    pairs: list[PreferencePair] = []
    for place, (i, j) in enumerate(places):
        pair = to_pair({**rest, "chosen": responses[i], "rejected": responses[j]}, unmapped, source_file, source_row)
        if not pairs:
            _check_repetition(pair, len(places))
        numbers = (scores[i], scores[j], scores[i] - scores[j], 1 / len(places), place)
        pairs.append(replace(pair, extra=pair.extra | dict(zip(COLUMNS, numbers, strict=True))))
    return pairs


def _ranking(row: Mapping[str, Any], shape: Shape) -> tuple[list[Any], list[float], set[str]]:
    """The responses, a score for each (higher is better), and the columns that they came from."""
    columns = {name: shape.column(name) for name in (*fields_of("ranked"), "chosen", "rejected")}
    chosen = row.get(columns["chosen"])
    if isinstance(chosen, list):
        rejected = row.get(columns["rejected"])
        others = [rejected] if isinstance(rejected, str) else rejected
        if not isinstance(others, list) or not all(isinstance(text, str) for text in others):
            raise RowFault(
                "bad-ranking", f"`{columns['chosen']}` is a list of texts, and `{columns['rejected']}` is not"
            )
        scores = [1.0] * len(chosen) + [0.0] * len(others)
        return [*chosen, *others], scores, {columns["chosen"], columns["rejected"]}
    name = columns["responses"] if columns["responses"] in row else columns["completions"]
    responses = _listed(row.get(name), name)
    if len(responses) < 2:
        raise RowFault("bad-ranking", f"`{name}` has {len(responses)} responses, but two are needed")
    if all(isinstance(one, dict) and "response" in one for one in responses):
        numbers = [next((one[key] for key in _SCORES_OF_COMPLETIONS if key in one), None) for one in responses]
        return [one["response"] for one in responses], list(_numbers(numbers, f"{name}, scores")), {name}
    kept = next((one for one in ("scores", "ranks") if row.get(columns[one]) is not None), None)
    if kept is None:
        raise RowFault("bad-ranking", f"there are neither `{columns['scores']}` nor `{columns['ranks']}`")
    numbers = _listed(row[columns[kept]], columns[kept])
    if len(numbers) != len(responses):
        raise RowFault("bad-ranking", f"{len(responses)} responses, but `{columns[kept]}` has {len(numbers)} numbers")
    sign = -1.0 if kept == "ranks" else 1.0  # rank 1 is the best
    return responses, [sign * value for value in _numbers(numbers, columns[kept])], {name, columns[kept]}


def _listed(value: Any, column: str) -> list[Any]:
    """A list; some files store it as text."""
    value = parse_structure(value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise RowFault("bad-ranking", f"`{column}` must be a list, it is {json_type(value)}")
    return value


def _numbers(values: Sequence[Any], column: str) -> Iterator[float]:
    for value in values:
        try:
            number = math.nan if isinstance(value, bool) or value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise RowFault("bad-ranking", f"`{column}` must contain numbers, it contains {value!r:.80}")
        yield number

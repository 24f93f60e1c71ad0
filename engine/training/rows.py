"""Rows of a view as training and evaluation use them: pairs, weights, labels. Copies nothing up front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds, ScoredGroup, ScoredRow
from dpoeng.cache.selection.mixed import AnyView

WeightArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rows(Sequence[ScoredRow]):
    """Selected rows of a data set, read from the mapped file on access.

    Attributes:
        view: where they are.
        indices: the places in the view at which they begin, of `View.row_starts`.
    """

    view: AnyView
    indices: Sequence[int]

    @classmethod
    def all_of(cls, view: AnyView) -> Rows:
        """Every row of a view."""
        return cls(view, view.row_starts())

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, i: int) -> ScoredRow: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[ScoredRow]: ...
    def __getitem__(self, i: int | slice) -> ScoredRow | Sequence[ScoredRow]:
        if isinstance(i, slice):
            return [self[row] for row in range(len(self))[i]]
        place = self.indices[i]
        return self.view.row(place) if self.view.rows == "ranked" else self.view[place]

    def pair_ids(self) -> list[PairIds]:
        """The tokens of all responses, two by two as the cache has them."""
        rows = (row.pairs if isinstance(row, ScoredGroup) else (row,) for row in self)
        return [pair.ids for pairs in rows for pair in pairs]

    def source(self, i: int) -> str:
        """The file and row of a pair."""
        file, line = self.view.source(self.indices[i])
        return f"{file}, row {line}"

    def extras(self) -> Iterator[dict[str, Any]]:
        """The user's other columns of each row."""
        return map(self.view.extra, self.indices)

    def prompts(self) -> list[bytes]:
        """Each row's prompt token ids as bytes."""
        return [self.view.prompt_ids(place).tobytes() for place in self.indices]

    def weights(self, column: str | None) -> WeightArray | None:
        """A user's column of numbers >= 0, as weights of the pairs; None if no column is named.

        Raises:
            UserError: a row has no number, or something else; or all are 0.
        """
        if column is None:
            return None
        weights = np.zeros(len(self))
        for at, extra in enumerate(self.extras()):
            value = extra.get(column)
            number = _as_float(value)
            if not 0 <= number < math.inf:
                raise UserError(
                    f"the column {column} does not contain a weight",
                    code="data-weight",
                    where=self.source(at),
                    expected="a number >= 0",
                    found="no such column" if value is None else _shown(value),
                    remedy="correct the row, or name another column with --pair-weight-column; the columns here are "
                    + (", ".join(sorted(extra)) or "none"),
                    exit_status=3,
                )
            weights[at] = number
        if len(weights) and not weights.any():
            raise UserError(
                f"all weights in the column {column} are 0",
                code="data-weight",
                where="--pair-weight-column",
                expected="at least one number > 0",
                remedy="name another column",
                exit_status=3,
            )
        return weights

    def labels(self, columns: Sequence[str] | None) -> dict[str, list[str]]:
        """Column -> the value of each row; see `labels_of`.

        Raises:
            UserError: a named column is in no row.
        """
        extras = list(self.extras())
        try:
            return labels_of(extras, columns)
        except KeyError as missing:
            names = sorted({name for extra in extras for name in extra})
            raise UserError(
                f"no held-out pair has a column {missing.args[0]}",
                code="config-value",
                where="--eval-group-by",
                expected=", ".join(names) or "the pairs have no further columns",
                found=str(missing.args[0]),
                remedy="name columns of the pairs",
            ) from None


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The pairs of the evaluations, with identifiers of their prompts, the columns to group them by, and their places
    in the user's files.
    """

    rows: Sequence[ScoredRow]
    weights: WeightArray | None
    prompts: Sequence[bytes]
    labels: Mapping[str, Sequence[str]]
    source_of: Callable[[int], str] = "row {}".format


def _shown(value: object) -> str:
    try:
        return repr(value)[:200]
    except ValueError:  # Python refuses to format integers with thousands of digits
        return "an integer of thousands of digits"


GROUPS_AT_MOST = 12
"""A column with more values than this does not count as categories."""

PAIRS_A_GROUP = 3
"""Nor does one with fewer rows per value than this."""


def labels_of(extras: Sequence[Mapping[str, Any]], columns: Iterable[str] | None) -> dict[str, list[str]]:
    """Column -> the value of each row, as text.

    Args:
        extras: the user's other columns, row by row.
        columns: the columns; None selects those with text or yes/no in every row, 2 to `GROUPS_AT_MOST` values, and
            on average at least `PAIRS_A_GROUP` rows per value.

    Raises:
        KeyError: a named column is in no row.
    """
    names = sorted({name for extra in extras for name in extra})
    if columns is None:
        labels = {}
        for name in names:
            column_values = [extra.get(name) for extra in extras]
            most = min(GROUPS_AT_MOST, len(column_values) // PAIRS_A_GROUP)
            if all(isinstance(value, str | bool) for value in column_values) and 2 <= len(set(column_values)) <= most:
                labels[name] = [_text(value) for value in column_values]
        return labels
    for name in columns:
        if name not in names:
            raise KeyError(name)
    return {name: [_text(extra.get(name)) for extra in extras] for name in columns}


def _as_float(value: object) -> float:
    """A number as a float; NaN for anything else, infinity for an integer beyond float's range."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "(none)" if value is None else str(value)

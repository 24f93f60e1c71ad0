"""Reads several views as one: from one or several caches, all with numbers of the same reference."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from dpoeng.cache.errors import CacheError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import IdArray, ScoredPair, ScoredRow
from dpoeng.cache.shard import Numbers


class MixedView:
    """The rows of several views, one view after the other; read like a `View`.

    Attributes:
        parts: the views.
        name: their names, joined by +.
        meta: the first view's, with the source files of all.
        rows, spec: the same in all views.
    """

    def __init__(self, parts: Sequence[View]) -> None:
        """Joins views. Raises CacheError if their references or kinds of rows differ."""
        first = parts[0]
        for other in parts[1:]:
            if (other.spec.digest, other.rows) != (first.spec.digest, first.rows):
                raise CacheError(
                    "these views cannot be trained on together",
                    code="mix-reference",
                    where=f"view {other.name}",
                    expected=f"{first.rows} rows of reference {first.spec.digest}, as in view {first.name}",
                    found=f"{other.rows} rows of reference {other.spec.digest}",
                    remedy="score both sets of pairs by one reference, with the same model options; `dpoeng cache "
                    "diff` shows how two references differ",
                    exit_status=2,
                )
        self.parts = tuple(parts)
        self.name = "+".join(part.name for part in parts)
        files = {name: digest for part in parts for name, digest in (part.meta.get("files") or {}).items()}
        self.meta: dict[str, Any] = {**first.meta, **({"files": files} if files else {})}
        self.rows, self.spec = first.rows, first.spec
        self.starts = [0, *itertools.accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self.starts[-1]

    def _part(self, i: SupportsIndex) -> tuple[View, int]:
        row = operator.index(i)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of views with {len(self)} rows")
        row %= len(self)
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[number], row - self.starts[number]

    def __getitem__(self, i: SupportsIndex) -> ScoredPair:
        part, row = self._part(i)
        return part[row]

    def prompt_ids(self, i: SupportsIndex) -> IdArray:
        """As `View.prompt_ids`."""
        part, row = self._part(i)
        return part.prompt_ids(row)

    def row(self, i: SupportsIndex) -> ScoredRow:
        """As `View.row`."""
        part, row = self._part(i)
        return part.row(row)

    def row_starts(self) -> Sequence[int]:
        """As `View.row_starts`."""
        return [start + row for part, start in zip(self.parts, self.starts, strict=False) for row in part.row_starts()]

    def scores(self, i: SupportsIndex) -> tuple[float, ...]:
        """Like `View.scores`."""
        part, row = self._part(i)
        return part.scores(row)

    def source(self, i: SupportsIndex) -> tuple[str, int]:
        """Like `View.source`."""
        part, row = self._part(i)
        return part.source(row)

    def extra(self, i: SupportsIndex) -> dict[str, Any]:
        """Like `View.extra`."""
        part, row = self._part(i)
        return part.extra(row)

    def key(self, i: SupportsIndex) -> bytes:
        """Like `View.key`."""
        part, row = self._part(i)
        return part.key(row)

    def keys(self) -> npt.NDArray[np.uint8]:
        """[N, 16] pair keys."""
        return np.concatenate([part.keys() for part in self.parts])

    def numbers(self) -> Numbers:
        """Like `View.numbers`."""
        return Numbers.join([part.numbers() for part in self.parts])


AnyView = View | MixedView

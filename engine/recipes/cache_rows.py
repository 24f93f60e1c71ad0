"""A cache as a sequence of rows with arrays, for notebooks; converts to an Arrow or pandas table or a torch Dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
import pyarrow as pa

from dpoeng.cache.exchange.responses import responses_of
from dpoeng.cache.reader import View
from dpoeng.cache.records import ROW_KINDS
from dpoeng.cache.schema import IdArray, LogpArray

if TYPE_CHECKING:
    from dpoeng.engine.training.dataset import CachedPairs


@dataclass(frozen=True, slots=True, eq=False)
class CacheRow:
    """One pair and the reference's log-probs. The arrays are read-only parts of the mapped file.

    Attributes:
        prompt_ids: [P] int32.
        chosen_ids: [C] int32.
        rejected_ids: [R] int32.
        chosen_logps: [C - chosen_start] float32, in nats; None if sums were imported.
        rejected_logps: [R - rejected_start] float32.
        chosen_sum: the sum of chosen_logps in float64: log p_ref(chosen | prompt).
        rejected_sum: the sum of rejected_logps.
        chosen_start: index of the first scored token in chosen_ids, usually 0; tokens before it are the prompt's end.
        rejected_start: the same for rejected_ids.
        extra: your own columns.
        source_file: the file that the row came from; `rows-...` for rows in memory.
        source_row: row number in that file, from 1.
    """

    prompt_ids: IdArray
    chosen_ids: IdArray
    rejected_ids: IdArray
    chosen_logps: LogpArray | None
    rejected_logps: LogpArray | None
    chosen_sum: float
    rejected_sum: float
    chosen_start: int
    rejected_start: int
    extra: dict[str, Any]
    source_file: str
    source_row: int


class CacheRows(Sequence[CacheRow]):
    """The rows of a view, in the order of their source. A slice is a CacheRows, too, on the same mapped files."""

    def __init__(self, view: View, indices: range | None = None) -> None:
        self.view = view
        self._indices = range(len(view)) if indices is None else indices

    @classmethod
    def open(cls, cache: Path, view: str | None = None, *, verify: Literal["open", "full"] = "full") -> Self:
        """See `dpoeng.open_cache`."""
        return cls(View.open(cache, view, verify=verify))

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, i: int) -> CacheRow: ...
    @overload
    def __getitem__(self, i: slice) -> CacheRows: ...
    def __getitem__(self, i: int | slice) -> CacheRow | CacheRows:
        """Row i, or the rows of a slice. Raises IndexError outside."""
        if isinstance(i, slice):
            return CacheRows(self.view, self._indices[i])
        try:
            at = self._indices[i]
        except IndexError:
            raise IndexError(f"row {i} of {len(self)} rows") from None
        return self._row(at)

    def __iter__(self) -> Iterator[CacheRow]:
        return map(self._row, self._indices)

    def __repr__(self) -> str:
        return f"<{len(self)} rows of view {self.view.name!r}>"

    def _row(self, at: int) -> CacheRow:
        scored = self.view[at]
        ids = scored.ids
        sums_only = self.view.spec.holds_sums
        return CacheRow(
            prompt_ids=ids.prompt_ids,
            chosen_ids=ids.chosen_ids,
            rejected_ids=ids.rejected_ids,
            chosen_logps=None if sums_only else scored.chosen_logps,
            rejected_logps=None if sums_only else scored.rejected_logps,
            chosen_sum=scored.chosen_sum,
            rejected_sum=scored.rejected_sum,
            chosen_start=ids.chosen_start,
            rejected_start=ids.rejected_start,
            extra=self.view.extra(at),
            source_file=self.view.source(at)[0],
            source_row=self.view.source(at)[1],
        )

    def to_arrow(self) -> pa.Table:
        """A table of all columns, including your own; one whose name is taken is called `extra.NAME`.

        This copies the data: the cache stores rows by length, the table has them in source order. A column with values
        of different types becomes text, as JSON.
        """
        rows = list(self)
        columns: dict[str, Any] = {
            name: _lists([getattr(row, name) for row in rows], kind)
            for name, kind in (
                ("prompt_ids", pa.int32()),
                ("chosen_ids", pa.int32()),
                ("rejected_ids", pa.int32()),
                ("chosen_logps", pa.float32()),
                ("rejected_logps", pa.float32()),
            )
        }
        for name in ("chosen_sum", "rejected_sum", "chosen_start", "rejected_start", "source_file", "source_row"):
            columns[name] = [getattr(row, name) for row in rows]
        for name in dict.fromkeys(chain.from_iterable(row.extra for row in rows)):
            column = f"extra.{name}" if name in columns else name
            columns[column] = _typed([row.extra.get(name) for row in rows])
        return pa.table(columns)

    def to_pandas(self) -> Any:
        """The same as a pandas DataFrame; needs pandas."""
        return self.to_arrow().to_pandas()

    def to_torch(self) -> CachedPairs:
        """A torch Dataset of dicts of tensors on the mapped files, without a copy; see `CachedPairs`."""
        from dpoeng.engine.training.dataset import CachedPairs

        return CachedPairs(self.view, self._indices)


@dataclass(frozen=True, slots=True, eq=False)
class ResponsesRow:
    """A row of any kind: a prompt, its responses and what the data set says of them. Arrays as in `CacheRow`.

    Attributes:
        prompt_ids: [P] int32.
        responses: of each response its ids [R], int32; of a pair chosen and rejected, of an unpaired row its own and
            the mismatched one.
        logps: of each response the log-probs [R - start, without gaps], float32 in nats; None where sums were imported.
        sums: of each response, log p_ref(response | prompt).
        starts: the first scored token of each response.
        scores: of a ranked row a number for each response, more is better; of an unpaired row 1 or 0 for the first; of
            a pair none.
        extra: your own columns.
        source_file: as in `CacheRow`.
        source_row: as in `CacheRow`.
    """

    prompt_ids: IdArray
    responses: tuple[IdArray, ...]
    logps: tuple[LogpArray, ...] | None
    sums: tuple[float, ...]
    starts: tuple[int, ...]
    scores: tuple[float, ...]
    extra: dict[str, Any]
    source_file: str
    source_row: int


class ResponsesRows(Sequence[ResponsesRow]):
    """The rows of a view of any kind, in the order of their source."""

    def __init__(self, view: View, places: Sequence[int] | None = None) -> None:
        self.view = view
        self._places = view.row_starts() if places is None else places

    @classmethod
    def open(cls, cache: Path, view: str | None = None, *, verify: Literal["open", "full"] = "full") -> Self:
        """See `dpoeng.open_responses`."""
        return cls(View.open(cache, view, rows=ROW_KINDS, verify=verify))

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, i: int) -> ResponsesRow: ...
    @overload
    def __getitem__(self, i: slice) -> ResponsesRows: ...
    def __getitem__(self, i: int | slice) -> ResponsesRow | ResponsesRows:
        """Row i, or the rows of a slice. Raises IndexError outside."""
        if isinstance(i, slice):
            return ResponsesRows(self.view, self._places[i])
        place = self._places[i]
        found = responses_of(self.view, place)
        source_file, source_row = self.view.source(place)
        return ResponsesRow(
            prompt_ids=self.view[place].ids.prompt_ids,
            responses=tuple(one.ids for one in found),
            logps=None if self.view.spec.holds_sums else tuple(one.logps for one in found),
            sums=tuple(float(one.logps.sum(dtype=np.float64)) for one in found),
            starts=tuple(one.start for one in found),
            scores=self.view.scores(place),
            extra=self.view.extra(place),
            source_file=source_file,
            source_row=source_row,
        )

    def __repr__(self) -> str:
        return f"<{len(self)} {self.view.rows} rows of view {self.view.name!r}>"


def _lists(parts: list[Any], kind: pa.DataType) -> pa.Array:
    """A list column from arrays; null if there are none."""
    if any(part is None for part in parts) or not parts:
        return pa.array(parts, pa.large_list(kind))
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts), kind))


def _typed(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        import json

        return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())

"""Imports rows that another program computed; checks all of them before it commits the first.

In between they are in a temporary file, so memory holds only a few bytes per row.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from dpoeng.cache.errors import UserError
from dpoeng.cache.exchange.export import GAPS, IDS, TOKENS, bad_suffix, batched
from dpoeng.cache.files import hash_file
from dpoeng.cache.foreign.tables import MAX_ROW_BYTES, Batch, arrow_batches, parquet_batches, reading
from dpoeng.cache.index import KeyIndex
from dpoeng.cache.records import MAX_RESPONSES
from dpoeng.cache.schema import Gaps, PairIds, ScoredPair, as_ids, first_of_each, gap_tokens, pair_key
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.spool import Spool
from dpoeng.cache.store import Store
from dpoeng.cache.table import ViewEntry

_MAX_LISTS: Final = (
    1 << 20
)  # lists in one line: an export has seven; each empty list takes 3 bytes in the file, but 64 in memory
# Column names of the sums: in TRL and dpoeng, and in older TRL and open-instruct.
_SUMS: Final = (("ref_chosen_logps", "ref_rejected_logps"), ("reference_chosen_logps", "reference_rejected_logps"))


@dataclass(frozen=True, slots=True)
class Imported:
    """Result of an import.

    Attributes:
        rows: rows of the file.
        added: pairs of responses that were new to the cache; a ranked row has several.
        view: the view, if the rows named a source.
        kind: of the rows.
    """

    rows: int
    added: int
    view: str | None
    kind: str


def file_holds_sums(path: Path) -> bool:
    """Whether a file to import has only sums, as TRL writes them. The first row decides.

    Raises:
        UserError: the file has neither sums nor log-probs of tokens, or cannot be read.
    """
    for columns in _read_columns(path):
        if all(columns.get(name) is not None for name in TOKENS):
            return False
        if columns.get("response_ids") is not None and columns.get("ref_logps") is not None:
            return columns.get("ref_token_logps") is None
        if _sum_columns(columns):
            return True
        raise _lacking(path, 1, columns)
    raise UserError(
        "the file has no rows to import",
        code="import-columns",
        where=str(path),
        remedy="name a file that `dpoeng cache export` or TRL wrote",
        exit_status=3,
    )


def import_rows(
    store: Store, spec: ReferenceSpec, path: Path, view: str | None = None, meta: Mapping[str, Any] | None = None
) -> Imported:
    """Imports rows that another program computed, under a reference that the caller vouches for.

    The file has the columns that `export_view` writes, for one kind of rows; source columns are optional. It needs
    token log-probs, or sums if the spec is one of sums. Nothing in the file proves which model computed its numbers.
    Therefore the records mark them as imported; the parity check before training, or `verify --recompute`, finds a
    wrong claim. For equal pairs the first row's numbers count.

    Args:
        store: the cache.
        spec: the reference; `spec.of_sums()` for a file with sums only.
        path: `.jsonl`, `.parquet` or `.arrow`.
        view: name of a view to write, with all rows of the file in order; None for no view.
        meta: further fields of the view's metadata.

    Raises:
        UserError: columns are missing, or a row's numbers cannot be correct; the message names the row.
    """
    rows, bytes_read, number, kind = _Rows(), hash_file(path), 0, "pairs"
    for number, found in enumerate(_read(path, sums=spec.holds_sums), 1):
        if number > 1 and found.kind != kind:
            raise _bad_row(path, number, f"{found.kind}, after {kind}")
        kind = found.kind
        for pair, extra in found.pairs:
            rows.append(pair, *found.source, extra)
    if hash_file(path) != bytes_read:
        raise _changed(path)
    digest = store.put_spec(spec)
    index = store.lookup(digest)
    missing = rows.missing_in(index)
    provenance = {"imported": {"xxh3_128": bytes_read, "name": path.name}}
    for some in batched(missing):
        store.commit_shard(digest, [rows.pair(i) for i in some], provenance)
    store.seal(digest)
    if view is not None:
        about = {**(meta or {}), **provenance, **({"rows": kind} if kind != "pairs" else {})}
        store.write_view(digest, view, map(rows.entry, range(len(rows))), about, known=index)
    return Imported(number, len(missing), view, kind)


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the file: its pairs of responses, each with its columns in the view; its source; and its kind."""

    pairs: Sequence[tuple[ScoredPair, Mapping[str, Any]]]
    source: tuple[str, int]
    kind: str


# source row; bytes of the file name and of the columns; lengths of prompt, chosen, rejected, chosen log-probs, rejected
# log-probs; both starts; number of gaps on both sides
_HEAD: Final = struct.Struct("<q11i")


class _Rows:
    """Rows with their sources, in a temporary file."""

    def __init__(self) -> None:
        self._spool, self._keys = Spool(), bytearray()

    def __len__(self) -> int:
        return len(self._spool)

    def append(self, row: ScoredPair, source_file: str, source_row: int, extra: Mapping[str, Any]) -> None:
        ids, name, columns = row.ids, source_file.encode(), json.dumps(dict(extra)).encode()
        parts = (ids.prompt_ids, ids.chosen_ids, ids.rejected_ids, row.chosen_logps, row.rejected_logps)
        gaps = as_ids([edge for gap in (*ids.chosen_gaps, *ids.rejected_gaps) for edge in gap])
        counts = (ids.chosen_start, ids.rejected_start, len(ids.chosen_gaps), len(ids.rejected_gaps))
        head = _HEAD.pack(source_row, len(name), len(columns), *map(len, parts), *counts)
        self._spool.append(b"".join((head, name, columns, *(part.tobytes() for part in (*parts, gaps)))))
        self._keys += pair_key(ids)

    def pair(self, i: int) -> ScoredPair:
        data = self._spool[i]
        _, name, columns, *lengths, chosen_start, rejected_start, first, second = _HEAD.unpack_from(data)
        ends = [0, *accumulate(4 * length for length in (*lengths, 2 * first, 2 * second))]
        behind = data[_HEAD.size + name + columns :]
        kinds = ("<i4",) * 3 + ("<f4",) * 2 + ("<i4",) * 2
        parts: list[Any] = [
            np.frombuffer(behind[a:b], kind) for (a, b), kind in zip(pairwise(ends), kinds, strict=True)
        ]
        prompt, chosen, rejected, chosen_logps, rejected_logps, *gaps = parts
        sides = (_pairs_of(gaps[0].tolist()), _pairs_of(gaps[1].tolist()))
        return ScoredPair(
            PairIds(prompt, chosen, rejected, chosen_start, rejected_start, *sides), chosen_logps, rejected_logps
        )

    def entry(self, i: int) -> ViewEntry:
        data = self._spool[i]
        source_row, name, columns, *_ = _HEAD.unpack_from(data)
        rest = data[_HEAD.size :]
        key, extra = bytes(self._keys[16 * i : 16 * i + 16]), json.loads(rest[name : name + columns])
        return ViewEntry(rest[:name].decode(), source_row, key, extra)

    def missing_in(self, index: KeyIndex) -> list[int]:
        """The first row of each pair that the index does not have."""
        first = first_of_each(np.frombuffer(self._keys, np.uint8).reshape(-1, 16))
        return [i for i in first.tolist() if self.pair(i).ids not in index]


def _read(path: Path, *, sums: bool) -> Iterator[_Row]:
    """Yields a file's rows with their sources: the named one, or else this file and the row number."""
    before: tuple[str, int] | None = None
    for number, columns in enumerate(_read_columns(path), 1):
        of_responses = columns.get("response_ids") is not None
        values = _sum_columns(columns) if sums else TOKENS
        needed = ("prompt_ids", "scores", _RESPONSE_VALUES[sums]) if of_responses else (*IDS, *values)
        if (not values and not of_responses) or any(columns.get(name) is None for name in needed):
            raise _lacking(path, number, columns)
        try:
            with np.errstate(over="ignore"):  # overflow gives infinity, which row.check() refuses
                if of_responses:
                    kind, pairs = _of_responses(columns, sums=sums)
                else:
                    kind, pairs = "pairs", [(_row(columns, values), {})]
            source = str(columns.get("source_file") or path.name), int(columns.get("source_row") or number)
            if not 0 <= source[1] < 1 << 63:
                raise ValueError(f"source_row {source[1]}"[:100])
            source[0].encode()  # raises for an unpaired surrogate, which UTF-8 cannot express
            if kind == "ranked" and source == before:
                raise ValueError(f"the source {source[0][:80]}:{source[1]} of the row before")
        except (ValueError, TypeError, OverflowError, KeyError, IndexError) as error:
            raise _bad_row(path, number, str(error)) from None
        yield _Row(pairs, source, kind)
        before = source


_RESPONSE_VALUES: Final = {False: "ref_token_logps", True: "ref_logps"}


def _of_responses(columns: Mapping[str, Any], *, sums: bool) -> tuple[str, list[tuple[ScoredPair, Mapping[str, Any]]]]:
    """The kind of a row of `RESPONSES_SCHEMA`, and its responses two by two; an odd last one has the first beside it.

    Raises:
        ValueError: its lists do not fit together.
    """
    responses, scores = columns["response_ids"], [float(score) for score in columns["scores"]]
    unpaired = len(scores) == 1
    values, gaps = columns[_RESPONSE_VALUES[sums]], columns.get("response_gaps") or [()] * len(responses)
    count = 2 if unpaired else len(scores)
    if {len(responses), len(values), len(gaps)} != {count}:
        raise ValueError(f"{len(responses)} responses, {len(values)} log-probs and {len(scores)} scores")
    if not all(map(math.isfinite, scores)) or (unpaired and scores[0] not in (0, 1)):
        raise ValueError(f"scores {scores}"[:100])
    if count > MAX_RESPONSES:
        raise ValueError(f"{count:,} responses are more than the {MAX_RESPONSES:,} that a row may have")
    if not unpaired and len(set(scores)) < 2:
        raise ValueError(f"scores {scores} of which none is better than another"[:100])
    names = _SUMS[0] if sums else TOKENS
    pairs: list[tuple[ScoredPair, Mapping[str, Any]]] = []
    for first in range(0, count, 2):
        both = (first, (first + 1) % count)
        sides = {
            **{name: responses[place] for name, place in zip(IDS[1:], both, strict=True)},
            **{name: values[place] for name, place in zip(names, both, strict=True)},
            **{name: gaps[place] for name, place in zip(GAPS, both, strict=True)},
        }
        extra: dict[str, Any] = {} if first else {"label": scores[0] == 1} if unpaired else {"scores": scores}
        pairs.append((_row({"prompt_ids": columns["prompt_ids"], **sides}, names), extra))
    return "unpaired" if unpaired else "ranked", pairs


def _sum_columns(columns: Mapping[str, Any]) -> Sequence[str]:
    """The column names of a row's sums; empty if it has none."""
    return next((names for names in _SUMS if all(columns.get(name) is not None for name in names)), ())


def _read_columns(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        with reading(path, "JSON Lines"):
            yield from _json_columns(path)
    elif path.suffix in (".parquet", ".arrow"):  # the datasets library writes .arrow
        with reading(path, path.suffix[1:].capitalize()):
            batches = parquet_batches(path) if path.suffix == ".parquet" else arrow_batches(path)
            yield from _table_columns(batches, path)
    else:
        raise bad_suffix(path)


def _json_columns(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number in count(1):
            if not (line := file.readline(MAX_ROW_BYTES + 1)):
                return
            if len(line) > MAX_ROW_BYTES or line.count(b"[") > _MAX_LISTS:
                raise _too_long(path, number)
            try:
                columns = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _bad_row(path, number, str(error)) from None
            if not isinstance(columns, dict):
                raise _bad_row(path, number, type(columns).__name__)
            yield columns


def _table_columns(batches: Iterable[Batch], path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    for batch, too_long in batches:
        for index in range(batch.num_rows):
            number += 1
            if too_long[index]:
                raise _too_long(path, number)
            try:
                yield {
                    name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
            except (ValueError, OverflowError) as error:  # a date that Python cannot hold
                raise _bad_row(path, number, str(error)) from None


def _too_long(path: Path, number: int) -> UserError:
    return _bad_row(path, number, f"a row larger than the limit of {MAX_ROW_BYTES >> 20} MiB")


def _row(columns: Mapping[str, Any], values: Sequence[str]) -> ScoredPair:
    prompt, chosen, rejected = (as_ids(columns[name]) for name in IDS)
    gaps = [_pairs_of(columns.get(name) or ()) for name in GAPS]
    if values == TOKENS:
        logps = [np.asarray(columns[name], np.float32) for name in values]
    else:
        logps = [
            np.zeros(len(ids) - gap_tokens(of_side), np.float32)
            for ids, of_side in zip((chosen, rejected), gaps, strict=True)
        ]
        for of_side, name in zip(logps, values, strict=True):
            of_side[:1] = columns[name]
    starts = [
        len(ids) - len(of_side) - gap_tokens(between)
        for ids, of_side, between in zip((chosen, rejected), logps, gaps, strict=True)
    ]
    row = ScoredPair(PairIds(prompt, chosen, rejected, starts[0], starts[1], gaps[0], gaps[1]), logps[0], logps[1])
    row.check()
    return row


def _pairs_of(edges: Sequence[int]) -> Gaps:
    if len(edges) % 2:
        raise ValueError("each gap needs a beginning and an end")
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _bad_row(path: Path, number: int, found: str) -> UserError:
    return UserError(
        "a row of the import is invalid",
        code="import-row",
        where=f"{path}:{number}",
        expected="token ids, and for each scored token a finite log-probability of at most 0",
        found=found[:200],
        remedy="correct the row at its source; nothing was imported",
        exit_status=3,
    )


def _changed(path: Path) -> UserError:
    return UserError(
        "the file changed during the run",
        code="data-changed",
        where=str(path),
        expected="the same bytes throughout the run",
        remedy="run again once nothing writes to the file; nothing was imported",
        exit_status=3,
    )


def _lacking(path: Path, number: int, columns: Mapping[str, Any]) -> UserError:
    return UserError(
        "the file to import lacks columns",
        code="import-columns",
        where=f"{path}:{number}",
        expected=", ".join(IDS) + f"; and {' and '.join(TOKENS)}, or sums: {' and '.join(_SUMS[0])}; or, of several "
        "responses or labels, prompt_ids, response_ids, scores, and ref_token_logps or ref_logps",
        found=", ".join(name for name, value in columns.items() if value is not None) or "none",
        remedy="write these columns; from TRL: trainer.train_dataset.to_parquet(FILE) once it has precomputed",
        exit_status=3,
    )

"""Reads files into preference pairs: filters, shapes, rejects with file and row, duplicates and contradictions.

Independent of tokens: here two pairs are equal if their texts are.
"""

from __future__ import annotations

import bisect
import difflib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import stat_result
from pathlib import Path
from typing import Any

import xxhash

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import hash_file
from dpoeng.cache.foreign.tables import unreadable
from dpoeng.cache.words import counted
from dpoeng.engine.data import readers
from dpoeng.engine.data.hub import local_file, shown_name
from dpoeng.engine.data.in_memory import RowsInMemory, is_in_memory, place
from dpoeng.engine.data.kinds.ranked import RankedPairs, is_ranked, to_pairs, to_ranked
from dpoeng.engine.data.kinds.unpaired import Mismatcher
from dpoeng.engine.data.messages import essence
from dpoeng.engine.data.prompts import PROMPT_COLUMNS, QUESTIONS
from dpoeng.engine.data.rejects import Reject, check_reject_share
from dpoeng.engine.data.shapes import (
    COLUMN_FIELDS,
    KIND_FIELDS,
    TRANSCRIPT,
    PreferencePair,
    Shape,
    Turns,
    check_kind,
    fields_of,
    holds_human_turn,
    to_pair,
    to_unpaired,
)
from dpoeng.engine.data.strict_json import RowFault
from dpoeng.engine.data.tables import csv_value
from dpoeng.engine.data.where import parse_condition

# Give up early on a large file that is mostly unusable, before the list of rejects fills the memory.
GIVE_UP_EVERY = 10_000
_ROW_BITS = 40


@dataclass(frozen=True, slots=True)
class Repeat:
    """A row that equals an earlier one (a duplicate) or contradicts it (swapped responses)."""

    source_file: str
    source_row: int
    first_file: str
    first_row: int


@dataclass(frozen=True, slots=True)
class ReadPair:
    """A usable row, and the earlier rows that it repeats or contradicts."""

    pair: PreferencePair
    duplicate: Repeat | None
    contradiction: Repeat | None


@dataclass(slots=True)
class PromptOrigins:
    """Counts of pairs without a plain `prompt` column, and an example of a guessed prompt.

    Attributes:
        columns: column used as the prompt -> pairs.
        conversations: pairs in which a column became a message next to a question given as text.
        transcripts: pairs whose prompt is the common beginning of both texts.
        repeated: pairs whose responses repeated the prompt, which is now kept once.
        ranked, of_ranked: rows of several responses, and the pairs made from them; 0 if they are kept whole.
        responses: of rows that are kept whole.
        example: (file:row, end of the prompt) of the first transcript.
    """

    columns: dict[str, int] = field(default_factory=dict)
    conversations: int = 0
    transcripts: int = 0
    repeated: int = 0
    ranked: int = 0
    of_ranked: int = 0
    responses: int = 0
    example: tuple[str, str] | None = None

    def add(self, pair: PreferencePair, *, formatted: bool) -> None:
        """Counts a pair; `formatted` if the user gave a format for prompts, and so chose the column on purpose."""
        if pair.origin in QUESTIONS and isinstance(pair.prompt, str) and not formatted:
            self.columns[pair.origin] = self.columns.get(pair.origin, 0) + 1
        self.conversations += pair.origin in QUESTIONS and isinstance(pair.prompt, list)
        self.repeated += pair.repeated
        if pair.origin == TRANSCRIPT:
            self.transcripts += 1
            if self.example is None:
                assert isinstance(pair.prompt, str)
                self.example = (place(pair.source_file, pair.source_row), repr(pair.prompt[-60:]))

    def remarks(self) -> list[str]:
        """One line for each remark."""
        remarks = [f"prompt taken from `{name}` in {counted(count, 'pair')}" for name, count in self.columns.items()]
        if self.conversations:
            remarks.append(
                f"question, system prompt and history became a conversation in {counted(self.conversations, 'pair')}"
            )
        if self.example is not None:
            where, end = self.example
            remarks.append(
                f"prompt guessed from the common beginning of both texts in {counted(self.transcripts, 'pair')}, e.g. "
                f"{where} ends {end}"
            )
        if self.of_ranked:
            remarks.append(
                f"{counted(self.ranked, 'row')} of several responses became {counted(self.of_ranked, 'pair')}"
            )
        elif self.ranked:
            remarks.append(
                f"{counted(self.ranked, 'row')} of {counted(self.responses, 'response')}, ranked by their scores"
            )
        if self.repeated:
            remarks.append(f"responses repeated their prompt in {counted(self.repeated, 'pair')}; dpoeng keeps it once")
        return remarks


@dataclass(slots=True)
class PairFile:
    """The pairs of a file, and how they were read.

    Attributes:
        pairs: in the order of the files and their rows, including duplicates. Empty if the pairs were streamed.
        count: number of pairs.
        rejects: rows left out, in the same order.
        filtered: number of rows that the filter left out.
        files: path as given -> xxh3_128 (hex) of the file's bytes.
        duplicates: rows equal to an earlier one in prompt, responses, tools and template arguments.
        contradictions: rows whose responses are swapped in an earlier row.
        multi_turn: pairs of texts with a further human turn inside a response; in messages such turns are not scored.
        columns: the names of all columns.
        prompts: where the prompts come from, as far as it is unusual.
        misspelt: unused column -> the field with a similar name that no column has.
        kind: kind of the rows, one of `shapes.KIND_FIELDS`.
    """

    pairs: list[PreferencePair] = field(default_factory=list)
    count: int = 0
    rejects: list[Reject] = field(default_factory=list)
    filtered: int = 0
    files: dict[str, str] = field(default_factory=dict)
    duplicates: list[Repeat] = field(default_factory=list)
    contradictions: list[Repeat] = field(default_factory=list)
    multi_turn: int = 0
    columns: tuple[str, ...] = ()
    prompts: PromptOrigins = field(default_factory=lambda: PromptOrigins())
    misspelt: dict[str, str] = field(default_factory=dict)
    kind: str = "pairs"

    def column_remark(self) -> str:
        """See the function `column_remark`."""
        return column_remark(self.prompts, self.misspelt)


def read_pairs(
    paths: Sequence[Path | RowsInMemory],
    *,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    max_reject_share: float = 0.05,
    prompt_format: str | None = None,
    ranked_pairs: RankedPairs | None = None,
) -> PairFile:
    """Reads all pairs of the given files and directories.

    Args:
        paths: JSON Lines, JSON, CSV, Parquet or Arrow files, or directories of them; or rows in memory.
        columns: field -> column of the file, for `prompt`, `chosen`, `rejected`, `tools`, `chat_template_kwargs`.
        where: a filter, see `where`; rows that do not match are counted, not rejected.
        max_reject_share: the largest allowed share of rejects among rows that pass the filter.
        prompt_format: a text with `{prompt}` to put around prompts given as texts, as the SFT data had it.
        ranked_pairs: which pairs to make from a row of several responses: the `best` against the others, or `all`; None
            keeps such rows whole.

    Raises:
        UserError: a file cannot be read, is empty or changes during reading; columns are missing; too many rejects.
    """
    pair_file, pairs = stream_pairs(
        paths,
        columns=columns,
        where=where,
        max_reject_share=max_reject_share,
        prompt_format=prompt_format,
        ranked_pairs=ranked_pairs,
    )
    pair_file.pairs = list(pairs)
    return pair_file


def stream_pairs(
    paths: Sequence[Path | RowsInMemory],
    *,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    max_reject_share: float = 0.05,
    prompt_format: str | None = None,
    ranked_pairs: RankedPairs | None = None,
) -> tuple[PairFile, Iterator[PreferencePair]]:
    """Reads pairs one by one, without keeping them.

    Args and errors are those of `read_pairs`; the iterator raises a file's errors when it reaches them.

    Returns:
        The counts, complete once the iterator has ended; and the iterator, which can be used once.
    """
    stream = PairStream(paths, columns=columns, where=where, prompt_format=prompt_format, ranked_pairs=ranked_pairs)
    pair_file = PairFile(files=stream.files, prompts=stream.prompts)
    return pair_file, _passing(stream, pair_file, where, max_reject_share)


def _passing(
    stream: PairStream, pair_file: PairFile, where: str | None, max_reject_share: float
) -> Iterator[PreferencePair]:
    for row in stream:
        if isinstance(row, Reject):
            pair_file.rejects.append(row)
            if len(pair_file.rejects) % GIVE_UP_EVERY == 0:
                check_reject_share(
                    pair_file.rejects, pair_file.count + len(pair_file.rejects), max(max_reject_share, 0.5)
                )
            continue
        pair_file.count += 1
        pair_file.multi_turn += isinstance(row.pair.prompt, str) and holds_human_turn(row.pair)
        if row.duplicate is not None:
            pair_file.duplicates.append(row.duplicate)
        if row.contradiction is not None:
            pair_file.contradictions.append(row.contradiction)
        yield row.pair
    pair_file.filtered, pair_file.columns, pair_file.misspelt = stream.filtered, stream.columns, stream.misspelt
    pair_file.kind = stream.kind or "pairs"
    check_reject_share(pair_file.rejects, pair_file.count + len(pair_file.rejects), max_reject_share)
    if not pair_file.count:
        raise _no_pair(pair_file, where)


def _no_pair(pair_file: PairFile, where: str | None) -> UserError:
    return UserError(
        "no pair is left",
        code="data-empty",
        where=", ".join(pair_file.files),
        expected="at least one usable row" + (f" and passes the filter {where!r}" if where else ""),
        found=f"{counted(pair_file.filtered, 'row')} left out by the filter, {len(pair_file.rejects)} rejected",
        remedy="use a wider --where" if pair_file.filtered and not pair_file.rejects else "read the rejects file",
        exit_status=3,
    )


def ensure_unchanged(files: Mapping[str, str]) -> None:
    """Checks that files still have the bytes that were read.

    Args:
        files: `PairFile.files`.

    Raises:
        UserError: a file was changed or removed.
    """
    for name, digest in files.items():
        path = local_file(name)
        if not is_in_memory(name) and (path is None or not path.is_file() or _digest(path) != digest):
            raise _changed(name)


class PairStream:
    """Reads the pairs of files one by one: iterate once, then look at the counts.

    Memory grows by a hash and a row number per pair, independent of the texts.

    Attributes:
        rejected, filtered: numbers of rows left out so far.
        files, prompts, misspelt: as in `PairFile`.
        columns: as in `PairFile`.
        kind: kind of the rows, one of `shapes.KIND_FIELDS`, decided by the first row; None before it.
    """

    def __init__(
        self,
        paths: Sequence[Path | RowsInMemory],
        *,
        columns: Mapping[str, str] | None = None,
        where: str | None = None,
        prompt_format: str | None = None,
        ranked_pairs: RankedPairs | None = None,
    ) -> None:
        """See `read_pairs` for the arguments.

        Raises:
            UserError: a column, the filter or the format is invalid, or a file does not exist.
        """
        self._columns = dict(columns or {})
        _check_targets(self._columns)
        if prompt_format is not None and "{prompt}" not in prompt_format:
            raise UserError(
                "the prompt format does not contain {prompt}",
                code="data-prompt-format",
                where="prompt_format",
                expected="a text with {prompt} in it",
                found=repr(prompt_format),
                remedy="write {prompt} where the prompt goes, e.g. 'Instruction: {prompt}\\nResponse:'",
            )
        self._condition = parse_condition(where) if where and where.strip() else None
        self._prompt_format, self._ranked_pairs = prompt_format, ranked_pairs
        self._paths: list[Path | RowsInMemory] = [*readers.expand([path for path in paths if isinstance(path, Path)])]
        self._paths += [path for path in paths if isinstance(path, RowsInMemory)]
        # Key of a pair -> its first row: the row number, and in the higher bits the number of its file. One integer
        # takes half the memory of a tuple.
        self._seen: dict[bytes, int] = {}
        self._held: deque[ReadPair] = deque()
        self._names: dict[str, None] = {}
        self.rejected = 0
        self.filtered = 0
        self.kind: str | None = None
        self._mismatcher = Mismatcher()
        self.prompts = PromptOrigins()
        self.misspelt: dict[str, str] = {}
        self.files: dict[str, str] = {}

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns."""
        return tuple(self._names)

    def __iter__(self) -> Iterator[ReadPair | Reject]:
        """Every row that passes the filter, in the order of the files.

        Raises:
            UserError: a file cannot be read, is empty, lacks a column, or changes during reading.
        """
        for path in self._paths:
            yield from self._read(path)
        self._mismatcher.finish(", ".join(self.files))

    def _read(self, path: Path | RowsInMemory) -> Iterator[ReadPair | Reject]:
        if isinstance(path, RowsInMemory):
            before, digest, numbered, untyped = None, path.digest, path.read(), False
        else:
            before, digest = path.stat(), _digest(path)
            numbered, untyped = readers.read_rows(path), readers.is_untyped(path)
        name = str(path) if isinstance(path, RowsInMemory) else shown_name(path)
        self.files[name] = digest
        shape = Shape(self._columns, untyped, self._prompt_format)
        rows = 0
        names: dict[str, None] = {}
        for number, row in numbered:
            rows += 1
            try:
                if isinstance(row, RowFault):
                    raise row
                names.update(dict.fromkeys(row))
                pairs = self._pairs(name, number, row, shape)
            except RowFault as fault:
                self.rejected += 1
                yield Reject(name, number, fault.reason, fault.detail)
            else:
                for pair in pairs:
                    yield from self._complete(pair)
        if isinstance(path, Path) and before is not None and _identity(path.stat()) != _identity(before):
            raise _changed(name)
        if rows == 0:
            raise UserError(
                "the file has no rows",
                code="data-empty",
                where=name,
                remedy="write the file again, or leave it out",
                exit_status=3,
            )
        if names:
            kind = shape.kind_of(names)
            self._check_columns(name, names, kind)
            self.misspelt |= _misspelt(names, self._columns, kind)
        self._names.update(names)

    def _complete(self, row: ReadPair) -> Iterator[ReadPair]:
        """The row; for unpaired rows, those that are now complete with a mismatched response."""
        if row.pair.kind != "unpaired":
            yield row
            return
        self._held.append(row)
        for pair in self._mismatcher.add(row.pair):
            yield replace(self._held.popleft(), pair=pair)

    def _pairs(self, source: str, number: int, row: dict[str, Any], shape: Shape) -> list[ReadPair]:
        """The pairs of a row: one, several for a ranked row, none if the filter leaves it out."""
        kind = shape.kind_of(row)
        if shape.untyped:
            texts = {shape.column(name) for name in (*fields_of(kind), *PROMPT_COLUMNS)}
            row = {name: (value or None) if name in texts else csv_value(value) for name, value in row.items()}
        if self._condition is not None and not self._condition.holds(row):
            self.filtered += 1
            return []
        ranked = is_ranked(row, shape)
        made = "unpaired" if kind == "unpaired" else "ranked" if ranked and self._ranked_pairs is None else "pairs"
        self.kind = self.kind or made
        check_kind(made, self.kind)
        if made == "ranked":
            pairs = [to_ranked(row, shape, source, number)]
            self.prompts.ranked += 1
            self.prompts.responses += len(pairs[0].scores)
        elif ranked:
            assert self._ranked_pairs is not None
            pairs = to_pairs(row, shape, source, number, self._ranked_pairs)
            self.prompts.ranked += 1
            self.prompts.of_ranked += len(pairs)
        else:
            pairs = [(to_unpaired if kind == "unpaired" else to_pair)(row, shape, source, number)]
        return [self._read_pair(source, number, pair, shape) for pair in pairs]

    def _read_pair(self, source: str, number: int, pair: PreferencePair, shape: Shape) -> ReadPair:
        self.prompts.add(pair, formatted=shape.prompt_format is not None)
        key, opposite = content_key(pair), content_key(pair, swapped=True)
        same, other = (self._repeat(source, number, earlier) for earlier in (key, opposite))
        self._seen.setdefault(key, (len(self.files) - 1) << _ROW_BITS | number)
        return ReadPair(pair, same, other)

    def _repeat(self, source: str, number: int, key: bytes) -> Repeat | None:
        first = self._seen.get(key)
        if first is None:
            return None
        return Repeat(source, number, list(self.files)[first >> _ROW_BITS], first & (1 << _ROW_BITS) - 1)

    def _check_columns(self, source: str, names: Mapping[str, None], kind: str) -> None:
        """Raises if no row of the file has a column that is needed, mapped or filtered by."""
        # A ranked row needs only one of two columns, which is checked row by row.
        required = {name: name for name in KIND_FIELDS[kind] if kind != "ranked"} | self._columns
        for target, column in required.items():
            if column and column not in names:
                remedy = f"name the column for `{target}` with --columns {target}=NAME"
                raise _no_column(source, column, names, remedy)
        if self._condition is not None:
            for column in sorted(self._condition.missing(names)):
                raise _no_column(source, column, names, f"correct the filter {self._condition.text!r}")


def _check_targets(columns: Mapping[str, str]) -> None:
    for target in columns:
        if target not in COLUMN_FIELDS:
            nearest = difflib.get_close_matches(target, COLUMN_FIELDS, n=1)
            raise UserError(
                f"--columns cannot set a field {target!r}",
                code="data-columns",
                where=f"--columns {target}={columns[target]}",
                expected=f"one of {', '.join(COLUMN_FIELDS)}, then = and the name of the file's column",
                remedy=f"did you mean {nearest[0]}={columns[target]}?" if nearest else "name one of these fields",
            )


def _misspelt(names: Mapping[str, None], columns: Mapping[str, str], kind: str) -> dict[str, str]:
    """Column -> field with a similar name, for fields that no column has and columns that are not fields."""
    lacking = [name for name in fields_of(kind) if name not in names and name not in columns]
    if "prompt" in lacking:
        lacking.append("input" if "instruction" in names else "instruction")
    lacking += [name for name in ("system", "history") if name not in names and name not in columns]
    similar: dict[str, str] = {}
    for name in names:
        known = name in COLUMN_FIELDS or name in columns.values()
        # `promt`, `prompts` and `Prompt` are similar; `prompt_id` and `instruction_type` are not.
        nearest = difflib.get_close_matches(name.casefold(), lacking, n=1, cutoff=0.83)
        if nearest and not known:
            similar[name] = nearest[0]
    return similar


def column_remark(prompts: PromptOrigins, misspelt: Mapping[str, str]) -> str:
    """A remark on the columns in one line, or an empty text. The arguments are as in `PairFile`."""
    return "; ".join([*prompts.remarks(), *([misspelt_remark(misspelt)] if misspelt else [])])


_MAPPED = frozenset(name for kind in KIND_FIELDS for name in fields_of(kind))


def misspelt_remark(misspelt: Mapping[str, str]) -> str:
    """A remark on unused columns whose name is similar to a field's."""
    remarks = []
    for column, target in misspelt.items():
        how = f" (--columns {target}={column})" if target in _MAPPED else ""
        remarks.append(f"unused column `{column}`: did you mean `{target}`?{how}")
    return "; ".join(remarks)


def _no_column(source: str, column: str, names: Mapping[str, None], remedy: str) -> UserError:
    nearest = difflib.get_close_matches(column, names, n=1)
    listed = list(names)[:30]
    return UserError(
        f"the file has no column {column!r}",
        code="data-columns",
        where=source,
        expected=f"a column {column!r}",
        found=", ".join(listed) + (f" and {len(names) - 30} more" if len(names) > 30 else ""),
        remedy=(f"did you mean {nearest[0]!r}? " if nearest else "") + remedy,
        exit_status=3,
    )


def _changed(name: str) -> UserError:
    return UserError(
        "the file changed during the run",
        code="data-changed",
        where=name,
        expected="the same bytes throughout the run",
        remedy="run again once nothing writes to the file; finished work is kept",
        exit_status=3,
    )


def _identity(stat: stat_result) -> tuple[int, ...]:
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _digest(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise unreadable(path, error) from None


def content_key(pair: PreferencePair, *, swapped: bool = False) -> bytes:
    """A hash of everything that defines a pair; with `swapped`, of the pair with its responses exchanged.

    An unpaired row's hash does not include its mismatched response; `swapped` changes its label. A ranked
    row's hash includes the order of its responses, not the scores that make it.
    """
    if pair.kind == "ranked":
        scores = [-score for score in pair.scores] if swapped else pair.scores
        ordered = sorted(scores)
        places = [len(ordered) - bisect.bisect_right(ordered, score) for score in scores]  # how many are better
        parts = [_essence(pair.prompt), [_essence(side) for side in pair.sides], places]
        content = json.dumps([*parts, pair.tools, pair.chat_template_kwargs], sort_keys=True)
        return xxhash.xxh3_128_digest(content.encode())
    if pair.kind == "unpaired":
        label = pair.scores[0] != float(swapped)
        content = json.dumps(
            [_essence(pair.prompt), _essence(pair.chosen), label, pair.tools, pair.chat_template_kwargs], sort_keys=True
        )
        return xxhash.xxh3_128_digest(content.encode())
    sides = (pair.rejected, pair.chosen) if swapped else (pair.chosen, pair.rejected)
    turns = [_essence(part) for part in (pair.prompt, *sides)]
    content = json.dumps([*turns, pair.tools, pair.chat_template_kwargs], sort_keys=True)
    return xxhash.xxh3_128_digest(content.encode())


def _essence(turns: Turns) -> Turns:
    return turns if isinstance(turns, str) else [essence(message) for message in turns]

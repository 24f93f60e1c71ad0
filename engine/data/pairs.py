"""Files to preference pairs: filter, shapes, rejects with file and row, duplicates and contradictions.

Knows nothing of tokens: two pairs are the same here where their texts are.
"""

from __future__ import annotations

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
from dpoeng.engine.data.in_memory import RowsInMemory, is_in_memory, place
from dpoeng.engine.data.kinds.ranked import RankedPairs, is_ranked, to_pairs
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

# A large file that is mostly unusable is given up early, lest the list of its rejects fill the memory.
GIVE_UP_EVERY = 10_000
_ROW_BITS = 40


@dataclass(frozen=True, slots=True)
class Repeat:
    """A row that says the same as an earlier one (a duplicate), or the opposite (a contradiction)."""

    source_file: str
    source_row: int
    first_file: str
    first_row: int


@dataclass(frozen=True, slots=True)
class ReadPair:
    """A row that can be used, and the earlier rows that say the same or the opposite."""

    pair: PreferencePair
    duplicate: Repeat | None
    contradiction: Repeat | None


@dataclass(slots=True)
class PromptOrigins:
    """Counts of pairs without a plain `prompt` column, and an example of a guessed prompt.

    Attributes:
        columns: column that was taken for the prompt -> pairs.
        conversations: column -> pairs in which it became a message beside a question that was a text.
        transcripts: pairs whose prompt is what both texts have in common.
        repeated: pairs whose responses repeated the prompt, which stands once now.
        ranked, of_ranked: rows of several responses, and the pairs that they became.
        example: (file:row, end of the prompt) of the first transcript.
    """

    columns: dict[str, int] = field(default_factory=dict)
    conversations: int = 0
    transcripts: int = 0
    repeated: int = 0
    ranked: int = 0
    of_ranked: int = 0
    example: tuple[str, str] | None = None

    def add(self, pair: PreferencePair, *, formatted: bool) -> None:
        """One more pair; `formatted` where the user has said what stands around prompts, and so meant the column."""
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
        """Return the remarks, a line each."""
        told = [f"prompt taken from `{name}` in {counted(count, 'pair')}" for name, count in self.columns.items()]
        if self.conversations:
            told.append(
                f"question, system prompt and history became a conversation in {counted(self.conversations, 'pair')}"
            )
        if self.example is not None:
            where, end = self.example
            told.append(
                f"prompt guessed from the common beginning of both texts in {counted(self.transcripts, 'pair')}, e.g. "
                f"{where} ends {end}"
            )
        if self.ranked:
            told.append(f"{counted(self.ranked, 'row')} of several responses became {counted(self.of_ranked, 'pair')}")
        if self.repeated:
            told.append(f"responses repeated their prompt in {counted(self.repeated, 'pair')}; dpoeng keeps it once")
        return told


@dataclass(slots=True)
class PairFile:
    """The pairs of a file, and how they were read.

    Attributes:
        pairs: in the order of the files and their rows; duplicates are all there. Empty where they went by.
        count: how many pairs there were.
        rejects: rows left out, in the same order.
        filtered: rows that the filter left out.
        files: path as given -> xxh3_128 (hex) of the file's bytes.
        duplicates: rows equal to an earlier one in prompt, responses, tools and template arguments.
        contradictions: rows whose responses stand the other way round in an earlier one.
        multi_turn: pairs of texts with a further human turn inside a response; in messages such turns are not scored.
        columns: every column name that was seen.
        prompts: where the prompts come from, as far as that is to be told.
        misspelt: unused column -> the field that no column has and whose name is close.
        kind: of the rows, one of `shapes.KIND_FIELDS`.
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
        """See the function of the same name."""
        return column_remark(self.prompts, self.misspelt)


def read_pairs(
    paths: Sequence[Path | RowsInMemory],
    *,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    max_reject_share: float = 0.05,
    prompt_format: str | None = None,
    ranked_pairs: RankedPairs = "best",
) -> PairFile:
    """Read all pairs of the given files and directories.

    Args:
        paths: JSON Lines, JSON, CSV, Parquet or Arrow files, or directories of them; or rows in memory.
        columns: field -> column of the file, for `prompt`, `chosen`, `rejected`, `tools`, `chat_template_kwargs`.
        where: a filter, see `where`; rows that it leaves out are counted, not rejected.
        max_reject_share: the largest share of rejected rows, of those that pass the filter.
        prompt_format: a text with `{prompt}` in it to put around prompts given as texts, where the SFT data had one.
        ranked_pairs: which pairs a row of several responses becomes: the `best` one against the others, or `all`.

    Raises:
        UserError: a file cannot be read, is empty or changes meanwhile; columns are missing; too many rejects.
    """
    found, pairs = stream_pairs(
        paths,
        columns=columns,
        where=where,
        max_reject_share=max_reject_share,
        prompt_format=prompt_format,
        ranked_pairs=ranked_pairs,
    )
    found.pairs = list(pairs)
    return found


def stream_pairs(
    paths: Sequence[Path | RowsInMemory],
    *,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    max_reject_share: float = 0.05,
    prompt_format: str | None = None,
    ranked_pairs: RankedPairs = "best",
) -> tuple[PairFile, Iterator[PreferencePair]]:
    """Read pairs one by one, without keeping them.

    Args and errors are those of `read_pairs`; errors of a file arise where the iterator meets them.

    Returns:
        What is found, complete once the iterator has ended; and the iterator, to be gone through once.
    """
    stream = PairStream(paths, columns=columns, where=where, prompt_format=prompt_format, ranked_pairs=ranked_pairs)
    found = PairFile(files=stream.files, prompts=stream.prompts)
    return found, _passing(stream, found, where, max_reject_share)


def _passing(
    stream: PairStream, found: PairFile, where: str | None, max_reject_share: float
) -> Iterator[PreferencePair]:
    for row in stream:
        if isinstance(row, Reject):
            found.rejects.append(row)
            if len(found.rejects) % GIVE_UP_EVERY == 0:
                check_reject_share(found.rejects, found.count + len(found.rejects), max(max_reject_share, 0.5))
            continue
        found.count += 1
        found.multi_turn += isinstance(row.pair.prompt, str) and holds_human_turn(row.pair)
        if row.duplicate is not None:
            found.duplicates.append(row.duplicate)
        if row.contradiction is not None:
            found.contradictions.append(row.contradiction)
        yield row.pair
    found.filtered, found.columns, found.misspelt = stream.filtered, stream.columns, stream.misspelt
    found.kind = stream.kind or "pairs"
    check_reject_share(found.rejects, found.count + len(found.rejects), max_reject_share)
    if not found.count:
        raise _no_pair(found, where)


def _no_pair(found: PairFile, where: str | None) -> UserError:
    return UserError(
        "no pair is left",
        code="data-empty",
        where=", ".join(found.files),
        expected="at least one row that can be used" + (f" and passes the filter {where!r}" if where else ""),
        found=f"{counted(found.filtered, 'row')} left out by the filter, {len(found.rejects)} rejected",
        remedy="use a wider --where" if found.filtered and not found.rejects else "read the rejects file",
        exit_status=3,
    )


def ensure_unchanged(files: Mapping[str, str]) -> None:
    """Check that files still hold the bytes that were read.

    Args:
        files: `PairFile.files`.

    Raises:
        UserError: one of them was changed or removed.
    """
    for name, digest in files.items():
        if not is_in_memory(name) and (not Path(name).is_file() or _digest(Path(name)) != digest):
            raise _changed(Path(name))


class PairStream:
    """Reads the pairs of files one by one: iterate once, then look at what was counted on the way.

    Memory grows by a hash and a row number a pair, whatever the texts.

    Attributes:
        rejected, filtered: rows left out so far.
        files, prompts, misspelt: as in `PairFile`.
        columns: as in `PairFile`.
        kind: of the rows, one of `shapes.KIND_FIELDS`, as the first of them says; None before there is one.
    """

    def __init__(
        self,
        paths: Sequence[Path | RowsInMemory],
        *,
        columns: Mapping[str, str] | None = None,
        where: str | None = None,
        prompt_format: str | None = None,
        ranked_pairs: RankedPairs = "best",
    ) -> None:
        """See `read_pairs` for the arguments.

        Raises:
            UserError: a column, the filter or the format is not understood, or no such file.
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
        # Key of a pair -> the row where it stood first: its number, and above that the number of its file. One number
        # takes half of the memory of a tuple.
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
        """Every column name that was seen."""
        return tuple(self._names)

    def __iter__(self) -> Iterator[ReadPair | Reject]:
        """Every row that passes the filter, in the order of the files.

        Raises:
            UserError: a file cannot be read, is empty, lacks a column, or changes meanwhile.
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
        self.files[str(path)] = digest
        shape = Shape(self._columns, untyped, self._prompt_format)
        rows = 0
        names: dict[str, None] = {}
        for number, row in numbered:
            rows += 1
            try:
                if isinstance(row, RowFault):
                    raise row
                names.update(dict.fromkeys(row))
                pairs = self._pairs(path, number, row, shape)
            except RowFault as fault:
                self.rejected += 1
                yield Reject(str(path), number, fault.reason, fault.detail)
            else:
                for pair in pairs:
                    yield from self._complete(pair)
        if isinstance(path, Path) and before is not None and _identity(path.stat()) != _identity(before):
            raise _changed(path)
        if rows == 0:
            raise UserError(
                "the file has no rows",
                code="data-empty",
                where=str(path),
                remedy="write the file again, or leave it out",
                exit_status=3,
            )
        if names:
            kind = shape.kind_of(names)
            self._check_columns(path, names, kind)
            self.misspelt |= _misspelt(names, self._columns, kind)
        self._names.update(names)

    def _complete(self, row: ReadPair) -> Iterator[ReadPair]:
        """The row; of unpaired ones those that have got their mismatched response with it."""
        if row.pair.kind != "unpaired":
            yield row
            return
        self._held.append(row)
        for pair in self._mismatcher.add(row.pair):
            yield replace(self._held.popleft(), pair=pair)

    def _pairs(self, path: Path | RowsInMemory, number: int, row: dict[str, Any], shape: Shape) -> list[ReadPair]:
        """The pair of a row; of a ranked row several; none of one that the filter leaves out."""
        kind = shape.kind_of(row)
        if shape.untyped:
            texts = {shape.column(name) for name in (*fields_of(kind), *PROMPT_COLUMNS)}
            row = {name: (value or None) if name in texts else csv_value(value) for name, value in row.items()}
        if self._condition is not None and not self._condition.holds(row):
            self.filtered += 1
            return []
        made = "unpaired" if kind == "unpaired" else "pairs"
        self.kind = self.kind or made
        check_kind(made, self.kind)
        if is_ranked(row, shape):
            pairs = to_pairs(row, shape, str(path), number, self._ranked_pairs)
            self.prompts.ranked += 1
            self.prompts.of_ranked += len(pairs)
        else:
            pairs = [(to_unpaired if kind == "unpaired" else to_pair)(row, shape, str(path), number)]
        return [self._read_pair(path, number, pair, shape) for pair in pairs]

    def _read_pair(self, path: Path | RowsInMemory, number: int, pair: PreferencePair, shape: Shape) -> ReadPair:
        self.prompts.add(pair, formatted=shape.prompt_format is not None)
        key, opposite = content_key(pair), content_key(pair, swapped=True)
        same, other = (self._repeat(path, number, earlier) for earlier in (key, opposite))
        self._seen.setdefault(key, (len(self.files) - 1) << _ROW_BITS | number)
        return ReadPair(pair, same, other)

    def _repeat(self, path: Path | RowsInMemory, number: int, key: bytes) -> Repeat | None:
        first = self._seen.get(key)
        if first is None:
            return None
        return Repeat(str(path), number, list(self.files)[first >> _ROW_BITS], first & (1 << _ROW_BITS) - 1)

    def _check_columns(self, path: Path | RowsInMemory, names: Mapping[str, None], kind: str) -> None:
        """Raise where a column that is needed, mapped or filtered by occurs in no row of a file."""
        # Of a ranked row one column of two will do, which is seen row by row.
        required = {name: name for name in KIND_FIELDS[kind] if kind != "ranked"} | self._columns
        for target, column in required.items():
            if column and column not in names:
                raise _no_column(path, column, names, f"--columns {target}=NAME names the column that holds `{target}`")
        if self._condition is not None:
            for column in sorted(self._condition.missing(names)):
                raise _no_column(path, column, names, f"correct the filter {self._condition.text!r}")


def _check_targets(columns: Mapping[str, str]) -> None:
    for target in columns:
        if target not in COLUMN_FIELDS:
            nearest = difflib.get_close_matches(target, COLUMN_FIELDS, n=1)
            raise UserError(
                f"there is no field {target!r} to take from a column",
                code="data-columns",
                where=f"--columns {target}={columns[target]}",
                expected=f"one of {', '.join(COLUMN_FIELDS)}, then = and the name of the file's column",
                remedy=f"did you mean {nearest[0]}={columns[target]}?" if nearest else "name one of these fields",
            )


def _misspelt(names: Mapping[str, None], columns: Mapping[str, str], kind: str) -> dict[str, str]:
    """Column -> the field whose name is close, of fields that no column has and columns that are no field."""
    lacking = [name for name in fields_of(kind) if name not in names and name not in columns]
    if "prompt" in lacking:
        lacking.append("input" if "instruction" in names else "instruction")
    lacking += [name for name in ("system", "history") if name not in names and name not in columns]
    found: dict[str, str] = {}
    for name in names:
        known = name in COLUMN_FIELDS or name in columns.values()
        # `promt`, `prompts` and `Prompt` are close, `prompt_id` and `instruction_type` are not.
        nearest = difflib.get_close_matches(name.casefold(), lacking, n=1, cutoff=0.83)
        if nearest and not known:
            found[name] = nearest[0]
    return found


def column_remark(prompts: PromptOrigins, misspelt: Mapping[str, str]) -> str:
    """Return a remark on the columns in one line, or an empty text. The arguments are as in `PairFile`."""
    return "; ".join([*prompts.remarks(), *([misspelt_remark(misspelt)] if misspelt else [])])


_MAPPED = frozenset(name for kind in KIND_FIELDS for name in fields_of(kind))


def misspelt_remark(misspelt: Mapping[str, str]) -> str:
    """Unused columns whose name is close to a field's."""
    told = []
    for column, target in misspelt.items():
        how = f" (--columns {target}={column})" if target in _MAPPED else ""
        told.append(f"unused column `{column}`: did you mean `{target}`?{how}")
    return "; ".join(told)


def _no_column(path: Path | RowsInMemory, column: str, names: Mapping[str, None], remedy: str) -> UserError:
    nearest = difflib.get_close_matches(column, names, n=1)
    shown = list(names)[:30]
    return UserError(
        f"the file has no column {column!r}",
        code="data-columns",
        where=str(path),
        expected=f"a column {column!r}",
        found=", ".join(shown) + (f" and {len(names) - 30} more" if len(names) > 30 else ""),
        remedy=(f"did you mean {nearest[0]!r}? " if nearest else "") + remedy,
        exit_status=3,
    )


def _changed(path: Path) -> UserError:
    return UserError(
        "the file changed during the run",
        code="data-changed",
        where=str(path),
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
    """A hash of all that a pair is made of; with `swapped`, of the pair the other way round.

    An unpaired row is the same whichever mismatched response it has, and the other way round with the other label.
    """
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

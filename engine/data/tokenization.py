"""Turns preference pairs into token ids: shared prompt, end token, truncation. The only place that decides on these."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds, as_ids
from dpoeng.engine.data.chat import END_TEXTS, Side, TrainOn, to_sides
from dpoeng.engine.data.encoding import Encoded, encode
from dpoeng.engine.data.rejects import Reject
from dpoeng.engine.data.shapes import PreferencePair, common_length
from dpoeng.engine.data.strict_json import RowFault
from dpoeng.engine.data.token_counts import Counter
from dpoeng.engine.data.token_counts import TokenCounts as TokenCounts
from dpoeng.engine.data.token_rows import TokenizedPair as TokenizedPair
from dpoeng.engine.data.token_rows import TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TruncationMode = Literal["keep_start", "keep_end"]

CHUNK_PAIRS = 128


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """All usable pairs, in the order of their rows, and the rejects.

    Attributes:
        pairs: N pairs, stored as `TokenRows` keeps them; a ranked row is several, see `kinds.ranked`.
        rows: how many rows they are.
        rejects: rows that cannot be used.
        counts: the effects of tokenisation.
        keys: [N, 16] key of each pair.
    """

    pairs: TokenRows
    rows: int
    rejects: list[Reject]
    counts: TokenCounts
    keys: npt.NDArray[np.uint8]


def tokenize_pairs(
    pairs: Iterable[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    append_eos: bool = True,
    train_on: TrainOn = "assistant",
) -> TokenizedData:
    """Tokenises pairs. The result depends only on the arguments, not on earlier uses of the tokenizer.

    Args:
        pairs: texts, or messages for the tokenizer's chat template; read once and not kept.
        tokenizer: any transformers tokenizer; one without offsets gives less exact boundaries.
        max_length: maximum tokens of prompt + response, for each side; None for no limit.
        max_prompt_length: maximum tokens of the prompt, which keeps its end (and beginning token); None for no limit.
        truncation_mode: what `max_length` cuts: with `keep_start` the end of a response, with `keep_end` the beginning
            of the prompt, for both sides alike. Pairs with no room left for the other part are rejected.
        append_eos: whether texts end with the end token; an existing one is not doubled. Messages end as the chat
            template ends them.
        train_on: what to score in a response of messages: the assistant's turns, its `last` turn, or `all`.

    Raises:
        UserError: the tokenizer has no end token to append, or no chat template for messages.
    """
    _check_limits(max_length, max_prompt_length)
    limits = _Limits(max_length, max_prompt_length, truncation_mode)
    ends = _end_tokens(tokenizer)
    token_rows, rejects, counter = TokenRows(), list[Reject](), Counter()
    rest = iter(pairs)
    while chunk := list(itertools.islice(rest, CHUNK_PAIRS)):
        if append_eos:
            _check_end_token(chunk, tokenizer)
        texts = [_sides_or_fault(pair, tokenizer, train_on) for pair in chunk]
        encoded = iter(
            encode([side for sides in texts if not isinstance(sides, RowFault) for side in sides], tokenizer)
        )
        for pair, sides in zip(chunk, texts, strict=True):
            try:
                if isinstance(sides, RowFault):
                    raise sides
                of_row = list(itertools.islice(encoded, len(sides)))  # consume all, even if one is a fault
                for side, tokens in zip(sides, of_row, strict=True):
                    _close(tokens, side, tokenizer, append_eos, ends)
                counter.counts.separate += sum(not tokens.joint for tokens in of_row)
                parts, truncated = _truncate(_share_prompt(of_row), limits)
                if pair.kind != "unpaired" and _some_equal(parts):
                    which = "two of the responses" if pair.kind == "ranked" else "chosen and rejected"
                    raise RowFault("same-tokens", f"{which} have the same tokens, perhaps after truncation")
            except RowFault as fault:
                rejects.append(Reject(pair.source_file, pair.source_row, fault.reason, fault.detail))
                continue
            row = _tokenized(pair, sides, of_row, parts, truncated)
            counter.add(row, pair.kind, len(sides))
            for tokenized in row:
                token_rows.append(tokenized)
    return TokenizedData(token_rows, counter.rows, rejects, counter.finish(), counter.keys)


def _tokenized(
    pair: PreferencePair, sides: Sequence[Side], encoded: Sequence[Encoded], parts: _Parts, truncated: bool
) -> list[TokenizedPair]:
    """A row as pairs of its responses; the first has the row's other columns."""
    merged, swallowed = (any(getattr(one, name) for one in encoded) for name in ("merged", "swallowed"))
    needed, thoughts = max(len(one.ids) for one in encoded), max(side.thoughts for side in sides)
    source = (pair.source_file, pair.source_row)
    return [
        TokenizedPair(ids, *source, {} if i else pair.extra, truncated, merged, needed, swallowed, thoughts)
        for i, ids in enumerate(_in_pairs(parts))
    ]


def _check_limits(max_length: int | None, max_prompt_length: int | None) -> None:
    """Raises UserError if a limit leaves no token."""
    for name, limit in (("max_length", max_length), ("max_prompt_length", max_prompt_length)):
        if limit is not None and limit < 1:
            raise UserError(
                "a length limit must be at least 1",
                code="config-value",
                where=name,
                expected="1 or more",
                found=str(limit),
                remedy="raise it, or leave it out",
            )


def _check_end_token(pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if there is no end token to append to texts."""
    if tokenizer.eos_token_id is None and any(isinstance(pair.prompt, str) for pair in pairs):
        raise UserError(
            "the tokenizer has no end token to append to responses",
            code="tokenizer-no-eos",
            where="append_eos",
            expected="an eos_token in tokenizer_config.json",
            remedy="add it there, or set append_eos to false if the SFT data had none",
            exit_status=3,
        )


@dataclass(frozen=True, slots=True)
class _Limits:
    max_length: int | None
    max_prompt_length: int | None
    mode: TruncationMode


@dataclass(slots=True)
class _Response:
    ids: list[int]
    start: int
    unscored: list[tuple[int, int]]


@dataclass(slots=True)
class _Parts:
    prompt: list[int]
    responses: list[_Response]
    bos: bool


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts that count as a written-out end: the end token, or one that ends a template's turn."""
    known = map(str, getattr(tokenizer, "get_added_vocab", dict)())
    return tuple({text for text in (tokenizer.eos_token, *known) if text and text in (tokenizer.eos_token, *END_TEXTS)})


def _sides_or_fault(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn
) -> list[Side] | RowFault:
    try:
        return to_sides(pair, tokenizer, train_on)
    except RowFault as fault:
        return fault


def _close(
    encoded: Encoded, side: Side, tokenizer: PreTrainedTokenizerBase, append_eos: bool, ends: tuple[str, ...]
) -> None:
    """Makes a side end with its end token: exactly one for texts; messages end as the template ends them.

    Raises:
        RowFault: `empty-response`, the response has no tokens; `no-context`, no token comes before it; or the fault
            from encoding.
    """
    if encoded.fault is not None:
        raise encoded.fault
    if encoded.start >= len(encoded.ids):
        raise RowFault("empty-response", "a response has no tokens")
    if encoded.start == 0:
        raise RowFault("no-context", "no token precedes the response, so nothing predicts its first token")
    if append_eos and not side.from_template:
        eos = tokenizer.eos_token_id
        while len(encoded.ids) > encoded.start + 1 and encoded.ids[-2:] == [eos, eos]:
            encoded.ids.pop()
        if encoded.ids[-1] != eos and not side.text.rstrip().endswith(ends):
            encoded.ids.append(eos)


def _share_prompt(sides: Sequence[Encoded]) -> _Parts:
    """The prompt is the common beginning of all sides before the responses; the rest goes to the responses."""
    first = sides[0].ids
    shared = min(common_length(first[: sides[0].start], side.ids[: side.start]) for side in sides)
    return _Parts(
        first[:shared],
        [
            _Response(
                side.ids[shared:],
                side.start - shared,
                [(begin - shared, end - shared) for begin, end in side.unscored],
            )
            for side in sides
        ],
        all(side.bos for side in sides),
    )


def _truncate(parts: _Parts, limits: _Limits) -> tuple[_Parts, bool]:
    """Truncates the row to its limits; also returns whether anything was cut.

    Raises:
        RowFault: `prompt-too-long` or `response-too-long`, no room is left for the other part.
    """
    before = len(parts.prompt) + sum(len(one.ids) for one in parts.responses)
    if limits.max_prompt_length is not None:
        parts.prompt = _tail(parts.prompt, limits.max_prompt_length, parts.bos)
    if limits.max_length is not None:
        longest = max(len(one.ids) for one in parts.responses)
        if limits.mode == "keep_end":
            room = limits.max_length - longest
            if room < min(len(parts.prompt), 1):
                raise RowFault(
                    "response-too-long", f"{longest} tokens leave no room for a prompt in {limits.max_length}"
                )
            parts.prompt = _tail(parts.prompt, room, parts.bos)
        else:
            room = limits.max_length - len(parts.prompt)
            if room <= max(one.start for one in parts.responses):
                length = len(parts.prompt)
                raise RowFault(
                    "prompt-too-long", f"{length} tokens leave no room for a response in {limits.max_length}"
                )
            for one in parts.responses:
                one.ids, one.unscored = _cut(one.ids, one.unscored, room)
    return parts, len(parts.prompt) + sum(len(one.ids) for one in parts.responses) < before


def _in_pairs(parts: _Parts) -> list[PairIds]:
    """The responses two by two, in their order; of an odd number the last is beside the first."""
    prompt, responses = as_ids(parts.prompt), parts.responses
    rest = [*responses, responses[0]]
    return [
        PairIds(
            prompt,
            as_ids(one.ids),
            as_ids(other.ids),
            one.start,
            other.start,
            tuple(one.unscored),
            tuple(other.unscored),
        )
        for one, other in zip(rest[: len(responses) : 2], rest[1::2], strict=False)
    ]


def _some_equal(parts: _Parts) -> bool:
    return len({(one.start, *one.ids) for one in parts.responses}) < len(parts.responses)


def _cut(response: list[int], unscored: list[tuple[int, int]], room: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The first tokens of a response, cut so that the last one is scored."""
    last = next((first for first, behind in unscored if first < room <= behind), room)
    return response[:last], [gap for gap in unscored if gap[1] < last]


def _tail(prompt: list[int], length: int, bos: bool) -> list[int]:
    """The last tokens of a prompt, after its beginning token if tokenizer or template added one."""
    if len(prompt) <= length:
        return prompt
    if length and bos:
        return [prompt[0], *prompt[len(prompt) - length + 1 :]]
    return prompt[len(prompt) - length :]

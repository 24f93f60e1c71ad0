"""Preference pairs to token ids: shared prompt, end token, truncation. The only place where any of them is decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds, as_ids, pair_key
from dpoeng.engine.data.chat import END_TEXTS, Side, TrainOn, to_sides
from dpoeng.engine.data.encoding import Encoded, encode
from dpoeng.engine.data.rejects import Reject
from dpoeng.engine.data.shapes import PreferencePair, common_length
from dpoeng.engine.data.strict_json import RowFault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TruncationMode = Literal["keep_start", "keep_end"]

CHUNK_PAIRS = 128


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One row's tokens.

    Attributes:
        ids: shared prompt and both responses, after truncation.
        extra: the row's other columns.
        truncated: whether anything was cut off.
        merged: whether the prompt by itself has other tokens than it has before a response.
        needed: positions of prompt + longer response before truncation: the `max_length` that cuts nothing.
        swallowed: whether a special token took the white space that a response begins with.
        thoughts: thoughts of earlier turns that the template leaves out.
    """

    ids: PairIds
    source_file: str
    source_row: int
    extra: dict[str, Any]
    truncated: bool
    merged: bool
    needed: int
    swallowed: bool = False
    thoughts: int = 0


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts of one part, over all pairs."""

    count: int
    mean: float
    p50: int
    p95: int
    max: int


@dataclass(slots=True)
class TokenCounts:
    """What tokenisation did, in pairs unless said otherwise.

    Attributes:
        truncated: something was cut off.
        merged: the prompt has other tokens before a response than by itself.
        unshared: the sides' last prompt tokens differ and were moved, unscored, to the responses.
        duplicates: equal in all ids to an earlier pair.
        contradictions: an earlier pair with the responses the other way round.
        separate: responses (not pairs) tokenised apart from their prompt, for want of offsets.
        turns: pairs with tokens of others inside a response, which are not scored.
        swallowed: a special token took the white space that a response begins with.
        thoughts: the template left out thoughts of earlier turns, as it is meant to.
        lengths: `prompt`, `chosen`, `rejected`, `total` (prompt once), after truncation.
    """

    truncated: int = 0
    merged: int = 0
    unshared: int = 0
    duplicates: int = 0
    contradictions: int = 0
    separate: int = 0
    turns: int = 0
    swallowed: int = 0
    thoughts: int = 0
    lengths: dict[str, Lengths] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """All pairs that can be used, in the order of their rows, and those that cannot."""

    pairs: list[TokenizedPair]
    rejects: list[Reject]
    counts: TokenCounts


def tokenize_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    append_eos: bool = True,
    train_on: TrainOn = "assistant",
) -> TokenizedData:
    """Tokenise pairs; the outcome depends on the arguments alone, not on what the tokenizer was used for before.

    Args:
        pairs: texts, or messages for the tokenizer's chat template.
        tokenizer: any of transformers'; one without offsets is used with less exact boundaries.
        max_length: most tokens of prompt + response, for each side; None for no limit.
        max_prompt_length: most tokens of the prompt, whose end (and beginning token) is kept; None for no limit.
        truncation_mode: what gives way to `max_length`: with `keep_start` the end of a response, with `keep_end` the
            beginning of the prompt, for both sides alike. Pairs with no room left for the other part are rejected.
        append_eos: whether texts end with the end token; one that is there already is not doubled. Messages end as the
            chat template has it.
        train_on: what of a response that is messages is scored: the assistant's turns, its `last` one alone, or `all`.

    Raises:
        UserError: the tokenizer has no end token to append, or no chat template for messages.
    """
    _check_settings(pairs, tokenizer, max_length, max_prompt_length, append_eos=append_eos)
    limits = _Limits(max_length, max_prompt_length, truncation_mode)
    ends = _end_tokens(tokenizer)
    done: list[TokenizedPair] = []
    rejects: list[Reject] = []
    counts = TokenCounts()
    for start in range(0, len(pairs), CHUNK_PAIRS):
        chunk = pairs[start : start + CHUNK_PAIRS]
        texts = [_sides_or_fault(pair, tokenizer, train_on) for pair in chunk]
        encoded = encode([side for sides in texts if not isinstance(sides, RowFault) for side in sides], tokenizer)
        both = iter(zip(encoded[::2], encoded[1::2], strict=True))
        for pair, sides in zip(chunk, texts, strict=True):
            try:
                if isinstance(sides, RowFault):
                    raise sides
                chosen, rejected = next(both)  # both at once, whatever is wrong with either
                for side, tokens in zip(sides, (chosen, rejected), strict=True):
                    _close(tokens, side, tokenizer, append_eos, ends)
                counts.separate += (not chosen.joint) + (not rejected.joint)
                needed = max(len(chosen.ids), len(rejected.ids))
                ids, truncated = _truncate(_share_prompt(chosen, rejected), limits)
            except RowFault as fault:
                rejects.append(Reject(pair.source_file, pair.source_row, fault.reason, fault.detail))
                continue
            merged = chosen.merged or rejected.merged
            source = (pair.source_file, pair.source_row, pair.extra)
            swallowed, thoughts = chosen.swallowed or rejected.swallowed, max(side.thoughts for side in sides)
            done.append(TokenizedPair(ids, *source, truncated, merged, needed, swallowed, thoughts))
    _count(done, counts)
    return TokenizedData(done, rejects, counts)


def _check_settings(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    max_prompt_length: int | None,
    *,
    append_eos: bool,
) -> None:
    """Raise UserError where a limit leaves no token, or there is no end token to append."""
    for name, limit in (("max_length", max_length), ("max_prompt_length", max_prompt_length)):
        if limit is not None and limit < 1:
            raise UserError(
                "a length limit must be positive",
                code="config-value",
                where=name,
                expected="1 or more",
                found=str(limit),
                remedy="raise it, or leave it out",
            )
    if append_eos and tokenizer.eos_token_id is None and any(isinstance(pair.prompt, str) for pair in pairs):
        raise UserError(
            "the tokenizer has no end token to put behind responses",
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
class _Parts:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_start: int
    rejected_start: int
    chosen_unscored: list[tuple[int, int]]
    rejected_unscored: list[tuple[int, int]]
    bos: bool


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """How an end may be written out in a text: the end token, or one that ends a turn of a template."""
    known = map(str, getattr(tokenizer, "get_added_vocab", dict)())
    return tuple({text for text in (tokenizer.eos_token, *known) if text and text in (tokenizer.eos_token, *END_TEXTS)})


def _sides_or_fault(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn
) -> tuple[Side, Side] | RowFault:
    try:
        return to_sides(pair, tokenizer, train_on)
    except RowFault as fault:
        return fault


def _close(
    encoded: Encoded, side: Side, tokenizer: PreTrainedTokenizerBase, append_eos: bool, ends: tuple[str, ...]
) -> None:
    """See that a side has its end token: exactly one for texts, as the template has it for messages.

    Raises:
        RowFault: `empty-response`, the response has no tokens; `no-context`, nothing stands before its first; and what
            the encoding found.
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


def _share_prompt(chosen: Encoded, rejected: Encoded) -> _Parts:
    """The common beginning of both sides before the responses is the prompt; what differs goes to the responses."""
    shared = common_length(chosen.ids[: chosen.start], rejected.ids[: rejected.start])
    return _Parts(
        chosen.ids[:shared],
        chosen.ids[shared:],
        rejected.ids[shared:],
        chosen.start - shared,
        rejected.start - shared,
        [(first - shared, last - shared) for first, last in chosen.unscored],
        [(first - shared, last - shared) for first, last in rejected.unscored],
        chosen.bos and rejected.bos,
    )


def _truncate(parts: _Parts, limits: _Limits) -> tuple[PairIds, bool]:
    """The pair within its limits, and whether anything was cut.

    Raises:
        RowFault: `prompt-too-long` or `response-too-long`, no room is left for the other; `same-tokens`.
    """
    before = len(parts.prompt) + len(parts.chosen) + len(parts.rejected)
    if limits.max_prompt_length is not None:
        parts.prompt = _tail(parts.prompt, limits.max_prompt_length, parts.bos)
    if limits.max_length is not None:
        longest = max(len(parts.chosen), len(parts.rejected))
        if limits.mode == "keep_end":
            room = limits.max_length - longest
            if room < min(len(parts.prompt), 1):
                raise RowFault(
                    "response-too-long", f"{longest} tokens leave no room for a prompt in {limits.max_length}"
                )
            parts.prompt = _tail(parts.prompt, room, parts.bos)
        else:
            room = limits.max_length - len(parts.prompt)
            if room <= max(parts.chosen_start, parts.rejected_start):
                length = len(parts.prompt)
                raise RowFault(
                    "prompt-too-long", f"{length} tokens leave no room for a response in {limits.max_length}"
                )
            parts.chosen, parts.chosen_unscored = _cut(parts.chosen, parts.chosen_unscored, room)
            parts.rejected, parts.rejected_unscored = _cut(parts.rejected, parts.rejected_unscored, room)
    if (parts.chosen, parts.chosen_start) == (parts.rejected, parts.rejected_start):
        raise RowFault("same-tokens", "chosen and rejected have the same tokens, perhaps after truncation")
    ids = PairIds(
        as_ids(parts.prompt),
        as_ids(parts.chosen),
        as_ids(parts.rejected),
        parts.chosen_start,
        parts.rejected_start,
        tuple(parts.chosen_unscored),
        tuple(parts.rejected_unscored),
    )
    return ids, ids.total_tokens < before


def _cut(response: list[int], unscored: list[tuple[int, int]], room: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The first tokens of a response, so that the last of them is scored."""
    last = next((first for first, behind in unscored if first < room <= behind), room)
    return response[:last], [gap for gap in unscored if gap[1] < last]


def _tail(prompt: list[int], length: int, bos: bool) -> list[int]:
    """The last tokens of a prompt, behind its beginning token if tokenizer or template gave it one."""
    if len(prompt) <= length:
        return prompt
    if length and bos:
        return [prompt[0], *prompt[len(prompt) - length + 1 :]]
    return prompt[len(prompt) - length :]


def _count(pairs: Sequence[TokenizedPair], counts: TokenCounts) -> None:
    seen: set[bytes] = set()
    for pair in pairs:
        ids = pair.ids
        key = pair_key(ids)
        counts.truncated += pair.truncated
        counts.merged += pair.merged
        counts.unshared += ids.chosen_start > 0 or ids.rejected_start > 0
        counts.duplicates += key in seen
        counts.contradictions += pair_key(ids.swapped()) in seen
        counts.turns += bool(ids.chosen_gaps or ids.rejected_gaps)
        counts.swallowed += pair.swallowed
        counts.thoughts += pair.thoughts > 0
        seen.add(key)
    if pairs:
        parts = {
            "prompt": [len(pair.ids.prompt_ids) for pair in pairs],
            "chosen": [len(pair.ids.chosen_ids) for pair in pairs],
            "rejected": [len(pair.ids.rejected_ids) for pair in pairs],
            "total": [pair.ids.total_tokens for pair in pairs],
        }
        counts.lengths = {name: _lengths(values) for name, values in parts.items()}


def _lengths(values: Sequence[int]) -> Lengths:
    p50, p95 = np.percentile(values, [50, 95], method="nearest")
    return Lengths(len(values), float(np.mean(values)), int(p50), int(p95), max(values))

"""Checks the limits of the machine and the model before pairs are scored: disk, vocabulary, positions."""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.scoring.forward import position_limit, rotary_limit

_STORED_BYTES_A_TOKEN = 8  # an id and a log-prob
_STORED_BYTES_A_PAIR = 64  # key, sums, offsets


def check_disk(root: Path, missing: Sequence[Sequence[PairIds]], states_bytes: int = 0) -> None:
    """Raises UserError if the log-probs would fill the disk, before hours are spent on them.

    `states_bytes`: size of hidden states to store as well.
    """
    needed = states_bytes + sum(
        _STORED_BYTES_A_TOKEN * ids.total_tokens + _STORED_BYTES_A_PAIR for shard in missing for ids in shard
    )
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            "the disk has no room for the log-probs of this run",
            code="cache-disk-small",
            where=str(root),
            expected=f"{needed / 1e6:.1f} MB free"
            + (f", {states_bytes / 1e6:.1f} MB of them for the hidden states of --trunk-layer" if states_bytes else ""),
            found=f"{free / 1e6:.1f} MB",
            remedy="free some space, or choose another folder with --cache"
            + ("; or leave --trunk-layer out" if states_bytes else ""),
            exit_status=5,
        )


def check_ids(pairs: Collection[PairIds], lm: CausalLM, model: str) -> None:
    """Raises UserError if the tokenizer gives ids outside the vocabulary of the model; `model` is its name."""
    highest = max(
        int(part.max()) for ids in pairs for part in (ids.prompt_ids, ids.chosen_ids, ids.rejected_ids) if len(part)
    )
    if highest >= lm.vocab_size:
        raise UserError(
            "the tokenizer gives ids outside the model's vocabulary",
            code="tokenizer-mismatch",
            where=model,
            expected=f"ids below {lm.vocab_size}",
            found=str(highest),
            remedy="use the tokenizer that belongs to this model; added tokens need resized embeddings",
        )


def longest_text(pairs: Iterable[PairIds]) -> int:
    """Tokens of the longest prompt together with one of its responses."""
    return max((_text_tokens(ids) for ids in pairs), default=0)


def _text_tokens(ids: PairIds) -> int:
    return len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))


def check_positions(pairs: Collection[PairIds], lm: CausalLM) -> None:
    """Checks that the model has a distinct position for every token.

    Raises:
        UserError: a pair is longer than the model's table of positions, or than the length up to which its rotary
            frequencies are constant.
    """
    lengths = array("q", map(_text_tokens, pairs))
    for limit, why, expected in (
        (
            position_limit(lm),
            "some pairs have more tokens than this model has positions",
            "the model's last position",
        ),
        (
            rotary_limit(lm),
            "this model changes its rotary frequencies for long texts, and so the numbers of all texts in the batch",
            "up to which its frequencies are constant",
        ),
    ):
        if limit is not None and max(lengths) > limit:
            raise UserError(
                why,
                code="model-unsupported",
                where=f"{sum(length > limit for length in lengths)} of {len(lengths)} pairs",
                expected=f"prompt and response of at most {limit} tokens, {expected}",
                found=f"{max(lengths)} tokens",
                remedy=f"use --max-length {limit}, or leave the long pairs out with --where",
            )

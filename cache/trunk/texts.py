"""The key of a trunk's row: a prompt, or a response after its prompt, identified by token ids alone."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

import xxhash

from dpoeng.cache.schema import IdArray, PairIds, as_ids

TEXT_KEY_TAG: Final = b"dpoeng.text.v1"
_COUNTS = struct.Struct("<2q")


def text_key(prompt_ids: IdArray, response_ids: IdArray | None = None) -> bytes:
    """16 bytes that identify a prompt, or a response after it: xxh3_128 over a tag, two counts and the ids.

    A causal model's states at a response depend on the prompt and the response; those at a prompt on the prompt alone.

    Args:
        prompt_ids: [P] int32.
        response_ids: [R] int32; None for the prompt itself, whose second count is -1.
    """
    prompt, response = as_ids(prompt_ids), as_ids(() if response_ids is None else response_ids)
    counts = _COUNTS.pack(len(prompt), -1 if response_ids is None else len(response))
    return xxhash.xxh3_128_digest(b"".join((TEXT_KEY_TAG, counts, prompt.data, response.data)))


def texts_of(ids: PairIds) -> dict[bytes, int]:
    """The texts of a pair, key -> tokens: prompt, chosen, rejected. An empty prompt has no states and is omitted."""
    texts = {text_key(ids.prompt_ids): len(ids.prompt_ids)} if len(ids.prompt_ids) else {}
    for response in (ids.chosen_ids, ids.rejected_ids):
        texts[text_key(ids.prompt_ids, response)] = len(response)
    return texts


def distinct_tokens(pairs: Iterable[PairIds]) -> int:
    """Tokens whose states a trunk of these pairs stores: each prompt once, each response once per prompt."""
    texts: dict[bytes, int] = {}
    for ids in pairs:
        texts |= texts_of(ids)
    return sum(texts.values())

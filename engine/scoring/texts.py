"""Locates prompts and responses in the input of a forward, so that their states can be stored and restored.

Works on rectangles [B, T] of tokens; a packed row has height 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dpoeng.cache.schema import IdArray
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.scoring.layout import PromptGroup


class Place(NamedTuple):
    """Tokens of a prompt (`response_ids` None), or of a response after it: columns [begin, end) of a row."""

    prompt_ids: IdArray
    response_ids: IdArray | None
    row: int
    begin: int
    end: int


def places_packed(groups: Sequence[PromptGroup]) -> list[Place]:
    """The texts of groups in one row, as `layout.pack` arranges them."""
    places, at = [], 0
    for group in groups:
        for response in (None, *(branch.ids for branch in group.branches)):
            tokens = len(group.prompt_ids if response is None else response)
            places.append(Place(group.prompt_ids, response, 0, at, at + tokens))
            at += tokens
    return places


def places_apart(groups: Sequence[PromptGroup]) -> list[Place]:
    """The texts of groups with one branch per row, after its own prompt, as `layout.pad` arranges them."""
    places, row = [], 0
    for group in groups:
        prompt = len(group.prompt_ids)
        for branch in group.branches:
            places.append(Place(group.prompt_ids, None, row, 0, prompt))
            places.append(Place(group.prompt_ids, branch.ids, row, prompt, prompt + len(branch.ids)))
            row += 1
    return places


def put_states(lm: CausalLM, places: Sequence[Place], shape: tuple[int, int]) -> None:
    """Passes the stored states of its texts to the next forward of a model that begins at a trunk; 0 at padding.

    Raises:
        CacheError: the trunk lacks one of the texts.
    """
    # The stored dtype is the reference's compute dtype; `choose_trunk` refuses a policy with another one.
    assert lm.states is not None, "the model begins at a trunk, but nothing provides its states"
    stored = [(place, lm.states(place.prompt_ids, place.response_ids)) for place in places if place.end > place.begin]
    first = stored[0][1]
    states = torch.zeros(*shape, first.shape[-1], dtype=first.dtype, device=first.device)
    for place, part in stored:
        states[place.row, place.begin : place.end] = part
    lm.entry.states = states if states.is_meta else states.to(lm.device, lm.dtype, non_blocking=True)

"""Packs pairs into rows in which each prompt occurs once. Pure arrays: needs no model and no tensor library.

A pair becomes `[prompt | chosen | rejected]`; several pairs follow each other in one row without padding. Chosen
positions continue from the prompt's, rejected positions start again at `len(prompt)`, and a branch sees only its prompt
and itself. The last prompt position predicts the first token of every branch: one hidden state, several targets. The
reference pass and training use the same rows, which makes their numbers comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpoeng.cache.schema import Gaps, IdArray, PairIds, gap_tokens

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Branch:
    """One response to a prompt: `ids` [R], of which `ids[start:]` are scored, except for the gaps."""

    ids: IdArray
    start: int = 0
    gaps: Gaps = ()

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) - self.start - gap_tokens(self.gaps)

    def positions(self) -> IndexArray:
        """The positions of the scored tokens in `ids`, ascending."""
        places = np.arange(self.start, len(self.ids))
        for begin, end in self.gaps:
            places = places[(places < begin) | (places >= end)]
        return places


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """A prompt [P] and the branches that share it. If the prompt is empty, a branch must have `start` > 0."""

    prompt_ids: IdArray
    branches: tuple[Branch, ...]

    @property
    def total_tokens(self) -> int:
        """Positions to compute for this group."""
        return len(self.prompt_ids) + sum(len(branch.ids) for branch in self.branches)


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Position of a group in a row: `[prompt_begin, prompt_end)`, then each branch's `[begin, end)`."""

    prompt_begin: int
    prompt_end: int
    branches: tuple[tuple[int, int], ...]

    @property
    def text_sizes(self) -> list[int]:
        """Lengths of `[prompt | first branch]` and of each further branch, which are adjacent."""
        return [end - begin for begin, end in self.text_ranges]

    @property
    def text_ranges(self) -> list[tuple[int, int]]:
        """`[begin, end)` of the same texts."""
        (_, first), *others = self.branches
        return [(self.prompt_begin, first), *others]


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """A row of T positions with N scored tokens in K branches.

    Attributes:
        input_ids: [T].
        position_ids: [T].
        groups: the spans, for attention.
        gather: [N], the position whose hidden state predicts each scored token.
        targets: [N], the scored tokens.
        branch_offsets: [K + 1]; branch k's scores are `[branch_offsets[k], branch_offsets[k + 1])`.
    """

    input_ids: IndexArray
    position_ids: IndexArray
    groups: tuple[GroupSpan, ...]
    gather: IndexArray
    targets: IndexArray
    branch_offsets: IndexArray


def pair_group(ids: PairIds, count: int = 2) -> PromptGroup:
    """The group of one pair: branch 0 is chosen, branch 1 is rejected; with `count` 1 only chosen."""
    return PromptGroup(ids.prompt_ids, sides(ids)[:count])


def share_prompts(pairs: Sequence[PairIds]) -> tuple[list[PromptGroup], IndexArray]:
    """Groups pairs so that every prompt occurs once, and every response once under its prompt.

    It is common that several pairs share a prompt (one chosen response against several rejected ones) or a response.

    Returns:
        the groups, in the order in which their prompts first occur; and [B, 2] the branches of each pair (chosen,
        rejected), numbered through all groups.
    """
    prompts: dict[bytes, IdArray] = {}
    branches: dict[bytes, dict[tuple[Any, ...], Branch]] = {}
    for ids in pairs:
        key = ids.prompt_ids.tobytes()
        prompts.setdefault(key, ids.prompt_ids)
        for branch in sides(ids):
            branches.setdefault(key, {}).setdefault(_key(branch), branch)
    places = {
        (prompt, response): i
        for i, (prompt, response) in enumerate((prompt, r) for prompt, of in branches.items() for r in of)
    }
    groups = [PromptGroup(prompts[prompt], tuple(of.values())) for prompt, of in branches.items()]
    order = [[places[ids.prompt_ids.tobytes(), _key(branch)] for branch in sides(ids)] for ids in pairs]
    return groups, np.array(order, dtype=np.int64).reshape(-1, 2)


def sides(ids: PairIds) -> tuple[Branch, Branch]:
    """The chosen and the rejected response."""
    return (
        Branch(ids.chosen_ids, ids.chosen_start, ids.chosen_gaps),
        Branch(ids.rejected_ids, ids.rejected_start, ids.rejected_gaps),
    )


def _key(branch: Branch) -> tuple[Any, ...]:
    return branch.ids.tobytes(), branch.start, branch.gaps


def separate(group: PromptGroup) -> list[PromptGroup]:
    """One group per branch, each with its own copy of the prompt, for models that cannot share a prompt."""
    before = len(group.prompt_ids)
    return [
        PromptGroup(
            group.prompt_ids[:0],
            (
                Branch(
                    np.concatenate([group.prompt_ids, branch.ids]),
                    before + branch.start,
                    tuple((before + begin, before + end) for begin, end in branch.gaps),
                ),
            ),
        )
        for branch in group.branches
    ]


def pack(groups: Sequence[PromptGroup]) -> PackedRow:
    """Concatenates groups to one row.

    Raises:
        ValueError: no groups, or no token comes before a scored token.
    """
    if not groups:
        raise ValueError("cannot pack an empty sequence of groups")
    inputs: list[IdArray] = []
    positions: list[IndexArray] = []
    gather: list[IndexArray] = []
    targets: list[IdArray] = []
    spans: list[GroupSpan] = []
    scored: list[int] = [0]
    cursor = 0
    for group in groups:
        prompt_begin, prompt_end = cursor, cursor + len(group.prompt_ids)
        inputs.append(group.prompt_ids)
        positions.append(np.arange(len(group.prompt_ids)))
        cursor = prompt_end
        branch_spans: list[tuple[int, int]] = []
        for branch in group.branches:
            if branch.start == 0 and len(group.prompt_ids) == 0:
                raise ValueError("nothing precedes the first scored token: empty prompt and start 0")
            begin, end = cursor, cursor + len(branch.ids)
            inputs.append(branch.ids)
            positions.append(len(group.prompt_ids) + np.arange(len(branch.ids)))
            scored_at = branch.positions()
            predictors = begin + scored_at - 1
            if branch.start == 0 and len(predictors):
                predictors[0] = prompt_end - 1
            gather.append(predictors)
            targets.append(branch.ids[scored_at])
            scored.append(branch.scored)
            branch_spans.append((begin, end))
            cursor = end
        spans.append(GroupSpan(prompt_begin, prompt_end, tuple(branch_spans)))
    return PackedRow(
        input_ids=np.concatenate(inputs).astype(np.int64),
        position_ids=np.concatenate(positions).astype(np.int64),
        groups=tuple(spans),
        gather=np.concatenate(gather).astype(np.int64),
        targets=np.concatenate(targets).astype(np.int64),
        branch_offsets=np.cumsum(scored, dtype=np.int64),
    )


def pad(groups: Sequence[PromptGroup], pad_id: int) -> tuple[PackedRow, tuple[int, int], IndexArray]:
    """Arranges promptless groups of one branch (see `separate`) in a right-padded rectangle `[B, L]`.

    Returns:
        the row with `input_ids` and `position_ids` flattened to [B * L] and `gather` indexing the flattened positions;
        the shape (B, L); the attention mask [B * L], 1 on real tokens.
    """
    branches = [group.branches[0] for group in groups]
    if any(len(group.prompt_ids) or len(group.branches) != 1 for group in groups):
        raise ValueError("pad() takes groups of one branch and no prompt: use separate() first")
    length = max(len(branch.ids) for branch in branches)
    input_ids = np.full((len(branches), length), pad_id, dtype=np.int64)
    mask = np.zeros((len(branches), length), dtype=np.int64)
    for i, branch in enumerate(branches):
        input_ids[i, : len(branch.ids)] = branch.ids
        mask[i, : len(branch.ids)] = 1
    packed = pack(groups)
    gather = np.concatenate([i * length + branch.positions() - 1 for i, branch in enumerate(branches)])
    row = PackedRow(
        input_ids=input_ids.reshape(-1),
        position_ids=np.tile(np.arange(length, dtype=np.int64), len(branches)),
        groups=(),
        gather=gather.astype(np.int64),
        targets=packed.targets,
        branch_offsets=packed.branch_offsets,
    )
    return row, (len(branches), length), mask.reshape(-1)


def queries_of(row: PackedRow) -> IndexArray:
    """The positions [M] that predict scored tokens, ascending, with all positions between them in the same text."""
    wanted = np.unique(row.gather)
    parts = [queries_within(wanted, begin, end) for group in row.groups for begin, end in group.text_ranges]
    return np.concatenate([np.arange(part[0], part[-1] + 1) for part in parts if len(part)])


def queries_within(positions: IndexArray, begin: int, end: int) -> IndexArray:
    """The positions in `[begin, end)` among ascending ones."""
    return positions[slice(*np.searchsorted(positions, (begin, end)))]


def batches_by_tokens(lengths: Sequence[int], budget: int) -> list[range]:
    """Splits a sequence into consecutive batches of at most `budget` tokens each; a longer item is alone."""
    batches: list[range] = []
    begin, total = 0, 0
    for i, length in enumerate(lengths):
        if i > begin and total + length > budget:
            batches.append(range(begin, i))
            begin, total = i, 0
        total += length
    if begin < len(lengths):
        batches.append(range(begin, len(lengths)))
    return batches


def batches_of_pairs(pairs: Sequence[PairIds], budget: int) -> list[tuple[range, int]]:
    """Splits pairs into consecutive batches of at most `budget` computed positions, as `share_prompts` arranges them.

    Returns:
        (the pairs, the positions computed for them) of each batch; a longer pair is alone.
    """
    batches: list[tuple[range, int]] = []
    begin, total, seen = 0, 0, set[tuple[bytes, bytes, int]]()
    for i, ids in enumerate(pairs):
        prompt = ids.prompt_ids.tobytes()
        pieces = {(prompt, b"", -1): len(ids.prompt_ids)}
        pieces |= {(prompt, *_key(branch)): len(branch.ids) for branch in sides(ids)}
        new = sum(length for piece, length in pieces.items() if piece not in seen)
        if i > begin and total + new > budget:
            batches.append((range(begin, i), total))
            begin, total, seen = i, 0, set()
            new = sum(pieces.values())
        total += new
        seen |= pieces.keys()
    if begin < len(pairs):
        batches.append((range(begin, len(pairs)), total))
    return batches

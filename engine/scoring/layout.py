"""Packs prompts and responses into rows in which each prompt occurs once. Pure arrays: needs no model, no tensors.

A pair becomes `[prompt | chosen | rejected]`, a prompt with N responses `[prompt | r1 | ... | rN]`; several groups
follow each other in one row without padding. A branch's positions continue from the prompt's, and it sees only its
prompt and itself. The last prompt position predicts the first token of every branch: one hidden state, several targets.
The reference pass and training use the same rows, which makes their numbers comparable.

If branches begin alike, their common beginnings can occur once too, at any depth: a tree. Its nodes lie in the row
parent before child. Each token keeps the position, and sees the tokens, that it would in a separate row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dpoeng.cache.schema import Gaps, IdArray, PairIds, ScoredGroup, ScoredRow, gap_tokens

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
class Text:
    """Positions `[begin, end)` of a row that one call of attention computes.

    Its keys are the first `shared` keys of text `after` of the same group (none where that is -1), then its own.
    """

    begin: int
    end: int
    after: int = -1
    shared: int = 0


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Position of a group in a row: `[prompt_begin, prompt_end)`, then each branch's `[begin, end)`.

    `tree`: its texts if common beginnings of branches occur once; a branch's span then covers only its own end.
    """

    prompt_begin: int
    prompt_end: int
    branches: tuple[tuple[int, int], ...]
    tree: tuple[Text, ...] = ()

    @property
    def texts(self) -> tuple[Text, ...]:
        """`[prompt | first branch]` and each further branch, which are adjacent."""
        if self.tree:
            return self.tree
        (_, first), *others = self.branches
        length = self.prompt_end - self.prompt_begin
        return Text(self.prompt_begin, first), *(Text(begin, end, 0, length) for begin, end in others)

    @property
    def text_sizes(self) -> list[int]:
        """Lengths of the texts."""
        return [text.end - text.begin for text in self.texts]

    @property
    def text_ranges(self) -> list[tuple[int, int]]:
        """`[begin, end)` of the texts."""
        return [(text.begin, text.end) for text in self.texts]


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


def row_group(row: ScoredRow, count: int = 2) -> PromptGroup:
    """The group of one row: of a ranked one a branch for each response, else as `pair_group`."""
    if isinstance(row, ScoredGroup):
        branches = [branch for pair in row.pairs for branch in sides(pair.ids)]
        return PromptGroup(row.ids.prompt_ids, tuple(branches[: len(row.scores)]))
    return pair_group(row.ids, count)


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


def pack(groups: Sequence[PromptGroup], shortest: int = 0) -> PackedRow:
    """Concatenates groups to one row.

    Args:
        groups: at least one.
        shortest: a common beginning of so many tokens or more occurs once for the branches that share it; 0: never.

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
        nodes = _nodes(group.branches, shortest)
        prompt = len(group.prompt_ids)
        begins = cursor + prompt + np.cumsum([0, *(node.end - node.begin for node in nodes)])
        inputs += [group.prompt_ids, *(group.branches[node.of].ids[node.begin : node.end] for node in nodes)]
        positions += [np.arange(prompt), *(prompt + np.arange(node.begin, node.end) for node in nodes)]
        for number, branch in enumerate(group.branches):
            if branch.start == 0 and prompt == 0:
                raise ValueError("nothing precedes the first scored token: empty prompt and start 0")
            places = np.concatenate([[cursor + prompt - 1], _places(nodes, begins, number)])
            scored_at = branch.positions()
            gather.append(places[scored_at])  # a token is predicted at the one before it
            targets.append(branch.ids[scored_at])
            scored.append(branch.scored)
        spans.append(_span(nodes, begins, cursor, len(group.branches)))
        cursor = int(begins[-1])
    return PackedRow(
        input_ids=np.concatenate(inputs).astype(np.int64),
        position_ids=np.concatenate(positions).astype(np.int64),
        groups=tuple(spans),
        gather=np.concatenate(gather).astype(np.int64),
        targets=np.concatenate(targets).astype(np.int64),
        branch_offsets=np.cumsum(scored, dtype=np.int64),
    )


def positions_of(groups: Sequence[PromptGroup], shortest: int = 0) -> int:
    """Positions of the row that `pack` makes of some groups."""
    return sum(
        len(group.prompt_ids) + sum(node.end - node.begin for node in _nodes(group.branches, shortest))
        for group in groups
    )


@dataclass(frozen=True, slots=True)
class _Node:
    """Tokens [begin, end) of branch `of`, which continue node `parent` (-1: the prompt).

    `leaf`: whether the branch ends here; otherwise at least two branches share these tokens.
    """

    of: int
    begin: int
    end: int
    parent: int
    leaf: bool = True


def _nodes(branches: Sequence[Branch], shortest: int) -> list[_Node]:
    """The tree of some branches, each node behind its parent and before that node's next child."""
    apart = [_Node(number, 0, len(branch.ids), -1) for number, branch in enumerate(branches)]
    if not shortest:
        return apart
    nodes: list[_Node] = []

    def grow(members: Sequence[int], begin: int, alike: int, parent: int) -> None:
        """Members have their first `alike` tokens in common, of which nodes up to `parent` hold the first `begin`."""
        first, *others = (branches[member].ids for member in members)
        if not others:
            nodes.append(_Node(members[0], begin, len(first), parent))
            return
        end = min(alike + _common(first[alike:], other[alike:]) for other in others)
        if end - begin >= shortest:
            nodes.append(_Node(members[0], begin, end, parent, leaf=False))
            begin, parent = end, len(nodes) - 1
        parts: dict[int, list[int]] = {}
        for member in members:
            ids = branches[member].ids
            parts.setdefault(int(ids[end]) if len(ids) > end else -1 - member, []).append(member)
        for part in parts.values():
            grow(part, begin, end, parent)

    grow(range(len(branches)), 0, 0, -1)
    return nodes if len(nodes) > len(apart) else apart


def _common(a: IdArray, b: IdArray) -> int:
    """How many leading tokens two sequences have in common."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _places(nodes: Sequence[_Node], begins: IndexArray, branch: int) -> IndexArray:
    """Where each token of a branch lies in the row."""
    at = next(i for i, node in enumerate(nodes) if node.leaf and node.of == branch)
    parts: list[IndexArray] = []
    while at >= 0:
        parts.append(np.arange(begins[at], begins[at + 1]))
        at = nodes[at].parent
    return np.concatenate(parts[::-1])


def _span(nodes: Sequence[_Node], begins: IndexArray, prompt_begin: int, count: int) -> GroupSpan:
    """The spans of a group whose nodes lie at `begins`."""
    spans = {node.of: (int(begins[i]), int(begins[i + 1])) for i, node in enumerate(nodes) if node.leaf}
    branches = tuple(spans[branch] for branch in range(count))
    if len(nodes) == count:
        return GroupSpan(prompt_begin, int(begins[0]), branches)
    texts: list[Text] = []
    of_node: list[int] = []
    for i, node in enumerate(nodes):
        begin, end = int(begins[i]), int(begins[i + 1])
        if i == 0:
            texts.append(Text(prompt_begin, end))
        elif node.parent == i - 1:  # goes on where its parent ends
            texts[-1] = replace(texts[-1], end=end)
        elif end > begin:
            after = of_node[node.parent] if node.parent >= 0 else 0
            parent_end = int(begins[node.parent + 1])  # of the prompt where there is none
            texts.append(Text(begin, end, after, texts[after].shared + parent_end - texts[after].begin))
        of_node.append(len(texts) - 1)
    return GroupSpan(prompt_begin, int(begins[0]), branches, tuple(texts))


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

    A batch ends between two prompts where it can, so that pairs of one prompt run together: a batch that is full goes
    back to where its last prompt began.

    Returns:
        (the pairs, the positions computed for them) of each batch; a longer pair is alone.
    """
    batches: list[tuple[range, int]] = []
    begin, i = 0, 0
    total, seen = 0, set[tuple[Any, ...]]()
    first, last = (0, 0), None  # where the pairs of the last prompt begin, and the positions before them; this prompt
    while i < len(pairs):
        pieces = _pieces(pairs[i])
        new = sum(length for piece, length in pieces.items() if piece not in seen)
        prompt = pairs[i].prompt_ids.tobytes()
        if prompt != last:
            first, last = (i, total), prompt
        if i > begin and total + new > budget:
            cut, total = first if first[0] > begin else (i, total)
            batches.append((range(begin, cut), total))
            begin = i = cut
            total, seen, last = 0, set(), None
            continue
        total += new
        seen |= pieces.keys()
        i += 1
    if begin < len(pairs):
        batches.append((range(begin, len(pairs)), total))
    return batches


def _pieces(ids: PairIds) -> dict[tuple[Any, ...], int]:
    """What is computed of a pair, and the positions of each piece."""
    prompt = ids.prompt_ids.tobytes()
    pieces: dict[tuple[Any, ...], int] = {(prompt, b"", -1): len(ids.prompt_ids)}
    return pieces | {(prompt, *_key(branch)): len(branch.ids) for branch in sides(ids)}

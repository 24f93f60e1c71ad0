"""The packed layout, checked against rows written out by hand and against its own definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpoeng.cache.schema import PairIds, as_ids
from dpoeng.engine.scoring.layout import Branch, PromptGroup, batches_by_tokens, pack, pad, pair_group, separate


def test_one_pair_by_hand() -> None:
    row = pack([pair_group(PairIds(as_ids([7, 8]), as_ids([1, 2, 3]), as_ids([4, 5])))])
    assert row.input_ids.tolist() == [7, 8, 1, 2, 3, 4, 5]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3]
    # Both first tokens are predicted from the prompt's last position; each other from the token before it.
    assert row.gather.tolist() == [1, 2, 3, 1, 5]
    assert row.targets.tolist() == [1, 2, 3, 4, 5]
    assert row.branch_offsets.tolist() == [0, 3, 5]


def test_unscored_tokens_at_a_merged_boundary() -> None:
    row = pack([pair_group(PairIds(as_ids([7]), as_ids([9, 1, 2]), as_ids([4, 5]), chosen_start=1, rejected_start=0))])
    assert row.targets.tolist() == [1, 2, 4, 5]
    assert row.gather.tolist() == [1, 2, 0, 4]
    assert row.branch_offsets.tolist() == [0, 2, 4]


def test_nothing_precedes_the_first_token() -> None:
    with pytest.raises(ValueError, match="nothing precedes"):
        pack([PromptGroup(as_ids([]), (Branch(as_ids([1, 2])),))])


ids = st.lists(st.integers(0, 999), min_size=1, max_size=9).map(as_ids)


@st.composite
def groups(draw: st.DrawFn) -> list[PromptGroup]:
    made = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = draw(ids)
        branches = []
        for _ in range(draw(st.integers(1, 3))):
            tokens = draw(ids)
            branches.append(Branch(tokens, draw(st.integers(0, len(tokens) - 1))))
        made.append(PromptGroup(prompt, tuple(branches)))
    return made


@given(groups())
def test_each_target_is_predicted_from_its_predecessor(made: list[PromptGroup]) -> None:
    """For every branch: the gathered positions, read in order, are `prompt + branch` shifted by one."""
    row = pack(made)
    assert len(row.input_ids) == sum(group.total_tokens for group in made)
    k = 0
    for group, span in zip(made, row.groups, strict=True):
        assert row.input_ids[span.prompt_begin : span.prompt_end].tolist() == group.prompt_ids.tolist()
        for branch, (begin, end) in zip(group.branches, span.branches, strict=True):
            assert row.input_ids[begin:end].tolist() == branch.ids.tolist()
            whole = np.concatenate([group.prompt_ids, branch.ids])
            where = slice(row.branch_offsets[k], row.branch_offsets[k + 1])
            first = len(group.prompt_ids) + branch.start
            assert row.targets[where].tolist() == whole[first:].tolist()
            assert row.input_ids[row.gather[where]].tolist() == whole[first - 1 : -1].tolist()
            assert row.position_ids[row.gather[where]].tolist() == list(range(first - 1, len(whole) - 1))
            k += 1
    assert row.branch_offsets[-1] == len(row.targets)


@given(groups())
def test_separate_rows_score_the_same_tokens(made: list[PromptGroup]) -> None:
    shared = pack(made)
    singles = [single for group in made for single in separate(group)]
    padded, (rows, length), mask = pad(singles, pad_id=0)
    assert padded.targets.tolist() == shared.targets.tolist()
    assert padded.branch_offsets.tolist() == shared.branch_offsets.tolist()
    assert padded.input_ids[padded.gather].tolist() == shared.input_ids[shared.gather].tolist()
    assert mask[padded.gather].all()
    assert rows * length == len(padded.input_ids)
    assert mask.sum() == sum(single.total_tokens for single in singles)


@given(st.lists(st.integers(1, 50)), st.integers(1, 60))
def test_batches_cover_all_in_order_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = batches_by_tokens(lengths, budget)
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
    for a, b in itertools.pairwise(batches):  # greedy: the next item would not have fitted
        assert sum(lengths[i] for i in a) + lengths[b[0]] > budget

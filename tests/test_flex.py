"""FlexAttention's tiles against the rule itself. Its numbers are compared in test_scoring."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpoeng.engine.flex import block_lists, block_mask, segments, visible
from dpoeng.engine.layout import GroupSpan


@st.composite
def spans(draw: st.DrawFn) -> list[GroupSpan]:
    made, cursor = [], 0
    for _ in range(draw(st.integers(1, 5))):
        begin, cursor = cursor, cursor + draw(st.integers(0, 9))
        prompt_end, branches = cursor, []
        for _ in range(draw(st.integers(1, 3))):
            branches.append((cursor, cursor + draw(st.integers(1, 9))))
            cursor = branches[-1][1]
        made.append(GroupSpan(begin, prompt_end, tuple(branches)))
    return made


@given(spans(), st.sampled_from([None, 1, 3, 8]), st.sampled_from([1, 2, 4, 7]))
@settings(max_examples=150)
def test_tiles_cover_what_is_visible_and_no_more(groups: list[GroupSpan], window: int | None, block: int) -> None:
    rows = segments(groups)
    total = groups[-1].branches[-1][1]
    every = np.arange(total)
    dense = visible(rows, window)(every[:, None], every[None, :])
    # The rule, said again from the spans: each branch is a causal text of its own, [prompt | branch].
    truth = np.zeros((total, total), bool)
    for span in groups:
        for begin, end in [(span.prompt_end, span.prompt_end), *span.branches]:
            text = [*range(span.prompt_begin, span.prompt_end), *range(begin, end)]
            for i, q in enumerate(text):
                truth[q, text[max(0, i + 1 - window) if window else 0 : i + 1]] = True
    assert (dense == truth).all()
    partial, full = block_lists(rows, window, block)
    for tile in range(-(-total // block)):
        for other in range(-(-total // block)):
            seen = truth[tile * block : (tile + 1) * block, other * block : (other + 1) * block]
            assert (other in full[tile]) <= bool(seen.all())
            assert (other in partial[tile] or other in full[tile]) == bool(seen.any())
            assert not (other in partial[tile] and other in full[tile])


def test_the_mask_of_a_long_row_is_sparse() -> None:
    """What FlexAttention is for: of 32 pairs in a row, a tile meets its own pair only."""
    groups, cursor = [], 0
    for _ in range(32):
        groups.append(GroupSpan(cursor, cursor + 128, ((cursor + 128, cursor + 192), (cursor + 192, cursor + 256))))
        cursor += 256
    assert block_mask(groups, None, torch.device("cpu")).sparsity() > 95

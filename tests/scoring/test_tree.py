"""Beginnings that responses share run once: laid out by hand, and exact in numbers and gradients at any depth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import SHARED_FAMILIES, VOCAB, make, own_logps
from hypothesis import given
from hypothesis import strategies as st

from dpoeng.bench.studies.tiny_models import tiny_config, tiny_model
from dpoeng.cache.schema import as_ids
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.choose_layout import SHORTEST, choose_layout
from dpoeng.engine.scoring.forward import score_groups
from dpoeng.engine.scoring.layout import Branch, PromptGroup, Text, pack, positions_of, separate
from dpoeng.engine.scoring.varlen import texts


def group(prompt: list[int], *branches: list[int]) -> PromptGroup:
    return PromptGroup(as_ids(prompt), tuple(Branch(as_ids(ids)) for ids in branches))


def test_a_tree_by_hand() -> None:
    # 1 2 | 3 4 5, 3 4 6 7, 8, 3 9: after the prompt 3, then 4 below it, then the ends.
    made = [group([1, 2], [3, 4, 5], [3, 4, 6, 7], [8], [3, 9])]
    row = pack(made, 1)
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 8]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 4, 5, 3, 2]
    assert row.targets.tolist() == [3, 4, 5, 3, 4, 6, 7, 8, 3, 9]
    assert row.gather.tolist() == [1, 2, 3, 1, 2, 3, 5, 1, 1, 2]
    assert row.branch_offsets.tolist() == [0, 3, 7, 8, 10]
    assert row.groups[0].texts == (Text(0, 5), Text(5, 7, 0, 4), Text(7, 8, 0, 3), Text(8, 9, 0, 2))
    assert positions_of(made, 1) == 9
    keys = texts(row.groups, torch.device("cpu"))
    assert keys.key_rows is not None
    assert keys.key_rows.tolist() == [*range(5), 0, 1, 2, 3, 5, 6, 0, 1, 2, 7, 0, 1, 8]


def test_a_fork_below_a_later_branch_goes_on_from_its_own_text() -> None:
    row = pack([group([1], [2], [3, 4, 5], [3, 4, 6])], 2)
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.groups[0].texts == (Text(0, 2), Text(2, 5, 0, 1), Text(5, 6, 1, 3))


def test_a_short_beginning_does_not_fork() -> None:
    made = [group([1], [2, 3, 4], [2, 3, 5])]
    assert pack(made, 3).input_ids.tolist() == pack(made).input_ids.tolist() == [1, 2, 3, 4, 2, 3, 5]
    assert pack(made, 2).input_ids.tolist() == [1, 2, 3, 4, 5]


@st.composite
def alike(draw: st.DrawFn) -> PromptGroup:
    """Branches of two different tokens, so that many begin alike, end within each other, or are equal."""
    ids = st.lists(st.integers(0, 1), min_size=1, max_size=8)
    branches = []
    for _ in range(draw(st.integers(1, 6))):
        tokens = draw(ids)
        branches.append(Branch(as_ids(tokens), draw(st.integers(0, len(tokens) - 1))))
    return PromptGroup(as_ids(draw(st.lists(st.integers(0, 1), min_size=1, max_size=3))), tuple(branches))


@given(st.lists(alike(), min_size=1, max_size=3), st.integers(1, 4))
def test_every_token_sees_what_it_would_see_in_a_row_of_its_own(made: list[PromptGroup], shortest: int) -> None:
    """Keys of each query, by token and position, are those of the branch's own text up to it."""
    row = pack(made, shortest)
    seen: dict[int, list[int]] = {}
    covered = []
    for span in row.groups:
        keys: list[list[int]] = []
        for text in span.texts:
            before = keys[text.after][: text.shared] if text.after >= 0 else []
            keys.append([*before, *range(text.begin, text.end)])
            for at in range(text.begin, text.end):
                seen[at] = [*before, *range(text.begin, at + 1)]
            covered += range(text.begin, text.end)
    assert covered == list(range(len(row.input_ids))) == list(range(positions_of(made, shortest)))
    k = 0
    for one in made:
        prefixes = {tuple(branch.ids[:n]) for branch in one.branches for n in range(1, len(branch.ids) + 1)}
        if shortest == 1:  # each beginning stands there once
            assert positions_of([one], 1) == len(one.prompt_ids) + len(prefixes)
        for branch in one.branches:
            whole = np.concatenate([one.prompt_ids, branch.ids])
            where = slice(row.branch_offsets[k], row.branch_offsets[k + 1])
            first = len(one.prompt_ids) + branch.start
            assert row.targets[where].tolist() == whole[first:].tolist()
            for n, at in enumerate(row.gather[where], first):
                assert row.input_ids[seen[at]].tolist() == whole[:n].tolist()
                assert row.position_ids[seen[at]].tolist() == list(range(n))
            k += 1


def branching(seed: int = 3) -> list[PromptGroup]:
    """Eight responses that fork at several depths, one of them early; and a prompt without any fork."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> Any:
        return rng.integers(0, VOCAB, n, dtype=np.int32)

    stem, left, right = draw(9), draw(8), draw(10)
    ends = [*(np.concatenate([stem, left, draw(3 + n)]) for n in range(3)), np.concatenate([stem, draw(4)])]
    ends += [np.concatenate([stem, right, draw(5)]), np.concatenate([stem, right, draw(2)]), draw(11), draw(2)]
    branches = tuple(Branch(ids, start=n % 2) for n, ids in enumerate(ends))
    return [PromptGroup(draw(12), branches), PromptGroup(draw(5), (Branch(draw(6)), Branch(draw(7))))]


def scored_with_gradients(lm: CausalLM, made: list[PromptGroup]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    weights = [p.requires_grad_() for n, p in lm.base.named_parameters() if p.dim() > 1]
    logps, _ = score_groups(lm, made)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    lm.base.zero_grad()
    lm.base.requires_grad_(False)
    return logps.detach(), gradients


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Gemma2Config", "Qwen3MoeConfig", "GPT2Config"])
def test_numbers_and_gradients_are_those_of_separate_rows(name: str) -> None:
    lm, made = make(name, SHARED_FAMILIES[name]), branching()
    truth = own_logps(lm, made)
    choose_layout(lm)
    assert (lm.layout, lm.tree) == ("shared", SHORTEST)
    assert positions_of(made, lm.tree) == sum(one.total_tokens for one in made) - 5 * 9 - 2 * 8 - 10
    tree, gradients = scored_with_gradients(lm, made)
    use_layout(lm, "separate")
    apart, expected = scored_with_gradients(lm, made)
    torch.testing.assert_close(tree, apart, atol=1e-5, rtol=0)
    torch.testing.assert_close(tree.double(), truth, atol=2e-5, rtol=0)
    assert len(gradients) == len(expected) > 3
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-6


def test_in_float64_nothing_is_left_but_rounding() -> None:
    lm, made = make("LlamaConfig", {}, torch.float64), branching()
    truth = own_logps(lm, made)
    use_layout(lm, "shared")
    lm.tree = 1
    torch.testing.assert_close(score_groups(lm, made)[0].double(), truth, atol=1e-10, rtol=0)


def test_tokens_of_eight_branches_behind_a_long_prompt() -> None:
    """8 x 256 tokens behind 1,024: 3.3 times fewer with the prompt once, and more where they begin alike."""
    rng = np.random.default_rng(0)
    made = PromptGroup(rng.integers(0, 9, 1024), tuple(Branch(rng.integers(0, 9, 256)) for _ in range(8)))
    apart = sum(one.total_tokens for one in separate(made))
    assert (apart, positions_of([made], SHORTEST)) == (10240, 3072)


def test_layers_with_a_state_share_prompts_only_and_say_so() -> None:
    model = tiny_model(tiny_config("lfm2"))
    lm = CausalLM(model, model, None, torch.device("cpu"), torch.float32, "none", model.config._attn_implementation)
    set_mode(lm, training=False)
    choose_layout(lm)
    assert (lm.layout, lm.tree) == ("shared", 0)
    assert "but not a beginning that responses share" in lm.layout_reason
    made = branching()
    truth = own_logps(lm, made)
    choose_layout(lm)
    torch.testing.assert_close(score_groups(lm, made)[0].double(), truth, atol=2e-5, rtol=0)


def test_a_tree_that_moves_the_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpoeng.engine.scoring import layout

    real = layout._span

    def blind(nodes: Any, begins: Any, prompt_begin: int, count: int) -> Any:
        span = real(nodes, begins, prompt_begin, count)
        wrong = tuple(Text(t.begin, t.end, t.after, max(0, t.shared - 2)) for t in span.tree)
        return layout.GroupSpan(span.prompt_begin, span.prompt_end, span.branches, wrong)

    monkeypatch.setattr(layout, "_span", blind)
    lm = make("LlamaConfig", {})
    choose_layout(lm)
    assert (lm.layout, lm.tree) == ("shared", 0)
    assert "changes log-probs" in lm.layout_reason

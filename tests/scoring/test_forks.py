"""Hybrids share prompts: a layer's state at the end of the prompt starts both responses, with its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import own_logps, some_groups

from dpoeng.bench.studies.tiny_models import tiny_config, tiny_model
from dpoeng.engine.models.model import CausalLM, enable_gradient_checkpointing, set_mode
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.forks import PADDING, fork_states, forks
from dpoeng.engine.scoring.forward import score_groups
from dpoeng.engine.scoring.layout import Branch, PromptGroup, pack

# One of each kind of state: gated delta nets (of two generations, and with a value for each channel), Mamba-2 (alone,
# beside attention, with a mixture of experts), short convolutions.
FAMILIES = ("qwen3_next", "qwen3_5_text", "kimi_linear", "nemotron_h", "falcon_h1", "granitemoehybrid", "lfm2")
MORE = ("qwen3_5_moe_text", "bamba", "zamba2", "lfm2_moe", "lfm3", "mamba2", "olmo_hybrid", "bailing_hybrid")


def hybrid(model_type: str, dtype: torch.dtype = torch.float32) -> CausalLM:
    model = tiny_model(tiny_config(model_type)).to(dtype)
    model.requires_grad_(False)
    lm = CausalLM(model, model, None, torch.device("cpu"), dtype, "none", model.config._attn_implementation)
    set_mode(lm, training=False)
    return lm


@pytest.mark.parametrize("model_type", [*FAMILIES, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE)])
def test_a_hybrid_shares_its_prompts_with_equal_numbers_and_gradients(model_type: str) -> None:
    lm = hybrid(model_type)
    choose_layout(lm)
    assert lm.layout == "shared", lm.layout_reason
    assert "state passes from prompt to response" in lm.layout_reason
    groups = some_groups()
    truth = own_logps(lm, groups)
    scored, gradients = {}, {}
    weights = torch.linspace(-1, 1, len(truth))  # responses pull in opposite ways, as in a preference loss
    for layout in ("shared", "separate"):
        use_layout(lm, layout)  # type: ignore[arg-type]
        lm.model.requires_grad_(True)
        scored[layout] = score_groups(lm, groups)[0]
        (scored[layout] * weights).sum().backward()
        gradients[layout] = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}
        lm.model.zero_grad()
        lm.model.requires_grad_(False)
    torch.testing.assert_close(scored["shared"].double(), truth, atol=2e-5, rtol=0)
    assert gradients["shared"].keys() == gradients["separate"].keys()
    for name, one in gradients["shared"].items():
        other = gradients["separate"][name]
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6, name


def test_a_response_does_not_see_the_other_one() -> None:
    lm = hybrid("qwen3_5_text", torch.float64)
    use_layout(lm, "shared")
    rng = np.random.default_rng(2)
    prompt, chosen, rejected = (rng.integers(0, 320, n, dtype=np.int32) for n in (9, 7, 6))
    changed = chosen.copy()
    changed[0] = (changed[0] + 1) % 320
    first, _ = score_groups(lm, [PromptGroup(prompt, (Branch(chosen), Branch(rejected)))])
    second, _ = score_groups(lm, [PromptGroup(prompt, (Branch(changed), Branch(rejected)))])
    torch.testing.assert_close(first[7:], second[7:], atol=0, rtol=0)
    assert not torch.allclose(first[:7], second[:7])


def test_layers_are_recomputed_with_their_states() -> None:
    lm, plain = hybrid("granitemoehybrid"), hybrid("granitemoehybrid")
    enable_gradient_checkpointing(lm)
    gradients = []
    for one in (lm, plain):
        use_layout(one, "shared")
        one.model.requires_grad_(True)
        score_groups(one, some_groups())[0].sum().backward()
        gradients.append([p.grad for p in one.model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_groups_without_a_prompt_start_from_nothing() -> None:
    lm = hybrid("mamba2")
    prompt, one, two = (np.arange(n, dtype=np.int32) + n for n in (4, 6, 5))
    alone = PromptGroup(prompt[:0], (Branch(one, start=1),))
    groups = [[alone], [alone, PromptGroup(prompt, (Branch(one), Branch(two)))]]
    for some in groups:
        truth = own_logps(lm, some)
        use_layout(lm, "shared")
        torch.testing.assert_close(score_groups(lm, some)[0].double(), truth, atol=2e-5, rtol=0)


def test_rectangles_hold_each_position_once_and_little_padding() -> None:
    rng = np.random.default_rng(3)
    groups = [
        PromptGroup(np.arange(rng.integers(1, 400)), tuple(Branch(np.arange(rng.integers(1, 300))) for _ in range(2)))
        for _ in range(20)
    ]
    row = pack(groups)
    plan = forks(row.groups, torch.device("cpu"))
    rows = torch.cat([rectangle.rows for rectangle in (*plan.prompts, *plan.branches)])
    assert rows[plan.places].tolist() == list(range(len(row.input_ids)))
    assert len(rows) <= PADDING * len(row.input_ids) + 2 * 40  # branches of one token take two places
    # A state belongs to the prompt before its branch: the last position of its text in the prompts' rectangles.
    ends = torch.cat([rectangle.rows.view(rectangle.shape)[:, -1] for rectangle in plan.prompts]).tolist()
    of_branch = {begin: group.prompt_end - 1 for group in row.groups for begin, _ in group.branches}
    for rectangle in plan.branches:
        assert rectangle.states is not None
        begins = rectangle.rows.view(rectangle.shape)[:, 0].tolist()
        assert [ends[state] for state in rectangle.states.tolist()] == [of_branch[begin] for begin in begins]


def test_layers_with_a_state_are_found_by_what_they_do() -> None:
    assert len(fork_states(hybrid("qwen3_next").backbone)) == 1
    assert fork_states(hybrid("llama").backbone) == []

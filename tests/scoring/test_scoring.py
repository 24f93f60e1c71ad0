"""Scoring against the models' own forward: every family, exact isolation of branches, gradients, the probe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import SHARED_FAMILIES, VOCAB, make, own_logps, some_groups

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import as_ids
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.scoring.attention import SHARED_PROMPT, use_layout
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.forward import rotary_limit, score_groups
from dpoeng.engine.scoring.layout import Branch, PromptGroup

# Recurrence, or positions inside the attention: a prompt cannot be shared, and that must be noticed.
SEPARATE_FAMILIES: dict[str, dict[str, Any]] = {"MambaConfig": {}, "BloomConfig": {"n_head": 4}}


@pytest.mark.parametrize("name", SHARED_FAMILIES)
def test_shared_prompt_equals_separate_forwards(name: str) -> None:
    lm = make(name, SHARED_FAMILIES[name])
    choose_layout(lm)
    assert (lm.layout, lm.attention) == ("shared", "segments")
    assert lm.layout_reason == (
        "each prompt runs once for all its responses, and so does a beginning that they share; attention: segments"
    )
    with torch.inference_mode():
        scored, _ = score_groups(lm, some_groups())
        truth = own_logps(lm, some_groups())
    torch.testing.assert_close(scored.double(), truth, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen2Config", "MistralConfig"])
def test_shared_prompt_in_float64(name: str) -> None:
    """In float64 what remains is not rounding but error of the method: there must be none."""
    lm = make(name, SHARED_FAMILIES[name], torch.float64)
    truth = own_logps(lm, some_groups())
    use_layout(lm, "shared")
    scored, _ = score_groups(lm, some_groups())
    torch.testing.assert_close(scored.double(), truth, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", SEPARATE_FAMILIES)
def test_architectures_that_cannot_share_fall_back(name: str) -> None:
    lm = make(name, SEPARATE_FAMILIES[name])
    choose_layout(lm)
    assert lm.layout == "separate"
    assert lm.layout_reason
    with torch.inference_mode():
        scored, _ = score_groups(lm, some_groups())
        truth = own_logps(lm, some_groups())
    torch.testing.assert_close(scored.double(), truth, atol=2e-5, rtol=0)
    with pytest.raises(UserError, match="cannot share a prompt"):
        choose_layout(lm, "shared")


ROTARY = {
    "plain": ("LlamaConfig", {"max_position_embeddings": 64}, None),
    "dynamic": (
        "LlamaConfig",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
        64,
    ),
    "longrope": (
        "Phi3Config",
        {
            "pad_token_id": None,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 64,
            },
        },
        64,
    ),
}


@pytest.mark.parametrize("kind", ROTARY)
def test_up_to_the_rotary_limit_a_long_text_moves_no_other(kind: str) -> None:
    """And beyond it does, where there is a limit: that is why it is one."""
    name, extra, limit = ROTARY[kind]
    lm = make(name, extra)
    assert rotary_limit(lm) == limit
    use_layout(lm, "shared")
    rng = np.random.default_rng(0)

    def text(tokens: int) -> PromptGroup:
        return PromptGroup(*(rng.integers(0, VOCAB, 4), (Branch(rng.integers(0, VOCAB, tokens - 4)),)))

    short = text(20)
    for tokens, moves in ((64, False), (70, limit is not None)):
        alone, beside = (score_groups(lm, groups)[0][:16] for groups in ([short], [short, text(tokens)]))
        assert bool((alone - beside).abs().max() > 1e-3) == moves


def test_pairs_beyond_the_rotary_limit_are_refused(tmp_path: Path, tiny_model: Path, pairs_file: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = {**json.loads((model / "config.json").read_text()), "max_position_embeddings": 8, "rope_parameters": rope}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="rotary") as caught:
        precompute_reference(PrecomputeConfig(pairs=(pairs_file,), model=str(model), cache=tmp_path / "cache"))
    assert "--max-length 8" in str(caught.value.remedy)


def test_a_head_that_dpoeng_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("GraniteConfig", SHARED_FAMILIES["GraniteConfig"])
    monkeypatch.setattr("dpoeng.engine.scoring.forward.head_transform", lambda lm: (None, 1.0))
    with pytest.raises(UserError) as caught:
        choose_layout(lm)
    assert caught.value.code == "model-unsupported"


def test_changing_one_branch_moves_no_other_bit() -> None:
    lm = make("Qwen2Config", {})
    use_layout(lm, "shared")
    groups = some_groups()
    with torch.inference_mode():
        before, offsets = score_groups(lm, groups)
        for g, group in enumerate(groups):
            for b, branch in enumerate(group.branches):
                for position in range(len(branch.ids)):
                    ids = branch.ids.copy()
                    ids[position] = (ids[position] + 1) % VOCAB
                    changed = list(group.branches)
                    changed[b] = Branch(ids, branch.start)
                    edited = [*groups[:g], PromptGroup(group.prompt_ids, tuple(changed)), *groups[g + 1 :]]
                    after, _ = score_groups(lm, edited)
                    k = sum(len(other.branches) for other in groups[:g]) + b
                    outside = torch.ones(len(before), dtype=torch.bool)
                    outside[offsets[k] : offsets[k + 1]] = False
                    assert torch.equal(before[outside], after[outside])
                    if position >= branch.start:  # and the branch itself does move
                        assert not torch.equal(before[~outside], after[~outside])


def test_gradients_equal_separate_forwards() -> None:
    # GPT-2, since its norms stay in float64; a Llama's are computed in float32 whatever the model's dtype.
    lm = make("GPT2Config", SHARED_FAMILIES["GPT2Config"], torch.float64)
    weights = [p for n, p in lm.base.named_parameters() if n.endswith(("c_attn.weight", "mlp.c_proj.weight"))]
    assert len(weights) == 4
    for weight in weights:
        weight.requires_grad_(True)
    groups = some_groups()
    truth = torch.autograd.grad(own_logps(lm, groups).sin().sum(), weights)
    use_layout(lm, "shared")
    scored, _ = score_groups(lm, groups)
    found = torch.autograd.grad(scored.double().sin().sum(), weights)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_how_a_batch_is_cut_does_not_matter() -> None:
    lm = make("LlamaConfig", {})
    use_layout(lm, "shared")
    groups = some_groups() + some_groups(seed=2)
    with torch.inference_mode():
        together, offsets = score_groups(lm, groups)
        alone = torch.cat([score_groups(lm, [group])[0] for group in groups])
        backwards, _ = score_groups(lm, groups[::-1])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=0)
    sizes = [sum(branch.scored for branch in group.branches) for group in groups]
    torch.testing.assert_close(torch.cat(backwards.split(sizes[::-1])[::-1]), together, atol=2e-6, rtol=0)
    assert offsets[-1] == len(together)


def test_attention_refuses_what_it_cannot_honour() -> None:
    lm = make("LlamaConfig", {})
    use_layout(lm, "shared")
    assert lm.base.config._attn_implementation == SHARED_PROMPT
    for layer in lm.base.model.layers:
        layer.self_attn.attention_dropout = 0.1
        layer.self_attn.training = True
    with pytest.raises(ValueError, match="attention dropout"):
        score_groups(lm, [PromptGroup(as_ids([1, 2]), (Branch(as_ids([3])),))])

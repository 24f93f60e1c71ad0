"""The mode in which both phases score: nothing of the base is random in training, and checkpointing changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make, own_logps, some_groups

from dpoeng.engine.models.adapters import add_policy_adapter
from dpoeng.engine.models.model import decoder_layers, enable_gradient_checkpointing, set_mode
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.forward import score_groups

# Layers that read their own `training` for dropout, which is 0.1 here; with checkpointing that flag used to be on.
WITH_DROPOUT: dict[str, dict[str, Any]] = {
    "OPTConfig": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1},
    "FalconConfig": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "new_decoder_architecture": False},
    "BioGptConfig": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "GPTNeoXConfig": {"hidden_dropout": 0.1},
}


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_the_training_forward_is_the_references(name: str) -> None:
    """With layers recomputed, which is when layers used to be told that they are trained."""
    lm = make(name, WITH_DROPOUT[name])
    truth = own_logps(lm, some_groups())
    lm = add_policy_adapter(lm, "new", None, {"r": 2, "target_modules": "all-linear"})
    choose_layout(lm)
    enable_gradient_checkpointing(lm)
    set_mode(lm, training=True)
    scored, _ = score_groups(lm, some_groups())
    torch.testing.assert_close(scored.double(), truth, atol=2e-5, rtol=0)
    assert scored.requires_grad


def test_checkpointed_layers_run_again_in_the_backward_and_give_the_same_gradients() -> None:
    def gradients(layers: int) -> tuple[list[torch.Tensor], int]:
        lm = add_policy_adapter(make("LlamaConfig", {}), "new", None, {"r": 2, "target_modules": "all-linear"})
        for name, parameter in lm.trainable_parameters():
            torch.manual_seed(len(name))
            torch.nn.init.normal_(parameter, std=0.1)
        runs = 0

        def count(*_: Any) -> None:
            nonlocal runs
            runs += 1

        for layer in decoder_layers(lm.backbone):
            layer.self_attn.register_forward_hook(count)
        choose_layout(lm)
        enable_gradient_checkpointing(lm, layers=layers)
        set_mode(lm, training=True)
        runs = 0
        scored, _ = score_groups(lm, some_groups())
        found = torch.autograd.grad(scored.sum(), [parameter for _, parameter in lm.trainable_parameters()])
        return list(found), runs

    plain, runs = gradients(0)
    for layers in (1, 2):
        again, more_runs = gradients(layers)
        assert (runs, more_runs) == (2, 2 + layers)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_decoder_without_marked_layers_has_its_longest_list_of_modules() -> None:
    lm = make("OpenAIGPTConfig", {"n_embd": 32, "n_layer": 3, "n_head": 4, "afn": "gelu"})
    assert decoder_layers(lm.backbone) == list(lm.base.transformer.h)

"""The probe finds what short texts do not show: windows, indexers, padding, tables of positions, heads of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import own_logps

from dpoeng.bench.studies.tiny_models import VOCABULARY, tiny_config, tiny_model
from dpoeng.cache.errors import UserError
from dpoeng.engine.models.model import CausalLM, decoder_of, set_mode
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.forward import head_transform, position_limit, rotary_limit, score_groups
from dpoeng.engine.scoring.layout import Branch, PromptGroup


def make(model_type: str, **changes: Any) -> CausalLM:
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    model = tiny_model(config).eval().requires_grad_(False)
    lm = CausalLM(model, model, None, torch.device("cpu"), torch.float32, "none", model.config._attn_implementation)
    set_mode(lm, training=False)
    return lm


def long_groups() -> list[PromptGroup]:
    """Longer than the tiny models' windows of 4 and 16, and of several lengths."""
    rng = np.random.default_rng(3)

    def draw(n: int) -> Any:
        return rng.integers(0, 257, n, dtype=np.int32)

    return [
        PromptGroup(draw(30), (Branch(draw(22)), Branch(draw(9)))),
        PromptGroup(draw(12), (Branch(draw(40)), Branch(draw(3)))),
    ]


# model type -> how prompts are scored, and whether texts may be padded.
FOUND: dict[str, tuple[str, bool]] = {
    "phimoe": ("separate", True),  # its window is in the mask that it makes, and nowhere else
    "deepseek_v32": ("separate", False),  # its indexer chooses other tokens beside padding
    "hy_v4": ("separate", False),
    "llama4_text": ("separate", True),  # chunks of attention, in the mask; `get_decoder` is the model itself
    "mistral": ("shared", True),
    "modernbert-decoder": ("shared", True),  # `get_decoder` is the head, and a dense layer is before that
    "recurrent_gemma": ("separate", True),  # logits_soft_cap
    "falcon_h1": ("shared", True),  # lm_head_multiplier
    "gemma3": ("shared", True),  # all of these inside text_config
    "mistral3": ("shared", True),  # there is no causal class of these
    "qwen2_5_vl": ("shared", True),
}


@pytest.mark.parametrize("model_type", FOUND)
def test_long_texts_have_the_models_own_numbers(model_type: str) -> None:
    lm = make(model_type, **({"lm_head_multiplier": 0.4} if model_type == "falcon_h1" else {}))
    choose_layout(lm)
    assert (lm.layout, lm.padding) == FOUND[model_type]
    scored, offsets = score_groups(lm, long_groups())
    assert offsets.tolist() == [0, 22, 31, 71, 74]
    truth = own_logps(lm, long_groups())
    torch.testing.assert_close(scored.double(), truth, atol=5e-5, rtol=0)


def test_a_window_that_no_text_reaches_is_not_tried() -> None:
    lm = make("phimoe")
    choose_layout(lm, longest=16)
    assert lm.layout == "shared"


def test_transforms_of_the_logits_are_known() -> None:
    assert head_transform(make("falcon_h1", lm_head_multiplier=0.4)) == (None, 0.4)
    assert head_transform(make("recurrent_gemma"))[0] == 30.0


def test_a_model_that_looks_ahead_is_refused() -> None:
    lm = make("roberta", is_decoder=False)
    with pytest.raises(UserError, match="see later tokens") as caught:
        choose_layout(lm)
    assert caught.value.code == "model-unsupported"


def test_the_decoder_holds_the_embedding_and_not_the_head() -> None:
    for model_type in ("llama4_text", "modernbert-decoder", "gpt2", "gemma3"):
        base = make(model_type).base
        modules = list(decoder_of(base).modules())
        assert any(module is base.get_input_embeddings() for module in modules)
        assert not any(module is base.get_output_embeddings() for module in modules)


# model type -> the most tokens that it has positions for; None where they are made for any length.
LIMITS = {
    "gpt2": 256,
    "opt": 256,
    "gptj": 256,
    "gpt_neo": 256,
    "biogpt": 256,
    "mpt": 2048,
    "llama": None,
    "bloom": None,
}


@pytest.mark.parametrize("model_type", LIMITS)
def test_the_last_position_is_known(model_type: str) -> None:
    """Up to the limit the model's own forward runs, and one token further it does not."""
    lm = make(model_type)
    limit = position_limit(lm)
    assert limit == LIMITS[model_type]
    if limit is not None and limit <= 256:
        lm.base(input_ids=torch.zeros(1, limit, dtype=torch.long), use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            lm.base(input_ids=torch.zeros(1, limit + 1, dtype=torch.long), use_cache=False)


def test_rotary_limits_are_found_inside_the_text_config() -> None:
    config = tiny_config("gemma3")
    config.text_config.rope_parameters = {
        kind: {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        for kind in ("full_attention", "sliding_attention")
    }
    model = tiny_model(config)
    lm = CausalLM(model, model, None, torch.device("cpu"), torch.float32, "none", "eager")
    assert rotary_limit(lm) == 256


def test_vocabulary_is_what_both_embedding_and_head_have() -> None:
    lm = make("llama")
    assert lm.vocab_size == VOCABULARY
    lm.base.get_input_embeddings().weight = torch.nn.Parameter(torch.zeros(VOCABULARY + 5, 32))
    assert lm.vocab_size == VOCABULARY

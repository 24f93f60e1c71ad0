"""The plan of layer offloading: its memory does not grow with the base, and it is proposed where that does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.config.plan import PlanConfig
from dpoeng.engine.memory.any_depth import step_memory
from dpoeng.engine.memory.simulate import ADAPTERS, GRADIENTS, OPTIMIZER, WEIGHTS, Pair, Setup
from dpoeng.engine.recipes.plan import as_json, make_plan, suggested

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LAYER = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64)


def setup(**more: Any) -> Setup:
    config = TrainConfig(gradient_checkpointing=True, lora_r=2)
    return Setup(model=MODEL, dtype=torch.bfloat16, quantization="none", config=config, **more)


def test_weights_are_two_layers_and_what_lies_outside() -> None:
    peak = step_memory(setup(by_layer=True), [Pair(3, 20, 10)]).peak
    rotary = peak.by_kind[WEIGHTS] - (2 * LAYER + 2 * 1000 * 64 + 2 * 64)  # the embedding is on the host
    assert 0 <= rotary < 1000
    ordinary = step_memory(setup(), [Pair(3, 20, 10)]).peak
    assert peak.by_kind[ADAPTERS] == ordinary.by_kind[ADAPTERS]
    assert peak.n_bytes < ordinary.n_bytes


def test_two_shallow_models_tell_of_a_deep_one() -> None:
    extended = step_memory(setup(by_layer=True), [Pair(3, 20, 10)]).peak
    assert extended == step_memory(setup(by_layer=True), [Pair(3, 20, 10)], whole=True).peak
    deeper = step_memory(setup(by_layer=True, depth=8), [Pair(3, 20, 10)]).peak
    grown = {kind for kind in extended.by_kind if extended.by_kind[kind] != deeper.by_kind.get(kind)}
    assert grown <= {ADAPTERS, GRADIENTS, OPTIMIZER}


def plan(**more: Any) -> Any:
    asked = {"model": "Qwen/Qwen2.5-7B", "quantization": "none", "max_length": 256, "compare": False, "pairs": 100}
    return make_plan(PlanConfig.model_validate({**asked, **more}))


def test_it_is_proposed_where_the_base_does_not_fit() -> None:
    found = plan(gpu=("12gb", "80gb"))
    small, large = found.cards
    assert small.fits
    assert small.by_layer == (True, True)
    assert large.by_layer == (False, False)
    assert suggested(found, small)["layer_offloading"] == "on"
    assert "layer_offloading" not in suggested(found, large)
    assert as_json(found)["cards"][0]["layer_offloading"] == {"phase1": True, "phase2": True}
    without = plan(gpu=("12gb",), layer_offloading="off").cards[0]
    assert not without.fits


def test_the_time_is_that_of_the_bus_where_it_is_slower() -> None:
    fast, slow = (plan(gpu=("rtx-4090-24gb",), layer_offloading="on", load_gb_per_s=speed) for speed in (1e6, 0.1))
    layers = fast.parameters - 2 * 152064 * 3584
    steps = -(-3 * 100 // 8)
    assert slow.cards[0].times[1].hours == pytest.approx(2 * steps * 2 * layers / 0.1e9 / 3600, rel=0.01)
    assert fast.cards[0].times[1].hours < 0.1 * slow.cards[0].times[1].hours

"""A shallow model tells the memory of a deep one, byte by byte, whatever the order of its layers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from dpoeng.bench.studies.tiny_models import tiny_config
from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.memory import any_depth
from dpoeng.engine.memory.any_depth import forward_memory, step_memory
from dpoeng.engine.memory.simulate import WEIGHTS, Pair, Setup
from dpoeng.engine.memory.tracker import MemoryTracker
from dpoeng.engine.models.loading import layer_period

PAIRS = [Pair(20, 12, 9)]
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
_IRREGULAR = [LINEAR, LINEAR, FULL, LINEAR, LINEAR, LINEAR, LINEAR, FULL, LINEAR, FULL, LINEAR, LINEAR, LINEAR, FULL]

ORDERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "turns": ("cohere2", {"layer_types": ([SLIDING] * 3 + [FULL]) * 3}, 8),
    "turns that do not end": ("cohere2", {"layer_types": (([SLIDING] * 3 + [FULL]) * 4)[:14]}, 8),
    "another last layer": ("cohere2", {"layer_types": [SLIDING] * 11 + [FULL]}, 4),
    "dense layers first": ("deepseek_v3", {"num_hidden_layers": 12, "first_k_dense_replace": 3}, 7),
    "a hybrid without a rule": ("granitemoehybrid", {"layer_types": _IRREGULAR}, 7),
    "late kinds": (
        "gemma4_text",
        {"layer_types": [SLIDING, FULL] * 5, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
        7,
    ),
    # An embedding with something for each layer: only the whole model tells of it.
    "tensors of all layers": ("gemma4_text", {"layer_types": [SLIDING, FULL] * 5}, 10),
}
"""An order of layers -> a type of model, fields of its config, and how many layers are simulated."""


def setup_of(model_type: str, changes: dict[str, Any], **more: Any) -> Setup:
    fields: dict[str, Any] = json.loads(tiny_config(model_type).to_json_string(use_diff=False))
    fields.pop("per_layer_config", None)  # it follows from the others
    depth = len(changes["layer_types"]) if "layer_types" in changes else changes["num_hidden_layers"]
    fields |= changes | {"num_hidden_layers": depth}
    return Setup(fields, torch.bfloat16, "none", TrainConfig(gradient_checkpointing=True, lora_r=4), **more)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The depth of each simulated model."""
    depths: list[int] = []
    trace = any_depth.trace_step

    def counted(setup: Setup, pairs: list[Pair]) -> MemoryTracker:
        depths.append(setup.layers)
        return trace(setup, pairs)

    monkeypatch.setattr(any_depth, "trace_step", counted)
    return depths


BOTH = list(product(ORDERS, ("cuda", "cpu")))


@pytest.mark.parametrize(
    ("order", "kernels"),
    [pytest.param(*case, marks=pytest.mark.slow) if number % 4 in (1, 2) else case for number, case in enumerate(BOTH)],
)
def test_a_step_follows_from_a_few_layers(order: str, kernels: Any, simulated: list[int]) -> None:
    model_type, changes, depth = ORDERS[order]
    setup = setup_of(model_type, changes, kernels=kernels, accumulates=kernels == "cuda")
    short = step_memory(setup, PAIRS)
    whole = step_memory(setup, PAIRS, whole=True)
    assert simulated == [depth, setup.layers]
    assert bool(short.timeline) == (depth == setup.layers)
    assert short.stretches == whole.stretches
    assert short.peak == whole.peak
    assert short.attention == whole.attention
    assert short.peak.by_kind[WEIGHTS] > 0


@pytest.mark.parametrize("order", [pytest.param("turns that do not end", marks=pytest.mark.slow), "dense layers first"])
def test_a_forward_and_a_step_by_layer_follow_too(order: str, simulated: list[int]) -> None:
    model_type, changes, depth = ORDERS[order]
    setup = setup_of(model_type, changes, kernels="cpu")
    for policy in (True, False):
        short, whole = (forward_memory(setup, PAIRS, policy=policy, whole=whole) for whole in (False, True))
        assert not short.timeline
        assert short.stretches == whole.stretches
    short, whole = (step_memory(replace(setup, by_layer=True), PAIRS, whole=whole) for whole in (False, True))
    assert simulated == [depth, setup.layers]
    assert short.peak.n_bytes == whole.peak.n_bytes  # several layers have it, with other parts
    assert {name: peak.n_bytes for name, peak in short.stretches.items()} == {
        name: peak.n_bytes for name, peak in whole.stretches.items()
    }


@pytest.mark.parametrize("trunk", [pytest.param(6, marks=pytest.mark.slow), 9])
def test_above_a_trunk_the_layers_take_turns_from_there(trunk: int, simulated: list[int]) -> None:
    setup = setup_of("cohere2", {"layer_types": ([SLIDING] * 3 + [FULL]) * 5}, trunk_layer=trunk)
    short, whole = (step_memory(setup, PAIRS, whole=whole) for whole in (False, True))
    assert simulated[0] < simulated[1] == 20 - trunk
    assert short.stretches == whole.stretches
    assert short.peak == whole.peak


def test_upper_layers_that_use_keys_from_below_cannot_begin_at_a_trunk() -> None:
    changes = {"layer_types": [SLIDING, FULL] * 4, "num_kv_shared_layers": 4}
    with pytest.raises(UserError, match="more from below than hidden states") as caught:
        step_memory(setup_of("gemma4_text", changes, trunk_layer=5), PAIRS)
    assert caught.value.code == "trunk-unsupported"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_model_of_few_layers_is_simulated_whole(depth: int) -> None:
    memory = step_memory(setup_of("cohere2", {"layer_types": [FULL] * depth}), PAIRS)
    assert memory.timeline
    assert memory.attention is not None


@pytest.mark.parametrize("times", [1, 2])
def test_layers_that_run_again_in_a_forward_are_noticed(times: int) -> None:
    """Which of them do may depend on their number."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            for layer in [self.layers[0], *[self.layers[1]] * times, self.layers[2]]:
                states = layer(states)
            return states

    decoder = Decoder()
    tracker = MemoryTracker("cpu")
    tracker.watch_layers(list(decoder.layers), decoder)
    with tracker:
        for _ in range(2):
            decoder(torch.ones(1, 4)).sum().backward()
    assert tracker.loops == (times == 2)


@pytest.mark.parametrize(
    ("order", "period"),
    [("turns", 4), ("turns that do not end", 4), ("dense layers first", 12)],
)
def test_the_period_of_an_order(order: str, period: int) -> None:
    model_type, changes, _ = ORDERS[order]
    assert layer_period(setup_of(model_type, changes).model) == period

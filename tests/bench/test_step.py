"""What a step asks of a GPU, counted on the meta device: ceilings, so that a change that costs launches is seen."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from dpoeng.bench.step import ATTENTION, HEAD, LORA, PRODUCTS, WIDENING, StepSettings, count_step
from dpoeng.cli.bench.step import step

GB = 1e9
LARGE = {"model": "Qwen/Qwen2.5-32B", "quantization": "8bit"}  # 6,144 tokens
SMALL = {"model": "Qwen/Qwen2.5-7B", "prompt": 100, "chosen": 200, "rejected": 200}  # 1,000 tokens


@pytest.mark.parametrize(
    ("settings", "launches", "n_bytes"),
    [
        # With chunked LoRA, int8 widened in two passes and torch's norms: 1,141 and 77.1 GB. The goal: 180 and 30.
        (LARGE, 140, 29 * GB),
        ({**LARGE, "gradient_checkpointing": False}, 100, 20.5 * GB),
        # 403 and 8.7 GB before. The goal was 120 launches, with layers that are not recomputed.
        (SMALL, 112, 4.0 * GB),
        ({**SMALL, "gradient_checkpointing": False}, 83, 2.8 * GB),
    ],
)
def test_a_layer_stays_below_its_ceiling(settings: Any, launches: int, n_bytes: float) -> None:
    layer = count_step(StepSettings(**settings)).layer
    assert layer.launches.total() <= launches
    assert layer.n_bytes.total() <= n_bytes


def test_products_are_those_of_the_formula() -> None:
    """A layer's own products, three times (forward, recomputed, backward); the head's two, once."""
    found = count_step(StepSettings(**SMALL))
    h, inner, heads, kv, vocabulary, tokens = 3584, 18944, 3584, 512, 152064, 1000
    weights = h * (2 * heads + 2 * kv) + 3 * h * inner
    assert found.tokens == tokens
    assert found.layer.flop[PRODUCTS] == 3 * 2 * tokens * weights
    assert found.layer.launches[PRODUCTS] == 3 * 7
    assert found.layer.launches[ATTENTION] == 3
    assert found.outside.flop[HEAD] == 2 * 2 * 800 * h * vocabulary  # the responses' tokens
    # The first layer forms no gradient of its input.
    assert found.outside.flop[PRODUCTS] == -2 * tokens * h * (heads + 2 * kv)


def test_widening_reads_a_byte_and_writes_two() -> None:
    layer = count_step(StepSettings(**LARGE)).layer
    weights = 5120 * (2 * 5120 + 2 * 1024) + 3 * 5120 * 27648
    assert layer.launches[WIDENING] == 3 * 7
    assert layer.n_bytes[WIDENING] == pytest.approx(3 * 3 * weights, rel=1e-3)


def test_the_command() -> None:
    found = CliRunner().invoke(step, ["--model", "Qwen/Qwen2.5-7B", "--json"])
    assert sum(json.loads(found.stdout)[0]["layer_launches"].values()) > 100
    table = CliRunner().invoke(step, ["--model", "Qwen/Qwen2.5-7B"])
    assert "one of 28 layers, 6144 tokens" in table.output
    assert LORA in table.output

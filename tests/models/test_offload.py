"""Layer inputs that wait in host memory: the same bytes trained, and less memory where it is short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, write_jsonl
from model_fields import fields

from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.memory.simulate import Pair, Setup, trace_step
from dpoeng.engine.models import offload
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train


def test_the_adapter_is_the_same(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; and every layer of every forward has kept one tensor on the host."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=tmp_path / "cache"))
    kept: list[torch.Size] = []
    original = offload.to_host

    def counted(tensor: torch.Tensor) -> Any:
        kept.append(tensor.shape)
        return original(tensor)

    monkeypatch.setattr(offload, "to_host", counted)
    adapters = []
    for name, switches in (
        ("plain", {"gradient_checkpointing": True}),
        ("offloaded", {"gradient_checkpointing": True, "activation_offloading": True}),
        ("by itself", {"activation_offloading": True}),
    ):
        kept.clear()
        places = {"cache": tmp_path / "cache", "output_dir": tmp_path / name}
        config = TrainConfig(**places, **switches, max_steps=2, eval_share=0.0)
        train(config)
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
        layers, forwards = 2, 2 * config.gradient_accumulation_steps
        assert len(kept) == (0 if name == "plain" else layers * forwards)
    assert adapters[0] == adapters[1] == adapters[2]


def test_the_plan_knows_what_it_saves() -> None:
    """The inputs of all layers but the one at work leave the device."""
    peaks = []
    for activation_offloading in (False, True):
        config = TrainConfig(gradient_checkpointing=True, activation_offloading=activation_offloading)
        model = fields("qwen2", num_hidden_layers=8)
        setup = Setup(model=model, dtype=torch.bfloat16, quantization="none", config=config)
        peaks.append(trace_step(setup, [Pair(64, 96, 96)]).peak().n_bytes)
    a_layer = 128 * 256 * 2  # hidden size x tokens x bytes
    assert 6 * a_layer <= peaks[0] - peaks[1] <= 9 * a_layer


def test_it_needs_checkpointing() -> None:
    with pytest.raises(ValueError, match="activation_offloading"):
        TrainConfig(gradient_checkpointing=False, activation_offloading=True)

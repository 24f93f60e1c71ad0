"""The forecast reads configs through transformers, whatever they call their sizes; as advice it ends no run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpoeng.bench.studies.tiny_models import tiny_config
from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.memory import fit
from dpoeng.engine.memory.overhead import count_parameters
from dpoeng.engine.models import loading
from dpoeng.engine.models.loading import empty_model, stored_dtype
from dpoeng.engine.models.model_config import config_of, sizes
from dpoeng.engine.models.sources import ModelSource

CUDA = torch.device("cuda")

# The number of layers under other names and nested; experts as stacked parameters; values narrower than keys; a number
# that JSON does not have; masks of the model's own; heads of two widths.
TYPES = (
    "gpt2",
    "gptj",
    "gpt_neo",
    "bloom",
    "mpt",
    "gemma3",
    "qwen3_moe",
    "deepseek_v3",
    "mamba2",
    "stablelm",
    "gemma4_text",
)


def fields_of(model_type: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(tiny_config(model_type).to_json_string(use_diff=False))
    return fields


def source_of(fields: dict[str, Any], folder: Path) -> ModelSource:
    (folder / "config.json").write_text(json.dumps(fields))
    return ModelSource("tiny", folder, ())


def pairs() -> list[PairIds]:
    return [PairIds(*(np.zeros(n, dtype=np.int32) for n in (20, 12, 9)))] * 2


@pytest.fixture(autouse=True)
def _recent_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "gpu_multiplies_bf16", lambda device: True)


@pytest.fixture
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "available_bytes", lambda device: 24 * 2**30)


@pytest.mark.usefixtures("_room")
@pytest.mark.parametrize("model_type", TYPES)
def test_both_phases_are_forecast_as_on_a_gpu(model_type: str, tmp_path: Path) -> None:
    fields = fields_of(model_type)
    source, notes = source_of(fields, tmp_path), list[str]()
    config = PrecomputeConfig(model="tiny", dtype="bfloat16", batch_tokens=256)
    forward = fit.check_forward(config, source, pairs(), CUDA, note=notes.append)
    step = fit.check_step(
        TrainConfig(gradient_checkpointing=True), source, pairs(), CUDA, quantization="none", dtype="bfloat16",
        note=notes.append,
    )  # fmt: skip
    assert not notes
    weights = sum(p.nbytes for p in empty_model(fields, quantization="none", dtype=torch.bfloat16).base.parameters())
    assert forward is not None
    assert step is not None
    assert weights < forward < step.peak_bytes


def test_a_forecast_that_cannot_run_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(fit, "step_memory", fail)
    notes: list[str] = []
    source = source_of(fields_of("gpt2"), tmp_path)
    ask = {"quantization": "none", "dtype": "bfloat16", "note": notes.append}
    assert fit.check_step(TrainConfig(), source, pairs(), CUDA, **ask) is None  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text('{"model_type": "of next year"}')
    assert fit.check_forward(PrecomputeConfig(), source, pairs(), CUDA, note=notes.append) is None
    assert ["no memory forecast for this run:" in note for note in notes] == [True, True]
    assert "ZeroDivisionError: nobody thought of this" in notes[0]


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_5"])
def test_what_does_not_fit_is_still_refused(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "available_bytes", lambda device: 2**10)
    source = source_of(fields_of(model_type), tmp_path)
    with pytest.raises(UserError) as caught:
        fit.check_forward(PrecomputeConfig(dtype="bfloat16"), source, pairs(), CUDA)
    assert caught.value.code == "memory-short"


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3", "mpt", "qwen3_moe"])
def test_sizes_are_those_of_the_model(model_type: str) -> None:
    fields = fields_of(model_type)
    lm = empty_model(fields, quantization="none", dtype=torch.bfloat16)
    found = sizes(config_of(fields))
    assert (found.layers, found.hidden, found.vocabulary) == (2, 32, 320)
    assert sum(count_parameters(fields).values()) == sum(p.numel() for p in lm.base.parameters())


def test_sizes_of_layers_that_differ_are_the_largest() -> None:
    fields = fields_of("gemma4_text")
    assert [layer.head_dim for layer in config_of(fields).per_layer_config] == [8, 16]
    assert sizes(config_of(fields)).attention == 4 * 16


def test_fields_that_contradict_each_other_are_a_value_error() -> None:
    """transformers validates some fields with errors of another class, which callers would let through."""
    fields = fields_of("gemma3_text") | {"layer_types": ["nonsense"] * 2, "dtype": None}
    with pytest.raises(ValueError, match="layer_types"):
        config_of(fields)
    assert stored_dtype(fields) is None
    with pytest.raises(UserError, match=r"cannot build a model from this config\.json"):
        count_parameters(fields)

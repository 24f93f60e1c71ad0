"""A step in float16: its gradient survives a range without small numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_fields import fields

from dpoeng.bench.memory import training_run
from dpoeng.cache.schema import PairIds, ScoredPair
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.training import step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a usual size, exact in float16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    small = fields("llama", vocab_size=200, pad_token_id=None)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small))
    folder = tmp_path_factory.mktemp("model")
    base.half().float().save_pretrained(folder)
    return folder


def pair(prompt: int, chosen: int, rejected: int) -> ScoredPair:
    """Random tokens."""
    random = np.random.default_rng(prompt)
    ids = PairIds(*(random.integers(0, 200, n, dtype=np.int32) for n in (prompt, chosen, rejected)))
    return ScoredPair(ids, np.full(chosen, -5.0, np.float32), np.full(rejected, -5.0, np.float32))


def gradient(model: Path, dtype: str, **settings: Any) -> tuple[torch.Tensor, float]:
    """Of one step over few pairs with a small beta, as late in a training or in a large batch."""
    lm = load_model(
        find_model(str(model)), quantization="none", dtype=dtype, device=torch.device("cpu"), tokenizer=False
    )
    use_layout(lm, "shared")
    config = TrainConfig.model_validate(
        {"beta": 1e-5, "lora_r": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, **settings}
    )
    rows = [pair(9, 7, 5), pair(5, 4, 6)]
    torch.manual_seed(0)  # the adapter's start
    with training_run(lm, rows, config) as run:
        _, norm = step._gradient(run, 0)
        parts = [p.grad.flatten() for _, p in lm.trainable_parameters() if p.grad is not None]
        return torch.cat(parts).double(), norm


@pytest.mark.parametrize("settings", [{}, {"loss_type": ("aot",)}], ids=["pairs", "pairs that meet"])
def test_a_small_gradient_is_that_of_float32(
    model: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, norm = gradient(model, "float32", **settings)

    def off(found: torch.Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    found, found_norm = gradient(model, "float16", **settings)
    assert off(found) < 0.01
    assert found_norm == pytest.approx(norm, rel=0.01)
    monkeypatch.setattr(step, "_FACTORS", (1.0,))
    assert off(gradient(model, "float16", **settings)[0]) > 0.03  # this is what the factor is for


def test_a_factor_that_overflows_gives_way(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = gradient(model, "float16")
    monkeypatch.setattr(step, "_FACTORS", (2.0**60, *step._FACTORS))
    found, norm = gradient(model, "float16")
    assert torch.equal(found, expected)
    assert 0 < norm < 1e-3


def test_other_dtypes_are_left_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = gradient(model, "float32")
    monkeypatch.setattr(step, "_FACTORS", ())
    assert torch.equal(gradient(model, "float32")[0], expected)

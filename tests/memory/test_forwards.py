"""How much goes through one forward on a GPU, where nobody said so. A room that is made up stands for the GPU's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpoeng_testing import pair_rows, write_jsonl
from model_fields import fields

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.memory import fit
from dpoeng.engine.memory.fit import StepForecast
from dpoeng.engine.memory.forwards import pairs_to_try
from dpoeng.engine.memory.offloading import decide_forward, decide_step
from dpoeng.engine.models.sources import ModelSource
from dpoeng.engine.recipes import policy as policy_module
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train

GPU = torch.device("cuda")


def ids(*lengths: int) -> PairIds:
    return PairIds(*(np.zeros(n, dtype=np.int32) for n in lengths))


@pytest.mark.parametrize(
    ("changes", "length", "named", "expected"),
    [
        ({}, 500, {}, [8, 4, 2, 1]),  # 4,000 tokens: the whole step
        ({}, 1500, {}, [3, 2, 1]),  # 12,000 tokens in three forwards
        ({}, 3000, {}, [2, 1]),  # two pairs are more than enough, and stay what they were
        ({"gradient_accumulation_steps": 12}, 500, {}, [8, 4, 2, 1]),
        ({}, 500, {"processes": 2}, [4, 2, 1]),  # none of them is idle
        ({}, 500, {"processes": 3}, [3, 2, 1]),
        ({}, 500, {"begun_with": 5}, [5, 3, 2, 1]),
        ({"per_device_train_batch_size": 2}, 500, {}, [2]),  # asked for
        ({"per_device_train_batch_size": 4}, 500, {"begun_with": 1}, [1]),  # memory had run out
        ({"lora_dropout": 0.1}, 500, {}, [2]),  # draws are those of a forward
    ],
)
def test_pairs_of_a_forward(changes: Any, length: int, named: Any, expected: list[int]) -> None:
    pairs = [ids(100, length - 200, 100)] * 20
    assert pairs_to_try(TrainConfig(**changes), pairs, "cuda", **named) == expected
    configured = TrainConfig(**changes)
    assert pairs_to_try(configured, pairs, "cpu", **named) == [configured.per_device_train_batch_size]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSource:
    model = fields("qwen2", num_hidden_layers=8, hidden_size=64, intermediate_size=256)
    (tmp_path / "config.json").write_text(json.dumps(model))
    monkeypatch.setattr(fit, "resolve_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(fit, "_needed", lambda peak, device: peak.n_bytes)
    return ModelSource("model", tmp_path, ())


def test_fewer_pairs_where_more_do_not_fit(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def forecast(room: int, **changes: Any) -> StepForecast:
        monkeypatch.setattr(fit, "available_bytes", lambda _: room)
        config = TrainConfig(lora_r=2, gradient_checkpointing=True, layer_offloading="off", **changes)
        how: dict[str, Any] = {"quantization": "none", "dtype": "bfloat16", "shards": 1, "held_bytes": 0}
        by_layer, found = decide_step(
            config, source, None, [ids(40, 60, 50)] * 8, GPU, trunk_layer=0, note=lambda _: None, **how
        )
        assert not by_layer
        assert found is not None
        return found

    needs = {n: forecast(2**40, per_device_train_batch_size=n).peak_bytes for n in (1, 2, 4, 8)}
    assert needs[1] < needs[2] < needs[4] < needs[8]
    for room, pairs in ((needs[8], 8), (needs[8] - 1, 4), (needs[4] - 1, 2), (needs[2] - 1, 1)):
        assert forecast(room) == StepForecast(needs[pairs], None, pairs)
    with pytest.raises(UserError, match="does not fit"):
        forecast(needs[1] - 1)
    with pytest.raises(UserError, match="does not fit"):
        forecast(needs[2] - 1, per_device_train_batch_size=2)  # asked for


def test_fewer_tokens_in_phase_one_where_more_do_not_fit(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, said = [ids(40, 60, 50)] * 64, list[str]()

    def decide(room: int, tokens: int, everything: Any = pairs) -> Any:
        monkeypatch.setattr(fit, "available_bytes", lambda _: room)
        config = PrecomputeConfig(model="model", batch_tokens=tokens, layer_offloading="off")
        return decide_forward(config, source, [pairs[:1]], GPU, said.append, everything=everything)

    (_, more, _), (_, fewer, _) = decide(2**40, 4096), decide(2**40, 2048)
    assert fewer < more
    assert decide(more, 4096) == (False, more, 4096)
    assert said == []
    # For all pairs, though only one is left to be scored: batches are then cut as in a run that was not interrupted.
    assert decide(more - 1, 4096) == (False, fewer, 2048)
    assert "2048 tokens" in said[-1]
    assert decide(more - 1, 4096, None)[2] == 4096  # asked for: of the pairs that are left
    with pytest.raises(UserError, match="does not fit"):
        decide(fewer // 8, 4096)


def test_the_result_is_that_of_a_run_configured_so(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte; and a killed run continues with as many pairs, whatever fits by then."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=tmp_path / "cache"))
    given: list[int | None] = []

    def decide(*_: Any, begun_with: int | None, **__: Any) -> tuple[bool, StepForecast]:
        given.append(begun_with)
        return False, StepForecast(1, pairs=begun_with or 3)

    def run(name: str, **settings: Any) -> bytes:
        train(
            TrainConfig(cache=tmp_path / "cache", output_dir=tmp_path / name, max_steps=3, eval_share=0.0, **settings)
        )
        return (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()

    as_configured = run("configured", per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert as_configured != run("others", per_device_train_batch_size=2, gradient_accumulation_steps=3)
    monkeypatch.setattr(policy_module, "decide_step", decide)
    usual: dict[str, Any] = {"gradient_accumulation_steps": 3}  # of 2 pairs, so that a step has 6
    assert run("chosen", **usual) == as_configured

    def stop(_: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    config = TrainConfig(cache=tmp_path / "cache", output_dir=tmp_path / "killed", max_steps=3, eval_share=0.0, **usual)
    with pytest.raises(KeyboardInterrupt):
        train(config, on_metrics=stop)
    given.clear()
    assert run("killed", **usual) == as_configured
    assert given == [3]

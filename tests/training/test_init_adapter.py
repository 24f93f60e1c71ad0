"""A policy that does not begin as the reference: its adapter has the weights of another one."""

from __future__ import annotations

from pathlib import Path

import pytest
from dpoeng_testing import tree

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.config.files import config_of
from dpoeng.engine.models.sources import find_adapter
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs.metrics import MetricsLog

FIELDS = {"eval_share": 0.3, "max_steps": 3, "learning_rate": 3e-3, "parity_pairs": 4, "save_steps": 1}


@pytest.fixture(params=["new", "stack", "continue"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cache(tmp_path: Path, tiny_model: Path, sft_adapter: Path, pairs_file: Path, mode: str) -> Path:
    adapter = str(sft_adapter) if mode != "new" else None
    config = PrecomputeConfig(pairs=(pairs_file,), model=str(tiny_model), adapter=adapter, cache=tmp_path / "cache")
    return precompute_reference(config).cache


def test_it_continues_where_the_other_run_ended(tmp_path: Path, cache: Path, mode: str) -> None:
    shape = {} if mode == "continue" else {"lora_r": 4, "lora_alpha": 8}
    config = TrainConfig(cache=cache, output_dir=tmp_path / "one", adapter_mode=mode, **FIELDS, **shape)
    first = train(config)
    more = config.model_copy(update={"output_dir": tmp_path / "two", "init_adapter": str(first.result)})
    train(more)
    ended = MetricsLog(tmp_path / "one").read_evaluations()[-1]["metrics"]
    began = MetricsLog(tmp_path / "two").read_evaluations()[0]
    assert began["step"] == 0
    assert began["metrics"] == pytest.approx(ended, abs=1e-5)
    assert abs(ended["rewards/margins"]) > 0.01

    # A run that is killed after its first step continues to the same bytes.
    class KilledError(Exception):
        pass

    def kill(line: object) -> None:
        if isinstance(line, dict) and line.get("step") == 2:
            raise KilledError

    third = more.model_copy(update={"output_dir": tmp_path / "three"})
    with pytest.raises(KilledError):
        train(third, on_metrics=kill)
    train(third)
    assert tree(tmp_path / "three", "adapter") == tree(tmp_path / "two", "adapter")

    with pytest.raises(UserError, match="resume-changed"):  # it began with other weights
        train(third.model_copy(update={"init_adapter": str(tmp_path / "two" / "adapter")}))
    assert find_adapter(str(first.result)).weight_files[0].is_file()


@pytest.mark.parametrize("mode", ["new", "stack"], indirect=True)
def test_another_shape_is_refused(tmp_path: Path, cache: Path, mode: str, sft_adapter: Path) -> None:
    config = TrainConfig(
        cache=cache, output_dir=tmp_path / "out", adapter_mode=mode, init_adapter=str(sft_adapter), lora_r=8, **FIELDS
    )
    with pytest.raises(UserError, match="adapter-mismatch") as caught:
        train(config)
    assert "r 4, not 8" in str(caught.value)


def test_it_needs_an_adapter_that_is_trained(sft_adapter: Path) -> None:
    with pytest.raises(UserError, match="init_adapter"):
        config_of(TrainConfig, {"use_peft": False, "init_adapter": str(sft_adapter)})

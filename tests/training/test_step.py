"""What a step does beside its numbers: work on the host that a GPU would wait for; and that it stops without them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_fields import fields

from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.memory import simulate
from dpoeng.engine.memory.simulate import Pair, Setup, trace_step
from dpoeng.engine.models.model import CausalLM, decoder_layers
from dpoeng.engine.training import step as step_module
from dpoeng.engine.training.optimizer import optimizer_on


def setup(**settings: Any) -> Setup:
    config = TrainConfig(lora_r=4, gradient_checkpointing=True, **settings)
    return Setup(model=fields("llama"), dtype=torch.bfloat16, quantization="none", config=config)


def test_a_step_does_not_go_through_the_model_for_what_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """68 ms each time over a 64-layer peft model, and there were two a step."""
    looks: list[int] = []
    look, step = CausalLM.trainable_parameters, simulate.train_step

    def counted(lm: CausalLM) -> Any:
        looks.append(1)
        return look(lm)

    def in_step(*arguments: Any) -> Any:
        looks.clear()
        return step(*arguments)

    monkeypatch.setattr(CausalLM, "trainable_parameters", counted)
    monkeypatch.setattr(simulate, "train_step", in_step)
    trace_step(setup(), [Pair(8, 4, 4)])
    assert looks == []


def test_a_step_reads_the_device_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the forwards: for the gradient's norm, and for all metrics at once. There were nine of these alone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    waits: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name
            to_host = str((kwargs or {}).get("device")) == "cpu" and bool(args) and args[0].is_meta
            if name == "aten::_local_scalar_dense" or (name == "aten::_to_copy" and to_host):
                waits.append(name)
            return func(*args, **(kwargs or {}))

    step = simulate.train_step

    def watched(*arguments: Any) -> Any:
        with Reads():
            return step(*arguments)

    monkeypatch.setattr(simulate, "train_step", watched)
    # AdamW counts its steps in host memory on a GPU; without values they would be read from the meta device.
    update, before_update = step_module._update, list[str]()

    def noted(run: Any) -> None:
        before_update.extend(waits)
        update(run)

    monkeypatch.setattr(step_module, "_update", noted)
    trace_step(setup(), [Pair(8, 4, 4)])
    assert sorted(before_update) == ["aten::_local_scalar_dense", "aten::_to_copy"]


def test_adamw_is_fused_on_a_gpu_unless_the_user_chose() -> None:
    usual, chosen = TrainConfig.model_validate({}), TrainConfig.model_validate({"optim": "adamw_torch"})
    assert [optimizer_on(usual, on_gpu=on_gpu) for on_gpu in (True, False)] == ["adamw_torch_fused", "adamw_torch"]
    assert optimizer_on(chosen, on_gpu=True) == "adamw_torch"
    assert usual.model_dump() == chosen.model_dump()  # a run's identity is of these: it continues on either device


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_states_of_generators_are_kept_for_dropout_alone(dropout: float, on_host: bool) -> None:
    lm = simulate.build(setup(lora_dropout=dropout, activation_offloading=on_host))
    kept = {layer.forward.args[0].keywords["preserve_rng_state"] for layer in decoder_layers(lm.backbone)}  # type: ignore[union-attr]
    assert kept == {dropout > 0}


class NotFiniteError(Exception):
    pass


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan), (-math.inf, math.nan)])
def test_either_number_alone_stops_the_step(monkeypatch: pytest.MonkeyPatch, loss: float, norm: float) -> None:
    updated: list[Any] = []
    monkeypatch.setattr(step_module, "_gradient_within_memory", lambda run, number: ([], norm))
    monkeypatch.setattr(step_module, "preference_metrics", lambda parts: {"loss": loss})
    monkeypatch.setattr(step_module, "_not_finite", lambda *_: NotFiniteError())
    monkeypatch.setattr(step_module, "_update", updated.append)
    run: Any = SimpleNamespace(starts_within=None, scheduler=SimpleNamespace(get_last_lr=lambda: [1e-5]))
    with pytest.raises(NotFiniteError):
        step_module.train_step(run, 0)
    assert not updated

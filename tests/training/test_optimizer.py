"""Optimizers: each steps as its formula says, decays what it should, and comes back from a checkpoint bit for bit."""

from __future__ import annotations

import sys
from typing import Any, get_args

import pytest
import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import Optimizer, TrainConfig
from dpoeng.engine.training.optimizer import build_optimizer, build_scheduler, optimizer_tensors, restore_optimizer

NAMES = get_args(Optimizer)


def parameters() -> list[tuple[str, nn.Parameter]]:
    """A matrix that bitsandbytes quantises the state of, one that it does not, and a vector."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"large": (64, 80), "small": (4, 8), "vector": (16,)}
    return [(name, nn.Parameter(torch.randn(shape, generator=draw))) for name, shape in shapes.items()]


def step(optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        draw = torch.Generator().manual_seed(100 + number)
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_adamws(name: Any) -> None:
    """Against Loshchilov and Hutter's algorithm 2 in float64; 8 bits of state cost some digits of later steps."""
    named = parameters()
    config = TrainConfig(optim=name, learning_rate=0.01, weight_decay=0.1)
    before = {key: parameter.detach().double().clone() for key, parameter in named}
    step(build_optimizer(config, named), named, 3)
    for index, (key, parameter) in enumerate(named):
        x, m, v = before[key], torch.zeros_like(before[key]), torch.zeros_like(before[key])
        for t in range(1, 4):
            draw = torch.Generator().manual_seed(99 + t)
            gradient = [torch.randn(p.shape, generator=draw) for _, p in named][index].double()
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            decay = 0.1 if parameter.dim() > 1 else 0.0
            x = x - 0.01 * (decay * x + (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
        in_8_bits = "8bit" in name and parameter.numel() >= 4096
        torch.testing.assert_close(parameter.detach().double(), x, rtol=0, atol=5e-3 if in_8_bits else 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_comes_back_bit_for_bit(name: Any) -> None:
    config = TrainConfig(optim=name, learning_rate=0.01, weight_decay=0.1)
    whole = parameters()
    optimizer = build_optimizer(config, whole)
    step(optimizer, whole, 3)
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizer, whole).items()}
    weights = [parameter.detach().clone() for _, parameter in whole]
    step(optimizer, whole, 3, first=3)

    again = parameters()
    with torch.no_grad():
        for (_, parameter), value in zip(again, weights, strict=True):
            parameter.copy_(value)
    resumed = build_optimizer(config, again)
    restore_optimizer(resumed, again, saved)
    step(resumed, again, 3, first=3)
    for (_, expected), (_, found) in zip(whole, again, strict=True):
        assert torch.equal(expected, found)
    mine, theirs = optimizer_tensors(optimizer, whole), optimizer_tensors(resumed, again)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype for key in mine)
    assert any(value.dtype == torch.uint8 for value in mine.values()) == ("8bit" in name)


def test_bitsandbytes_that_cannot_be_imported_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError) as caught:
        build_optimizer(TrainConfig(optim="adamw_bnb_8bit"), parameters())
    assert caught.value.code == "bitsandbytes-unusable"
    assert "adamw_torch" in str(caught.value.remedy)


def test_a_share_of_warm_up_is_rounded_up() -> None:
    """A tenth of 15 steps is 2: the first step has rate 0, the second half the peak, the third the peak."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(TrainConfig(warmup_ratio=0.1, lr_scheduler_type="constant_with_warmup"), optimizer, 15)
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [0.0, 0.5, 1.0, 1.0]

"""Optimizer and learning-rate schedule, and their state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.quantized import import_bitsandbytes

Named = Sequence[tuple[str, nn.Parameter]]


def build_optimizer(config: TrainConfig, trainable: Named) -> torch.optim.Optimizer:
    """AdamW. Decoupled weight decay as in Loshchilov and Hutter, https://arxiv.org/abs/1711.05101

    Decay pulls matrices towards zero, and leaves vectors (DoRA's magnitudes, biases) alone. bitsandbytes keeps the
    state of tensors with at least 4,096 values in 8 bits; a paged state moves out of a full GPU, and on a CPU there is
    nothing to move.

    Raises:
        UserError: bitsandbytes is requested and cannot be imported.
    """
    matrices = [parameter for _, parameter in trainable if parameter.dim() > 1]
    vectors = [parameter for _, parameter in trainable if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": config.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    on_gpu = any(parameter.device.type == "cuda" for _, parameter in trainable)
    name = optimizer_on(config, on_gpu=on_gpu)
    if name == "adamw_torch":
        return torch.optim.AdamW(groups, **settings)
    if name == "adamw_torch_fused":
        return torch.optim.AdamW(groups, **settings, fused=True)
    return bitsandbytes_adamw(
        groups,
        **settings,
        optim_bits=8 if "8bit" in config.optim else 32,
        is_paged="paged" in config.optim and on_gpu,
    )


def optimizer_on(config: TrainConfig, *, on_gpu: bool) -> str:
    """The optimizer's name: `optim`, or if left out, AdamW as one kernel on a GPU.

    Both do the same arithmetic with the same state; only float32 rounding differs. So a run's identity has the field as
    set, and a run that moves to another device can continue.
    """
    return "adamw_torch_fused" if on_gpu and "optim" not in config.model_fields_set else config.optim


def build_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """Builds a transformers schedule by its name.

    Raises:
        UserError: no such schedule, or one that needs arguments that dpoeng does not have.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    try:
        return lr_schedule(config.lr_scheduler_type, optimizer, warmup, total_steps)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"unknown schedule {config.lr_scheduler_type}",
            code="config-value",
            where="--lr-scheduler-type",
            expected="linear, cosine, constant, constant_with_warmup, polynomial or cosine_with_restarts",
            found=f"{config.lr_scheduler_type} ({error})",
            remedy="name one of these",
        ) from error


def learning_rates(config: TrainConfig, total_steps: int, count: int) -> list[float]:
    """The learning rate of each of the first `count` steps of a run of `total_steps`, without a run's optimizer."""
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    (rate,) = build_scheduler(config, stand_in, total_steps).lr_lambdas
    return [config.learning_rate * rate(step) for step in range(count)]


def set_scheduler_step(scheduler: Any, step: int) -> None:
    """Sets a fresh scheduler to its state after `step` steps. The rate is computed from the step, not accumulated."""
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1})
    rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def copy_parameters(lm: CausalLM) -> dict[str, torch.Tensor]:
    """The current values of each trained parameter, in host memory; `put_parameters` restores them."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in lm.trainable_parameters()}


@torch.no_grad()
def put_parameters(lm: CausalLM, values: Mapping[str, torch.Tensor]) -> None:
    """Sets each trained parameter to the value with its name."""
    for name, parameter in lm.trainable_parameters():
        parameter.copy_(values[name])
    lm.take_masters()


def optimizer_tensors(optimizer: torch.optim.Optimizer, trainable: Named) -> dict[str, torch.Tensor]:
    """The optimizer's state as `<parameter>/<quantity>` -> tensor, on the CPU.

    bitsandbytes' tables of its 256 values (`qmap`) are constants, and left out.
    """
    return {
        f"{name}/{quantity}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in trainable
        for quantity, value in optimizer.state[parameter].items()
        if not quantity.startswith("qmap")
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, trainable: Named, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restores the output of `optimizer_tensors`, bit for bit."""
    by_name = dict(trainable)
    if hasattr(optimizer, "init_state"):  # bitsandbytes: fill its own buffers, which may be paged
        for at, group in enumerate(optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, at, i)
    for key, value in tensors.items():
        name, quantity = key.rsplit("/", 1)
        parameter = by_name[name]
        state = optimizer.state[parameter]
        if isinstance(state.get(quantity), torch.Tensor):
            state[quantity].copy_(value)
        elif quantity in state:
            state[quantity] = int(value)
        else:
            # torch's AdamW counts steps in a CPU scalar unless fused; the moments are on the parameter's device.
            beside = value.dim() > 0 or optimizer.defaults.get("fused")
            state[quantity] = value.to(parameter.device if beside else value.device)


def lr_schedule(name: str, optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> Any:
    """transformers' learning-rate schedule of that name."""
    from transformers import get_scheduler

    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)


def bitsandbytes_adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW.

    Raises:
        UserError: it cannot be imported.
    """
    library = import_bitsandbytes("--optim", "use --optim adamw_torch")
    optimizer: torch.optim.Optimizer = library.optim.AdamW(groups, **settings)
    return optimizer

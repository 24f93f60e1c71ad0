"""Optimizer and learning-rate schedule, and their state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.engine.config import TrainConfig
from dpoeng.engine.model import lr_schedule

Named = Sequence[tuple[str, nn.Parameter]]


def build_optimizer(config: TrainConfig, trainable: Named) -> torch.optim.Optimizer:
    """AdamW. Decoupled weight decay as in Loshchilov and Hutter, https://arxiv.org/abs/1711.05101"""
    return torch.optim.AdamW(
        [parameter for _, parameter in trainable],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def build_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """A schedule of transformers by its name there.

    Raises:
        UserError: no such schedule, or one that needs arguments dpoeng does not have.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    try:
        return lr_schedule(config.lr_scheduler_type, optimizer, warmup, total_steps)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"there is no schedule {config.lr_scheduler_type}",
            code="config-value",
            where="--lr-scheduler-type",
            expected="linear, cosine, constant, constant_with_warmup, polynomial or cosine_with_restarts",
            found=f"{config.lr_scheduler_type} ({error})",
            remedy="name one of these",
        ) from error


def set_scheduler_step(scheduler: Any, step: int) -> None:
    """Puts a fresh scheduler where it was after `step` steps. The rate is computed from the step, not accumulated."""
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1})
    rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def optimizer_tensors(optimizer: torch.optim.Optimizer, trainable: Named) -> dict[str, torch.Tensor]:
    """The optimizer's state as `<parameter>/<quantity>` -> tensor, on the CPU."""
    return {
        f"{name}/{quantity}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in trainable
        for quantity, value in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, trainable: Named, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave, bit for bit."""
    by_name = dict(trainable)
    for key, value in tensors.items():
        name, quantity = key.rsplit("/", 1)
        parameter = by_name[name]
        # AdamW counts its steps in a CPU scalar; the moments live beside the parameter.
        device = parameter.device if value.dim() else value.device
        optimizer.state[parameter][quantity] = value.to(device)

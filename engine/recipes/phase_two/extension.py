"""Extends a finished run by more steps: whether only its length changed, and the effect on the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.runs.identity import changes
from dpoeng.engine.training.order import Schedule, plan_schedule

if TYPE_CHECKING:
    from dpoeng.engine.runs.checkpoint import Checkpoint

_LENGTH = frozenset(("max_steps", "num_train_epochs"))


@dataclass(frozen=True, slots=True)
class Extension:
    """A run of `planned` steps that continues from `step` to `steps`."""

    step: int
    planned: int
    steps: int

    def record(self) -> dict[str, int]:
        """The record in checkpoints and run.json."""
        return asdict(self)


def find_extension(
    config: TrainConfig, schedule: Schedule, identity: Mapping[str, Any], checkpoint: Checkpoint
) -> Extension | None:
    """How a checkpoint's run is extended; None if more than its length changed, or if it is not longer.

    A run that early stopping ended would do no further step, so it is not extended.

    Args:
        config: the current config.
        schedule: the current schedule.
        identity: the current identity of the run.
        checkpoint: the checkpoint to continue from.
    """
    old = checkpoint.state["identity"]
    different = {name for name, _, _ in changes(old, dict(identity))}
    if not different or not different <= _LENGTH:
        return None
    planned = plan_schedule(
        schedule.rows,
        batch=schedule.batch,
        epochs=old["settings"]["num_train_epochs"],
        max_steps=old["settings"]["max_steps"],
        seed=schedule.seed,
    ).total_steps
    patience = config.early_stopping_patience
    stopped = patience is not None and checkpoint.state.get("best", {}).get("waited", 0) >= patience
    if stopped or schedule.total_steps <= planned:
        return None
    return Extension(checkpoint.step, planned, schedule.total_steps)


def extension_text(config: TrainConfig, extension: Extension) -> str:
    """The effect of continuing on the learning rate, in one or two sentences."""
    from dpoeng.engine.training.optimizer import learning_rates

    first_step = extension.step
    old = learning_rates(config, extension.planned, first_step)
    *new, rate = learning_rates(config, extension.steps, first_step + 1)
    text = f"extended from {extension.planned:,} to {extension.steps:,} steps, continuing from step {first_step:,}: "
    if old == new:
        same = "" if config.watches_a_metric else "; the result equals that of an uninterrupted run of this length"
        return f"{text}the learning rate is that of a run of this length, now {rate:.3g}{same}"
    return (
        f"{text}the {config.lr_scheduler_type} schedule is stretched over the new length, so the learning rate goes "
        f"from {old[-1]:.3g} to {rate:.3g}; a run of this length from the beginning would have used other rates before"
    )

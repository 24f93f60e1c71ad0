"""More steps for a run that has been done: whether that is all that was changed, and what it does to the rate."""

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
    """A run of `planned` steps that goes on from `step` to `steps`."""

    step: int
    planned: int
    steps: int

    def record(self) -> dict[str, int]:
        """As checkpoints and run.json hold it."""
        return asdict(self)


def find_extension(
    config: TrainConfig, schedule: Schedule, identity: Mapping[str, Any], checkpoint: Checkpoint
) -> Extension | None:
    """How the run of a checkpoint is extended; None where more than its length was changed, or it is no longer.

    A run that early stopping has ended would do no further step, so it is not extended.

    Args:
        config: as it is now.
        schedule: of the steps as they are now.
        identity: of the run as it is now.
        checkpoint: what it would go on from.
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
    """What going on does to the learning rate, in a sentence or two."""
    from dpoeng.engine.training.optimizer import learning_rates

    done = extension.step
    old = learning_rates(config, extension.planned, done)
    *new, rate = learning_rates(config, extension.steps, done + 1)
    text = f"extended from {extension.planned:,} to {extension.steps:,} steps, and going on from step {done:,}: "
    if old == new:
        same = "" if config.watches_a_metric else "; the result equals that of a run of this length from the beginning"
        return f"{text}the learning rate is that of a run of this length, now {rate:.3g}{same}"
    return (
        f"{text}the {config.lr_scheduler_type} schedule is stretched over the new length, so the learning rate goes "
        f"from {old[-1]:.3g} to {rate:.3g}; a run of this length from the beginning would have had other rates before"
    )

"""State of a phase-two run, and how it is saved and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from dpoeng.cache.schema import ScoredRow
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.losses.batch import LossState
from dpoeng.engine.losses.names import LossSettings
from dpoeng.engine.models.experts.balance import Balance
from dpoeng.engine.models.fsdp_rows import make_whole, own_rows, whole_parameters
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.runs.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from dpoeng.engine.runs.metrics import MetricsLog
from dpoeng.engine.runtime.distributed import ALONE, Group
from dpoeng.engine.runtime.progress import Progress
from dpoeng.engine.training.early_stopping import Best
from dpoeng.engine.training.optimizer import (
    copy_parameters,
    optimizer_tensors,
    put_parameters,
    restore_optimizer,
    set_scheduler_step,
)
from dpoeng.engine.training.order import Schedule
from dpoeng.engine.training.rows import HeldOut, WeightArray

OnMetrics = Callable[[Mapping[str, float]], None]
"""Called with each line of metrics.jsonl after it is written: of a step, or of an evaluation (`eval_` names)."""


@dataclass(slots=True)
class Run:
    """Everything that the training loop needs, assembled once.

    `train_weights` are the user's, one number per row, or None. `per_token` is False if the cache has only sums.
    `source_of` gives a training row's place in the user's files. `whole` are the tensors that every process trains in
    full, found once because a deep model has many modules. `settings` are the loss fields of `config`; `loss_state` is
    the state that losses carry from step to step. `starts_within` is the limit, in nats per token, for the first step's
    difference from the cache: that of the comparison before training; None if the policy does not start as the
    reference (dropout). `extensions` are the records of earlier lengths of this run, if it was extended. `micro_batch`
    is the number of pairs per forward: as configured, or on a GPU a chosen one, until memory runs out. The processes of
    `group` share a step's forwards; all have the same adapter and optimizer. `tell` reports the progress of a long
    step. `balance` adds the balancing loss of a mixture of experts, if set.
    """

    config: TrainConfig
    lm: CausalLM
    train_rows: Sequence[ScoredRow]
    train_weights: WeightArray | None
    held_out: HeldOut
    schedule: Schedule
    optimizer: torch.optim.Optimizer
    scheduler: Any
    log: MetricsLog
    progress: Progress
    per_token: bool = True
    on_metrics: OnMetrics = lambda _: None
    loss_state: LossState = field(default_factory=dict)
    best: Best = field(default_factory=Best)
    source_of: Callable[[int], str] = "row {}".format
    starts_within: float | None = None
    extensions: list[dict[str, int]] = field(default_factory=list)
    micro_batch: int = 0
    group: Group = ALONE
    tell: Callable[[str], None] = lambda _: None
    balance: Balance | None = None
    settings: LossSettings = field(init=False)
    whole: Sequence[torch.nn.Parameter] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.settings = LossSettings.of(self.config)
        self.whole = whole_parameters(self.lm)
        self.micro_batch = self.micro_batch or self.config.per_device_train_batch_size

    @property
    def waited_enough(self) -> bool:
        """Whether early stopping applies now."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.best.waited >= patience


def save_run(run: Run, step: int, identity: dict[str, Any], *, complete: bool) -> None:
    """Saves a checkpoint of the run after `step` steps; the first process writes it.

    Raises:
        UserError: the processes no longer have the same weights, or the folder cannot be written.
    """
    trainable = run.lm.trainable_parameters()
    parameters = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable}
    parts = set(run.lm.parts.values())
    if run.group.size > 1:
        # Equal gradients give equal weights in all processes. Check this before saving, since a difference would stay
        # unnoticed until a resume gives every process the first one's. Sharded weights differ by design.
        run.group.agree(
            "trained weights",
            _digest({name: parameters[name] for name, parameter in trainable if parameter not in parts}),
            "start the same command again: it continues from the previous checkpoint; if this repeats, test the "
            "machines, since equal gradients give equal weights",
        )
    if not (parts or run.group.is_first):
        return
    # With sharded weights every process has to take part: whole tensors are gathered from all of them.
    parameters = make_whole(run.lm, run.group, parameters)
    optimizer = make_whole(run.lm, run.group, optimizer_tensors(run.optimizer, trainable))
    if not run.group.is_first:
        return
    save_checkpoint(
        run.config.output_dir,
        step,
        parameters=parameters,
        optimizer=optimizer,
        state={
            "identity": identity,
            "complete": complete,
            "losses": dict(run.loss_state),
            "micro_batch": run.micro_batch,
            "best": run.best.record(),
            **({"extensions": run.extensions} if run.extensions else {}),
        },
        keep=run.config.save_total_limit,
        spare=run.best.kept if run.config.load_best_model_at_end else (),
    )


def restore_run(run: Run, checkpoint: Checkpoint) -> int:
    """Restores the run from the checkpoint; returns its step."""
    put_parameters(run.lm, own_rows(run.lm, run.group, checkpoint.parameters))
    optimizer = own_rows(run.lm, run.group, checkpoint.optimizer)
    restore_optimizer(run.optimizer, run.lm.trainable_parameters(), optimizer)
    set_scheduler_step(run.scheduler, checkpoint.step)
    run.loss_state = checkpoint.state.get("losses", {})
    run.best = Best(**checkpoint.state.get("best", {}))
    run.extensions = [*checkpoint.state.get("extensions", [])]
    # Fewer than it was saved with where this machine has less memory.
    run.micro_batch = min(run.micro_batch, checkpoint.state.get("micro_batch", run.micro_batch))
    return checkpoint.step


@contextlib.contextmanager
def best_parameters(run: Run, done: int) -> Iterator[None]:
    """Within the block, the trained tensors are those of the best evaluation, if requested.

    Raises:
        UserError: the checkpoint of the best evaluation cannot be read.
    """
    best = run.best.step
    if not run.config.load_best_model_at_end or best is None or best == done:
        yield
        return
    last = copy_parameters(run.lm)  # the last step's checkpoint, saved after this, contains these
    values = read_checkpoint(run.config.output_dir, best).parameters if run.group.is_first else {}
    if run.lm.parts:
        put_parameters(run.lm, own_rows(run.lm, run.group, values))
    else:
        if run.group.is_first:
            put_parameters(run.lm, values)
        run.group.copy_first([parameter.data for _, parameter in run.lm.trainable_parameters()])
        run.lm.take_masters()
    yield
    put_parameters(run.lm, last)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

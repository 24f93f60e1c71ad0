"""The optimizer steps of phase two. What a step sees, dropout included, depends on its number and the seed alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import ScoredPair
from dpoeng.engine.checkpoint import Checkpoint, save_checkpoint
from dpoeng.engine.config import TrainConfig
from dpoeng.engine.layout import pair_group
from dpoeng.engine.losses import PreferenceBatch, PreferenceLoss, preference_loss
from dpoeng.engine.metrics import MetricsLog, preference_metrics
from dpoeng.engine.model import CausalLM, set_mode
from dpoeng.engine.optim import optimizer_tensors, restore_optimizer, set_scheduler_step
from dpoeng.engine.order import Schedule
from dpoeng.engine.progress import Progress
from dpoeng.engine.scoring import score_groups


@dataclass(frozen=True, slots=True)
class Rows(Sequence[ScoredPair]):
    """Some rows of a view, read from the mapped file when they are asked for."""

    view: View
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, i: int) -> ScoredPair: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[ScoredPair]: ...
    def __getitem__(self, i: int | slice) -> ScoredPair | Sequence[ScoredPair]:
        if isinstance(i, slice):
            return [self.view[row] for row in self.indices[i]]
        return self.view[self.indices[i]]


@dataclass(slots=True)
class Run:
    """What the loop needs, put together once."""

    config: TrainConfig
    lm: CausalLM
    train_rows: Sequence[ScoredPair]
    eval_rows: Sequence[ScoredPair]
    schedule: Schedule
    optimizer: torch.optim.Optimizer
    scheduler: Any
    log: MetricsLog
    progress: Progress


def run_steps(run: Run, first_step: int, identity: dict[str, Any]) -> None:
    """Trains from `first_step` to the end, with evaluations, log lines and checkpoints on the way."""
    config, schedule = run.config, run.schedule
    save_every = config.save_steps or max(1, math.ceil(schedule.total_steps / 10))
    eval_every = config.eval_steps or schedule.steps_per_epoch
    if first_step == 0 and run.eval_rows:
        _evaluate(run, 0)
    with run.progress.task("training", schedule.total_steps, "steps", first_step) as advance:
        for step in range(first_step, schedule.total_steps):
            began = time.perf_counter()
            metrics = _step(run, step)
            done = step + 1
            if done % config.logging_steps == 0 or done == schedule.total_steps:
                run.log.write(done, schedule.epoch(done), metrics)
            run.log.write_timing(done, {"step_ms": 1e3 * (time.perf_counter() - began)})
            advance(1, f"loss {metrics['loss']:.4f}  margin {metrics['rewards/margins']:+.3f}")
            if run.eval_rows and (done % eval_every == 0 or done == schedule.total_steps):
                _evaluate(run, done)
            if done % save_every == 0 and done < schedule.total_steps:
                save_run(run, done, identity, complete=False)


def _step(run: Run, step: int) -> dict[str, float]:
    """One optimizer step over the pairs that the schedule gives it; the loss is their mean however they are cut."""
    config = run.config
    rows = [run.train_rows[i] for i in run.schedule.rows_of_step(step)]
    parts: list[PreferenceLoss] = []
    for micro, batch in enumerate(_chunks(rows, config.per_device_train_batch_size)):
        # Dropout depends on where the run is and on nothing that happened before.
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, micro]).generate_state(1, np.uint64)[0] >> 1))
        part = batch_loss(run.lm, batch, beta=config.beta, loss_type=config.loss_type)
        torch.autograd.backward(part.losses.sum() / len(rows))
        parts.append(part)
    metrics = preference_metrics(parts)
    parameters = [parameter for _, parameter in run.lm.trainable_parameters()]
    limit = config.max_grad_norm if config.max_grad_norm > 0 else math.inf
    metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    metrics["learning_rate"] = float(run.scheduler.get_last_lr()[0])
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        raise UserError(
            "the loss or its gradient is not a number",
            code="training-not-finite",
            where=f"step {step + 1}",
            expected="finite numbers",
            found=f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}",
            remedy="lower learning_rate, or use a wider dtype; the newest checkpoint is from before this step",
            exit_status=5,
        )
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return metrics


def batch_loss(lm: CausalLM, pairs: Sequence[ScoredPair], *, beta: float, loss_type: str) -> PreferenceLoss:
    """Scores pairs with the policy, with gradient where that is on, and compares with their cached values."""
    policy, offsets = score_groups(lm, [pair_group(pair.ids) for pair in pairs])
    reference = np.concatenate([side for pair in pairs for side in (pair.chosen_logps, pair.rejected_logps)])
    branch = np.repeat(np.arange(2 * len(pairs)), np.diff(offsets))
    batch = PreferenceBatch(
        policy=policy,
        reference=torch.from_numpy(reference).to(policy.device),
        branch=torch.from_numpy(branch).to(policy.device),
        pairs=len(pairs),
    )
    return preference_loss(batch, beta=beta, loss_type=loss_type)


@torch.no_grad()
def evaluate(
    lm: CausalLM, rows: Sequence[ScoredPair], *, batch_size: int, beta: float, loss_type: str
) -> dict[str, float]:
    """Metrics over held-out pairs, under `eval_` names."""
    parts = [batch_loss(lm, batch, beta=beta, loss_type=loss_type) for batch in _chunks(rows, batch_size)]
    return preference_metrics(parts, prefix="eval_")


def _evaluate(run: Run, step: int) -> None:
    config = run.config
    set_mode(run.lm, training=False)
    metrics = evaluate(
        run.lm,
        run.eval_rows,
        batch_size=config.per_device_eval_batch_size,
        beta=config.beta,
        loss_type=config.loss_type,
    )
    set_mode(run.lm, training=True)
    run.log.write(step, run.schedule.epoch(step), metrics)


def _chunks(rows: Sequence[ScoredPair], size: int) -> Iterator[Sequence[ScoredPair]]:
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


def save_run(run: Run, step: int, identity: dict[str, Any], *, complete: bool) -> None:
    """A checkpoint of the run as it stands after `step` steps."""
    trainable = run.lm.trainable_parameters()
    save_checkpoint(
        run.config.output_dir,
        step,
        parameters={name: parameter.detach().cpu().contiguous() for name, parameter in trainable},
        optimizer=optimizer_tensors(run.optimizer, trainable),
        state={"identity": identity, "complete": complete},
        keep=run.config.save_total_limit,
    )


def restore_run(run: Run, checkpoint: Checkpoint) -> int:
    """Puts the run where the checkpoint was; returns its step."""
    with torch.no_grad():
        for name, parameter in run.lm.trainable_parameters():
            parameter.copy_(checkpoint.parameters[name])
    restore_optimizer(run.optimizer, run.lm.trainable_parameters(), checkpoint.optimizer)
    set_scheduler_step(run.scheduler, checkpoint.step)
    return checkpoint.step

"""The optimizer steps of phase two. What a step sees, dropout included, depends on its number and the seed alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import ScoredPair
from dpoeng.engine.checkpoint import Checkpoint, save_checkpoint
from dpoeng.engine.config import TrainConfig
from dpoeng.engine.layout import pair_group
from dpoeng.engine.losses import (
    LossSettings,
    LossState,
    PairSums,
    PreferenceBatch,
    PreferenceLoss,
    next_state,
    pair_sums,
    preference_loss,
)
from dpoeng.engine.metrics import MetricsLog, preference_metrics
from dpoeng.engine.model import CausalLM, set_mode
from dpoeng.engine.optim import optimizer_tensors, restore_optimizer, set_scheduler_step
from dpoeng.engine.order import Schedule
from dpoeng.engine.progress import Progress
from dpoeng.engine.scoring import head_log_collision, head_logps, predict_groups

WeightArray = npt.NDArray[np.float64]
Micro = tuple[Sequence[ScoredPair], WeightArray | None]
"""Pairs of one forward, and the user's weights of them."""


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

    def column(self, name: str) -> WeightArray:
        """A column of numbers >= 0 of the user's, as weights of the pairs.

        Raises:
            UserError: a row has none, or something else there; or all are 0.
        """
        values = [self.view.extra(row).get(name) for row in self.indices]
        for row, value in zip(self.indices, values, strict=True):
            number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
            if not 0 <= number < math.inf:
                file, line = self.view.source(row)
                raise UserError(
                    f"the column {name} does not hold a weight",
                    code="data-weight",
                    where=f"{file}, row {line}",
                    expected="a number >= 0",
                    found="no such column" if value is None else repr(value),
                    remedy="correct the row, or name another column with --pair-weight-column; the columns here are "
                    + (", ".join(sorted(self.view.extra(row))) or "none"),
                    exit_status=3,
                )
        weights = np.array(values, dtype=np.float64)
        if len(weights) and not weights.any():
            raise UserError(
                f"all weights in the column {name} are 0",
                code="data-weight",
                where="--pair-weight-column",
                expected="at least one number > 0",
                remedy="name another column",
                exit_status=3,
            )
        return weights


@dataclass(slots=True)
class Run:
    """What the loop needs, put together once.

    `loss_state` is what the losses remember from step to step; weights are the user's, a number a row, or None.
    """

    config: TrainConfig
    lm: CausalLM
    train_rows: Sequence[ScoredPair]
    eval_rows: Sequence[ScoredPair]
    train_weights: WeightArray | None
    eval_weights: WeightArray | None
    schedule: Schedule
    optimizer: torch.optim.Optimizer
    scheduler: Any
    log: MetricsLog
    progress: Progress
    loss_state: LossState = field(default_factory=dict)


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
    indices = run.schedule.rows_of_step(step)
    rows = [run.train_rows[i] for i in indices]
    weights = None if run.train_weights is None else run.train_weights[indices]
    micros = list(_chunks(rows, weights, config.per_device_train_batch_size))
    settings = LossSettings.of(config)
    if settings.whole_batch and len(micros) > 1:
        parts = _backward_of_whole_batch(run, step, micros, settings)
    else:
        parts = []
        mean_tokens = float(np.mean([len(pair.chosen_logps) for pair in rows]))
        for micro, (batch, batch_weights) in enumerate(micros):
            _seed(config.seed, step, micro)
            part = batch_loss(run.lm, batch, settings, batch_weights, state=run.loss_state, mean_tokens=mean_tokens)
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
    run.loss_state = next_state(run.loss_state, PairSums.join([part.sums for part in parts]), settings)
    return metrics


def _backward_of_whole_batch(
    run: Run, step: int, micros: Sequence[Micro], settings: LossSettings
) -> list[PreferenceLoss]:
    """The exact gradient of a loss in which the pairs of a step meet, however many forwards the step is cut into.

    Each part is run twice: without gradient, for the sums that the loss and its derivatives need; and with, to carry
    these derivatives on. Dropout draws the same both times. Gao et al. 2021, https://arxiv.org/abs/2101.06983
    """
    sums: list[PairSums] = []
    for micro, (batch, weights) in enumerate(micros):
        _seed(run.config.seed, step, micro)
        with torch.no_grad():
            sums.append(batch_sums(run.lm, batch, settings, weights))
    leaves = PairSums.join(sums).leaves()
    whole = preference_loss(leaves, settings, state=run.loss_state)
    torch.autograd.backward(whole.losses.mean())
    begin = 0
    for micro, (batch, weights) in enumerate(micros):
        _seed(run.config.seed, step, micro)
        part = batch_sums(run.lm, batch, settings, weights)
        pairs = slice(begin, begin := begin + len(batch))
        pulls = [
            (x, leaf.grad[pairs])
            for x, leaf in zip(part.with_gradient, leaves.with_gradient, strict=True)
            if leaf.grad is not None
        ]
        torch.autograd.backward([x for x, _ in pulls], [pull for _, pull in pulls])
    return [whole]


def _seed(seed: int, step: int, micro: int) -> None:
    """Dropout depends on where the run is and on nothing that happened before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)[0] >> 1))


def batch_loss(
    lm: CausalLM,
    pairs: Sequence[ScoredPair],
    settings: LossSettings,
    weights: WeightArray | None = None,
    *,
    state: LossState | None = None,
    mean_tokens: float | None = None,
) -> PreferenceLoss:
    """The loss of some pairs, with gradient where that is on; for the last two see `preference_loss`."""
    return preference_loss(batch_sums(lm, pairs, settings, weights), settings, state=state, mean_tokens=mean_tokens)


def batch_sums(
    lm: CausalLM, pairs: Sequence[ScoredPair], settings: LossSettings, weights: WeightArray | None = None
) -> PairSums:
    """Scores pairs with the policy, with gradient where that is on, and compares with their cached values."""
    predictors, targets, offsets = predict_groups(lm, [pair_group(pair.ids) for pair in pairs])
    policy = head_logps(lm, predictors, targets)
    reference = np.concatenate([side for pair in pairs for side in (pair.chosen_logps, pair.rejected_logps)])
    branch = np.repeat(np.arange(2 * len(pairs)), np.diff(offsets))
    batch = PreferenceBatch(
        policy=policy,
        reference=torch.from_numpy(reference).to(policy.device),
        branch=torch.from_numpy(branch).to(policy.device),
        pairs=len(pairs),
        log_collision=head_log_collision(lm, predictors) if settings.use_weighting else None,
        weights=None if weights is None else torch.from_numpy(weights).to(policy.device),
    )
    return pair_sums(batch, settings)


@torch.no_grad()
def evaluate(
    lm: CausalLM,
    rows: Sequence[ScoredPair],
    settings: LossSettings,
    weights: WeightArray | None = None,
    *,
    batch_size: int,
    state: LossState | None = None,
) -> PreferenceLoss:
    """The loss of held-out pairs, all of them as one batch however they are cut."""
    parts = [batch_sums(lm, batch, settings, some) for batch, some in _chunks(rows, weights, batch_size)]
    return preference_loss(PairSums.join(parts), settings, state=state)


def _evaluate(run: Run, step: int) -> None:
    config = run.config
    set_mode(run.lm, training=False)
    found = evaluate(
        run.lm,
        run.eval_rows,
        LossSettings.of(config),
        run.eval_weights,
        batch_size=config.per_device_eval_batch_size,
        state=run.loss_state,
    )
    metrics = preference_metrics([found], prefix="eval_")
    set_mode(run.lm, training=True)
    run.log.write(step, run.schedule.epoch(step), metrics)


def _chunks(rows: Sequence[ScoredPair], weights: WeightArray | None, size: int) -> Iterator[Micro]:
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        yield rows[part], None if weights is None else weights[part]


def save_run(run: Run, step: int, identity: dict[str, Any], *, complete: bool) -> None:
    """A checkpoint of the run as it stands after `step` steps."""
    trainable = run.lm.trainable_parameters()
    save_checkpoint(
        run.config.output_dir,
        step,
        parameters={name: parameter.detach().cpu().contiguous() for name, parameter in trainable},
        optimizer=optimizer_tensors(run.optimizer, trainable),
        state={"identity": identity, "complete": complete, "losses": dict(run.loss_state)},
        keep=run.config.save_total_limit,
    )


def restore_run(run: Run, checkpoint: Checkpoint) -> int:
    """Puts the run where the checkpoint was; returns its step."""
    with torch.no_grad():
        for name, parameter in run.lm.trainable_parameters():
            parameter.copy_(checkpoint.parameters[name])
    restore_optimizer(run.optimizer, run.lm.trainable_parameters(), checkpoint.optimizer)
    set_scheduler_step(run.scheduler, checkpoint.step)
    run.loss_state = checkpoint.state.get("losses", {})
    return checkpoint.step

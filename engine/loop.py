"""The optimizer steps of phase two. What a step sees, dropout included, depends on its number and the seed alone."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import ScoredPair
from dpoeng.engine.best import Best, more_is_better, updated, watched
from dpoeng.engine.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from dpoeng.engine.config import TrainConfig
from dpoeng.engine.evaluation import summarise
from dpoeng.engine.layout import pair_group
from dpoeng.engine.loss_names import LossSettings
from dpoeng.engine.losses import (
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
from dpoeng.engine.oom import attempt, in_parts, is_out_of_memory, too_large
from dpoeng.engine.optim import Named, optimizer_tensors, restore_optimizer, set_scheduler_step
from dpoeng.engine.order import Schedule
from dpoeng.engine.progress import QUIET, Progress
from dpoeng.engine.rows import WeightArray
from dpoeng.engine.scoring import head_log_collision, head_logps, predict_groups

Micro = tuple[Sequence[ScoredPair], WeightArray | None]
"""Pairs of one forward, and the user's weights of them."""
OnMetrics = Callable[[Mapping[str, float]], None]
"""Called with each line of metrics.jsonl when it has been written: of a step, or of an evaluation (`eval_` names)."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The pairs of the evaluations, what tells their prompts apart, and the columns by which they are grouped."""

    rows: Sequence[ScoredPair]
    weights: WeightArray | None
    prompts: Sequence[bytes]
    labels: Mapping[str, Sequence[str]]


@dataclass(slots=True)
class Run:
    """What the loop needs, put together once.

    `train_weights` are the user's, a number a row, or None. `per_token` is false where the cache holds sums.
    `loss_state` is what the losses remember from step to step.
    `micro_batch` is the number of pairs in a forward: the configured one, until memory runs out.
    """

    config: TrainConfig
    lm: CausalLM
    train_rows: Sequence[ScoredPair]
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
    micro_batch: int = 0

    def __post_init__(self) -> None:
        self.micro_batch = self.micro_batch or self.config.per_device_train_batch_size

    @property
    def waited_enough(self) -> bool:
        """Whether early stopping has come."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.best.waited >= patience


def run_steps(run: Run, first_step: int, identity: dict[str, Any]) -> int:
    """Trains from `first_step` on, with evaluations, log lines and checkpoints on the way; returns the steps done.

    A checkpoint follows every evaluation that is the best so far, where the best is asked for.
    """
    config, schedule = run.config, run.schedule
    save_every = config.save_steps or max(1, math.ceil(schedule.total_steps / 10))
    eval_every = config.eval_steps or schedule.steps_per_epoch
    if first_step == 0 and run.held_out.rows:
        _evaluate(run, 0)
    done = first_step
    with run.progress.task("training", schedule.total_steps, "steps", first_step) as advance:
        while done < schedule.total_steps and not run.waited_enough:
            began = time.perf_counter()
            metrics = train_step(run, done)
            done += 1
            if done % config.logging_steps == 0 or done == schedule.total_steps:
                _log(run, done, metrics)
            seconds = time.perf_counter() - began
            run.log.write_timing(done, {"step_ms": 1e3 * seconds})
            advance(1, live_figures(metrics, len(schedule.rows_of_step(done - 1)) / seconds))
            if run.held_out.rows and (done % eval_every == 0 or done == schedule.total_steps):
                _evaluate(run, done)
            best = config.load_best_model_at_end and run.best.step == done
            if (best or done % save_every == 0) and done < schedule.total_steps:
                save_run(run, done, identity, complete=False)
    return done


def live_figures(metrics: Mapping[str, float], pairs_per_s: float) -> str:
    """What a step tells while it goes by."""
    return (
        f"loss {metrics['loss']:.4f}  margin {metrics['rewards/margins']:+.3f}  "
        f"accuracy {metrics['rewards/accuracies']:.2f}  {pairs_per_s:.3g} pairs/s"
    )


def train_step(run: Run, step: int) -> dict[str, float]:
    """One optimizer step over the pairs that the schedule gives it; the loss is their mean however they are cut."""
    settings = LossSettings.of(run.config)
    parts, grad_norm = _gradient_within_memory(run, step, settings)
    metrics = preference_metrics(parts)
    metrics["grad_norm"] = grad_norm
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
    _update(run)
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.loss_state = next_state(run.loss_state, PairSums.join([part.sums for part in parts]), settings)
    return metrics


def _gradient_within_memory(run: Run, step: int, settings: LossSettings) -> tuple[list[PreferenceLoss], float]:
    """The step's gradient, and with fewer pairs a forward where memory runs out: see docs/memory.md.

    A step that ran out is begun anew, so that its result is that of one left alone. If it runs out again, the number of
    pairs in a forward is halved for the rest of the run, which then goes on as one that was configured so.

    Raises:
        UserError: one pair alone does not fit.
    """
    while True:
        done, said = attempt(lambda: _gradient(run, step, settings))
        if done is not None:
            return done
        run.optimizer.zero_grad(set_to_none=True)
        if run.micro_batch == 1:
            rows = [run.train_rows[i].ids for i in run.schedule.rows_of_step(step)]
            raise too_large(
                [max(rows, key=lambda ids: ids.total_tokens)],
                said,
                phase=f"phase two, step {step + 1}",
                helps="turn on --gradient-checkpointing, use --optim paged_adamw_8bit, hold the base in fewer bits, or "
                "run phase one again with a shorter --max-length",
            )
        run.micro_batch = (run.micro_batch + 1) // 2
        run.progress.note(
            f"out of memory at step {step + 1}: the step is done again, and the run goes on, with {run.micro_batch} "
            "pairs a forward; the pairs of a step stay the same"
        )


def _gradient(run: Run, step: int, settings: LossSettings) -> tuple[list[PreferenceLoss], float]:
    """Forward and backward of one step from the beginning: its losses, and the norm of the gradient it left."""
    config = run.config
    run.optimizer.zero_grad(set_to_none=True)
    indices = run.schedule.rows_of_step(step)
    rows = [run.train_rows[i] for i in indices]
    weights = None if run.train_weights is None else run.train_weights[indices]
    micros = list(_chunks(rows, weights, run.micro_batch))
    if settings.whole_batch and len(micros) > 1:
        parts = _backward_of_whole_batch(run, step, micros, settings)
    else:
        parts = []
        mean_tokens = float(np.mean([len(pair.chosen_logps) for pair in rows]))
        for micro, (batch, batch_weights) in enumerate(micros):
            _seed(config.seed, step, micro)
            part = batch_loss(
                run.lm,
                batch,
                settings,
                batch_weights,
                state=run.loss_state,
                mean_tokens=mean_tokens,
                per_token=run.per_token,
            )
            torch.autograd.backward(part.losses.sum() / len(rows))
            parts.append(part)
    parameters = [parameter for _, parameter in run.lm.trainable_parameters()]
    limit = config.max_grad_norm if config.max_grad_norm > 0 else math.inf
    return parts, float(torch.nn.utils.clip_grad_norm_(parameters, limit))


def _update(run: Run) -> None:
    """The optimizer's step. Where it runs out of memory half-way, weights and moments may no longer fit together."""
    try:
        run.optimizer.step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory in the optimizer's update",
            code="memory-full",
            where="phase two, after the gradients",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy="use --optim adamw_torch_fused or paged_adamw_8bit; the same command goes on from the newest "
            "checkpoint where the optimizer is the same",
            exit_status=5,
        ) from error


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
            sums.append(batch_sums(run.lm, batch, settings, weights, per_token=run.per_token))
    leaves = PairSums.join(sums).leaves()
    whole = preference_loss(leaves, settings, state=run.loss_state)
    torch.autograd.backward(whole.losses.mean())
    begin = 0
    for micro, (batch, weights) in enumerate(micros):
        _seed(run.config.seed, step, micro)
        part = batch_sums(run.lm, batch, settings, weights, per_token=run.per_token)
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
    per_token: bool = True,
) -> PreferenceLoss:
    """The loss of some pairs, with gradient where that is on; see `batch_sums` and `preference_loss`."""
    sums = batch_sums(lm, pairs, settings, weights, per_token=per_token)
    return preference_loss(sums, settings, state=state, mean_tokens=mean_tokens)


def batch_sums(
    lm: CausalLM,
    pairs: Sequence[ScoredPair],
    settings: LossSettings,
    weights: WeightArray | None = None,
    *,
    per_token: bool = True,
) -> PairSums:
    """Scores pairs with the policy, with gradient where that is on, and compares with their cached values.

    `per_token` is false where the cache holds sums over whole responses.
    """
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
        per_token=per_token,
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
    per_token: bool = True,
    note: Callable[[str], None] = QUIET.note,
) -> PreferenceLoss:
    """The loss of held-out pairs, all of them as one batch however they are cut."""

    def score(some: Sequence[int]) -> list[PairSums]:
        return [
            batch_sums(
                lm,
                [rows[i] for i in some],
                settings,
                None if weights is None else weights[list(some)],
                per_token=per_token,
            )
        ]

    def too_long(some: Sequence[int], said: str) -> UserError:
        return too_large([rows[i].ids for i in some], said, phase="evaluation", helps="hold out shorter pairs")

    parts: list[PairSums] = []
    for begin in range(0, len(rows), batch_size):
        some = range(begin, min(len(rows), begin + batch_size))
        parts += in_parts(score, some, may_split=True, note=note, describe=too_long)
    return preference_loss(PairSums.join(parts), settings, state=state)


def _evaluate(run: Run, step: int) -> None:
    """All held-out pairs; the evaluation before the first step is no candidate for the best."""
    config, settings, held_out = run.config, LossSettings.of(run.config), run.held_out
    set_mode(run.lm, training=False)
    found = evaluate(
        run.lm,
        held_out.rows,
        settings,
        held_out.weights,
        batch_size=config.per_device_eval_batch_size,
        state=run.loss_state,
        per_token=run.per_token,
        note=run.progress.note,
    )
    set_mode(run.lm, training=True)
    result = summarise(
        found, held_out.prompts, held_out.labels, seed=config.seed, per_pair_loss=not settings.sorts_pairs
    )
    metrics = {f"eval_{name}": value for name, value in result.metrics.items()}
    _log(run, step, metrics)
    run.log.write_evaluation(step, result.record())
    if config.watches_a_metric:
        name = config.metric_for_best_model
        value = watched(metrics, name)
        if step:
            greater = more_is_better(name, config.greater_is_better)
            run.best = updated(run.best, step, value, greater=greater, threshold=config.early_stopping_threshold)


def _log(run: Run, step: int, metrics: dict[str, float]) -> None:
    run.log.write(step, run.schedule.epoch(step), metrics)
    run.on_metrics({"step": step, **metrics})


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
        state={
            "identity": identity,
            "complete": complete,
            "losses": dict(run.loss_state),
            "micro_batch": run.micro_batch,
            "best": run.best.record(),
        },
        keep=run.config.save_total_limit,
        spare=run.best.kept if run.config.load_best_model_at_end else (),
    )


def restore_run(run: Run, checkpoint: Checkpoint) -> int:
    """Puts the run where the checkpoint was; returns its step."""
    _put(run.lm.trainable_parameters(), checkpoint.parameters)
    restore_optimizer(run.optimizer, run.lm.trainable_parameters(), checkpoint.optimizer)
    set_scheduler_step(run.scheduler, checkpoint.step)
    run.loss_state = checkpoint.state.get("losses", {})
    run.best = Best(**checkpoint.state.get("best", {}))
    run.micro_batch = checkpoint.state.get("micro_batch", run.config.per_device_train_batch_size)
    return checkpoint.step


@contextlib.contextmanager
def best_parameters(run: Run, done: int) -> Iterator[None]:
    """The trained tensors of the best evaluation, where it is asked for; those of the last step come back afterwards.

    Raises:
        UserError: the checkpoint of the best evaluation cannot be read.
    """
    best = run.best.step
    if not run.config.load_best_model_at_end or best is None or best == done:
        yield
        return
    trainable = run.lm.trainable_parameters()
    last = {name: parameter.detach().clone() for name, parameter in trainable}
    _put(trainable, read_checkpoint(run.config.output_dir, best).parameters)
    yield
    _put(trainable, last)


@torch.no_grad()
def _put(trainable: Named, values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in trainable:
        parameter.copy_(values[name])

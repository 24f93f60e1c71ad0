"""The loop of phase two's steps, with evaluations, log lines and checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch

from dpoeng.cache.words import speed
from dpoeng.engine.losses.batch import PreferenceLoss
from dpoeng.engine.models.model import set_mode
from dpoeng.engine.runtime.host import peak_resident
from dpoeng.engine.runtime.stopping import Kept, keeping_signals
from dpoeng.engine.training.batch_loss import evaluate
from dpoeng.engine.training.early_stopping import more_is_better, updated, watched
from dpoeng.engine.training.evaluation import pair_lines, summarise
from dpoeng.engine.training.run import Run, save_run
from dpoeng.engine.training.step import train_step


def run_steps(run: Run, first_step: int, identity: dict[str, Any], pause: int | None = None) -> int:
    """Trains from `first_step`, with evaluations, log lines and checkpoints; returns the number of steps done.

    After the step `pause` the run is evaluated and saved, and no further step is done.

    If the best evaluation is requested, every best evaluation so far is followed by a checkpoint. A signal to end takes
    effect after the current step and evaluation, with a checkpoint; see `runtime/stopping`.
    """
    config, schedule = run.config, run.schedule
    if first_step == 0 and run.held_out.rows:
        with run.progress.task("evaluating before training", len(run.held_out.rows), "pairs") as advance:
            _evaluate(run, 0)
            advance(len(run.held_out.rows), "")
    steps_done = first_step
    with (
        run.progress.task("training", schedule.total_steps, "steps", first_step) as advance,
        keeping_signals() as pending,
    ):
        run.tell = lambda shown: advance(0, shown)
        while steps_done < schedule.total_steps and steps_done != pause and not run.waited_enough:
            began = time.perf_counter()
            metrics = train_step(run, steps_done)
            steps_done += 1
            if steps_done % config.logging_steps == 0 or steps_done == schedule.total_steps:
                _log(run, steps_done, metrics)
            seconds = time.perf_counter() - began
            run.log.write_timing(steps_done, {"step_ms": 1e3 * seconds, "peak_bytes": _peak_bytes(run)})
            advance(1, live_figures(metrics, len(schedule.rows_of_step(steps_done - 1)) / seconds))
            _after_step(run, steps_done, identity, pending, pauses=steps_done == pause)
    return steps_done


def _after_step(run: Run, done: int, identity: dict[str, Any], pending: Kept, *, pauses: bool) -> None:
    """Evaluates and saves if it is time; then obeys a signal that any of the processes received."""
    config, total = run.config, run.schedule.total_steps
    save_every = config.save_steps or max(1, math.ceil(total / 10))
    eval_every = config.eval_steps or run.schedule.steps_per_epoch
    if run.held_out.rows and (done % eval_every == 0 or done == total or pauses):
        _evaluate(run, done)
    best = config.load_best_model_at_end and run.best.step == done
    stop = max(run.group.gather(pending.number))  # all processes must end after the same step
    if stop or ((best or done % save_every == 0 or pauses) and done < total):
        save_run(run, done, identity, complete=False)
    if stop:
        run.progress.note(
            f"received {signal.Signals(stop).name}: step {done} of {total} is done and saved in a checkpoint"
        )
        run.group.wait()  # the first process to end may stop the others, so wait until the checkpoint is written
        pending.hand_on(stop)


def _peak_bytes(run: Run) -> int:
    """Peak memory so far, on the GPU or of this process; reading it does not wait for the GPU."""
    device = run.lm.device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def live_figures(metrics: Mapping[str, float], pairs_per_s: float) -> str:
    """The figures to show while a step runs."""
    margin = f"margin {metrics['rewards/margins']:+.3f}  " if "rewards/margins" in metrics else ""
    return (
        f"loss {metrics['loss']:.4f}  {margin}accuracy {metrics['rewards/accuracies']:.2f}  "
        f"{speed(pairs_per_s, 1.0, 'pairs')}"
    )


def _evaluate(run: Run, step: int) -> None:
    """Evaluates all held-out pairs; the evaluation before the first step cannot be the best one.

    The processes share the forwards; the first one decides and tells the others.
    """
    set_mode(run.lm, training=False)
    losses = evaluate(
        run.lm,
        run.held_out.rows,
        run.settings,
        run.held_out.weights,
        batch_size=run.config.per_device_eval_batch_size,
        state=run.loss_state,
        per_token=run.per_token,
        note=run.progress.note,
        group=run.group,
    )
    set_mode(run.lm, training=True)
    if run.group.is_first:
        _conclude(run, step, losses)
    run.best = run.group.from_first(run.best)


def _conclude(run: Run, step: int, losses: PreferenceLoss) -> None:
    config, held_out, per_pair_loss = run.config, run.held_out, not run.settings.sorts_pairs
    result = summarise(losses, held_out.prompts, held_out.labels, seed=config.seed, per_pair_loss=per_pair_loss)
    metrics = {f"eval_{name}": value for name, value in result.metrics.items()}
    _log(run, step, metrics)
    run.log.write_evaluation(step, result.record())
    if config.watches_a_metric:
        name = config.metric_for_best_model
        if step:  # before training all margins are 0, so comparing metrics are undefined
            value = watched(metrics, name)
            greater = more_is_better(name, config.greater_is_better)
            run.best = updated(run.best, step, value, greater=greater, threshold=config.early_stopping_threshold)
    if not config.load_best_model_at_end or run.best.step == step:
        sources = [held_out.source_of(row) for row in range(len(held_out.rows))]
        run.log.write_held_out(step, pair_lines(losses, held_out.prompts, sources, per_pair_loss=per_pair_loss))


def _log(run: Run, step: int, metrics: dict[str, float]) -> None:
    run.log.write(step, run.schedule.epoch(step), metrics)
    if run.group.is_first:
        run.on_metrics({"step": step, **metrics})

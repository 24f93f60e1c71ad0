"""The steps of phase two one after the other, with evaluations, log lines and checkpoints on the way."""

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
    """Trains from `first_step` on, with evaluations, log lines and checkpoints on the way; returns the steps done.

    After the step `pause` the run is evaluated and saved, and no further step is done.

    A checkpoint follows every evaluation that is the best so far, where the best is asked for. A signal to end is
    obeyed after the step and evaluation in progress, with a checkpoint; see `runtime/stopping`.
    """
    config, schedule = run.config, run.schedule
    if first_step == 0 and run.held_out.rows:
        with run.progress.task("evaluating before training", len(run.held_out.rows), "pairs") as advance:
            _evaluate(run, 0)
            advance(len(run.held_out.rows), "")
    done = first_step
    with (
        run.progress.task("training", schedule.total_steps, "steps", first_step) as advance,
        keeping_signals() as kept,
    ):
        run.tell = lambda shown: advance(0, shown)
        while done < schedule.total_steps and done != pause and not run.waited_enough:
            began = time.perf_counter()
            metrics = train_step(run, done)
            done += 1
            if done % config.logging_steps == 0 or done == schedule.total_steps:
                _log(run, done, metrics)
            seconds = time.perf_counter() - began
            run.log.write_timing(done, {"step_ms": 1e3 * seconds, "peak_bytes": _peak_bytes(run)})
            advance(1, live_figures(metrics, len(schedule.rows_of_step(done - 1)) / seconds))
            _after_step(run, done, identity, kept, pauses=done == pause)
    return done


def _after_step(run: Run, done: int, identity: dict[str, Any], kept: Kept, *, pauses: bool) -> None:
    """Evaluate and save where it is time to; then obey a signal that has come to any of the processes."""
    config, total = run.config, run.schedule.total_steps
    save_every = config.save_steps or max(1, math.ceil(total / 10))
    eval_every = config.eval_steps or run.schedule.steps_per_epoch
    if run.held_out.rows and (done % eval_every == 0 or done == total or pauses):
        _evaluate(run, done)
    best = config.load_best_model_at_end and run.best.step == done
    stop = max(run.group.gather(kept.number))  # all of them end after the same step
    if stop or ((best or done % save_every == 0 or pauses) and done < total):
        save_run(run, done, identity, complete=False)
    if stop:
        run.progress.note(f"{signal.Signals(stop).name} has come: step {done} of {total} is done and in a checkpoint")
        run.group.wait()  # whoever ends first may take the others along, so not before the checkpoint is written
        kept.hand_on(stop)


def _peak_bytes(run: Run) -> int:
    """The most memory held so far: allocated on the GPU, or of this process; asking costs no wait for the GPU."""
    device = run.lm.device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def live_figures(metrics: Mapping[str, float], pairs_per_s: float) -> str:
    """What a step tells while it goes by."""
    margin = f"margin {metrics['rewards/margins']:+.3f}  " if "rewards/margins" in metrics else ""
    return (
        f"loss {metrics['loss']:.4f}  {margin}accuracy {metrics['rewards/accuracies']:.2f}  "
        f"{speed(pairs_per_s, 1.0, 'pairs')}"
    )


def _evaluate(run: Run, step: int) -> None:
    """All held-out pairs; the evaluation before the first step is no candidate for the best.

    The processes share the forwards; the first of them draws the conclusions, and tells the others.
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
        if step:  # before it margins are all 0, and what compares them is no number yet
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

"""Phase two: DPO of a LoRA policy against the cached numbers. No reference model is ever loaded here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import ScoredPair
from dpoeng.engine.adapters import AdapterMode, add_policy_adapter, as_reference, lora_arguments
from dpoeng.engine.advice import Advice, advise
from dpoeng.engine.best import Best
from dpoeng.engine.checkpoint import Checkpoint
from dpoeng.engine.config import TrainConfig
from dpoeng.engine.fit import check_step
from dpoeng.engine.loop import HeldOut, OnMetrics, Run, best_parameters, restore_run, run_steps, save_run
from dpoeng.engine.metrics import MetricsLog
from dpoeng.engine.model import CausalLM, device_name, enable_gradient_checkpointing, pick_device, set_mode
from dpoeng.engine.optim import build_optimizer, build_scheduler
from dpoeng.engine.order import hold_out, plan_schedule
from dpoeng.engine.progress import QUIET, Progress
from dpoeng.engine.quantized import import_bitsandbytes, require_bitsandbytes
from dpoeng.engine.reference import ParityReport, compare_with_cache, load_policy_base, parity_tolerance, spread
from dpoeng.engine.rows import Rows
from dpoeng.engine.run_folder import (
    ADAPTER_FOLDER,
    clear_output,
    open_output,
    run_identity,
    write_adapter,
    write_advice,
    write_run_file,
)
from dpoeng.engine.scoring import choose_layout
from dpoeng.engine.sources import find_adapter, find_model
from dpoeng.engine.trackers import check_trackers, open_trackers


@dataclass(slots=True)
class TrainSummary:
    """What phase two did."""

    output_dir: Path
    adapter: Path
    steps: int
    resumed_from: int
    train_pairs: int
    eval_pairs: int
    trainable: int
    adapter_mode: str
    parity: ParityReport | None
    layout: str
    layout_reason: str
    device: str
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    eval_before: dict[str, float] = field(default_factory=dict)
    eval_after: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    already_complete: bool = False
    planned_steps: int = 0
    best: Best = field(default_factory=Best)
    evaluation: dict[str, Any] = field(default_factory=dict)
    advice: list[Advice] = field(default_factory=list)


def train(config: TrainConfig, progress: Progress = QUIET, on_metrics: OnMetrics | None = None) -> TrainSummary:
    """Runs phase two, or goes on with it where `output_dir` holds an unfinished run of the same configuration.

    Args:
        config: every setting.
        progress: where bars and notes go.
        on_metrics: called with the metrics of each logged step and each evaluation; what it raises ends the run, which
            can then be gone on with.

    Raises:
        UserError: cache, model, configuration or output folder is not usable as it is; or the policy does not agree
            with the cache before the first step; or a loss is not a number.
    """
    began = time.perf_counter()
    check_trackers(config.report_to)
    view = View.open(config.cache, config.view)
    eval_view = View.open(config.cache, config.eval_view) if config.eval_view else None
    refuse_sums_for_tokens(config, view)
    reference = view.meta["reference"]
    require_bitsandbytes(config.quantization or reference["quantization"])
    if not config.optim.startswith("adamw_torch"):
        import_bitsandbytes(f"--optim {config.optim}", "use --optim adamw_torch")
    adapter_name = config.adapter or reference.get("adapter")
    adapter = find_adapter(adapter_name) if adapter_name else None
    mode = resolve_adapter_mode(config, has_adapter=adapter is not None)
    train_indices, eval_indices = split(view, eval_view, config)
    train_rows, eval_rows = Rows(view, train_indices), Rows(eval_view or view, eval_indices)
    train_weights = train_rows.weights(config.pair_weight_column)
    held_out = HeldOut(
        rows=eval_rows,
        weights=eval_rows.weights(config.pair_weight_column),
        prompts=eval_rows.prompts(),
        labels=eval_rows.labels(config.eval_group_by) if eval_rows else {},
    )
    schedule = plan_schedule(
        len(train_rows),
        batch=config.per_device_train_batch_size * config.gradient_accumulation_steps,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
    )
    identity = run_identity(config, view, eval_view, mode)
    checkpoint = open_output(config, identity, progress)
    if checkpoint is not None and (config.output_dir / ADAPTER_FOLDER).is_dir() and checkpoint.state["complete"]:
        return _finished(config, checkpoint, mode, train_rows, eval_rows)

    device = pick_device(config.device)
    refuse_flex_on_cpu(config, device)
    predicted_bytes = check_step(
        config,
        find_model(config.model or reference["model"], revision=reference.get("revision")),
        [row.ids for row in train_rows],
        device,
        quantization=config.quantization or reference["quantization"],
        dtype=config.dtype or reference["dtype"],
    )
    # Seeded before the adapter is made: its start is part of what a seed means.
    torch.manual_seed(config.seed)
    lm = load_policy_base(config, reference)
    lm = add_policy_adapter(lm, mode, adapter, lora_arguments(config))
    set_mode(lm, training=False)
    with as_reference(lm, mode):
        choose_layout(lm, config.layout, config.attention)
        parity = check_parity(config, lm, view, train_indices, reference)
    clear_output(config)
    checkpointing = config.gradient_checkpointing
    if checkpointing or (checkpointing is None and device.type == "cuda"):
        enable_gradient_checkpointing(lm)
    set_mode(lm, training=True)

    trainable = lm.trainable_parameters()
    optimizer = build_optimizer(config, trainable)
    run = Run(
        config=config,
        lm=lm,
        train_rows=train_rows,
        train_weights=train_weights,
        held_out=held_out,
        schedule=schedule,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, schedule.total_steps),
        log=MetricsLog(config.output_dir),
        progress=progress,
        per_token=not view.spec.holds_sums,
    )
    if on_metrics is not None:
        run.on_metrics = on_metrics
    first_step = 0
    if checkpoint is not None:
        first_step = restore_run(run, checkpoint)
        progress.note(f"going on from step {first_step} of {schedule.total_steps} ({checkpoint.folder})")
    run.log.rewind(first_step if checkpoint is not None else -1)
    write_run_file(config, identity, view, mode, config.model or reference["model"], adapter_name, parity, lm)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    trackers = open_trackers(
        config.report_to,
        run_name=config.run_name or config.output_dir.resolve().name,
        output_dir=config.output_dir,
        settings=config.model_dump(mode="json"),
        first_step=first_step,
        progress=progress,
    )
    run.log.also = trackers.log
    try:
        done = run_steps(run, first_step, identity)
    finally:
        trackers.finish()

    with best_parameters(run, done):
        adapter_folder = write_adapter(lm, config.output_dir)
    save_run(run, done, identity, complete=True)

    summary = TrainSummary(
        output_dir=config.output_dir,
        adapter=adapter_folder,
        steps=done,
        planned_steps=schedule.total_steps,
        best=run.best,
        resumed_from=first_step,
        train_pairs=len(train_rows),
        eval_pairs=len(eval_rows),
        trainable=sum(parameter.numel() for _, parameter in trainable),
        adapter_mode=mode,
        parity=parity,
        layout=lm.layout,
        layout_reason=lm.layout_reason,
        device=device_name(device),
        seconds=time.perf_counter() - began,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        predicted_bytes=predicted_bytes,
    )
    _add_results(summary, run.log, config)
    write_advice(config.output_dir, summary.advice)
    return summary


# --------------------------------------------------------------------------- before the first step


def resolve_adapter_mode(config: TrainConfig, *, has_adapter: bool) -> AdapterMode:
    """`auto` -> `continue` where the reference has an SFT adapter, else `new`.

    Raises:
        UserError: the mode does not fit the reference.
    """
    if config.adapter_mode == "auto":
        named = config.lora_shape_given()
        if has_adapter and named:
            raise UserError(
                "the reference has an SFT adapter, and LoRA settings were given: which adapter is to be trained?",
                code="adapter-mode",
                where=", ".join("--" + name.replace("_", "-") for name in named),
                expected="adapter_mode stack: a new LoRA of this shape on top of the frozen SFT adapter; or "
                "adapter_mode continue: the SFT adapter itself, in its own shape",
                remedy="add --adapter-mode stack, or take the LoRA settings out",
            )
        return "continue" if has_adapter else "new"
    if (config.adapter_mode == "new") == has_adapter:
        raise UserError(
            f"adapter_mode {config.adapter_mode} does not fit this reference",
            code="adapter-mode",
            where="--adapter-mode",
            expected="continue or stack, since the reference has an SFT adapter"
            if has_adapter
            else "new, since the reference has no SFT adapter",
            found=config.adapter_mode,
            remedy="leave it out: auto chooses what fits",
        )
    return config.adapter_mode


def refuse_flex_on_cpu(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError where the backward pass that training needs is not there."""
    if config.attention == "flex" and config.layout != "separate" and device.type == "cpu":
        raise UserError(
            "training through FlexAttention needs a GPU: it has no backward pass on a CPU",
            code="attention-unsupported",
            where="--attention flex",
            expected="a GPU",
            found=device_name(device),
            remedy="leave --attention out",
            exit_status=5,
        )


def refuse_sums_for_tokens(config: TrainConfig, view: View) -> None:
    """Raises UserError where the loss weighs single tokens and the cache holds sums only."""
    if view.spec.holds_sums and config.ld_alpha is not None:
        raise UserError(
            "this loss weighs single tokens, and these reference log-probs are sums over whole responses",
            code="cache-sums-only",
            where="--ld-alpha",
            expected="a cache that `dpoeng precompute-ref` wrote",
            found=f"view {view.name}, imported from {view.meta['imported']['name']}",
            remedy="leave --ld-alpha out, or run precompute-ref on the pairs",
        )


def split(view: View, eval_view: View | None, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to evaluate on. With `eval_view`, all of each."""
    if eval_view is not None:
        if eval_view.spec.digest != view.spec.digest:
            raise UserError(
                "training and evaluation pairs were scored by different references",
                code="eval-reference",
                where="--eval-view",
                expected=f"the reference of {view.name}: {view.spec.digest}",
                found=f"{eval_view.name}: {eval_view.spec.digest}",
                remedy="run precompute-ref for both files with the same model options",
            )
        return list(range(len(view))), list(range(len(eval_view)))
    train_indices, eval_indices = hold_out(
        [view[row].ids.prompt_ids.tobytes() for row in range(len(view))], config.eval_share, config.seed
    )
    return train_indices, eval_indices


def check_parity(
    config: TrainConfig, lm: CausalLM, view: View, rows: Sequence[int], reference: dict[str, Any]
) -> ParityReport:
    """Compares the policy, as the reference, with the cache on pairs spread over the view.

    Raises:
        UserError: they differ by more than rounding explains.
    """
    sample = spread(rows, config.parity_pairs)
    tolerance = config.parity_tolerance or parity_tolerance(lm, reference["quantization"], reference["dtype"])
    report = compare_with_cache(
        lm, view, sample, beta=config.beta, batch_tokens=reference["batch_tokens"], tolerance=tolerance
    )
    if not report.ok:
        raise UserError(
            "the policy is not the model that the cache was made with",
            code="parity-failed",
            where=f"{report.pairs} pairs, {report.tokens} tokens, scored without the new adapter",
            expected=f"mean difference per token <= {tolerance:g} nats",
            found=f"mean {report.mean_diff:.4g}, largest {report.max_diff:.4g} nats; as reward noise "
            f"{report.reward_noise:.3g} at beta {config.beta:g}",
            remedy="train with the model, adapter and precision that the cache names (leave out --model, --adapter, "
            "--dtype and --quantization), or run precompute-ref for this model",
            exit_status=4,
        )
    return report


def _finished(
    config: TrainConfig,
    checkpoint: Checkpoint,
    mode: AdapterMode,
    train_rows: Sequence[ScoredPair],
    eval_rows: Sequence[ScoredPair],
) -> TrainSummary:
    summary = TrainSummary(
        output_dir=config.output_dir,
        adapter=config.output_dir / ADAPTER_FOLDER,
        steps=checkpoint.step,
        resumed_from=checkpoint.step,
        train_pairs=len(train_rows),
        eval_pairs=len(eval_rows),
        trainable=sum(tensor.numel() for tensor in checkpoint.parameters.values()),
        adapter_mode=mode,
        parity=None,
        layout="",
        layout_reason="",
        device="",
        already_complete=True,
    )
    summary.best = Best(**checkpoint.state.get("best", {}))
    _add_results(summary, MetricsLog(config.output_dir), config)
    return summary


def _add_results(summary: TrainSummary, log: MetricsLog, config: TrainConfig) -> None:
    lines = log.read()
    steps = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "eval_loss" in line]
    summary.first, summary.last = (steps[0], steps[-1]) if steps else ({}, {})
    summary.eval_before, summary.eval_after = (evals[0], evals[-1]) if evals else ({}, {})
    full = log.read_evaluations()
    summary.evaluation = full[-1] if full else {}
    summary.advice = advise(
        steps, evals, loss_type=config.loss_type, beta=config.beta, held_out_pairs=summary.eval_pairs
    )

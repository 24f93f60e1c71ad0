"""Phase two: DPO of a LoRA policy against the cached numbers. No reference model is ever loaded here."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import xxhash

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.schema import ScoredPair
from dpoeng.engine.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    write_durably,
    write_folder,
)
from dpoeng.engine.config import TrainConfig
from dpoeng.engine.layout import pair_group
from dpoeng.engine.losses import PreferenceBatch, PreferenceLoss, preference_loss
from dpoeng.engine.metrics import METRICS_FILE, TIMINGS_FILE, MetricsLog, preference_metrics
from dpoeng.engine.model import (
    AdapterMode,
    CausalLM,
    add_policy_adapter,
    as_reference,
    device_name,
    enable_gradient_checkpointing,
    find_adapter,
    library_versions,
    save_policy_adapter,
    set_mode,
)
from dpoeng.engine.optim import (
    build_optimizer,
    build_scheduler,
    optimizer_tensors,
    restore_optimizer,
    set_scheduler_step,
)
from dpoeng.engine.order import Schedule, hold_out, plan_schedule
from dpoeng.engine.progress import QUIET, Progress
from dpoeng.engine.reference import ParityReport, compare_with_cache, load_policy_base, parity_tolerance, spread
from dpoeng.engine.scoring import choose_layout, score_groups

RUN_FILE = "run.json"
ADAPTER_FOLDER = "adapter"

# Fields that may differ between a run and its continuation: none of them moves a weight.
_FREE_TO_CHANGE = frozenset(
    "cache output_dir resume model adapter device logging_steps eval_steps save_steps save_total_limit "
    "per_device_eval_batch_size parity_pairs parity_tolerance".split()
)


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
    already_complete: bool = False


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
class _Run:
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


def train(config: TrainConfig, progress: Progress = QUIET) -> TrainSummary:
    """Runs phase two, or goes on with it where `output_dir` holds an unfinished run of the same configuration.

    Raises:
        UserError: cache, model, configuration or output folder is not usable as it is; or the policy does not agree
            with the cache before the first step; or a loss is not a number.
    """
    began = time.perf_counter()
    view = View.open(config.cache, config.view)
    eval_view = View.open(config.cache, config.eval_view) if config.eval_view else None
    reference = view.meta["reference"]
    adapter_name = config.adapter or reference.get("adapter")
    adapter = find_adapter(adapter_name) if adapter_name else None
    mode = resolve_adapter_mode(config, has_adapter=adapter is not None)
    train_indices, eval_indices = split(view, eval_view, config)
    train_rows, eval_rows = Rows(view, train_indices), Rows(eval_view or view, eval_indices)
    schedule = plan_schedule(
        len(train_rows),
        batch=config.per_device_train_batch_size * config.gradient_accumulation_steps,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
    )
    identity = run_identity(config, view, eval_view, mode)
    checkpoint = _open_output(config, identity, progress)
    if checkpoint is not None and (config.output_dir / ADAPTER_FOLDER).is_dir() and checkpoint.state["complete"]:
        return _finished(config, checkpoint, mode, train_rows, eval_rows)

    # Seeded before the adapter is made: its start is part of what a seed means.
    torch.manual_seed(config.seed)
    lm = load_policy_base(config, reference)
    lm = add_policy_adapter(lm, mode, adapter, lora_arguments(config))
    set_mode(lm, training=False)
    with as_reference(lm, mode):
        choose_layout(lm, config.layout)
        parity = check_parity(config, lm, view, train_indices, reference)
    device, checkpointing = lm.device, config.gradient_checkpointing
    if checkpointing or (checkpointing is None and device.type == "cuda"):
        enable_gradient_checkpointing(lm)
    set_mode(lm, training=True)

    trainable = lm.trainable_parameters()
    optimizer = build_optimizer(config, trainable)
    run = _Run(
        config=config,
        lm=lm,
        train_rows=train_rows,
        eval_rows=eval_rows,
        schedule=schedule,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, schedule.total_steps),
        log=MetricsLog(config.output_dir),
        progress=progress,
    )
    first_step = 0
    if checkpoint is not None:
        first_step = _restore(run, checkpoint)
        progress.note(f"going on from step {first_step} of {schedule.total_steps} ({checkpoint.folder})")
    run.log.rewind(first_step if checkpoint is not None else -1)
    _write_run_file(config, identity, view, mode, config.model or reference["model"], adapter_name, parity, lm)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    _loop(run, first_step, identity)

    staging = config.output_dir / f".{ADAPTER_FOLDER}.peft"
    save_policy_adapter(lm, staging)
    files = {path.name: path.read_bytes() for path in sorted(staging.iterdir()) if path.is_file()}
    write_folder(config.output_dir / ADAPTER_FOLDER, files)
    for path in staging.iterdir():
        path.unlink()
    staging.rmdir()
    _save(run, schedule.total_steps, identity, complete=True)

    summary = TrainSummary(
        output_dir=config.output_dir,
        adapter=config.output_dir / ADAPTER_FOLDER,
        steps=schedule.total_steps,
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
    )
    _add_results(summary, run.log)
    return summary


# --------------------------------------------------------------------------- before the first step


def resolve_adapter_mode(config: TrainConfig, *, has_adapter: bool) -> AdapterMode:
    """`auto` -> `continue` where the reference has an SFT adapter, else `new`.

    Raises:
        UserError: the mode does not fit the reference.
    """
    if config.adapter_mode == "auto":
        shape = {"lora_r", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora", "init_lora_weights"}
        named = sorted(shape & config.model_fields_set)
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


def lora_arguments(config: TrainConfig) -> dict[str, Any]:
    """The arguments of peft's LoraConfig."""
    targets = list(config.lora_target_modules)
    return {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets[0] if targets == ["all-linear"] else targets,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": config.init_lora_weights,
    }


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


def run_identity(config: TrainConfig, view: View, eval_view: View | None, mode: AdapterMode) -> dict[str, Any]:
    """All that determines the result of a run: what a continuation must have in common with its beginning."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE_TO_CHANGE}
    settings["adapter_mode"] = mode
    return {
        "settings": settings,
        "reference": view.spec.digest,
        "pairs": rows_digest(view),
        "eval_pairs": rows_digest(eval_view) if eval_view is not None else None,
    }


def rows_digest(view: View) -> str:
    """One hash over the pair keys of a view, in order."""
    digest = xxhash.xxh3_128()
    for row in range(len(view)):
        digest.update(view.key(row))
    return digest.hexdigest()


def _open_output(config: TrainConfig, identity: dict[str, Any], progress: Progress) -> Checkpoint | None:
    """The checkpoint to go on from, or None for a fresh start."""
    root = config.output_dir
    if config.resume is False:
        remove_checkpoints(root)
        for name in (METRICS_FILE, TIMINGS_FILE, RUN_FILE):
            (root / name).unlink(missing_ok=True)
        return None
    checkpoint, damaged = latest_checkpoint(root)
    for sentence in damaged:
        progress.note(sentence)
    if checkpoint is None:
        if config.resume:
            raise UserError(
                "there is no checkpoint to go on from",
                code="resume-nothing",
                where=str(root),
                expected="a checkpoint-* folder",
                remedy="leave --resume out, or name the folder of the run with --output-dir",
            )
        return None
    changed = _changes(checkpoint.state["identity"], identity)
    if changed:
        raise UserError(
            "this folder holds a run of another configuration",
            code="resume-changed",
            where=str(root),
            expected="; ".join(f"{name} = {old}" for name, old, _ in changed),
            found="; ".join(f"{name} = {new}" for name, _, new in changed),
            remedy="use the same values to go on, another --output-dir for a second run, or --no-resume to start anew "
            "here (the old run's checkpoints are removed)",
        )
    return checkpoint


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    flat_old = {**old["settings"], **{k: v for k, v in old.items() if k != "settings"}}
    flat_new = {**new["settings"], **{k: v for k, v in new.items() if k != "settings"}}
    return [
        (name, flat_old.get(name), flat_new.get(name))
        for name in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(name) != flat_new.get(name)
    ]


# --------------------------------------------------------------------------- the loop


def _loop(run: _Run, first_step: int, identity: dict[str, Any]) -> None:
    config, schedule = run.config, run.schedule
    save_every = config.save_steps or max(1, math.ceil(schedule.total_steps / 10))
    eval_every = config.eval_steps or schedule.steps_per_epoch
    if first_step == 0 and run.eval_rows:
        _evaluate(run, 0)
    with run.progress.task("training", schedule.total_steps, "steps") as advance:
        advance(first_step, "")
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
                _save(run, done, identity, complete=False)


def _step(run: _Run, step: int) -> dict[str, float]:
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


def _evaluate(run: _Run, step: int) -> None:
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


# --------------------------------------------------------------------------- state on disk


def _save(run: _Run, step: int, identity: dict[str, Any], *, complete: bool) -> None:
    trainable = run.lm.trainable_parameters()
    save_checkpoint(
        run.config.output_dir,
        step,
        parameters={name: parameter.detach().cpu().contiguous() for name, parameter in trainable},
        optimizer=optimizer_tensors(run.optimizer, trainable),
        state={"identity": identity, "complete": complete},
        keep=run.config.save_total_limit,
    )


def _restore(run: _Run, checkpoint: Checkpoint) -> int:
    with torch.no_grad():
        for name, parameter in run.lm.trainable_parameters():
            parameter.copy_(checkpoint.parameters[name])
    restore_optimizer(run.optimizer, run.lm.trainable_parameters(), checkpoint.optimizer)
    set_scheduler_step(run.scheduler, checkpoint.step)
    return checkpoint.step


def _write_run_file(
    config: TrainConfig,
    identity: dict[str, Any],
    view: View,
    mode: AdapterMode,
    model: str,
    adapter: str | None,
    parity: ParityReport,
    lm: CausalLM,
) -> None:
    """All that is needed to repeat the run, and to load its result."""
    record = {
        "command": "dpoeng train",
        "config": config.model_dump(mode="json"),
        "identity": identity,
        "reference": {**view.meta["reference"], "spec": view.spec.digest, "view": view.name},
        "files": view.meta.get("files"),
        "model": model,
        "adapter_mode": mode,
        "sft_adapter": adapter,
        "seed": config.seed,
        "parity": {
            "pairs": parity.pairs,
            "mean_diff": parity.mean_diff,
            "max_diff": parity.max_diff,
            "reward_noise": parity.reward_noise,
            "tolerance": parity.tolerance,
        },
        "layout": lm.layout,
        "layout_reason": lm.layout_reason,
        "device": device_name(lm.device),
        "versions": library_versions(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "load": loading_recipe(mode, model, adapter),
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_durably(config.output_dir / RUN_FILE, (json.dumps(record, indent=2) + "\n").encode())


def loading_recipe(mode: AdapterMode, model: str, adapter: str | None) -> list[str]:
    """Python lines that load the result with transformers and peft alone; run in the output folder."""
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({model!r})",
    ]
    if mode == "stack":
        lines += [
            f"model = PeftModel.from_pretrained(model, {adapter!r}, adapter_name='reference')",
            f"model.load_adapter({ADAPTER_FOLDER!r}, adapter_name='default')",
            "model.base_model.set_adapter(['reference', 'default'])",
        ]
    else:
        lines.append(f"model = PeftModel.from_pretrained(model, {ADAPTER_FOLDER!r})")
    return lines


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
    _add_results(summary, MetricsLog(config.output_dir))
    return summary


def _add_results(summary: TrainSummary, log: MetricsLog) -> None:
    lines = log.read()
    steps = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "eval_loss" in line]
    summary.first, summary.last = (steps[0], steps[-1]) if steps else ({}, {})
    summary.eval_before, summary.eval_after = (evals[0], evals[-1]) if evals else ({}, {})

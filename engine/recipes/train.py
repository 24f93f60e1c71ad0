"""Phase two: DPO of a LoRA, or of all weights, against the cached log-probs. Never loads a reference model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import Mode, TrainConfig
from dpoeng.engine.losses.own_check import check_own_losses
from dpoeng.engine.models.checkpoint_names import class_to_load
from dpoeng.engine.models.experts.balance import balance_of, trains_routers
from dpoeng.engine.models.full_finetuning import whole_weights
from dpoeng.engine.models.model import device_name, library_versions
from dpoeng.engine.models.sources import ModelSource, has_stored_quantization, license_of
from dpoeng.engine.models.tokenizer import TokenizerChoice, has_tokenizer, recorded_tokenizer
from dpoeng.engine.recipes.inputs import Inputs, check_held_out, open_inputs
from dpoeng.engine.recipes.phase_two.extension import Extension, extension_text, find_extension
from dpoeng.engine.recipes.phase_two.summary import TrainSummary, add_results, finished_summary
from dpoeng.engine.recipes.phase_two.tracked import run_steps_tracked
from dpoeng.engine.recipes.policy import Choice, Policy, choose_policy, load_policy
from dpoeng.engine.reference.loading import KeptBase
from dpoeng.engine.runs.card import model_card
from dpoeng.engine.runs.checkpoint import Checkpoint, Finished
from dpoeng.engine.runs.folder import (
    RUN_FILE,
    clear_output,
    open_output,
    refuse_foreign,
    result_folder,
    write_advice,
    write_run_file,
)
from dpoeng.engine.runs.identity import run_identity
from dpoeng.engine.runs.load_lines import Loading, Place, loading_lines
from dpoeng.engine.runs.lock import holding
from dpoeng.engine.runs.metrics import MetricsLog
from dpoeng.engine.runs.reading import read_json
from dpoeng.engine.runs.result import write_result
from dpoeng.engine.runs.trackers import check_trackers
from dpoeng.engine.runtime.determinism import full_determinism
from dpoeng.engine.runtime.distributed import Group, process_group
from dpoeng.engine.runtime.progress import QUIET, Progress
from dpoeng.engine.training.optimizer import build_optimizer, build_scheduler
from dpoeng.engine.training.run import OnMetrics, Run, best_parameters, restore_run, save_run


def train(
    config: TrainConfig,
    progress: Progress = QUIET,
    on_metrics: OnMetrics | None = None,
    kept_base: KeptBase | None = None,
    *,
    may_extend: bool = True,
    pause_at: int | None = None,
) -> TrainSummary:
    """Runs phase two, or continues it if `output_dir` has an unfinished run with the same configuration.

    A run that only differs by having more steps is extended: it continues from its newest checkpoint.

    Under torchrun the processes share each step's forwards; the first of them writes and reports. The result does not
    depend on their number, up to the rounding of sums, so a run can continue with another number of processes.

    Args:
        config: every setting.
        progress: receives bars and notes.
        on_metrics: called in the first process with the metrics of each logged step and each evaluation; an exception
            in it ends the run, which can then be continued.
        kept_base: keeps the base between the runs of one process, so that it is loaded once; see `sweep`.
        may_extend: whether to extend a shorter run in the folder; otherwise it counts as another configuration.
        pause_at: an optimizer step after which the run is evaluated, saved and left. A later call without it continues
            from there, to the same bytes. A run that has such an evaluation already stays unchanged.

    Raises:
        UserError: cache, model, configuration or output folder is not usable; another run is writing to that folder;
            the policy does not match the cache before the first step; a loss is NaN or infinite; or another process of
            the same run has ended.
    """
    with (
        process_group() as group,
        holding(config.output_dir) if group.is_first else contextlib.nullcontext(),
        full_determinism(config.full_determinism),
    ):
        return _train(config, group, progress if group.is_first else QUIET, on_metrics, kept_base, may_extend, pause_at)


def _train(
    config: TrainConfig,
    group: Group,
    progress: Progress,
    on_metrics: OnMetrics | None,
    kept_base: KeptBase | None,
    may_extend: bool,
    pause_at: int | None,
) -> TrainSummary:
    began = time.perf_counter()
    if group.is_first:
        check_trackers(config.report_to)
    inputs = open_inputs(config)
    check_held_out(config, len(inputs.held_out.rows))
    check_own_losses(config.loss_type, config.beta, per_token=not inputs.view.spec.holds_sums)
    if inputs.split.overlap:
        progress.note(inputs.split.overlap)
    choice = choose_policy(config, inputs, group, progress.note)
    identity, checkpoint = find_beginning(config, inputs, choice, group, progress, may_extend)
    extension = find_extension(config, inputs.schedule, identity, checkpoint) if checkpoint is not None else None
    has_result = group.from_first(result_folder(config.output_dir, choice.mode).is_dir())
    complete = checkpoint is not None and checkpoint.state["complete"] and has_result and extension is None
    if checkpoint is not None and (complete or _has_paused(config, checkpoint, pause_at)):
        finished = Finished(checkpoint.step, checkpoint.trained, checkpoint.state)
        return finished_summary(config, inputs, choice.mode, finished, processes=group.size, reports=group.is_first)

    if group.is_first:
        refuse_foreign(config.output_dir, _models(config, choice))
    begun_with = group.from_first(_pairs_of_begun(config, identity, checkpoint) if group.is_first else None)
    policy = load_policy(config, inputs, choice, group, progress, kept_base, begun_with)
    group.wait()  # until every process has checked its policy
    if group.is_first and config.resume is False:  # only now, when nothing can refuse the new run
        clear_output(config.output_dir)
    run = make_run(config, inputs, policy, group, progress, on_metrics)
    first_step = _go_on_from(run, checkpoint, extension)
    if group.is_first:
        record = _record(run, identity, inputs, choice, policy)
        loading = how_to_load(choice, policy, inputs.reference)
        write_run_file(config.output_dir, record, library_versions(), loading_lines(loading, config.output_dir))
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(policy.device)
    pause = None if pause_at is None else max(pause_at, first_step + 1)
    done = run_steps_tracked(run, first_step, identity, pause, policy.source, inputs.reference)
    if done != pause or done == run.schedule.total_steps:
        write_results(run, done, identity, choice, policy, inputs.reference)
    return summarise(run, inputs, policy, choice.mode, first_step, done, time.perf_counter() - began)


def _models(config: TrainConfig, choice: Choice) -> list[Path]:
    """The local folders of the models that a run reads."""
    start = [Path(config.init_adapter)] if config.init_adapter else []
    return [Path(choice.model), *([choice.adapter.folder] if choice.adapter else []), *start]


def find_beginning(
    config: TrainConfig, inputs: Inputs, choice: Choice, group: Group, progress: Progress, may_extend: bool
) -> tuple[dict[str, Any], Checkpoint | None]:
    """The run's identity, and the checkpoint that it resumes from, if any.

    Raises:
        UserError: the processes were started with different settings, or the folder has a run with other settings.
    """
    mode, trunk_layer = choice.mode, choice.trunk.layer if choice.trunk else None
    identity = run_identity(config, inputs.view, inputs.split.eval_view, mode, trunk_layer)
    shared = {**identity, **config.model_dump(mode="json", exclude={"cache", "output_dir", "device"})}
    del shared["settings"]
    group.agree("settings or pairs", shared, "give every process the same command, configuration and cache")

    def extends(checkpoint: Checkpoint) -> bool:
        return may_extend and find_extension(config, inputs.schedule, identity, checkpoint) is not None

    # Only one process reads the folder: others may see it later or not at all, but all must continue from one step.
    opened = open_output(config.output_dir, config.resume, identity, progress, extends) if group.is_first else None
    if not (config.fsdp and mode == "full"):
        return identity, group.from_first(opened)
    # Whole tensors stay in the first process, which sends rows of them: they are too large to send to all.
    others = group.from_first(opened.without_tensors() if opened is not None else None)
    return identity, opened if group.is_first else others


def _pairs_of_begun(config: TrainConfig, identity: Mapping[str, Any], checkpoint: Checkpoint | None) -> int | None:
    """Pairs per forward of the run that this one resumes, or that was killed before its first checkpoint."""
    if checkpoint is not None:
        return checkpoint.state.get("micro_batch")
    file = config.output_dir / RUN_FILE
    if config.resume is False or not file.is_file():
        return None
    with contextlib.suppress(UserError):  # a damaged record is written again
        record = read_json(file, dict)
        return record.get("micro_batch") if record.get("identity") == identity else None
    return None


def make_run(
    config: TrainConfig,
    inputs: Inputs,
    policy: Policy,
    group: Group,
    progress: Progress,
    on_metrics: OnMetrics | None = None,
) -> Run:
    """Everything that the loop needs, at step 0."""
    optimizer = build_optimizer(config, policy.lm.trainable_parameters())
    run = Run(
        config=config,
        lm=policy.lm,
        train_rows=inputs.train_rows,
        train_weights=inputs.train_weights,
        held_out=inputs.held_out,
        schedule=inputs.schedule,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, inputs.schedule.total_steps),
        log=MetricsLog(config.output_dir, writes=group.is_first),
        progress=progress,
        per_token=not inputs.view.spec.holds_sums,
        source_of=inputs.train_rows.source,
        micro_batch=policy.pairs,
        starts_within=policy.parity.tolerance if _starts_at_reference(config) else None,
        group=group,
    )
    run.balance = balance_of(policy.lm, config.router_aux_loss_coef, whole_batch=run.settings.whole_batch)
    if run.balance is None and trains_routers(policy.lm):
        progress.note("routers are trained without a balancing loss: --router-aux-loss-coef adds the model's own")
    if on_metrics is not None:
        run.on_metrics = on_metrics
    return run


def _starts_at_reference(config: TrainConfig) -> bool:
    """Whether the first step's forward must reproduce the cache."""
    return config.init_adapter is None and (config.lora_dropout == 0 or not config.use_peft)


def how_to_load(choice: Choice, policy: Policy, reference: Mapping[str, Any]) -> Loading:
    """How to load the result as it was trained: class, precision and places come from what was loaded."""
    source, lm = policy.source, policy.lm
    try:
        tokenizer = has_tokenizer(recorded_tokenizer(source, reference).source)
    except UserError:  # reported when the result is written
        tokenizer = has_tokenizer(source)
    return Loading(
        mode=choice.mode,
        loader=class_to_load(source, lm.base),
        base=_place(source),
        dtype=str(lm.dtype).removeprefix("torch."),
        quantization="none" if has_stored_quantization(source) else choice.quantization,
        quant_type=reference["bnb_4bit_quant_type"],
        double_quant=reference["bnb_4bit_use_double_quant"],
        sft_adapter=_place(choice.adapter) if choice.adapter is not None and choice.mode == "stack" else None,
        tokenizer=tokenizer,
    )


def _place(source: ModelSource) -> Place:
    """A hub id stays one, with its commit; a folder becomes its absolute path."""
    name = source.name if source.revision else str(source.folder.resolve())
    return Place(name, source.revision, source.weight_files[0].name if source.gguf else None)


def _record(run: Run, identity: dict[str, Any], inputs: Inputs, choice: Choice, policy: Policy) -> dict[str, Any]:
    """The fields of run.json that are specific to this run."""
    view = inputs.view
    return {
        "command": "dpoeng train",
        "config": run.config.model_dump(mode="json"),
        "identity": identity,
        "reference": {**inputs.reference, "spec": view.spec.digest, "view": view.name},
        "files": view.meta.get("files"),
        "model": choice.model,
        "class": class_to_load(policy.source, run.lm.base),
        "adapter_mode": choice.mode,
        "sft_adapter": choice.adapter_name,
        "seed": run.config.seed,
        "parity": policy.parity.record(),
        **({"trunk_layer": choice.trunk.layer} if choice.trunk else {}),
        "layout": run.lm.layout,
        "layout_reason": run.lm.layout_reason,
        "device": device_name(run.lm.device),
        "license": license_of(policy.source),
        "processes": run.group.size,
        "extensions": run.extensions,
        "total_steps": run.schedule.total_steps,
        "micro_batch": run.micro_batch,
    }


def _go_on_from(run: Run, checkpoint: Checkpoint | None, extension: Extension | None) -> int:
    """Restores the run and its log from the checkpoint; returns the first step to do."""
    if checkpoint is None:
        run.log.rewind(-1)  # an evaluation before step 0 may have been logged, and will be logged again
        return 0
    first_step = restore_run(run, checkpoint)
    if extension is not None:
        run.extensions.append(extension.record())
        run.progress.note(extension_text(run.config, extension))
    else:
        run.progress.note(f"resuming from step {first_step} of {run.schedule.total_steps} ({checkpoint.folder})")
    run.log.rewind(first_step)
    return first_step


def _has_paused(config: TrainConfig, checkpoint: Checkpoint, pause_at: int | None) -> bool:
    """Whether the run has a checkpoint at or after `pause_at`, and was evaluated there."""
    if pause_at is None or checkpoint.step < pause_at:
        return False
    return any(pause_at <= line["step"] <= checkpoint.step for line in MetricsLog(config.output_dir).read_evaluations())


def write_results(
    run: Run, done: int, identity: dict[str, Any], choice: Choice, policy: Policy, reference: Mapping[str, Any]
) -> None:
    """Writes the adapter or checkpoint with tokenizer and card, then marks the run complete.

    Raises:
        UserError: the disk is full or not writable; the same command then writes the result again.
    """
    with best_parameters(run, done):
        weights = whole_weights(run.lm, run.group)  # in all processes: sharded weights are gathered from each
        if run.group.is_first:
            try:
                tokenizer = recorded_tokenizer(policy.source, reference)
            except UserError as error:  # a missing tokenizer must not lose the trained weights
                run.progress.note(f"{error.message}: the tokenizer of the SFT adapter is not saved with the result")
                tokenizer = TokenizerChoice(policy.source)
            card = _card(run, done, loading_lines(how_to_load(choice, policy, reference)))
            write_result(run.lm, run.config.output_dir, choice.mode, policy.source, weights, tokenizer, card)
        del weights
    # In this order: after a kill in between, the run is not marked complete and will be continued.
    save_run(run, done, identity, complete=True)
    run.group.wait()  # no process reports success before the result is on disk


def _card(run: Run, done: int, load: Sequence[str]) -> str:
    """The model card, from the evaluation whose weights are saved. `load`: Python lines to run next to the result."""
    evaluations = run.log.read_evaluations()
    saved = run.best.step if run.config.load_best_model_at_end else None
    after = next(
        (line for line in reversed(evaluations) if line["step"] == saved), evaluations[-1] if evaluations else None
    )
    before = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else None
    return model_card(read_json(run.config.output_dir / RUN_FILE, dict), before, after, done, load)


def summarise(
    run: Run, inputs: Inputs, policy: Policy, mode: Mode, first_step: int, done: int, seconds: float
) -> TrainSummary:
    """Summarises the run; the first process adds its metrics and writes the remarks."""
    config, on_gpu = run.config, policy.device.type == "cuda"
    summary = TrainSummary(
        output_dir=config.output_dir,
        result=result_folder(config.output_dir, mode),
        steps=done,
        planned_steps=run.schedule.total_steps,
        best=run.best,
        resumed_from=first_step,
        train_pairs=len(run.train_rows),
        eval_pairs=len(run.held_out.rows),
        trainable=sum(p.numel() for p in run.lm.model.parameters() if p.requires_grad),
        mode=mode,
        parity=policy.parity,
        layout=run.lm.layout,
        layout_reason=run.lm.layout_reason,
        device=device_name(policy.device),
        processes=run.group.size,
        loaded=policy.loaded,
        reports=run.group.is_first,
        seconds=seconds,
        peak_bytes=torch.cuda.max_memory_allocated(policy.device) if on_gpu else None,
        predicted_bytes=policy.predicted_bytes,
        layers_read_bytes=run.lm.by_layer.bytes_read() if run.lm.by_layer is not None else None,
    )
    if run.group.is_first:
        add_results(summary, run.log, config)
        write_advice(config.output_dir, [remark.record() for remark in summary.advice])
    return summary

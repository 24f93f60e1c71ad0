"""Phase two: DPO of a LoRA, or of all weights, against the cached numbers. No reference model is ever loaded here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpoeng.cache.reader import View
from dpoeng.cache.schema import ScoredPair
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.memory.fit import check_step
from dpoeng.engine.models.adapters import Mode, as_reference, make_trainable
from dpoeng.engine.models.fsdp import check_fsdp, layer_sharding, loads_whole_because, shard_base
from dpoeng.engine.models.fsdp_rows import whole_parameters
from dpoeng.engine.models.full_finetuning import check_full, whole_weights
from dpoeng.engine.models.model import device_name, enable_gradient_checkpointing, set_mode
from dpoeng.engine.models.quantized import import_bitsandbytes, require_bitsandbytes
from dpoeng.engine.models.sources import find_adapter, find_model
from dpoeng.engine.recipes.inputs import check_apart, check_held_out, refuse_sums_for_tokens, split
from dpoeng.engine.recipes.policy import (
    check_parity,
    note_idle,
    own_device,
    parity_text,
    refuse_attention_on_cpu,
    resolve_mode,
)
from dpoeng.engine.reference.loading import KeptBase, load_policy_base
from dpoeng.engine.reference.parity import ParityReport
from dpoeng.engine.runs.checkpoint import Checkpoint
from dpoeng.engine.runs.folder import (
    clear_output,
    open_output,
    result_folder,
    write_advice,
    write_result,
    write_run_file,
)
from dpoeng.engine.runs.identity import run_identity
from dpoeng.engine.runs.lock import holding
from dpoeng.engine.runs.metrics import MetricsLog
from dpoeng.engine.runs.trackers import check_trackers, open_trackers
from dpoeng.engine.runtime.determinism import full_determinism
from dpoeng.engine.runtime.distributed import Group, process_group
from dpoeng.engine.runtime.progress import QUIET, Progress
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.training.advice import Advice, advise
from dpoeng.engine.training.early_stopping import Best
from dpoeng.engine.training.loop import run_steps
from dpoeng.engine.training.optimizer import build_optimizer, build_scheduler, copy_parameters
from dpoeng.engine.training.order import plan_schedule
from dpoeng.engine.training.rows import Rows
from dpoeng.engine.training.run import HeldOut, OnMetrics, Run, best_parameters, restore_run, save_run
from dpoeng.engine.training.samples import sample_prompts, take_samples, write_samples


@dataclass(slots=True)
class TrainSummary:
    """What phase two did. Of several processes one `reports`; the others know no results.

    `result` is the folder of the trained adapter; with full fine-tuning (mode `full`) that of the trained checkpoint.
    `loaded` says, with `fsdp`, how the processes came by their parts of the base.
    """

    output_dir: Path
    result: Path
    steps: int
    resumed_from: int
    train_pairs: int
    eval_pairs: int
    trainable: int
    mode: str
    parity: ParityReport | None
    layout: str
    layout_reason: str
    device: str
    processes: int = 1
    loaded: str = ""
    reports: bool = True
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


def train(
    config: TrainConfig,
    progress: Progress = QUIET,
    on_metrics: OnMetrics | None = None,
    kept_base: KeptBase | None = None,
) -> TrainSummary:
    """Runs phase two, or goes on with it where `output_dir` holds an unfinished run of the same configuration.

    Under torchrun the processes share each step's forwards; the first of them writes and reports. The result does not
    depend on how many there are, up to the rounding of sums, so a run may go on with another number of them.

    Args:
        config: every setting.
        progress: where bars and notes go.
        on_metrics: called, in the first process, with the metrics of each logged step and each evaluation; what it
            raises ends the run, which can then be gone on with.
        kept_base: holds the base between the runs of one process, so that it is loaded once; see `sweep`.

    Raises:
        UserError: cache, model, configuration or output folder is not usable as it is; or another run is writing to
            that folder; or the policy does not agree with the cache before the first step; or a loss is not a number;
            or another process of the same run has ended.
    """
    with (
        process_group() as group,
        holding(config.output_dir) if group.is_first else contextlib.nullcontext(),
        full_determinism(config.full_determinism),
    ):
        return _train(config, group, progress if group.is_first else QUIET, on_metrics, kept_base)


def _train(
    config: TrainConfig, group: Group, progress: Progress, on_metrics: OnMetrics | None, kept_base: KeptBase | None
) -> TrainSummary:
    began = time.perf_counter()
    if group.is_first:
        check_trackers(config.report_to)
    view = View.open(config.cache, config.view, beside=config.eval_view)
    eval_view = View.open(config.cache, config.eval_view) if config.eval_view else None
    refuse_sums_for_tokens(config, view)
    reference = view.meta["reference"]
    quantization = config.quantization or reference["quantization"]
    check_fsdp(config, group, quantization)
    require_bitsandbytes(quantization)
    if not config.optim.startswith("adamw_torch"):
        import_bitsandbytes(f"--optim {config.optim}", "use --optim adamw_torch")
    adapter_name = config.adapter or reference.get("adapter")
    adapter = find_adapter(adapter_name) if adapter_name else None
    mode = resolve_mode(config, has_adapter=adapter is not None)
    train_indices, eval_indices = split(view, eval_view, config)
    if eval_view is not None and (overlap := check_apart(view, eval_view)):
        progress.note(overlap)
    check_held_out(config, len(eval_indices))
    train_rows, eval_rows = Rows(view, train_indices), Rows(eval_view or view, eval_indices)
    train_weights = train_rows.weights(config.pair_weight_column)
    held_out = HeldOut(
        rows=eval_rows,
        weights=eval_rows.weights(config.pair_weight_column),
        prompts=eval_rows.prompts(),
        labels=eval_rows.labels(config.eval_group_by) if eval_rows else {},
        source_of=eval_rows.source,
    )
    schedule = plan_schedule(
        len(train_rows),
        batch=config.per_device_train_batch_size * config.gradient_accumulation_steps,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
    )
    identity = run_identity(config, view, eval_view, mode)
    shared = {**identity, **config.model_dump(mode="json", exclude={"cache", "output_dir", "device"})}
    del shared["settings"]
    group.agree("settings or pairs", shared, "give every process the same command, configuration and cache")
    # One process looks into the folder, so that all go on from the same step.
    found = open_output(config, identity, progress) if group.is_first else None
    if config.fsdp and mode == "full":  # its tensors are divided when they are put back
        told = group.from_first(found.without_tensors() if found is not None else None)
        checkpoint = found if group.is_first else told
    else:
        checkpoint = group.from_first(found)
    has_result = group.from_first(result_folder(config.output_dir, mode).is_dir())
    if checkpoint is not None and has_result and checkpoint.state["complete"]:
        return _finished(config, group, checkpoint, mode, train_rows, eval_rows)

    check_full(config, reference, quantization=quantization)
    source = find_model(config.model or reference["model"], revision=reference.get("revision"))
    device = own_device(config, group)
    refuse_attention_on_cpu(config, device)
    note_idle(config, group, progress)
    predicted_bytes = None
    if not (config.fsdp and mode == "full"):  # the simulation divides frozen layers only
        predicted_bytes = check_step(
            config,
            source,
            [row.ids for row in train_rows],
            device,
            quantization=quantization,
            dtype=config.dtype or reference["dtype"],
            shards=group.size if config.fsdp else 1,
            held_bytes=kept_base.n_bytes if kept_base is not None else 0,
        )
    load = kept_base.load if kept_base is not None else load_policy_base
    whole = loads_whole_because(config, group, quantization, source, adapter) if config.fsdp else ""
    if whole:
        progress.note(f"each process loads the whole base into the host's memory before it is divided: {whole}")
    in_parts = config.fsdp and not whole
    n_bytes = sum(file.stat().st_size for file in source.weight_files)
    with progress.task("loading the base", n_bytes, "B") as advance:
        lm = load(
            config,
            reference,
            device,
            on_host=bool(whole),
            tokenizer=config.samples > 0,
            shard=layer_sharding(group, device, trained=mode == "full") if in_parts else None,
        )
        advance(n_bytes, "")
    if whole and mode == "full":
        shard_base(lm, group, device, trained=True)  # before: what is trained are the parts
    # Seeded before the adapter is made: its start is part of what a seed means.
    torch.manual_seed(config.seed)
    lm = make_trainable(lm, config, mode, adapter)
    if whole and mode != "full":
        shard_base(lm, group, device)
    trainable = lm.trainable_parameters()
    group.copy_first([parameter.data for parameter in whole_parameters(lm)])
    lm.take_masters()
    set_mode(lm, training=False)
    with as_reference(lm, mode):
        choose_layout(lm, config.layout, config.attention)
        sample = min(config.parity_pairs, len(train_indices))
        with progress.task("comparing the policy with the cache", sample, "pairs") as advance:
            parity = check_parity(config, lm, view, train_indices, reference)
            advance(sample, "")
    progress.note(parity_text(parity))
    group.wait()  # until every process has found its policy right
    if group.is_first:
        clear_output(config)
    if config.checkpoints_on(device.type):
        enable_gradient_checkpointing(lm, inputs_on_host=config.activation_offloading)
    set_mode(lm, training=True)

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
        log=MetricsLog(config.output_dir, writes=group.is_first),
        progress=progress,
        per_token=not view.spec.holds_sums,
        source_of=train_rows.source,
        group=group,
    )
    if on_metrics is not None:
        run.on_metrics = on_metrics
    start = copy_parameters(lm) if config.samples else {}
    first_step = 0
    if checkpoint is not None:
        first_step = restore_run(run, checkpoint)
        progress.note(f"going on from step {first_step} of {schedule.total_steps} ({checkpoint.folder})")
    run.log.rewind(first_step if checkpoint is not None else -1)
    if group.is_first:
        model = config.model or reference["model"]
        write_run_file(config, identity, view, mode, model, adapter_name, parity.record(), lm, processes=group.size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    trackers = open_trackers(
        config.report_to if group.is_first else (),
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
        if config.samples and (group.is_first or lm.sharded):
            progress.note(f"answering {counted(config.samples, 'held-out prompt')}, before and after")
            samples = take_samples(lm, start, sample_prompts(eval_rows, config.samples))
        weights = whole_weights(lm, group)
        if group.is_first:
            if config.samples:
                write_samples(config.output_dir, samples)
            write_result(lm, config.output_dir, mode, source, weights)
        del weights
    save_run(run, done, identity, complete=True)
    group.wait()  # nobody reports success before the result is on the disk

    summary = TrainSummary(
        output_dir=config.output_dir,
        result=result_folder(config.output_dir, mode),
        steps=done,
        planned_steps=schedule.total_steps,
        best=run.best,
        resumed_from=first_step,
        train_pairs=len(train_rows),
        eval_pairs=len(eval_rows),
        trainable=sum(p.numel() for p in lm.model.parameters() if p.requires_grad),
        mode=mode,
        parity=parity,
        layout=lm.layout,
        layout_reason=lm.layout_reason,
        device=device_name(device),
        processes=group.size,
        loaded=f"whole by each process, then divided: {whole}" if whole else "in parts" if in_parts else "",
        reports=group.is_first,
        seconds=time.perf_counter() - began,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        predicted_bytes=predicted_bytes,
    )
    if group.is_first:
        _add_results(summary, run.log, config)
        write_advice(config.output_dir, [remark.record() for remark in summary.advice])
    return summary


def _finished(
    config: TrainConfig,
    group: Group,
    checkpoint: Checkpoint,
    mode: Mode,
    train_rows: Sequence[ScoredPair],
    eval_rows: Sequence[ScoredPair],
) -> TrainSummary:
    summary = TrainSummary(
        output_dir=config.output_dir,
        result=result_folder(config.output_dir, mode),
        steps=checkpoint.step,
        resumed_from=checkpoint.step,
        train_pairs=len(train_rows),
        eval_pairs=len(eval_rows),
        trainable=sum(tensor.numel() for tensor in checkpoint.parameters.values()),
        mode=mode,
        parity=None,
        layout="",
        layout_reason="",
        device="",
        processes=group.size,
        reports=group.is_first,
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
    full = log.read_evaluations()
    saved = summary.best.step if config.load_best_model_at_end else None
    evals_of_saved = [line for line in evals if line["step"] == saved] or evals
    summary.eval_before, summary.eval_after = (evals[0], evals_of_saved[-1]) if evals else ({}, {})
    summary.evaluation = ([line for line in full if line["step"] == saved] or full or [{}])[-1]
    summary.advice = advise(
        steps, evals, loss_type=config.loss_type, beta=config.beta, held_out_pairs=summary.eval_pairs
    )

"""The policy of phase two: chosen, checked against this machine, loaded, made trainable, compared with the cache."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.trunk.index import TrunkIndex
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import Mode, Quantization, TrainConfig
from dpoeng.engine.memory.fit import StepForecast
from dpoeng.engine.memory.offloading import decide_step
from dpoeng.engine.models.adapters import as_reference, begin_with, check_savable, make_trainable
from dpoeng.engine.models.fsdp import check_fsdp, layer_sharding, loads_whole_because, shard_base
from dpoeng.engine.models.fsdp_rows import whole_parameters
from dpoeng.engine.models.full_finetuning import check_full
from dpoeng.engine.models.loading import pick_device
from dpoeng.engine.models.model import (
    CausalLM,
    decoder_layers,
    device_name,
    enable_gradient_checkpointing,
    set_mode,
)
from dpoeng.engine.models.quantized import import_bitsandbytes, require_bitsandbytes
from dpoeng.engine.models.sources import ModelSource, find_adapter, find_model
from dpoeng.engine.recipes.inputs import Inputs
from dpoeng.engine.recipes.phase_two.mode import resolve_mode
from dpoeng.engine.reference.limits import check_positions, longest_text
from dpoeng.engine.reference.loading import KeptBase, load_policy_base
from dpoeng.engine.reference.parity import (
    ParityReport,
    compare_with_cache,
    parity_tolerance,
    same_precision,
    spread,
)
from dpoeng.engine.reference.trunk_choice import Wanted, choose_trunk, stored_states
from dpoeng.engine.runtime.distributed import Group
from dpoeng.engine.runtime.progress import Progress
from dpoeng.engine.scoring.passes import choose_how_to_score
from dpoeng.engine.training.layer_step import check_trained
from dpoeng.engine.training.rows import Rows


@dataclass(frozen=True, slots=True)
class Choice:
    """The policy that a run trains: as configured, otherwise the cache's reference.

    Attributes:
        model: the base.
        adapter_name: the SFT adapter of the reference, or None.
        adapter: its files.
        mode: how the trained weights relate to base and adapter.
        quantization: precision of the base.
        dtype: compute dtype.
        trunk: stored hidden states that the run begins from, or None.
    """

    model: str
    adapter_name: str | None
    adapter: ModelSource | None
    mode: Mode
    quantization: Quantization
    dtype: str
    trunk: TrunkIndex | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy, loaded and ready for its first step.

    Attributes:
        lm: the model, in training mode.
        source: the files of the base.
        device: device of this process.
        parity: the comparison with the cache.
        loaded: with `fsdp`: whether each process read only its share of the base, in words.
        predicted_bytes: simulated peak of a step; None if it was not simulated.
        pairs: pairs per forward.
    """

    lm: CausalLM
    source: ModelSource
    device: torch.device
    parity: ParityReport
    loaded: str
    predicted_bytes: int | None
    pairs: int


def choose_policy(config: TrainConfig, inputs: Inputs, group: Group, note: Callable[[str], None]) -> Choice:
    """Decides what is trained, and from which stored hidden states, before loading it.

    Raises:
        UserError: the policy is not available: no such adapter, a mode that does not fit it, or a missing library; or
            the run cannot begin from the trunk that it names.
    """
    reference = inputs.reference
    quantization = config.quantization or reference["quantization"]
    check_fsdp(config, group, quantization)
    require_bitsandbytes(quantization)
    if not config.optim.startswith("adamw_torch"):
        import_bitsandbytes(f"--optim {config.optim}", "use --optim adamw_torch")
    adapter_name = config.adapter or reference.get("adapter")
    adapter = find_adapter(adapter_name) if adapter_name else None
    mode = resolve_mode(config, has_adapter=bool(adapter_name))
    model = config.model or reference["model"]
    trunk = None
    if config.trunk_layer != 0:
        source = find_model(model, revision=reference.get("revision"))
        pairs = [*inputs.train_rows.pair_ids(), *inputs.split.held_out.pair_ids()]
        trunk = choose_trunk(Wanted(config, source, mode, adapter, reference, pairs), inputs.view.spec, note)
    return Choice(
        model=model,
        adapter_name=adapter_name,
        adapter=adapter,
        mode=mode,
        quantization=quantization,
        dtype=config.dtype or reference["dtype"],
        trunk=trunk,
    )


def load_policy(
    config: TrainConfig,
    inputs: Inputs,
    choice: Choice,
    group: Group,
    progress: Progress,
    kept_base: KeptBase | None,
    begun_with: int | None = None,
) -> Policy:
    """Loads the policy, makes it trainable and compares it with the cache.

    Args:
        config: config of the run.
        inputs: inputs of the run; the longest pairs decide whether a step fits into memory.
        choice: the result of `choose_policy`.
        group: the processes of the run; all get the first one's trained weights.
        progress: receives bars and notes.
        kept_base: keeps the base between the runs of a sweep.
        begun_with: pairs per forward of the run that this one resumes, or None.

    Raises:
        UserError: the policy cannot be loaded, would not fit into memory, or does not match the cache.
    """
    check_full(config, inputs.reference, quantization=choice.quantization)
    source = find_model(choice.model, revision=inputs.reference.get("revision"))
    device = own_device(config.device, group)
    refuse_attention_on_cpu(config, device)
    note_idle(config, group, progress)
    held_bytes = kept_base.n_bytes if kept_base is not None else 0
    checked = (config, inputs, choice, source, device, group, held_bytes, begun_with, progress.note)
    by_layer, forecast, pairs = _check_memory(*checked)
    load = kept_base.load if kept_base is not None else load_policy_base
    lm, loaded = _load_trainable(config, inputs, choice, group, progress, source, device, load, by_layer)
    if by_layer:
        check_trained(lm)
    if choice.mode != "full" and group.is_first:
        check_savable(lm)
    for remark in lm.remarks:
        progress.note(remark)
    parity = _compare(lm, config, inputs, choice.mode, progress)
    if config.checkpoints_on(device.type) and not by_layer:  # by_layer recomputes layers by itself
        _recompute_layers(lm, config, forecast, group, progress)
    set_mode(lm, training=True)
    return Policy(lm, source, device, parity, loaded, forecast.peak_bytes if forecast else None, pairs)


def _load_trainable(
    config: TrainConfig,
    inputs: Inputs,
    choice: Choice,
    group: Group,
    progress: Progress,
    source: ModelSource,
    device: torch.device,
    load: Callable[..., CausalLM],
    by_layer: bool,
) -> tuple[CausalLM, str]:
    """The policy, made trainable, and how its base was loaded, in words; empty if nothing is special about it."""
    whole = loads_whole_because(config, group, choice.quantization, source, choice.adapter) if config.fsdp else ""
    if whole:
        progress.note(f"each process loads the whole base into host memory before it is sharded: {whole}")
    in_parts = config.fsdp and not whole
    layers_later = in_parts and choice.quantization != "none"  # each is quantised whole, and divided at once
    n_bytes = sum(file.stat().st_size for file in source.weight_files)
    with progress.task("loading the base", n_bytes, "B") as advance:
        lm = load(
            config,
            inputs.reference,
            device,
            on_host=bool(whole),  # no card has the whole base, not even before sharding
            shard=layer_sharding(group, device, trained=choice.mode == "full") if in_parts != layers_later else None,
            by_layer=by_layer,
            layers_later=layers_later,
            trunk_layer=choice.trunk.layer if choice.trunk else None,
        )
        advance(n_bytes, "")
    loaded = f"whole by each process, then sharded: {whole}" if whole else ""
    if in_parts:
        loaded = "in parts, a layer at a time" if layers_later else "in parts"
    if choice.trunk is not None:
        lm.states = stored_states(choice.trunk, lm)
        loaded = f"from layer {choice.trunk.layer} on; its input is read from the cache"
        loaded += "; these layers one at a time" if by_layer else ""
    return _make_trainable(lm, config, choice, device, group, divide=bool(whole) or layers_later), loaded


def _recompute_layers(
    lm: CausalLM, config: TrainConfig, forecast: StepForecast | None, group: Group, progress: Progress
) -> None:
    """Recomputes layers in the backward pass: all, or as many as the forecast requires.

    All processes use the largest number that one needs, since they gather sharded layers together.
    """
    took = lm.attention if lm.layout == "shared" else None
    if forecast is not None and forecast.recompute is not None and took != forecast.attention:
        progress.note(
            f"recomputing all layers: the forecast was for {forecast.attention or 'separate'} attention, and this run "
            f"takes {took or 'separate prompts'}"
        )
        forecast = replace(forecast, recompute=None)
    counts = group.gather(forecast.recompute if forecast is not None else None)
    given_counts = [count for count in counts if count is not None]
    recompute = max(given_counts) if len(given_counts) == len(counts) else None
    if recompute is not None:
        progress.note(
            f"recomputing {recompute} of {counted(len(decoder_layers(lm.backbone)), 'layer')}: there is memory for "
            "the others' activations; --gradient-checkpointing recomputes all, with the same numbers"
        )
    enable_gradient_checkpointing(lm, inputs_on_host=config.activation_offloading, layers=recompute)


def _check_memory(
    config: TrainConfig,
    inputs: Inputs,
    choice: Choice,
    source: ModelSource,
    device: torch.device,
    group: Group,
    held_bytes: int,
    begun_with: int | None,
    note: Callable[[str], None],
) -> tuple[bool, StepForecast | None, int]:
    """Decides whether layers are loaded one at a time; also returns the forecast of a step and the pairs per forward.

    `held_bytes`: memory that already contains a kept base, which this run reuses.

    Raises:
        UserError: the device does not have enough memory.
    """
    configured = config.per_device_train_batch_size
    if config.fsdp and choice.mode == "full":  # the simulation shards only frozen layers
        return False, None, begun_with or configured
    by_layer, predicted = decide_step(
        config,
        source,
        choice.adapter,
        list(inputs.train_rows),
        device,
        quantization=choice.quantization,
        dtype=choice.dtype,
        shards=group.size if config.fsdp else 1,
        held_bytes=held_bytes,
        trunk_layer=choice.trunk.layer if choice.trunk else 0,
        processes=group.size,
        begun_with=begun_with,
        note=note,
    )
    # All processes must decide alike, even if some cards have less free memory.
    pairs = min(group.gather((predicted and predicted.pairs) or begun_with or configured))
    if pairs not in (configured, begun_with):
        note(
            f"{counted(pairs, 'pair')} in one forward, as this GPU's memory takes them; a step keeps its pairs. "
            f"--per-device-train-batch-size {configured} sets the usual number, with the same result up to rounding"
        )
    return any(group.gather(by_layer)), predicted, pairs


def _make_trainable(
    lm: CausalLM, config: TrainConfig, choice: Choice, device: torch.device, group: Group, *, divide: bool
) -> CausalLM:
    """Makes the base trainable, equally in all processes; `divide` if it was loaded whole for FSDP."""
    if divide and choice.mode == "full":
        shard_base(lm, group, device, trained=True)  # before make_trainable: each process trains its rows
    # Seed before the adapter is created: its start depends on the seed.
    torch.manual_seed(config.seed)
    lm = make_trainable(lm, config, choice.mode, choice.adapter)
    if divide and choice.mode != "full":
        shard_base(lm, group, device)  # after make_trainable: DoRA and saved modules start from whole weights
    # Every process drew the same start; copying removes differences between machines or libraries. Masters come after
    # that, since they are float32 copies of these weights.
    group.copy_first([parameter.data for parameter in whole_parameters(lm)])
    lm.take_masters()
    return lm


def _compare(lm: CausalLM, config: TrainConfig, inputs: Inputs, mode: Mode, progress: Progress) -> ParityReport:
    """Chooses the layout, compares the policy with the cache, then loads the weights to start from."""
    set_mode(lm, training=False)
    sample = min(config.parity_pairs, len(inputs.train_rows))
    with as_reference(lm, mode):
        texts = inputs.train_rows.pair_ids()
        check_positions(texts, lm)  # imported values were not checked against this model
        ranked = inputs.view.rows == "ranked"
        choose_how_to_score(lm, config.layout, config.attention, longest_text(texts), texts, ranked=ranked)
        with progress.task("comparing the policy with the cache", sample, "pairs") as advance:
            parity = check_parity(config, lm, inputs.train_rows)
            advance(sample, "")
    progress.note(parity_text(parity))
    if config.init_adapter is not None:  # only now: the policy was compared as the reference
        begin_with(lm, find_adapter(config.init_adapter))
        progress.note(f"the policy begins with the weights of {config.init_adapter}, not as the reference")
    return parity


def note_idle(config: TrainConfig, group: Group, progress: Progress) -> None:
    """Adds a note if processes are idle because a step has fewer forwards than there are processes.

    The batch does not grow with the number of processes.
    """
    forwards, size = config.gradient_accumulation_steps, config.per_device_train_batch_size
    if forwards < group.size:
        progress.note(
            f"a step has {counted(forwards, 'forward')} of {counted(size, 'pair')} for {group.size} processes, so some "
            f"are idle: the batch of a step ({counted(forwards * size, 'pair')}) does not grow with the processes; "
            f"use --gradient-accumulation-steps {group.size} or more, or a smaller "
            "--per-device-train-batch-size"
        )


def own_device(name: str, group: Group) -> torch.device:
    """The device of this process; if it is a GPU, makes it torch's current one.

    `name` is the option: `auto`, `cpu`, `cuda` or one of several GPUs.

    Raises:
        UserError: another process of the group has the same GPU, which NCCL refuses.
    """
    device = pick_device(name, group.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        refuse_shared_gpu(group, f"{socket.gethostname()}, GPU {torch.cuda.get_device_properties(device).uuid}")
    return device


def refuse_shared_gpu(group: Group, gpu: str) -> None:
    """Raises UserError in every process if two of them share a GPU."""
    everyones = group.gather(gpu)
    for rank, other in enumerate(everyones):
        if other in everyones[:rank]:
            raise UserError(
                "two processes of this run share a GPU",
                code="ranks-one-gpu",
                where=f"ranks {everyones.index(other)} and {rank}",
                expected="one GPU for each process",
                found=other,
                remedy="start no more processes on a machine than it has GPUs (--nproc-per-node), without --device",
                exit_status=5,
            )


def refuse_attention_on_cpu(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError if the CPU lacks the backward pass that training needs, or even the forward."""
    if config.attention == "varlen" and config.layout != "separate" and device.type == "cpu":
        raise UserError(
            "training through FlashAttention needs a GPU: it has no backward pass on a CPU",
            code="attention-unsupported",
            where="--attention varlen",
            expected="a GPU",
            found=device_name(device),
            remedy="leave --attention out",
            exit_status=5,
        )


def check_parity(config: TrainConfig, lm: CausalLM, rows: Rows) -> ParityReport:
    """Compares the policy, acting as the reference, with the cache on pairs spread over the rows.

    Raises:
        UserError: they differ by more than rounding.
    """
    reference = rows.view.meta["reference"]
    sample = spread(rows.indices, config.parity_pairs)
    precision = reference["quantization"], reference["dtype"]
    report = compare_with_cache(
        lm,
        rows.view,
        sample,
        beta=config.beta,
        batch_tokens=reference["batch_tokens"],
        tolerance=config.parity_tolerance or parity_tolerance(lm, *precision),
        measures_noise=config.parity_tolerance is None and same_precision(lm, *precision),
    )
    if not report.ok:
        raise UserError(
            "the policy does not match the cached reference",
            code="parity-failed",
            where=f"{counted(report.pairs, 'pair')}, {counted(report.tokens, 'token')}, scored without the new adapter",
            expected=f"mean difference per token <= {report.tolerance:g} nats{noise_text(report)}",
            found=f"mean {report.mean_diff:.4g}, largest {report.max_diff:.4g} nats; as reward noise "
            f"{report.reward_noise:.3g} at beta {config.beta:g}",
            remedy="train with the model, adapter and precision that the cache names (leave out --model, --adapter, "
            "--dtype and --quantization), or run precompute-ref for this model",
            exit_status=4,
        )
    return report


def parity_text(report: ParityReport) -> str:
    """The result of the comparison in one line."""
    return (
        f"the policy matches the cache on {counted(report.pairs, 'pair')}: mean difference {report.mean_diff:.2g}, "
        f"largest {report.max_diff:.2g} nats per token; reward noise {report.reward_noise:.2g}"
        + (f"; allowed: {report.tolerance:.2g}{noise_text(report)}" if report.noise is not None else "")
    )


def noise_text(report: ParityReport) -> str:
    """The measured noise behind a tolerance; empty if none was measured."""
    return "" if report.noise is None else f" (each pair alone differs from packed ones by {report.noise:.2g})"

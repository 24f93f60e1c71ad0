"""Predicts before loading whether a phase fits into memory, and compares afterwards.

It makes the same prediction as `dpoeng plan`, for the actual pairs and device.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds, ScoredRow, lengths_of
from dpoeng.cache.words import GIB, counted
from dpoeng.engine.config.fields import Attention, PrecomputeConfig, Quantization, TrainConfig
from dpoeng.engine.memory.any_depth import Memory, forward_memory, step_memory
from dpoeng.engine.memory.overhead import estimate_overhead, needed_bytes
from dpoeng.engine.memory.simulate import Pair, Setup
from dpoeng.engine.memory.tracker import SAVED, Peak
from dpoeng.engine.models.loading import gpu_multiplies_bf16, layer_period, resolve_dtype
from dpoeng.engine.models.model_config import config_of, sizes
from dpoeng.engine.models.sources import ModelSource, read_fields
from dpoeng.engine.models.trunk.layers import chosen_layers
from dpoeng.engine.runtime.host import available_memory
from dpoeng.engine.runtime.out_of_memory import release_memory

Forecast = TypeVar("Forecast")

Note = Callable[[str], None]
"""Receives messages for the user."""


@dataclass(frozen=True, slots=True)
class StepForecast:
    """Predicted memory of a step of phase two.

    Attributes:
        peak_bytes: the predicted peak of tensors.
        recompute: how many of the first layers to recompute in the backward pass; None: as configured.
        pairs: pairs per forward; None: as configured.
        attention: with `recompute`: the attention that this is for. None over separate prompts.
    """

    peak_bytes: int
    recompute: int | None = None
    pairs: int | None = None
    attention: Attention | None = None


def ignore(_: str) -> None:
    """Ignore the message."""


def available_bytes(device: torch.device) -> int:
    """Memory available now: on the GPU, or on this machine within its container's limit."""
    if device.type == "cuda":
        release_memory()  # what torch keeps of an earlier phase or run is taken by this one
        return int(torch.cuda.mem_get_info(device)[0])
    host = available_memory()
    return host if host is not None else sys.maxsize  # an unknown limit must not refuse a run


def check_step(
    config: TrainConfig,
    source: ModelSource,
    pairs: Iterable[PairIds | ScoredRow],
    device: torch.device,
    *,
    quantization: Quantization,
    dtype: str,
    shards: int = 1,
    held_bytes: int = 0,
    trunk_layer: int = 0,
    by_layer: bool = False,
    advises: bool = True,
    note: Note = ignore,
) -> StepForecast | None:
    """Raises if phase two's longest pairs would not fit; `held_bytes`: memory in use that this run will reuse.

    With `shards` above 1 the frozen layers are sharded over that many processes, each with its own device. On a GPU
    with memory to spare only some layers are recomputed, unless `gradient_checkpointing` was set. With `trunk_layer`
    the model begins at that layer; with `by_layer` layers are loaded one at a time. Without `advises`, the error does
    not suggest a batch that fits.

    Returns:
        the forecast; None if everything obviously fits, or if it cannot be predicted, which `note` reports.

    Raises:
        UserError: it would not fit.
    """
    return _advised(
        note,
        lambda: _check_step(
            config,
            source,
            _longest(pairs),
            device,
            quantization,
            dtype,
            shards=shards,
            held_bytes=held_bytes,
            trunk_layer=trunk_layer,
            by_layer=by_layer,
            advises=advises,
        ),
    )


def check_forward(
    config: PrecomputeConfig,
    source: ModelSource,
    pairs: Iterable[PairIds | ScoredRow],
    device: torch.device,
    *,
    by_layer: bool = False,
    note: Note = ignore,
) -> int | None:
    """The same for phase one, whose longest pairs come first."""
    return _advised(note, lambda: _check_forward(config, source, _longest(pairs), device, by_layer))


def _advised(note: Note, predict: Callable[[], Forecast | None]) -> Forecast | None:
    """Makes a forecast, which is advice: it may refuse a run that does not fit, but its failure must not end one."""
    try:
        return predict()
    except UserError as error:
        if error.code == "memory-short":
            raise
        why = f"{error.message} ({error.found})" if error.found else error.message
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    note(f"no memory forecast for this run: {why}")
    return None


def _check_step(
    config: TrainConfig,
    source: ModelSource,
    ordered: Iterator[Pair],
    device: torch.device,
    quantization: Quantization,
    dtype: str,
    *,
    shards: int,
    held_bytes: int,
    trunk_layer: int,
    by_layer: bool,
    advises: bool,
) -> StepForecast | None:
    longest = list(islice(ordered, config.per_device_train_batch_size))
    if _is_small(source, longest, device, not config.use_peft):
        return None
    setup = _setup(config, source, device, quantization, dtype, config.checkpoints_on(device.type))
    setup = from_trunk(replace(setup, shards=shards, by_layer=by_layer), trunk_layer)
    memory = step_memory(setup, longest)
    peak = memory.peak
    room = available_bytes(device) + held_bytes
    if _needed(peak, device) > room:
        fewer = [n for n in (1, 2, 4) if advises and n < len(longest)]
        fits = [n for n in fewer if _needed(step_memory(setup, longest[:n]).peak, device) <= room]
        changes = (
            [f"--per-device-train-batch-size {fits[-1]} (with more --gradient-accumulation-steps)"] if fits else []
        )
        changes += [] if config.checkpoints_on(device.type) else ["--gradient-checkpointing"]
        if not config.use_peft:
            changes += [] if "8bit" in config.optim else ["--optim adamw_8bit (or adamw_torch_fused)"]
            changes += ["a LoRA, without --no-use-peft"]
        if config.use_peft and shards == 1:
            changes += _less_of_the_base(config, by_layer=by_layer, trunk_layer=trunk_layer)
        if not changes:
            changes = ["phase one again with fewer bits (--quantization) or a shorter --max-length", "a larger device"]
        raise _no_room("phase two", peak, _needed(peak, device), room, longest, changes)
    chooses = config.gradient_checkpointing is None and not config.activation_offloading and not by_layer
    if device.type == "cuda" and chooses:
        return _with_fewest_recomputed(setup, longest, memory, room, device)
    return StepForecast(peak.n_bytes)


def _less_of_the_base(config: TrainConfig, *, by_layer: bool, trunk_layer: int) -> list[str]:
    """Changes that leave less of the frozen base, or of the trained part, in memory."""
    found = ["--layer-offloading auto"] if config.layer_offloading == "off" else []
    if by_layer:  # then the trained part is most of the rest
        found += [] if "8bit" in config.optim else ["--optim adamw_8bit"]
        found += ["a smaller --lora-r"]
    trunk = "--train-last-layers with a trunk (precompute-ref --trunk-layer), which trains the upper layers alone"
    return found + ([] if trunk_layer else [trunk])


def _with_fewest_recomputed(
    setup: Setup, pairs: Sequence[Pair], recomputing: Memory, room: int, device: torch.device
) -> StepForecast:
    """Recomputes as few layers as memory allows: each costs another forward in every step.

    A layer that is not recomputed adds the difference of the two simulations per layer, taken where it is largest. That
    is an upper bound, since the last layers have freed theirs when the first are recomputed.
    """
    period = layer_period(setup.model)
    if period is None:
        return StepForecast(recomputing.peak.n_bytes)
    never = replace(setup, config=setup.config.model_copy(update={"gradient_checkpointing": False}))
    keeping = step_memory(never, pairs).stretches
    differences = [keeping[place].n_bytes - peak.n_bytes for place, peak in recomputing.stretches.items()]
    layers = setup.layers
    layer_bytes = max(0, -(-max(differences) // layers))
    peak = recomputing.peak
    for recompute in range(0, layers, period):
        more = (layers - recompute) * layer_bytes
        kinds = {**peak.by_kind, SAVED: peak.by_kind.get(SAVED, 0) + more}
        if _needed(Peak(peak.n_bytes + more, kinds), device) <= room:
            return StepForecast(peak.n_bytes + more, recompute, attention=recomputing.attention)
    return StepForecast(peak.n_bytes, layers)


def from_trunk(setup: Setup, layer: int) -> Setup:
    """The setup from a trunk at a layer; if all layers from there on are trained, they are equal to each other."""
    if not layer:
        return setup
    chosen = chosen_layers(setup.config, setup.layers)
    everything = {"layers_to_transform": None, "train_last_layers": None}
    all_trained = chosen is None or len(chosen) == setup.layers - layer
    config = setup.config.model_copy(update=everything) if all_trained else setup.config
    return replace(setup, config=config, trunk_layer=layer)


def _check_forward(
    config: PrecomputeConfig, source: ModelSource, ordered: Iterator[Pair], device: torch.device, by_layer: bool
) -> int | None:
    longest: list[Pair] = []
    tokens = 0
    for pair in ordered:
        if longest and tokens + pair.tokens > (config.batch_tokens or 0):
            break
        longest.append(pair)
        tokens += pair.tokens
    if _is_small(source, longest, device):
        return None
    like = TrainConfig.model_validate({"layout": config.layout, "attention": config.attention})
    setup = _setup(like, source, device, config.quantization, config.dtype, False)
    setup = replace(setup, by_layer=by_layer)
    peak = forward_memory(setup, longest, policy=config.adapter is not None).peak
    room = available_bytes(device)
    if _needed(peak, device) > room:
        fewer = ["--batch-tokens with a smaller number"] if len(longest) > 1 else []
        off = ["--layer-offloading auto"] if config.layer_offloading == "off" else []
        changes = [*fewer, *off, "--quantization 8bit or 4bit", "a shorter --max-length"]
        raise _no_room("phase one", peak, _needed(peak, device), room, longest, changes)
    return peak.n_bytes


def _setup(
    config: TrainConfig,
    source: ModelSource,
    device: torch.device,
    quantization: Quantization,
    dtype: str,
    checkpointing: bool,
) -> Setup:
    compute = resolve_dtype(source, dtype, device)
    on_gpu_in_half = device.type == "cuda" and compute == torch.float16  # bfloat16 is refused before Ampere
    return Setup(
        model=read_fields(source),
        dtype=compute,
        quantization=quantization,
        config=config.model_copy(update={"gradient_checkpointing": checkpointing}),
        layout="separate" if config.layout == "separate" else "shared",
        kernels="cuda" if device.type == "cuda" else "cpu",
        ampere=not on_gpu_in_half or gpu_multiplies_bf16(device),
        accumulates=config.gradient_accumulation_steps > 1,
    )


def _longest(rows: Iterable[PairIds | ScoredRow]) -> Iterator[Pair]:
    """All rows, the longest first, lazily: only one batch of them is read."""
    lengths, ends, sums = array("i"), array("q", [0]), array("q")
    for row in rows:
        counts = lengths_of(row)
        lengths.extend(counts)
        ends.append(len(lengths))
        sums.append(sum(counts))
    for i in np.argsort(-np.asarray(sums), kind="stable").tolist():
        prompt, chosen, rejected, *more = lengths[ends[i] : ends[i + 1]]
        yield Pair(prompt, chosen, rejected, tuple(more))


def _is_small(source: ModelSource, pairs: Sequence[Pair], device: torch.device, full: bool = False) -> bool:
    """Whether an upper bound leaves half of the machine free; the sizes of a GGUF are not known here."""
    if source.gguf or not (source.folder / "config.json").is_file():
        return True
    if device.type == "cuda":
        return False  # on a GPU the prediction is also compared with the allocation afterwards
    model = sizes(config_of(read_fields(source)))
    tokens = sum(pair.prompt * (len(pair.responses) - 1) + pair.tokens for pair in pairs)
    # From 16-bit files, full fine-tuning takes 18 bytes per weight, plus temporaries.
    weights = (12 if full else 3) * sum(path.stat().st_size for path in source.weight_files)
    activations = 4 * tokens * (model.layers * (24 * model.hidden + 10 * model.inner) + model.vocabulary)
    return 2 * (weights + activations) < available_bytes(device)


def _needed(peak: Peak, device: torch.device) -> int:
    estimates = estimate_overhead()
    if device.type == "cuda":  # mem_get_info already excludes this process's context
        return needed_bytes(peak, {name: n for name, n in estimates.items() if name != "CUDA context"})
    return needed_bytes(peak, {})


def _no_room(
    phase: str, peak: Peak, needed: int, room: int, pairs: Sequence[Pair], changes: Sequence[str]
) -> UserError:
    parts = ", ".join(f"{kind} {n / GIB:.2f}" for kind, n in sorted(peak.by_kind.items(), key=lambda i: -i[1]))
    tokens = max(pair.tokens for pair in pairs)
    return UserError(
        f"{phase} does not fit into the free memory",
        code="memory-short",
        where=f"{counted(len(pairs), 'pair')} in one forward, the longest of {tokens} tokens",
        expected=f"{needed / GIB:.2f} GiB free (simulated, GiB: {parts}; with workspaces and fragmentation)",
        found=f"{room / GIB:.2f} GiB",
        remedy="use " + ", or ".join(changes) + "; `dpoeng plan` shows the saving of each change",
        exit_status=5,
    )

"""Plans a run before you download or rent anything: memory by simulation, time by arithmetic.

Memory comes from running the real forward and step without a device (`memory.simulate`), plus named estimates for what
the simulation cannot see. Nothing here was measured on the requested card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import GIB
from dpoeng.engine.config.fields import Attention
from dpoeng.engine.config.plan import PlanConfig
from dpoeng.engine.memory.any_depth import Memory, forward_memory, step_memory
from dpoeng.engine.memory.cards import Gpu, PhaseTime, Roads, beside_loading, find_gpu, layer_bytes, phase_times
from dpoeng.engine.memory.overhead import (
    FRAGMENTATION,
    count_parameters,
    estimate_overhead,
    model_fields,
    needed_bytes,
)
from dpoeng.engine.memory.simulate import Pair, Setup
from dpoeng.engine.memory.tracker import Peak
from dpoeng.engine.memory.ways import Way, find_ways
from dpoeng.engine.models.loading import stored_whole
from dpoeng.engine.models.model import DTYPES
from dpoeng.engine.models.model_config import config_of, sizes
from dpoeng.engine.models.sources import quantization_record, read_format
from dpoeng.engine.models.trunk.layers import trunk_layer
from dpoeng.engine.runtime.distributed import BUCKET_BYTES

BATCH_TOKENS = (16384, 4096, 1024)


@dataclass(frozen=True, slots=True)
class Option:
    """A changed setting, and phase two's peak with it."""

    name: str
    peak: Peak

    @property
    def peak_bytes(self) -> int:
        """The peak of tensors."""
        return self.peak.n_bytes


@dataclass(slots=True)
class CardPlan:
    """The plan for one card: whether each phase fits, and with which settings.

    Attributes:
        gpu: the card.
        phase1_fits: whether phase one fits, with `batch_tokens` positions per forward.
        phase2_fits: whether phase two fits, with `way` and `micro_batch` pairs per forward.
        batch_tokens: positions per forward of phase one.
        micro_batch: pairs per forward of phase two.
        way: the first way that fits; if none does, the one that needs the least memory.
        by_layer: for each phase, whether layers are loaded one at a time.
        needed_bytes: memory of each phase, with estimates and fragmentation.
        times: times of both phases, and of their alternatives.
    """

    gpu: Gpu
    phase1_fits: bool
    phase2_fits: bool
    batch_tokens: int
    micro_batch: int
    way: Way
    by_layer: tuple[bool, bool]
    needed_bytes: tuple[int, int]
    times: list[PhaseTime] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether both phases fit."""
        return self.phase1_fits and self.phase2_fits


@dataclass(slots=True)
class Plan:
    """The whole plan. Peaks are of tensors; `estimates` come on top of each.

    Attributes:
        request: the request.
        parameters: parameters of the base.
        phase1: `batch_tokens` -> memory of one forward of the reference.
        phase2: pairs per forward -> memory of one optimizer step.
        evaluation: memory of a forward of the evaluation or the parity check, with one pair.
        two_models: memory of a step with a reference model next to the policy and whole logits; None if not requested.
        estimates: memory that the simulation cannot see, bytes by name.
        options: other settings and their peaks.
        cards: one plan per card.
        phase1_by_layer: like `phase1`, with layers loaded one at a time; empty if not requested or needed.
        ways: phase two in the ways that were tried, the fastest first.
        trunk_layer: the requested first layer of phase two; 0 for all layers.
        trunk_bytes: disk space for the hidden states of all pairs, for any trunk.
        tokens: computed for a row, with its prompt once, and with a separate row for each response.
    """

    request: PlanConfig
    parameters: int
    phase1: dict[int, Memory]
    phase2: dict[int, Memory]
    evaluation: Memory
    two_models: Memory | None
    estimates: dict[str, int]
    options: list[Option]
    cards: list[CardPlan]
    phase1_by_layer: dict[int, Memory] = field(default_factory=dict)
    ways: list[Way] = field(default_factory=list)
    trunk_layer: int = 0
    trunk_bytes: int = 0
    tokens: tuple[int, int] = (0, 0)

    @property
    def step(self) -> Peak:
        """The step with one pair per forward: the minimum for phase two."""
        return self.phase2[1].peak

    def needed(self, peak: Peak) -> int:
        """A peak of tensors plus everything on top of it."""
        return needed_bytes(peak, self.estimates)


# --------------------------------------------------------------------------- the plan


def make_plan(request: PlanConfig) -> Plan:
    """Simulates both phases and decides what fits where.

    Raises:
        UserError: the model is unknown, or cannot be built.
    """
    fields = model_fields(request.model)
    request = with_stored(request, fields)
    cards = [find_gpu(name) for name in request.gpu]
    setup = Setup(
        model=fields,
        dtype=DTYPES["bfloat16" if request.dtype == "auto" else request.dtype],
        quantization=request.quantization,
        config=request.train_config(),
        layout=request.layout,
        accumulates=request.batch > 1,
        shards=request.gpus if request.fsdp else 1,
    )
    if request.trunk_layer is not None:
        setup = replace(setup, trunk_layer=trunk_layer(request.trunk_layer, setup.layers))
    answers = request.max_length - request.prompt_length
    pair = Pair(request.prompt_length, answers, answers, (answers,) * (request.responses - 2))
    estimates, parts = estimate_overhead(), count_parameters(fields)
    if request.gpus > 1:
        estimates["gradients of all cards"] = BUCKET_BYTES
    # Phase one has the whole base on every card.
    bits = request.reference_quantization or request.quantization
    reference = replace(setup, quantization=bits, shards=1, trunk_layer=0)
    rooms = {card.name: partial(_has_room, card.n_bytes, estimates) for card in cards}
    found = find_ways(request, setup, pair, rooms)
    as_asked = found[0] if not found[0].by_layer else None
    steps = dict(as_asked.steps) if as_asked else {1: step_memory(setup, [pair])}
    plan = Plan(
        request=request,
        parameters=sum(parts.values()),
        phase1=_by_tokens(reference, pair),
        phase2=steps,
        evaluation=as_asked.evaluation if as_asked else forward_memory(setup, [pair], policy=True),
        two_models=step_memory(_two_models(setup), [pair]) if request.compare else None,
        estimates=estimates,
        options=_options(setup, pair, steps[min(steps)].attention) if request.compare else [],
        cards=[],
        ways=found,
        trunk_layer=setup.trunk_layer,
        trunk_bytes=_trunk_bytes(request, setup, pair),
        tokens=(pair_tokens(pair, "shared"), pair_tokens(pair, "separate")),
    )
    least = plan.needed(plan.phase1[min(plan.phase1)].peak)
    able = request.use_peft and not request.fsdp and request.layer_offloading != "off"
    if able and (request.layer_offloading == "on" or any(least > card.n_bytes for card in cards)):
        plan.phase1_by_layer = _by_tokens(replace(reference, by_layer=True), pair)
    plan.cards = [_card(plan, pair, parts, gpu, rooms[gpu.name]) for gpu in cards]
    return plan


def _has_room(n_bytes: int, estimates: Mapping[str, int], memory: Memory) -> bool:
    return needed_bytes(memory.peak, estimates) <= n_bytes


def with_stored(request: PlanConfig, fields: Mapping[str, Any]) -> PlanConfig:
    """The request for a model whose files are quantised already: they are loaded as they are.

    Raises:
        UserError: the request differs, or dpoeng does not support their quantisation.
    """
    record = quantization_record(fields)
    if record is None:
        return request
    held = {"quantization": "8bit" if record.get("load_in_8bit") else "4bit"}
    if record.get("quant_method") != "bitsandbytes":
        read_format(request.model, "--model", record)
        held = {"quantization": "stored", "layer_offloading": "off"}
        if request.layer_offloading == "on":
            raise stored_whole(request.model, "--layer-offloading on")
    fields_set = request.model_fields_set & {"quantization", "reference_quantization"}
    asked = next(
        (value for name in fields_set if (value := getattr(request, name)) not in (None, *held.values())), None
    )
    if asked is not None and not Path(request.model).exists():
        return request  # a known name: somebody may have the same model in full precision
    if asked is not None:
        raise UserError(
            f"{request.model} is already quantised in another way",
            code="quantization-stored",
            where="--quantization",
            expected=f"{held['quantization']}, as its config.json says, or nothing",
            found=asked,
            remedy=("leave the option out" if request.use_peft else "train a LoRA")
            + ", or name the full-precision model with --model",
        )
    return request.model_copy(update=held)


def _by_tokens(setup: Setup, pair: Pair) -> dict[int, Memory]:
    """Positions per forward -> memory of a forward of phase one."""
    tokens = pair_tokens(pair, setup.layout)
    counts = sorted({max(1, budget // tokens) for budget in BATCH_TOKENS})
    return {count * tokens: forward_memory(setup, [pair] * count, policy=False) for count in counts}


def _trunk_bytes(request: PlanConfig, setup: Setup, pair: Pair) -> int:
    """Bytes of the hidden states of all pairs, each with its own prompt."""
    tokens = request.pairs * pair.tokens
    return tokens * sizes(config_of(setup.model)).hidden * setup.dtype.itemsize


def pair_tokens(pair: Pair, layout: str) -> int:
    """Positions to compute for a row."""
    return pair.tokens + (0 if layout == "shared" else pair.prompt * (len(pair.responses) - 1))


def _two_models(setup: Setup) -> Setup:
    return replace(setup, second_model=True, full_logits=True, stock=True, layout="separate", trunk_layer=0)


def _options(setup: Setup, pair: Pair, attention: Attention | None) -> list[Option]:
    """Phase two with one pair per forward and one changed setting."""
    config = setup.config
    half = Pair(max(1, pair.prompt // 2), pair.chosen // 2, pair.rejected // 2, tuple(n // 2 for n in pair.more))
    changes: list[tuple[str, Setup, Pair]] = [
        (f"quantization {name}", replace(setup, quantization=name), pair)
        for name in ("none", "8bit", "4bit")
        if name != setup.quantization and config.use_peft and setup.quantization != "stored"
    ]
    as_lora = config.model_copy(update={"use_peft": True})
    without = replace(setup, config=config.model_copy(update={"gradient_checkpointing": False}))
    in_segments = config.model_copy(update={"attention": "segments"})
    offloading = config.model_copy(update={"gradient_checkpointing": True, "activation_offloading": True})
    changes += [
        *([] if setup.shards == 1 else [("without fsdp", replace(setup, shards=1), pair)]),
        *([] if config.use_peft else [("a LoRA", replace(setup, config=as_lora), pair)]),
        ("half of max_length", setup, half),
        *(
            (f"optim {name}", replace(setup, config=config.model_copy(update={"optim": name})), pair)
            for name in ("adamw_torch_fused", "adamw_8bit")
            if name != config.optim and (name != "adamw_torch_fused" or not config.use_peft)
        ),
        ("activation_offloading", replace(setup, config=offloading), pair),
        *(
            [("attention segments, if a card refuses FlashAttention", replace(setup, config=in_segments), pair)]
            if attention == "varlen"
            else []
        ),
        ("without gradient checkpointing", without, pair),
        ("whole logits", replace(setup, full_logits=True), pair),
    ]
    return [
        *(Option(name, step_memory(changed, [some]).peak) for name, changed, some in changes),
        *_trunk_option(setup, pair),
    ]


def _trunk_option(setup: Setup, pair: Pair) -> list[Option]:
    """Training only the upper third, from a trunk; empty if the architecture's layers have no numbers."""
    layer = 2 * setup.layers // 3
    if setup.trunk_layer or not layer or not setup.config.use_peft or setup.shards > 1:
        return []
    try:
        peak = step_memory(replace(setup, trunk_layer=layer), [pair]).peak
    except UserError:
        return []
    return [Option(f"trunk_layer {layer}, the upper third trained", peak)]


def _card(plan: Plan, pair: Pair, parts: Mapping[str, int], gpu: Gpu, has_room: Callable[[Memory], bool]) -> CardPlan:
    way = next((way for way in plan.ways if way.fitting(has_room)), None)
    micro = way.fitting(has_room) if way else []
    if way is None:
        way = min(plan.ways, key=lambda way: plan.needed(way.steps[1].peak))
    micro_batch = max(micro, default=1)
    tokens = [n for n, memory in plan.phase1.items() if has_room(memory)]
    one = bool(plan.phase1_by_layer) and (not tokens or plan.request.layer_offloading == "on")
    phase1 = plan.phase1_by_layer if one else plan.phase1
    tokens = [n for n, memory in phase1.items() if has_room(memory)]
    # Phase two's parity check scores batches of phase one's size; they should not determine phase two's memory.
    quiet = [n for n in tokens if phase1[n].peak.n_bytes <= way.steps[micro_batch].peak.n_bytes]
    batch_tokens = max(quiet, default=min(phase1))
    return CardPlan(
        gpu=gpu,
        phase1_fits=bool(tokens),
        phase2_fits=bool(micro),
        batch_tokens=batch_tokens,
        micro_batch=micro_batch,
        way=way,
        by_layer=(one, way.by_layer),
        needed_bytes=(plan.needed(phase1[batch_tokens].peak), plan.needed(way.steps[micro_batch].peak)),
        times=_times(plan, way, pair, parts, gpu, one),
    )


def _times(
    plan: Plan, way: Way, pair: Pair, parts: Mapping[str, int], gpu: Gpu, phase1_by_layer: bool
) -> list[PhaseTime]:
    request, setup = plan.request, way.setup
    share = setup.layers / (setup.layers + setup.trunk_layer)
    one, two, *others = phase_times(
        parts,
        setup.model,
        pair=(pair.prompt, *pair.responses),
        pairs=request.pairs,
        epochs=request.epochs,
        checkpointing=bool(setup.config.gradient_checkpointing) or way.by_layer,
        full=not setup.config.use_peft,
        shared=request.layout == "shared",
        gpu=gpu,
        gpus=request.gpus,
        utilisation=request.utilisation,
        share=share,
    )
    roads = Roads(request.load_gb_per_s, request.disk_gb_per_s, (request.host_gib - request.offload_gib) * GIB)
    # What waits on the host for its next layer: all positions of all pairs, once.
    waiting = request.pairs * pair_tokens(pair, request.layout) * 2 * sizes(config_of(setup.model)).hidden
    if phase1_by_layer:
        passes = math.ceil(waiting / (request.offload_gib * GIB))
        n_bytes = layer_bytes(parts, request.reference_quantization or request.quantization)
        states = 2.0 * (setup.layers + setup.trunk_layer) * waiting  # each layer's states are copied out and back
        one = beside_loading(one, roads.from_files(n_bytes, passes) + roads.over_bus(states))
    seconds = roads.from_files(plan.trunk_bytes, request.epochs) if setup.trunk_layer else 0.0
    if way.by_layer:
        steps = math.ceil(request.epochs * request.pairs / request.batch)
        held = share * layer_bytes(parts, request.quantization)
        # There, and back for the next layer and again for the backward, whose gradients go there and come back.
        states = request.epochs * 5 * setup.layers * waiting
        seconds += roads.from_files(held, 2 * steps) + roads.over_bus(states)
    return [one, beside_loading(two, seconds), *others]


# --------------------------------------------------------------------------- for scripts


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan for scripts; top-level fields describe the first card."""
    first = plan.cards[0]
    return {
        "calculated": True,
        "model": plan.request.model,
        "parameters": plan.parameters,
        "fits": first.fits,
        "tokens": {"prompt_once": plan.tokens[0], "a_row_for_each_response": plan.tokens[1]},
        "estimates_gib": {name: _gib(n) for name, n in plan.estimates.items()},
        "fragmentation": FRAGMENTATION,
        **({"trunk": {"layer": plan.trunk_layer, "gib": _gib(plan.trunk_bytes)}} if plan.trunk_layer else {}),
        "phase1": {
            "fits": first.phase1_fits,
            **_peak_json(plan, _of_card(plan, first)[0]),
            "batch_tokens": first.batch_tokens,
        },
        "phase2": {
            "fits": first.phase2_fits,
            **_peak_json(plan, plan.step),
            "stretches_gib": {name: _gib(peak.n_bytes) for name, peak in plan.phase2[1].stretches.items()},
            "evaluation_peak_gib": _gib(plan.evaluation.peak.n_bytes),
            "peak_gib_by_micro_batch": {str(n): _gib(memory.peak.n_bytes) for n, memory in plan.phase2.items()},
            "two_model_peak_gib": _gib(plan.two_models.peak.n_bytes) if plan.two_models else None,
            "options_gib": {option.name: _gib(option.peak_bytes) for option in plan.options},
            "suggested": suggested(plan, first),
            "suggested_peak_gib": _gib(_of_card(plan, first)[1].n_bytes),
        },
        "cards": [_card_json(plan, card) for card in plan.cards],
    }


def _of_card(plan: Plan, card: CardPlan) -> tuple[Peak, Peak]:
    """Both phases' peaks in the mode that a card uses."""
    phase1 = plan.phase1_by_layer if card.by_layer[0] else plan.phase1
    return phase1[card.batch_tokens].peak, card.way.steps[card.micro_batch].peak


def _gib(n_bytes: int) -> float:
    return round(n_bytes / GIB, 3)


def _peak_json(plan: Plan, peak: Peak) -> dict[str, Any]:
    return {
        "peak_gib": _gib(peak.n_bytes),
        "needed_gib": _gib(plan.needed(peak)),
        "breakdown_gib": {kind: _gib(n) for kind, n in sorted(peak.by_kind.items(), key=lambda item: -item[1])},
    }


def _card_json(plan: Plan, card: CardPlan) -> dict[str, Any]:
    price = plan.request.price_per_hour
    return {
        "name": card.gpu.name,
        "gib": _gib(card.gpu.n_bytes),
        "fits": card.fits,
        "phase1_fits": card.phase1_fits,
        "phase2_fits": card.phase2_fits,
        "layer_offloading": {"phase1": card.by_layer[0], "phase2": card.by_layer[1]},
        "changes": dict(card.way.changes),
        "needed_gib": {"phase1": _gib(card.needed_bytes[0]), "phase2": _gib(card.needed_bytes[1])},
        "suggested": suggested(plan, card),
        "time": [
            {
                "phase": time.name,
                "pflop": round(time.flops / 1e15, 3),
                "hours": None if time.hours is None else float(f"{time.hours:.3g}"),
                "cost": None
                if time.hours is None or price is None
                else round(plan.request.gpus * time.hours * price, 2),
            }
            for time in card.times
        ],
    }


def _trunk_fields(plan: Plan) -> dict[str, Any]:
    if not plan.trunk_layer:
        return {}
    depth = sizes(config_of(model_fields(plan.request.model))).layers
    return {"trunk_layer": plan.trunk_layer, "train_last_layers": depth - plan.trunk_layer}


def suggested(plan: Plan, card: CardPlan) -> dict[str, Any]:
    """Fields of dpoeng.yaml for a card, with the requested number of pairs per step."""
    request = plan.request
    micro = min(card.micro_batch, max(1, request.batch // request.gpus))  # one forward per card
    return {
        **({} if request.use_peft else {"use_peft": False}),
        **({"fsdp": True} if request.fsdp else {}),
        **({"layer_offloading": "on"} if any(card.by_layer) else {}),
        **_trunk_fields(plan),
        **({"lora_r": request.lora_r} if "lora_r" in request.model_fields_set and request.use_peft else {}),
        "quantization": request.quantization,
        "dtype": request.dtype,
        "max_length": request.max_length,
        "batch_tokens": card.batch_tokens,
        "gradient_checkpointing": request.gradient_checkpointing,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": -(-request.batch // micro),
        "per_device_eval_batch_size": micro,
        "optim": request.optim,
        **card.way.changes,
    }

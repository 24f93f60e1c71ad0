"""Plans a run before you download or rent anything: memory by simulation, time by arithmetic.

Memory comes from running the real forward and the real step without a device (`memory.simulate`); what that
cannot see is added as estimates, each under its name. Nothing here was measured on the card that is asked about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import GIB
from dpoeng.engine.config.plan import PlanConfig
from dpoeng.engine.memory.any_depth import Memory, forward_memory, step_memory
from dpoeng.engine.memory.cards import Gpu, PhaseTime, beside_loading, find_gpu, loading_seconds, phase_times
from dpoeng.engine.memory.overhead import (
    FRAGMENTATION,
    count_parameters,
    estimate_overhead,
    model_fields,
    needed_bytes,
)
from dpoeng.engine.memory.simulate import OPTIMIZER, Pair, Setup
from dpoeng.engine.memory.tracker import Peak
from dpoeng.engine.models.model import DTYPES
from dpoeng.engine.models.model_config import config_of, sizes
from dpoeng.engine.models.trunk.layers import trunk_layer
from dpoeng.engine.runtime.distributed import BUCKET_BYTES

BATCH_TOKENS = (16384, 4096, 1024)

MICRO_BATCHES = (1, 2, 4)

SMALL_OPTIMIZER = "adamw_8bit"
"""Tried on cards that are too small for the optimizer that nobody chose."""


@dataclass(frozen=True, slots=True)
class Option:
    """A change, and the peak of phase two with it."""

    name: str
    peak: Peak

    @property
    def peak_bytes(self) -> int:
        """The peak of tensors."""
        return self.peak.n_bytes


@dataclass(slots=True)
class CardPlan:
    """One card: bytes it has, whether each phase fits, and with what.

    `small`: phase two with `SMALL_OPTIMIZER`, where it fits with that alone.
    `by_layer` tells of each phase whether layers are loaded one at a time; `needed_bytes` what it needs.
    """

    gpu: Gpu
    phase1_fits: bool
    phase2_fits: bool
    batch_tokens: int
    micro_batch: int
    by_layer: tuple[bool, bool] = (False, False)
    needed_bytes: tuple[int, int] = (0, 0)
    times: list[PhaseTime] = field(default_factory=list)
    small: Peak | None = None

    @property
    def fits(self) -> bool:
        """Both phases."""
        return self.phase1_fits and self.phase2_fits


@dataclass(slots=True)
class Plan:
    """The answer. Peaks are of tensors; `estimates` come on top of each.

    Attributes:
        request: what was asked.
        parameters: of the base.
        phase1: `batch_tokens` -> memory of one forward of the reference.
        phase2: pairs in a forward -> memory of one optimizer step.
        evaluation: memory of a forward of the evaluation or the parity check, one pair.
        two_models: memory of a step with a reference model beside the policy and whole logits; None if not asked.
        estimates: what the simulation cannot see, bytes by name.
        options: other settings and their peaks.
        cards: an answer a card.
        phase1_by_layer: as `phase1`, with layers loaded one at a time; empty where that is not asked for or needed.
        phase2_by_layer: the same of `phase2`.
        trunk_layer: where phase two begins; 0 for all layers.
        trunk_bytes: what the stored hidden states of all pairs take on disk.
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
    phase2_by_layer: dict[int, Memory] = field(default_factory=dict)
    trunk_layer: int = 0
    trunk_bytes: int = 0

    @property
    def step(self) -> Peak:
        """One pair a forward: the least that phase two can do with."""
        return self.phase2[1].peak

    def needed(self, peak: Peak) -> int:
        """A peak of tensors with what comes on top of it."""
        return needed_bytes(peak, self.estimates)


# --------------------------------------------------------------------------- the answer


def make_plan(request: PlanConfig) -> Plan:
    """Simulates both phases and says what fits where.

    Raises:
        UserError: the model is not known, or cannot be made.
    """
    fields = model_fields(request.model)
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
    pair = Pair(request.prompt_length, answers, answers)
    estimates, parts = estimate_overhead(setup, pair), count_parameters(fields)
    if request.gpus > 1:
        estimates["gradients of all cards"] = BUCKET_BYTES
    largest = max(card.n_bytes for card in cards)

    def room_left(memory: Memory) -> bool:
        return needed_bytes(memory.peak, estimates) <= largest

    phase2 = _by_micro_batch(setup, pair, room_left, whole=request.whole)
    # Phase one holds the base whole on every card.
    bits = request.reference_quantization or request.quantization
    reference = replace(setup, quantization=bits, shards=1, trunk_layer=0)
    plan = Plan(
        request=request,
        parameters=sum(parts.values()),
        phase1=_by_tokens(reference, pair),
        phase2=phase2,
        evaluation=forward_memory(setup, [pair], policy=True),
        two_models=step_memory(_two_models(setup), [pair]) if request.compare else None,
        estimates=estimates,
        options=_options(setup, pair) if request.compare else [],
        cards=[],
        trunk_layer=setup.trunk_layer,
        trunk_bytes=_trunk_bytes(request, setup, pair),
    )
    plan.cards = [_card(plan, setup, pair, parts, gpu) for gpu in cards]
    if request.layer_offloading != "on":
        _try_small_optimizer(plan, setup, pair)
    short = not all(card.fits for card in plan.cards)
    able = request.use_peft and not request.fsdp and not setup.trunk_layer
    if able and (request.layer_offloading == "on" or (request.layer_offloading == "auto" and short)):
        plan.phase1_by_layer = _by_tokens(replace(reference, by_layer=True), pair)
        plan.phase2_by_layer = _by_micro_batch(replace(setup, by_layer=True), pair, room_left)
        plan.cards = [
            card if card.fits and request.layer_offloading == "auto" else _card(plan, setup, pair, parts, card.gpu)
            for card in plan.cards
        ]
    return plan


def _try_small_optimizer(plan: Plan, setup: Setup, pair: Pair) -> None:
    """Has cards on which phase two does not fit try an optimizer of fewer bytes, unless one was named."""
    if "optim" in plan.request.model_fields_set:
        return
    least = plan.needed(plan.step) - plan.step.by_kind.get(OPTIMIZER, 0)
    room = [card for card in plan.cards if not card.phase2_fits and least <= card.gpu.n_bytes]
    if not room:
        return
    config = setup.config.model_copy(update={"optim": SMALL_OPTIMIZER})
    peak = step_memory(replace(setup, config=config), [pair]).peak
    for card in room:
        if max(plan.needed(peak), plan.needed(plan.evaluation.peak)) <= card.gpu.n_bytes:
            card.phase2_fits, card.micro_batch, card.small = True, 1, peak
            card.needed_bytes = card.needed_bytes[0], plan.needed(peak)


def _by_micro_batch(
    setup: Setup, pair: Pair, room_left: Callable[[Memory], bool], *, whole: bool = False
) -> dict[int, Memory]:
    """Pairs in a forward -> memory of a step, up to the first that leaves no room."""
    found: dict[int, Memory] = {}
    for micro_batch in MICRO_BATCHES:
        found[micro_batch] = step_memory(setup, [pair] * micro_batch, whole=whole)
        if not room_left(found[micro_batch]):
            break
    return found


def _by_tokens(setup: Setup, pair: Pair) -> dict[int, Memory]:
    """Positions in a forward -> memory of one of phase one."""
    tokens = pair_tokens(pair, setup.layout)
    counts = sorted({max(1, budget // tokens) for budget in BATCH_TOKENS})
    return {count * tokens: forward_memory(setup, [pair] * count, policy=False) for count in counts}


def _trunk_bytes(request: PlanConfig, setup: Setup, pair: Pair) -> int:
    """The hidden states of all pairs, each with a prompt of its own; 0 without a trunk."""
    if not setup.trunk_layer:
        return 0
    tokens = request.pairs * (pair.prompt + pair.chosen + pair.rejected)
    return tokens * sizes(config_of(setup.model)).hidden * setup.dtype.itemsize


def pair_tokens(pair: Pair, layout: str) -> int:
    """Positions computed for a pair."""
    return pair.prompt * (1 if layout == "shared" else 2) + pair.chosen + pair.rejected


def _two_models(setup: Setup) -> Setup:
    return replace(setup, second_model=True, full_logits=True, stock=True, layout="separate", trunk_layer=0)


def _options(setup: Setup, pair: Pair) -> list[Option]:
    """Phase two with one pair a forward and one thing changed."""
    config = setup.config
    half = Pair(max(1, pair.prompt // 2), pair.chosen // 2, pair.rejected // 2)
    changes: list[tuple[str, Setup, Pair]] = [
        (f"quantization {name}", replace(setup, quantization=name), pair)
        for name in ("none", "8bit", "4bit")
        if name != setup.quantization and config.use_peft
    ]
    as_lora = config.model_copy(update={"use_peft": True})
    without = replace(setup, config=config.model_copy(update={"gradient_checkpointing": False}))
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
        ("without gradient checkpointing", without, pair),
        ("whole logits", replace(setup, full_logits=True), pair),
    ]
    return [
        *(Option(name, step_memory(changed, [some]).peak) for name, changed, some in changes),
        *_trunk_option(setup, pair),
    ]


def _trunk_option(setup: Setup, pair: Pair) -> list[Option]:
    """The upper third alone, from a trunk; none where the architecture's layers cannot be told apart by number."""
    layer = 2 * setup.layers // 3
    if setup.trunk_layer or not layer or not setup.config.use_peft or setup.shards > 1:
        return []
    try:
        peak = step_memory(replace(setup, trunk_layer=layer), [pair]).peak
    except UserError:
        return []
    return [Option(f"trunk_layer {layer}, the upper third trained", peak)]


def _card(plan: Plan, setup: Setup, pair: Pair, parts: Mapping[str, int], gpu: Gpu) -> CardPlan:
    request = plan.request

    def fitting(memories: Mapping[int, Memory]) -> list[int]:
        return [n for n, memory in memories.items() if plan.needed(memory.peak) <= gpu.n_bytes]

    always = request.layer_offloading == "on"
    evaluates = plan.needed(plan.evaluation.peak) <= gpu.n_bytes
    micro = fitting(plan.phase2) if evaluates and not always else []
    tokens = [] if always else fitting(plan.phase1)
    two, one = bool(plan.phase2_by_layer) and not micro, bool(plan.phase1_by_layer) and not tokens
    phase2, phase1 = plan.phase2_by_layer if two else plan.phase2, plan.phase1_by_layer if one else plan.phase1
    micro, tokens = fitting(phase2) if two else micro, fitting(phase1) if one else tokens
    micro_batch = max(micro, default=1)
    # The parity check of phase two scores batches of phase one's size: they should not be what decides there.
    quiet = [n for n in tokens if phase1[n].peak.n_bytes <= phase2[micro_batch].peak.n_bytes]
    batch_tokens = max(quiet, default=min(phase1))
    return CardPlan(
        gpu=gpu,
        phase1_fits=bool(tokens),
        phase2_fits=bool(micro),
        batch_tokens=batch_tokens,
        micro_batch=micro_batch,
        by_layer=(one, two),
        needed_bytes=(plan.needed(phase1[batch_tokens].peak), plan.needed(phase2[micro_batch].peak)),
        times=_times(request, setup, pair, parts, gpu, (one, two)),
    )


def _times(
    request: PlanConfig,
    setup: Setup,
    pair: Pair,
    parts: Mapping[str, int],
    gpu: Gpu,
    by_layer: tuple[bool, bool],
) -> list[PhaseTime]:
    one, two, *others = phase_times(
        parts,
        setup.model,
        pair=(pair.prompt, pair.chosen, pair.rejected),
        pairs=request.pairs,
        epochs=request.epochs,
        checkpointing=bool(setup.config.gradient_checkpointing) or by_layer[1],
        full=not setup.config.use_peft,
        shared=request.layout == "shared",
        gpu=gpu,
        gpus=request.gpus,
        utilisation=request.utilisation,
        share=setup.layers / (setup.layers + setup.trunk_layer),
    )
    if by_layer[0]:
        waiting = request.pairs * pair_tokens(pair, request.layout) * 2 * sizes(config_of(setup.model)).hidden
        passes = math.ceil(waiting / (request.offload_gib * GIB))
        held = request.reference_quantization or request.quantization
        one = beside_loading(one, loading_seconds(parts, held, passes, request.load_gb_per_s))
    if by_layer[1]:
        steps = math.ceil(request.epochs * request.pairs / request.batch)
        two = beside_loading(two, loading_seconds(parts, request.quantization, 2 * steps, request.load_gb_per_s))
    return [one, two, *others]


# --------------------------------------------------------------------------- for scripts


def as_json(plan: Plan) -> dict[str, Any]:
    """The answer for scripts; top-level fields are of the first card."""
    first = plan.cards[0]
    return {
        "calculated": True,
        "model": plan.request.model,
        "parameters": plan.parameters,
        "fits": first.fits,
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
    """The peaks of both phases in the way that a card gets."""
    phase1 = plan.phase1_by_layer if card.by_layer[0] else plan.phase1
    phase2 = plan.phase2_by_layer if card.by_layer[1] else plan.phase2
    return phase1[card.batch_tokens].peak, phase2[card.micro_batch].peak


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
    """Fields of dpoeng.yaml for a card, with the number of pairs a step that was asked for."""
    request = plan.request
    micro = min(card.micro_batch, max(1, request.batch // request.gpus))  # a forward for each card
    return {
        **({} if request.use_peft else {"use_peft": False}),
        **({"fsdp": True} if request.fsdp else {}),
        **({"layer_offloading": "on"} if any(card.by_layer) else {}),
        **_trunk_fields(plan),
        "quantization": request.quantization,
        "dtype": request.dtype,
        "max_length": request.max_length,
        "batch_tokens": card.batch_tokens,
        "gradient_checkpointing": request.gradient_checkpointing,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": -(-request.batch // micro),
        "per_device_eval_batch_size": micro,
        "optim": request.optim if card.small is None else SMALL_OPTIMIZER,
    }

"""Ways to run phase two, the fastest first; a plan tries them until one fits a card."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.config.plan import PlanConfig
from dpoeng.engine.memory.any_depth import Memory, forward_memory, step_memory
from dpoeng.engine.memory.simulate import Pair, Setup

MICRO_BATCHES = (1, 2, 4)

SMALL_OPTIMIZER = "adamw_8bit"
"""Tried on cards that are too small for the default optimizer."""

_TRUNK_SHARE = 2 / 3
"""Share of the layers below a proposed trunk: the upper third is trained."""

Changes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run phase two, and its memory.

    Attributes:
        setup: the simulated setup.
        changes: fields of dpoeng.yaml that differ from the request.
        steps: pairs per forward -> memory of one optimizer step.
        evaluation: memory of a forward of the evaluation or the parity check, with one pair.
    """

    setup: Setup
    changes: Changes
    steps: Mapping[int, Memory]
    evaluation: Memory

    @property
    def by_layer(self) -> bool:
        """Whether layers are loaded one at a time."""
        return self.setup.by_layer

    @property
    def trains_less(self) -> bool:
        """Whether this trains less than requested: fewer layers, or a smaller LoRA."""
        return not self.changes.keys().isdisjoint(("trunk_layer", "lora_r"))

    def fitting(self, fits: Callable[[Memory], bool]) -> list[int]:
        """Pairs per forward with which step and evaluation fit."""
        return [n for n, memory in self.steps.items() if fits(memory)] if fits(self.evaluation) else []


def ways(request: PlanConfig, setup: Setup) -> Iterator[tuple[Changes, Setup]]:
    """The ways to try, in this order: changed fields, and the simulated setup.

    All layers in memory; layer by layer, unless that is off; finally the upper third from a trunk, which trains fewer
    layers. Each also with a smaller optimizer and, layer by layer, with a smaller LoRA, unless these were set.
    """
    optimizer = {} if "optim" in request.model_fields_set else {"optim": SMALL_OPTIMIZER}
    whole: list[Changes] = [{}, optimizer] if optimizer else [{}]
    frozen = request.use_peft and not request.fsdp
    by_layer = frozen and request.layer_offloading != "off"
    layers: list[Changes] = [*whole, *({**optimizer, **rank} for rank in _ranks(request, setup.config))]

    def way(changes: Changes, beside: Changes, **fields: Any) -> tuple[Changes, Setup]:
        config = setup.config.model_copy(update=dict(changes))
        return {**beside, **changes}, replace(setup, config=config, **fields)

    if request.layer_offloading != "on":
        yield from (way(changes, {}) for changes in whole)
    if by_layer:
        yield from (way(changes, {"layer_offloading": "on"}, by_layer=True) for changes in layers)
    below = round(_TRUNK_SHARE * setup.layers)
    if not frozen or setup.trunk_layer or not 0 < below < setup.layers:
        return
    trunk = {"trunk_layer": below, "train_last_layers": setup.layers - below}
    if request.layer_offloading != "on":
        yield from (way(changes, trunk, trunk_layer=below) for changes in whole)
    if by_layer:
        both = {"layer_offloading": "on", **trunk}
        yield from (way(changes, both, by_layer=True, trunk_layer=below) for changes in layers)


def _ranks(request: PlanConfig, config: TrainConfig) -> Iterator[Changes]:
    """A half and a quarter of the LoRA's rank, with the same scaling; none if a rank was set."""
    if "lora_r" in request.model_fields_set or not request.use_peft:
        return
    for part in (2, 4):
        if request.lora_r % part == 0:
            yield {"lora_r": request.lora_r // part, "lora_alpha": config.lora_alpha / part}


def find_ways(
    request: PlanConfig, setup: Setup, pair: Pair, cards: Mapping[str, Callable[[Memory], bool]]
) -> list[Way]:
    """The ways tried until each card has one that fits; all of them if a card has none.

    Args:
        request: the user's request.
        setup: phase two as requested.
        pair: the longest pair.
        cards: name -> whether a memory fits this card.
    """
    found: list[Way] = []
    without = dict(cards)
    evaluations: dict[tuple[Any, ...], Memory] = {}  # an evaluation does not depend on the optimizer
    for changes, some in ways(request, setup):
        # An architecture whose layers have no numbers has no trunk.
        with contextlib.suppress(UserError) if some.trunk_layer != setup.trunk_layer else contextlib.nullcontext():
            key = (some.by_layer, some.trunk_layer, some.config.lora_r)
            if key not in evaluations:
                evaluations[key] = forward_memory(some, [pair], policy=True)
            room_left = partial(_fits_any, tuple(without.values()))
            steps = by_micro_batch(some, pair, room_left, whole=request.whole and not some.by_layer)
            found.append(Way(some, changes, steps, evaluations[key]))
            without = {name: fits for name, fits in without.items() if not found[-1].fitting(fits)}
        if not without:
            break
    return found


def _fits_any(cards: Collection[Callable[[Memory], bool]], memory: Memory) -> bool:
    return any(fits(memory) for fits in cards)


def by_micro_batch(
    setup: Setup, pair: Pair, room_left: Callable[[Memory], bool], *, whole: bool = False
) -> dict[int, Memory]:
    """Pairs per forward -> memory of a step, up to the first that does not fit."""
    found: dict[int, Memory] = {}
    for micro_batch in MICRO_BATCHES:
        found[micro_batch] = step_memory(setup, [pair] * micro_batch, whole=whole)
        if not room_left(found[micro_batch]):
            break
    return found

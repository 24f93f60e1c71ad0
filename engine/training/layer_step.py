"""The gradient of one optimizer step, layer by layer: all forwards of the step through each layer, and back.

This is gradient checkpointing with its loops exchanged. Forward: each layer processes the hidden states of all
forwards, without gradient, and its inputs are stored on the host. Head: loss and gradient of each forward, as usual.
Backward: from the last layer to the first, each forward is recomputed through the layer and its gradient propagated. A
weight is read twice per step, however many forwards the step has. Gradients are added in the usual order, and dropout
draws the same numbers, so the adapter is the same, byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.losses.batch import PreferenceLoss
from dpoeng.engine.models.layers.by_layer import ByLayer
from dpoeng.engine.models.layers.gates import States
from dpoeng.engine.models.layers.waiting import Slot
from dpoeng.engine.models.model import CausalLM, adapter_draws, decoder_layers
from dpoeng.engine.runtime.distributed import Group
from dpoeng.engine.scoring.forward import predict_groups
from dpoeng.engine.scoring.layout import PromptGroup

Begin = Callable[[int], None]
"""Called with the number of a forward before it runs; seeds its dropout."""


def gradient_by_layer(
    lm: CausalLM,
    forwards: Mapping[int, Sequence[PromptGroup]],
    begin: Begin,
    head: Callable[[Begin], list[PreferenceLoss]],
    *,
    group: Group,
    tell: Callable[[str], None] = lambda _: None,
) -> list[PreferenceLoss]:
    """Computes the gradient of a step into the trained tensors.

    Args:
        lm: the policy, which runs by layer.
        forwards: number -> the groups of each of this process's forwards.
        begin: seeds a forward's dropout.
        head: computes the step's loss and its gradient; calls `begin` with a number before each forward.
        group: the processes, each with its own forwards.
        tell: called with finished layers.
    """
    assert lm.by_layer is not None
    work = _Step(lm, lm.by_layer, forwards, begin, tell)
    group.each(work.forward)
    with lm.by_layer.gates.starting_at(lm.by_layer.gates.count):
        parts = head(work.at_head)
    group.each(work.backward)
    return parts


class _Step:
    """The stored states of one step."""

    def __init__(
        self,
        lm: CausalLM,
        by_layer: ByLayer,
        forwards: Mapping[int, Sequence[PromptGroup]],
        begin: Begin,
        tell: Callable[[str], None],
    ) -> None:
        self.lm, self.by_layer, self.begin = lm, by_layer, begin
        self.count = by_layer.gates.count
        self.first = _first_trained(lm)
        self.jobs = {number: partial(predict_groups, lm, groups) for number, groups in forwards.items()}
        self.waiting = by_layer.waiting(lm.device)
        # For each forward: the hidden states that enter each layer, then those that leave the last one.
        self.entering: dict[int, list[list[Slot]]] = {number: [[]] for number in forwards}
        self.leaves: dict[int, States] = {}
        self.draws = adapter_draws(lm)
        self.random: dict[tuple[int, int], Any] = {}
        self.pace = _Pace(len(forwards), self.count, self.first, tell)

    @torch.no_grad()
    def forward(self) -> None:
        """Runs all forwards through each layer; stores the inputs of layers that will be recomputed."""
        for layer in range(self.count):
            for number, job in self.jobs.items():
                slots = self.entering[number]
                self._seed(number, layer)
                made = self.by_layer.gates.run_layer(layer, self._take(slots[layer]) if layer else None, job)
                self._keep_random(number, layer + 1)
                if layer and layer < self.first:
                    self.waiting.drop(slots[layer])
                slots.append([self.waiting.put(state) for state in made])
                self.pace.done("forward", layer, number)
            self._keep_within_limit(layer)

    def at_head(self, number: int) -> None:
        """Continues a forward after its layers."""
        self.begin(number)
        states = [state.detach().requires_grad_() for state in self._take(self.entering[number][self.count])]
        self.leaves[number] = states
        self.by_layer.gates.give(states)

    def backward(self) -> None:
        """Propagates the gradient from the head down to the lowest trained layer."""
        pulls = {number: self._pulls(number, states, self.count) for number, states in self.leaves.items()}
        self.leaves.clear()
        for layer in range(self.count - 1, self.first - 1, -1):
            for number, job in self.jobs.items():
                states = [state.detach() for state in self._take(self.entering[number][layer])] if layer else []
                if layer > self.first:
                    states = [state.requires_grad_() for state in states]
                self._seed(number, layer, again=True)
                made = self.by_layer.gates.run_layer(layer, states if layer else None, job)
                torch.autograd.backward(made, self._take(pulls[number]))
                del made
                if layer > self.first:
                    pulls[number] = self._pulls(number, states, layer, pulls[number])
                self.pace.done("backward", layer, number)

    def _take(self, slots: Sequence[Slot]) -> States:
        return [self.waiting.get(slot) for slot in slots]

    def _pulls(self, number: int, states: States, layer: int, before: Sequence[Slot] | None = None) -> list[Slot]:
        """Stores the gradients by the hidden states that entered a layer, and releases those states."""
        self.waiting.drop(self.entering[number][layer])
        places: Sequence[Slot | None] = before or [None] * len(states)
        return [
            self.waiting.put(state.grad if state.grad is not None else torch.zeros_like(state), place)
            for state, place in zip(states, places, strict=True)
        ]

    def _seed(self, number: int, layer: int, *, again: bool = False) -> None:
        """Sets the generators to this forward's dropout state at a layer."""
        if not self.draws:
            return
        if again or layer:
            _set_random_state(self.random[number, layer], self.lm.device)
        else:
            self.begin(number)
            self._keep_random(number, 0)

    def _keep_random(self, number: int, layer: int) -> None:
        """Records the generators' state when a forward reaches a layer."""
        if self.draws:
            self.random[number, layer] = _random_state(self.lm.device)

    def _keep_within_limit(self, layer: int) -> None:
        """Checks the limit once the first stored layer shows how much a step will store."""
        if layer != self.first:
            return
        each = sum(
            self.by_layer.taken(slot.shape.numel() * slot.dtype.itemsize)
            for forward_slots in self.entering.values()
            for slot in forward_slots[-1]
        )
        wanted, limit = each * (self.count - self.first), self.by_layer.limit_bytes
        if wanted > limit:
            raise UserError(
                "the hidden states of a step exceed the limit",
                code="offload-room",
                where=f"{self.count - self.first} layers, {len(self.jobs)} forwards a step",
                expected=f"at most {limit / 2**30:.2f} GiB (--offload-gib, or half of what is free)",
                found=f"{wanted / 2**30:.2f} GiB",
                remedy="use fewer --gradient-accumulation-steps, raise --offload-gib, or name a folder on a disk with "
                "room with --offload-folder",
                exit_status=5,
            )


class _Pace:
    """Reports the current layer, and the step's remaining time."""

    def __init__(self, forwards: int, layers: int, first: int, tell: Callable[[str], None]) -> None:
        self._forwards, self._layers, self._first, self._tell = forwards, layers, first, tell
        self._began, self._work = time.perf_counter(), 0
        # Recomputation and backward of a layer take about as long as three forwards.
        self._whole = forwards * (layers + 3 * (layers - first))

    def done(self, direction: str, layer: int, number: int) -> None:
        """Records that a forward has passed a layer."""
        self._work += 1 if direction == "forward" else 3
        passed = time.perf_counter() - self._began
        left = passed * (self._whole - self._work) / self._work
        self._tell(
            f"{direction}, layer {layer + 1} of {self._layers}, forward {number + 1}, {left:.0f} s of the step left"
        )


def check_trained(lm: CausalLM) -> None:
    """Refuses a policy with trained tensors outside single layers: their gradients would be added in another order.

    Raises:
        UserError: there are such tensors.
    """
    in_layers = {id(p) for layer in decoder_layers(lm.backbone) for p in layer.parameters()}
    outside = [name for name, parameter in lm.trainable_parameters() if id(parameter) not in in_layers]
    if outside:
        raise UserError(
            "layer offloading trains only modules in the decoder's layers",
            code="layer-offloading-unsupported",
            where="--layer-offloading",
            expected="a LoRA on modules of the layers",
            found=", ".join(outside[:3]) + (f" and {len(outside) - 3} more" if outside[3:] else ""),
            remedy="leave these out of --lora-target-modules, or use --layer-offloading off",
        )


def _first_trained(lm: CausalLM) -> int:
    layers = decoder_layers(lm.backbone)
    return next(
        (number for number, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), len(layers)
    )


def _random_state(device: torch.device) -> Any:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Any, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)

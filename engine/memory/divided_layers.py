"""Simulates the memory of one FSDP2 process with a sharded base.

FSDP itself needs other processes and values. So the layers stay whole on the `meta` device, count only as one process's
share, and add the memory that FSDP uses to run them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dpoeng.engine.memory.tracker import MemoryTracker, in_backward
from dpoeng.engine.models.fsdp import divided_parameters

GATHERED = "gathered layers"


def part_bytes(parameter: nn.Parameter, shards: int) -> int:
    """The share of one process in whole rows; the largest of all shares."""
    rows = parameter.shape[0]
    return -(-rows // shards) * (parameter.nbytes // rows)


def gather_layers(tracker: MemoryTracker, layers: Sequence[nn.Module], shards: int, *, through_gloo: bool) -> None:
    """Adds gathered layers: nearly always two are alive while one runs.

    Forward: the running layer, and the buffer it was gathered into, which stays until the next layer is copied out of
    its buffer. Backward: a layer, and the buffer of the next one. Only the frozen part is gathered, in its storage
    dtype. (torch 2.13: FSDPParamGroup.wait_for_unshard, _backward_prefetch)

    NCCL writes into that buffer. Gloo, on a CPU, first gathers into its own tensor.
    """
    parts = [sum(part_bytes(parameter, shards) for parameter in divided_parameters(layer)) for layer in layers]
    whole: dict[int, torch.Tensor] = {}
    buffers: dict[int, torch.Tensor] = {}

    def take(held: dict[int, torch.Tensor], number: int) -> None:
        if number >= 0 and number not in held:
            held[number] = torch.empty(shards * parts[number], dtype=torch.uint8, device=tracker.device_type)
            tracker.see(held[number], GATHERED)
            if through_gloo and held is buffers:
                tracker.scratch(shards * parts[number], kind=GATHERED)

    def before(number: int) -> None:
        if in_backward():  # checkpointing reruns the layer, which is gathered already
            return
        take(buffers, number)
        for other in [other for other in buffers if other != number]:
            del buffers[other]
        take(whole, number)

    def after(number: int, output: Any) -> None:
        if in_backward():
            return
        del whole[number]
        if number == len(layers) - 1:
            buffers.clear()
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _: backward(number))  # type: ignore[no-untyped-call]

    def backward(number: int) -> None:
        if number in whole:
            return
        if number == len(layers) - 1:
            torch.autograd.Variable._execution_engine.queue_callback(let_go)
        whole.pop(number + 1, None)
        take(buffers, number)
        take(whole, number)
        del buffers[number]
        take(buffers, number - 1)

    def let_go() -> None:
        whole.clear()
        buffers.clear()

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: before(number))
        layer.register_forward_hook(lambda _layer, _inputs, output, number=number: after(number, output))

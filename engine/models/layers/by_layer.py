"""A model whose layers are run one at a time: what it consists of, and pieces of work taken through all its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dpoeng.engine.models.layers.gates import Gates
from dpoeng.engine.models.layers.waiting import Slot, Waiting

Result = TypeVar("Result")
Job = Callable[[], Any]
"""Calls the decoder, each time over the same tokens; what it returns is not used."""


@dataclass(slots=True)
class ByLayer:
    """How a model is run layer by layer.

    Attributes:
        gates: of its decoder.
        standing_in: see `LayerStore.standing_in`.
        bytes_read: bytes of layers that have been read from the files so far.
        folder: where hidden states wait in a mapped scratch file; None: in host memory.
        limit_bytes: most bytes of hidden states that wait at a time.
        bytes_per_position: of hidden states between two layers; found by the trial.
    """

    gates: Gates
    standing_in: Callable[[], AbstractContextManager[None]]
    bytes_read: Callable[[], int]
    folder: Path | None = None
    limit_bytes: int = 1 << 62
    bytes_per_position: int = 0

    def waiting(self, device: torch.device) -> Waiting:
        """Room for hidden states."""
        return Waiting(device, self.folder)


def through_layers(
    by_layer: ByLayer,
    waiting: Waiting,
    jobs: Sequence[Job],
    tell: Callable[[int, int], None] = lambda _layer, _job: None,
    end: int | None = None,
) -> list[list[Slot]]:
    """Takes all jobs through each layer before the next one is loaded.

    Args:
        by_layer: the model.
        waiting: where hidden states wait.
        jobs: at least one.
        tell: called with the layer's number and the job's when a job is through a layer.
        end: the first layer that is not run; None: all are.

    Returns:
        of each job, where its hidden states after the last layer wait.
    """
    slots: list[list[Slot]] = [[] for _ in jobs]
    first = by_layer.gates.first
    for number in range(first, by_layer.gates.count if end is None else end):
        for at, job in enumerate(jobs):
            states = [waiting.get(slot) for slot in slots[at]] if number > first else None
            made = by_layer.gates.run_layer(number, states, job)
            before: Sequence[Slot | None] = slots[at] or [None] * len(made)
            slots[at] = [waiting.put(state, slot) for state, slot in zip(made, before, strict=True)]
            tell(number, at)
    return slots


def after_layers(
    by_layer: ByLayer, waiting: Waiting, slots: Sequence[Sequence[Slot]], finish: Callable[[int], Result]
) -> Iterator[Result]:
    """What `finish` makes of each job, whose forward then has only to go on after the last layer."""
    with by_layer.gates.starting_at(by_layer.gates.count):
        for at, own in enumerate(slots):
            by_layer.gates.give([waiting.get(slot) for slot in own])
            result = finish(at)
            waiting.drop(own)
            yield result

"""A model that runs one layer at a time: its parts, and how jobs are taken through all its layers."""

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
"""Calls the decoder over the same tokens each time; its return value is not used."""


@dataclass(slots=True)
class ByLayer:
    """How to run a model layer by layer.

    Attributes:
        gates: the gates of its decoder.
        standing_in: see `LayerStore.standing_in`.
        bytes_read: bytes of layers read from the files so far.
        folder: folder of the mapped scratch file for hidden states; None: host memory.
        limit_bytes: maximum bytes of stored hidden states.
        bytes_per_position: size of hidden states between two layers; determined by the trial.
        keeps_meta: see `Waiting`.
    """

    gates: Gates
    standing_in: Callable[[], AbstractContextManager[None]]
    bytes_read: Callable[[], int]
    folder: Path | None = None
    limit_bytes: int = 1 << 62
    bytes_per_position: int = 0
    keeps_meta: bool = False

    def taken(self, n_bytes: int) -> int:
        """Bytes that hidden states of so many take while they wait: torch rounds pinned memory up to a power of two."""
        pinned = self.gates.device.type == "cuda" and self.folder is None
        return 1 << (n_bytes - 1).bit_length() if pinned and n_bytes else n_bytes

    def waiting(self, device: torch.device) -> Waiting:
        """Storage for hidden states."""
        return Waiting(device, self.folder, keeps_meta=self.keeps_meta)


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
        waiting: storage for hidden states.
        jobs: at least one.
        tell: called with the layer's and the job's number when a job has passed a layer.
        end: the first layer that does not run; None: all run.

    Returns:
        for each job, the slots of its hidden states after the last layer.
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
    """The result of `finish` for each job, whose forward only needs to continue after the last layer."""
    with by_layer.gates.starting_at(by_layer.gates.count):
        for at, job_slots in enumerate(slots):
            by_layer.gates.give([waiting.get(slot) for slot in job_slots])
            result = finish(at)
            waiting.drop(job_slots)
            yield result

"""Reads torch's allocations and frees during a piece of work, event by event, from torch.profiler.

Unlike resident memory it counts no library, no interpreter and no page that the system has not yet taken back, so it
can be compared with a simulation byte by byte, and shows leaks of any size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class AllocatorTrace:
    """The allocator's history during some work. Bytes are those of blocks allocated during it.

    Attributes:
        peak_bytes: the maximum.
        grown_bytes: bytes still allocated at the end.
        levels: (milliseconds since the first event, bytes) after every event.
    """

    peak_bytes: int
    grown_bytes: int
    levels: list[tuple[float, int]]

    def outline(self, points: int = 200) -> list[tuple[float, int]]:
        """The maximum of each of at most `points` equal intervals of events: small enough for a record."""
        width = max(1, -(-len(self.levels) // points))
        stretches = (self.levels[i : i + width] for i in range(0, len(self.levels), width))
        return [max(stretch, key=lambda level: level[1]) for stretch in stretches]


def trace_allocator(work: Callable[[], object], device: torch.device) -> AllocatorTrace:
    """Runs `work` and returns the history of the allocator of `device`. Slower than the work alone."""
    with allocator_profiler() as profiler:
        work()
    return read_trace(profiler, device)


def allocator_profiler() -> torch.profiler.profile:
    """A profiler for `read_trace`; the caller starts and stops it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print each start and stop
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def read_trace(profiler: torch.profiler.profile, device: torch.device) -> AllocatorTrace:
    """Returns the allocator events of `device` from a stopped profiler.

    The profiler remembers addresses from session to session, so it reports the end of a block from before this
    session with the size of another block at that address. Only blocks of this session count, each with its own size.
    """
    recorded: Any = profiler.profiler
    events = []
    waiting = list(recorded.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag.name == "Allocation" and event.extra_fields.device.type == device.type:
            events.append((event.start_time_ns, event.extra_fields))
    events.sort(key=lambda item: item[0])
    alive: dict[int, int] = {}
    level = top = 0
    levels: list[tuple[float, int]] = []
    for at, block in events:
        if block.alloc_size > 0:
            alive[block.ptr] = block.alloc_size
            level += block.alloc_size
        else:
            level -= alive.pop(block.ptr, 0)
        top = max(top, level)
        levels.append(((at - events[0][0]) / 1e6, level))
    return AllocatorTrace(top, level, levels)

"""Reads torch's allocations and frees during a piece of work, event by event, from torch.profiler.

Unlike resident memory it counts no library, no interpreter and no page that the system has not yet taken back, so it
can be compared with a simulation byte by byte; and what is not given back is a leak, however small.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class AllocatorTrace:
    """The allocator through a piece of work. Bytes are of blocks that began in it.

    Attributes:
        peak_bytes: the highest point.
        grown_bytes: what was still held at the end.
        levels: (milliseconds since the first event, bytes) after every event.
    """

    peak_bytes: int
    grown_bytes: int
    levels: list[tuple[float, int]]

    def outline(self, points: int = 200) -> list[tuple[float, int]]:
        """The highest level of each of at most `points` equal stretches of events: small enough for a record."""
        width = max(1, -(-len(self.levels) // points))
        stretches = (self.levels[i : i + width] for i in range(0, len(self.levels), width))
        return [max(stretch, key=lambda level: level[1]) for stretch in stretches]


def trace_allocator(work: Callable[[], object], device: torch.device) -> AllocatorTrace:
    """Runs `work` and returns what the allocator of `device` did meanwhile. Slower than the work alone."""
    with allocator_profiler() as profiler:
        work()
    return read_trace(profiler, device)


def allocator_profiler() -> torch.profiler.profile:
    """A profiler that `read_trace` can read, to begin and to end."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell the terminal of each start and stop
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def read_trace(profiler: torch.profiler.profile, device: torch.device) -> AllocatorTrace:
    """Return the allocator events of `device` from a profiler that has ended.

    The profiler remembers addresses from session to session, so it reports the end of a block that began outside this
    one with the size of another that was once there. Only blocks that began in here count, each with its own size.
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

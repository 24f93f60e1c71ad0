"""The memory of a step or a forward of a model of any depth: simulated whole, or from two shallow models, exactly.

Equal layers add equal bytes, so within one stretch of a step (a half of the forward or of the backward, the optimizer)
the peak is a linear function of the number of layers: memory falls or rises steadily while the backward walks through
them, so its highest point is at the first or at the last. From three layers on, the first, the last and one between are
all there. Tests compare with whole models, kind by kind and byte by byte. Models of unlike layers are simulated whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dpoeng.engine.memory_tracker import MemoryTracker, Peak
from dpoeng.engine.model import layer_period
from dpoeng.engine.simulate import Pair, Setup, trace_forward, trace_step

# A first, a last and some between; even where two kinds of layer take turns.
DEPTHS = {1: (3, 5), 2: (4, 6)}


@dataclass(frozen=True, slots=True)
class Memory:
    """What a piece of work takes.

    Attributes:
        peak: its highest point.
        stretches: the highest point of each stretch.
        timeline: (bytes, phase) after each operation, where the whole model was simulated; else empty.
    """

    peak: Peak
    stretches: Mapping[str, Peak]
    timeline: Sequence[tuple[int, str]] = ()


def step_memory(setup: Setup, pairs: Sequence[Pair], *, whole: bool = False) -> Memory:
    """One optimizer step of phase two over one micro-batch."""
    return _memory(setup, lambda some: trace_step(some, pairs), whole)


def forward_memory(setup: Setup, pairs: Sequence[Pair], *, adapters: bool, whole: bool = False) -> Memory:
    """One forward without gradient over some pairs."""
    return _memory(setup, lambda some: trace_forward(some, pairs, adapters=adapters), whole)


def _memory(setup: Setup, trace: Callable[[Setup], MemoryTracker], whole: bool) -> Memory:
    if not whole and setup.layers > 6:
        period = layer_period(setup.model)
        if period is not None and setup.layers % period == 0:
            depths = DEPTHS[period]
            shallow = [_stretches(trace(setup.with_layers(depth))) for depth in depths]
            extended = _extend(shallow, depths, setup.layers)
            if extended is not None:
                return Memory(max(extended.values(), key=lambda peak: peak.n_bytes), extended)
    tracker = trace(setup)
    return Memory(tracker.peak(), _stretches(tracker), list(zip(tracker.samples, tracker.phases, strict=True)))


def _stretches(tracker: MemoryTracker) -> dict[str, Peak]:
    """Peaks of the phases; of forward and backward in halves."""
    found = {}
    for phase, (first, last) in tracker.stretches().items():
        if phase == "optimizer":
            found[phase] = tracker.peak(first, last)
            continue
        middle = (first + last) // 2
        for half, begin, end in (("first half", first, middle), ("second half", middle, last)):
            if end > begin:
                found[f"{phase}, {half}"] = tracker.peak(begin, end)
    return found


def _extend(shallow: Sequence[Mapping[str, Peak]], depths: tuple[int, int], layers: int) -> dict[str, Peak] | None:
    """The stretches of a model of `layers` layers, or None where the shallow ones do not fit together."""
    if any(stretches.keys() != shallow[0].keys() for stretches in shallow):
        return None
    few, more = shallow
    extended = {}
    for name in few:
        by_kind = {}
        for kind in {*few[name].by_kind, *more[name].by_kind}:
            low = few[name].by_kind.get(kind, 0)
            slope, odd = divmod(more[name].by_kind.get(kind, 0) - low, depths[1] - depths[0])
            if odd or slope < 0:
                return None
            by_kind[kind] = low + slope * (layers - depths[0])
        extended[name] = Peak(sum(by_kind.values()), {kind: n for kind, n in by_kind.items() if n})
    return extended

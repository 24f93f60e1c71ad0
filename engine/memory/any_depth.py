"""Memory of a step or forward for a model of any depth: simulated whole, or derived exactly from two shallow models.

Equal layers add equal bytes. With each additional layer of the model, the memory alive at an operation of one layer
grows by the same amount, as it does from one layer to the next; and every layer's peak is at the same operation. Only
the first and last layer differ, because other work comes before and after them. A model with a first layer, a last one
and one in between has all of these; together with one that has a layer more, it determines all others. The highest of
the layers in between is the second or the second last, as a straight line is highest at an end. Tests compare with
whole models, kind by kind and byte by byte. Models with unlike layers are simulated whole; if kinds alternate, one
period counts as a layer.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dpoeng.cache.errors import UserError
from dpoeng.engine.memory.simulate import Pair, Setup, trace_forward, trace_step
from dpoeng.engine.memory.tracker import MemoryTracker, Peak
from dpoeng.engine.models.loading import layer_period
from dpoeng.engine.models.trunk.layers import names_layers

Stretches = dict[tuple[str, str], Peak]
"""(phase, place) -> the peak there."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a piece of work.

    Attributes:
        peak: the peak of the whole work.
        stretches: the peak before, in and after the layers of each phase.
        timeline: (bytes, phase) after each operation if the whole model was simulated; else empty.
        shared: whether prompts were shared.
    """

    peak: Peak
    stretches: Mapping[str, Peak]
    timeline: Sequence[tuple[int, str]] = ()
    shared: bool = True


def step_memory(setup: Setup, pairs: Sequence[Pair], *, whole: bool = False) -> Memory:
    """One optimizer step of phase two over one micro-batch."""
    return _as_laid_out(setup, lambda some: trace_step(some, pairs), whole)


def forward_memory(setup: Setup, pairs: Sequence[Pair], *, policy: bool, whole: bool = False) -> Memory:
    """One forward without gradient over some pairs: the policy in training, or the reference."""
    return _as_laid_out(setup, lambda some: trace_forward(some, pairs, policy=policy), whole)


def _as_laid_out(setup: Setup, trace: Callable[[Setup], MemoryTracker], whole: bool) -> Memory:
    """Uses separate prompts if the model's attention cannot be replaced, as `choose_layout` does."""
    with _rare_collections():
        if setup.layout == "shared":
            with contextlib.suppress(ValueError, TypeError, RuntimeError, NotImplementedError, ImportError):
                return _memory(setup, trace, whole)
        return replace(_memory(replace(setup, layout="separate"), trace, whole), shared=False)


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Lets Python look for cycles less often: a trace makes many objects that stay, and each look walks them again."""
    before = gc.get_threshold()
    gc.set_threshold(20_000, 20, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _memory(setup: Setup, trace: Callable[[Setup], MemoryTracker], whole: bool) -> Memory:
    # With a LoRA in only some layers, layers are not equal.
    period = None if whole or names_layers(setup.config) else layer_period(setup.model)
    if setup.by_layer:
        return _by_layer(setup, trace, period)
    if period is not None and setup.layers % period == 0 and setup.layers > 5 * period:
        extended = _from_two_shallow(setup, trace, period)
        if extended is not None:
            return Memory(max(extended.values(), key=lambda peak: peak.n_bytes), _in_words(extended))
    tracker = trace(setup)
    stretches = _in_words(_by_place(tracker, setup.layers, period or 1))
    return Memory(tracker.peak(), stretches, list(zip(tracker.samples, tracker.phases, strict=True)))


def _by_layer(setup: Setup, trace: Callable[[Setup], MemoryTracker], period: int | None) -> Memory:
    """For layers that are loaded one at a time: per layer only its trained weights add memory, in every phase."""

    def by_phase(some: Setup) -> Stretches:
        peaks: Stretches = {}
        for (phase, _), peak in trace(some).stretches().items():
            before = peaks.get((phase, "all"))
            if before is None or peak.n_bytes > before.n_bytes:
                peaks[phase, "all"] = peak
        return peaks

    extended = None
    if period is not None and setup.layers % period == 0 and setup.layers > 4 * period:
        # Three have one in between: the first passes no gradient on, and the last may compute fewer positions.
        few, more = (by_phase(setup.with_layers(depth * period)) for depth in (3, 4))
        extended = _extend(few, more, (setup.layers - 3 * period) // period)
    if extended is None:
        extended = by_phase(setup)
    return Memory(max(extended.values(), key=lambda peak: peak.n_bytes), _in_words(extended))


def _from_two_shallow(setup: Setup, trace: Callable[[Setup], MemoryTracker], period: int) -> Stretches | None:
    """The places of the whole model; None if its config cannot be cut, or the two models do not fit together."""
    depths = (3 * period, 4 * period)
    try:
        few, more = (_by_place(trace(setup.with_layers(depth)), depth, period) for depth in depths)
    except (UserError, ValueError, IndexError, AttributeError, TypeError):
        return None  # layers refer to others by number: the whole model reports an error, if there is one
    return _extend(few, more, (setup.layers - depths[0]) // period)


def _by_place(tracker: MemoryTracker, depth: int, period: int) -> Stretches:
    """The peaks at the places that models of every depth have."""
    peaks: Stretches = {}
    for (phase, layer), peak in tracker.stretches().items():
        for place in _places(phase, layer, depth, period):
            peaks[phase, place] = peak
    return peaks


def _places(phase: str, layer: int, depth: int, period: int) -> Iterator[str]:
    """A layer's names, counted from either end; the middle layer of three is the second and the second last."""
    if phase == "optimizer":
        yield "all"
    elif layer < 0:
        yield "before the layers"
    elif layer >= depth:
        yield "head" if layer == depth else "gradients"
    else:
        if layer < 2 * period:
            yield f"layer {layer + 1}"
        if layer >= depth - 2 * period:
            yield f"layer {layer - depth}"


def _extend(few: Stretches, more: Stretches, steps: int) -> Stretches | None:
    """The places of a deeper model, or None if the two shallow ones do not fit together."""
    if few.keys() != more.keys():
        return None
    extended = {}
    for place, low in few.items():
        by_kind = {}
        for kind in {*low.by_kind, *more[place].by_kind}:
            slope = more[place].by_kind.get(kind, 0) - low.by_kind.get(kind, 0)
            by_kind[kind] = low.by_kind.get(kind, 0) + slope * steps
            if slope < 0:
                return None
        extended[place] = Peak(sum(by_kind.values()), {kind: n for kind, n in by_kind.items() if n})
    return extended


def _in_words(stretches: Stretches) -> dict[str, Peak]:
    """`forward, layers` and so on: the highest of all layers under one name."""
    peaks: dict[str, Peak] = {}
    for (phase, place), peak in stretches.items():
        name = phase if place == "all" else f"{phase}, {'layers' if place.startswith('layer ') else place}"
        if name not in peaks or peak.n_bytes > peaks[name].n_bytes:
            peaks[name] = peak
    return peaks

"""Memory of a step or forward for a model of any depth: simulated whole, or derived exactly from a shallow model.

Equal layers add equal bytes. While one layer runs, those that have run hold something (activations that the backward
will need, later in the step gradients), those still to run hold something, and all hold their weights. The tracker
knows which layer owns or has made each tensor. So a shallow model tells how many bytes a layer of each kind holds, seen
from the first layer and from the last, and thereby the memory at each layer of a deep one. It has all layers up to the
one with which each kind has begun, since that one may make what others of its kind share; then others of each kind; and
the last layer, because other work comes after it, with kinds that begin late. A layer's neighbours tell nothing of it,
as it uses their results. Tests compare with whole models, kind by kind and byte by byte. A model is simulated whole if
its equal layers do not add equal bytes, or if it runs layers more than once.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import Attention
from dpoeng.engine.memory.simulate import Pair, Setup, trace_forward, trace_step
from dpoeng.engine.memory.tracker import MemoryTracker, Peak, Phase
from dpoeng.engine.models.loading import can_leave_out, layer_kinds
from dpoeng.engine.models.trunk.layers import names_layers
from dpoeng.engine.scoring.choose_layout import CANNOT


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a piece of work.

    Attributes:
        peak: the peak of the whole work.
        stretches: the peak before, in and after the layers of each phase.
        timeline: (bytes, phase) after each operation if the whole model was simulated; else empty.
        attention: the one over shared prompts that a run is expected to choose; None if prompts are not shared.
    """

    peak: Peak
    stretches: Mapping[str, Peak]
    timeline: Sequence[tuple[int, str]] = ()
    attention: Attention | None = None


def step_memory(setup: Setup, pairs: Sequence[Pair], *, whole: bool = False) -> Memory:
    """One optimizer step of phase two over one micro-batch."""
    return _as_laid_out(setup, lambda some: trace_step(some, pairs), whole)


def forward_memory(setup: Setup, pairs: Sequence[Pair], *, policy: bool, whole: bool = False) -> Memory:
    """One forward without gradient over some pairs: the policy in training, or the reference."""
    return _as_laid_out(setup, lambda some: trace_forward(some, pairs, policy=policy), whole)


def _as_laid_out(setup: Setup, trace: Callable[[Setup], MemoryTracker], whole: bool) -> Memory:
    """Uses separate prompts if the model's attention cannot be replaced, as `choose_layout` does.

    Raises:
        UserError: the model cannot begin at the setup's trunk.
    """
    with _rare_collections():
        if setup.layout == "shared":
            with contextlib.suppress(*CANNOT):
                return _memory(setup, trace, whole)
        try:
            return _memory(replace(setup, layout="separate"), trace, whole)
        except CANNOT as error:
            if not setup.trunk_layer:
                raise
            raise UserError(
                "the upper layers of this model need more from below than hidden states",
                code="trunk-unsupported",
                where=f"--trunk-layer {setup.trunk_layer}, simulated",
                expected="layers that run from the states that enter them",
                found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                remedy="leave --trunk-layer out: phase two then runs all layers",
            ) from error


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
    # With a LoRA in only some layers, or if only some are recomputed, layers are not equal.
    unequal = names_layers(setup.config) or setup.recompute is not None
    cut = None if whole or unequal else _cut_of(setup)
    if cut is not None:
        shallow = None
        with contextlib.suppress(UserError, *CANNOT):
            # If layers refer to others by number, the whole model reports an error, if there is one.
            shallow = trace(setup.with_layers(cut.chosen))
        if shallow is not None and not shallow.loops and (highest := _extend(shallow.stretches(), cut, setup.by_layer)):
            top = max(highest.values(), key=lambda peak: peak.n_bytes)
            return Memory(top, highest, attention=shallow.attention)
    tracker = trace(setup)
    stretches = _highest(
        (_in_words(phase, layer, setup.layers, setup.by_layer), peak)
        for (phase, layer), peak in tracker.stretches().items()
    )
    timeline = list(zip(tracker.samples, tracker.phases, strict=True))
    return Memory(tracker.peak(), stretches, timeline, attention=tracker.attention)


_Tops = Mapping[tuple[Phase, int], Peak]
"""Phase and layer of a shallow model -> the peak there."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """A shallow model that tells of a deep one.

    Attributes:
        kinds: the kind of each layer of the deep one.
        chosen: those of its layers that the shallow one has.
        begin: how many of the first layers both have: until each kind has begun.
        end: how many of the last ones: the last, and kinds that begin late.
    """

    kinds: Sequence[int]
    chosen: Sequence[int]
    begin: int
    end: int

    @property
    def shallow(self) -> list[int]:
        """The kinds of the shallow model's layers."""
        return [self.kinds[layer] for layer in self.chosen]

    def telling(self, *, first: int, last: int) -> dict[int, int]:
        """Kind -> the shallow model's first such layer of these, `last` included."""
        kinds = self.shallow
        return {kinds[layer]: layer for layer in range(last, max(self.begin, first) - 1, -1)}

    def like(self, layer: int) -> int:
        """The shallow model's layer that is like one of the deep model."""
        if layer >= len(self.kinds) - self.end:
            return len(self.chosen) - len(self.kinds) + layer
        within = self.chosen[: -self.end]
        return within.index(layer) if layer in within else self.shallow.index(self.kinds[layer], self.begin)


def _cut_of(setup: Setup) -> _Cut | None:
    """The shallowest model that tells of this one; None if only the whole one does."""
    kinds = layer_kinds(setup.model)
    if kinds is None:
        return None
    numbers = setup.chosen or range(len(kinds))
    kinds = [kinds[layer] for layer in numbers][setup.trunk_layer :]
    if len(kinds) < 2:
        return None
    begin, late = max(map(partial(_ordinary, kinds), range(1, len(kinds))), key=lambda part: part[1] - part[0])
    again = sorted({kinds.index(kind, begin) for kind in kinds[begin:late]})
    beside = again[-1] + 1 if again else late  # so that none of these is the last one's neighbour
    last = kinds[late:]
    first_ones = next((i for i in range(beside + 1, late) if kinds[i : i + len(last)] == last), late)
    for chosen in ([*range(begin), *again, beside, *range(late, len(kinds))], [*range(first_ones + len(last))]):
        in_file = [numbers[setup.trunk_layer + layer] for layer in chosen]
        if beside < late and len(chosen) < len(kinds) and can_leave_out(setup.model, in_file):
            return _Cut(kinds, chosen, begin, len(last))
    return None


def _ordinary(kinds: Sequence[int], begin: int) -> tuple[int, int]:
    """The layers from `begin` on whose kinds have begun before, without the last one."""
    late = next((layer for layer in range(begin, len(kinds)) if kinds[layer] not in kinds[:begin]), len(kinds))
    return begin, min(late, len(kinds) - 1)


def _extend(tops: _Tops, cut: _Cut, by_layer: bool) -> dict[str, Peak]:
    """The highest peaks of the deep model.

    Empty if the shallow model's equal layers do not tell of each other, for example since each uses all before it.
    """
    deep, shallow, last = cut.kinds, cut.shallow, len(cut.chosen) - 1
    after, before = cut.telling(first=2, last=last - 1), cut.telling(first=1, last=last - 2)
    phases = dict.fromkeys(phase for phase, layer in tops if 0 <= layer <= last)
    if any((phase, layer) not in tops for phase in phases for layer in range(last + 1)):
        return {}

    def moved(phase: Phase, layer: int, kinds: Sequence[int], to: int) -> Peak:
        """The peak at a layer of the shallow model, if it were at another place of a model with these layers."""
        seen = _with_more(tops[phase, layer], tops[phase, last], before, kinds[:to], shallow[:layer])
        return _with_more(seen, tops[phase, 0], after, kinds[to + 1 :], shallow[layer + 1 :])

    for phase, layer in itertools.product(phases, range(cut.begin, last)):
        like = shallow.index(shallow[layer], cut.begin)
        if moved(phase, like, shallow, layer).n_bytes != tops[phase, layer].n_bytes:
            return {}

    def deeper() -> Iterator[tuple[str, Peak]]:
        for (phase, layer), peak in tops.items():
            if not 0 <= layer <= last:
                name = _in_words(phase, layer, len(shallow), by_layer)
                yield name, _with_more(peak, peak, after, deep, shallow)
        for phase, layer in itertools.product(phases, range(len(deep))):
            yield _in_words(phase, layer, len(deep), by_layer), moved(phase, cut.like(layer), deep, layer)

    return _highest(deeper())


def _with_more(
    peak: Peak, seen_from: Peak, telling: Mapping[int, int], wanted: Sequence[int], there: Sequence[int]
) -> Peak:
    """A peak with the wanted kinds of layers instead of those that are there."""
    by_kind = dict(peak.by_kind)
    more = Counter(wanted)
    more.subtract(there)
    for layer_kind, layer in telling.items():
        for kind, n_bytes in seen_from.by_layer.get(layer, {}).items():
            by_kind[kind] = by_kind.get(kind, 0) + more[layer_kind] * n_bytes
    by_kind = {kind: n_bytes for kind, n_bytes in by_kind.items() if n_bytes}
    return Peak(sum(by_kind.values()), by_kind)


def _in_words(phase: Phase, layer: int, depth: int, by_layer: bool) -> str:
    """Where a peak is: `forward, layers` and so on."""
    if by_layer or phase == "optimizer":
        return phase
    place = "before the layers" if layer < 0 else "layers" if layer < depth else "head"
    return f"{phase}, {'gradients' if layer > depth else place}"


def _highest(peaks: Iterable[tuple[str, Peak]]) -> dict[str, Peak]:
    """The highest of all peaks with the same name."""
    highest: dict[str, Peak] = {}
    for name, peak in peaks:
        if name not in highest or peak.n_bytes > highest[name].n_bytes:
            highest[name] = peak
    return highest

"""Runs forwards layer by layer, in passes: as many forwards at once as their hidden states have room for.

A pass that runs out of memory is repeated. If it runs out again, the forward at work is halved, with the same numbers
as without layer offloading. If hidden states have no room, the pass is halved, which changes no number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import counted
from dpoeng.engine.models.layers.by_layer import ByLayer, Job, after_layers, through_layers
from dpoeng.engine.models.layers.gates import LayersDone
from dpoeng.engine.models.layers.waiting import Waiting
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.runtime.out_of_memory import attempt
from dpoeng.engine.runtime.progress import QUIET, Advance
from dpoeng.engine.scoring.forward import predict_groups, tree_of
from dpoeng.engine.scoring.layout import PromptGroup, positions_of, separate

Item = TypeVar("Item")
Result = TypeVar("Result")
Describe = Callable[[Sequence[Any], str], UserError]
"""The error for items of one forward that do not fit, with torch's message."""


@dataclass(frozen=True, slots=True)
class Forwards(Generic[Item]):
    """The forwards to run through the layers.

    Attributes:
        items: the items of each forward.
        groups_of: the prompt groups that a forward runs for some items.
        describe: the error for one item that does not fit alone.
        note: receives a note if something is halved because memory ran out.
    """

    items: Sequence[Sequence[Item]]
    groups_of: Callable[[Sequence[Item]], Sequence[PromptGroup]]
    describe: Describe
    note: Callable[[str], None] = QUIET.note


@torch.no_grad()
def in_passes(
    lm: CausalLM,
    forwards: Forwards[Item],
    finish: Callable[[Sequence[Item]], list[Result]],
    *,
    ends: Collection[int] = (),
    advance: Advance = lambda _amount, _shown: None,
    pause: Callable[[], None] = lambda: None,
) -> Iterator[list[Result]]:
    """Yields the results of `finish` for each forward of a model that is run by layer; without gradient.

    Args:
        lm: the model, with its layers in the files.
        forwards: the forwards.
        finish: computes the results of some items after the layers. Results of a halved forward are joined.
        ends: forwards after which the caller stores results; a pass ends there if it can.
        advance: receives the number of finished tokens.
        pause: called after a pass that ends at one of `ends`; it may raise.

    Raises:
        UserError: an item alone does not fit into memory.
    """
    by_layer = lm.by_layer
    assert by_layer is not None

    def run(pass_: _Pass[Item], waiting: Waiting, progress: _Progress) -> list[list[Result]]:
        slots = through_layers(by_layer, waiting, pass_.jobs, progress)
        at_head = lambda at: pass_.at_work(at, lambda: finish(pass_.items[at]))  # noqa: E731
        return list(after_layers(by_layer, waiting, slots, at_head))

    sizes = [_waiting_bytes(lm, by_layer, forwards.groups_of(some)) for some in forwards.items]
    passes = plan_passes(sizes, by_layer.limit_bytes, ends)
    for number, some in enumerate(passes):
        title = f"pass {number + 1} of {len(passes)}, " if len(passes) > 1 else ""
        progress = _Progress(by_layer.gates.count, advance, title)
        yield from _within_memory(lm, forwards, [forwards.items[i] for i in some], run, progress)
        if some[-1] in ends:
            pause()


@torch.no_grad()
def up_to_layer(lm: CausalLM, forwards: Forwards[Item], end: int) -> Iterator[None]:
    """Runs forwards of a model that is run by layer up to the input of layer `end`, where a watch stops them.

    Yields:
        Once per forward, when its pass is done.

    Raises:
        UserError: an item alone does not fit into memory.
    """
    by_layer = lm.by_layer
    assert by_layer is not None

    def run(pass_: _Pass[Item], waiting: Waiting, progress: _Progress) -> list[list[Item]]:
        slots = through_layers(by_layer, waiting, pass_.jobs, progress, end=end)
        for own, job in zip(slots, pass_.jobs, strict=True):
            by_layer.gates.run_layer(end, [waiting.get(slot) for slot in own], job)
            waiting.drop(own)
        return [[] for _ in slots]

    sizes = [_waiting_bytes(lm, by_layer, forwards.groups_of(some)) for some in forwards.items]
    for some in plan_passes(sizes, by_layer.limit_bytes):
        progress = _Progress(end, lambda _amount, _shown: None, "")
        for _ in _within_memory(lm, forwards, [forwards.items[i] for i in some], run, progress):
            yield


def _waiting_bytes(lm: CausalLM, by_layer: ByLayer, groups: Sequence[PromptGroup]) -> int:
    """Bytes that the hidden states of a forward take between two layers."""
    return by_layer.taken(by_layer.bytes_per_position * computed_positions(lm, groups))


@dataclass(slots=True)
class _Pass(Generic[Item]):
    """The forwards of one pass. `working` is the one being computed; None while hidden states are stored or fetched."""

    lm: CausalLM
    items: Sequence[Sequence[Item]]
    groups: Sequence[Sequence[PromptGroup]]
    working: int | None = None
    jobs: Sequence[Job] = field(init=False)

    def __post_init__(self) -> None:
        self.jobs = [self._job(at) for at in range(len(self.items))]

    def _job(self, at: int) -> Job:
        return lambda: self.at_work(at, lambda: predict_groups(self.lm, self.groups[at]))

    def at_work(self, at: int, work: Callable[[], Result]) -> Result:
        """Does some work of a forward. If it fails, `working` still names this forward."""
        self.working = at
        try:
            result = work()
        except LayersDone:
            self.working = None
            raise
        self.working = None
        return result


def _within_memory(
    lm: CausalLM,
    forwards: Forwards[Item],
    items: Sequence[Sequence[Item]],
    run: Callable[[_Pass[Item], Waiting, _Progress], list[list[Result]]],
    progress: _Progress,
) -> list[list[Result]]:
    """The results of each forward of a pass, which is halved if memory runs out."""
    assert lm.by_layer is not None
    by_layer: ByLayer = lm.by_layer
    pass_ = _Pass(lm, items, [forwards.groups_of(some) for some in items])

    def once() -> list[list[Result]]:
        pass_.working = None
        return run(pass_, by_layer.waiting(lm.device), progress.of([sum_positions(groups) for groups in pass_.groups]))

    done, problem = attempt(once)
    if done is not None:
        progress.finish()
        return done
    at = pass_.working
    if at is not None and len(items[at]) > 1:
        count, middle = len(items[at]), (len(items[at]) + 1) // 2
        forwards.note(f"out of memory with {count} pairs in one forward: computing them in halves")
        halves = [items[at][:middle], items[at][middle:]]
        cut = _within_memory(lm, forwards, [*items[:at], *halves, *items[at + 1 :]], run, progress)
        return [*cut[:at], [*cut[at], *cut[at + 1]], *cut[at + 2 :]]
    if len(items) > 1:
        forwards.note(f"out of memory with {counted(len(items), 'forward')} in a pass: running it in halves")
        middle = (len(items) + 1) // 2
        first = _within_memory(lm, forwards, items[:middle], run, progress)
        return [*first, *_within_memory(lm, forwards, items[middle:], run, progress)]
    raise forwards.describe(items[0], problem)


class _Progress:
    """Reports progress: a token counts by the share of layers that it passed, and never twice."""

    def __init__(self, layers: int, advance: Advance, title: str) -> None:
        self._layers, self._advance, self._title = layers, advance, title
        self._tokens: Sequence[int] = ()
        self._finished = self._most = 0
        self._now: list[int] = []

    def of(self, tokens: Sequence[int]) -> _Progress:
        """Starts a pass over so many tokens, or repeats one."""
        self._tokens, self._now = tokens, [0] * len(tokens)
        return self

    def finish(self) -> None:
        """Ends a pass, or a part of one."""
        self._finished += sum(self._now)

    def __call__(self, layer: int, at: int) -> None:
        self._now[at] = self._tokens[at] * (layer + 1) // self._layers
        shown = f"{self._title}layer {layer + 1} of {self._layers}, forward {at + 1} of {len(self._tokens)}"
        done = self._finished + sum(self._now)
        self._advance(max(0, done - self._most), shown)
        self._most = max(self._most, done)


def plan_passes(sizes: Sequence[int], limit: int, ends: Collection[int] = ()) -> list[range]:
    """Divides forwards into passes of at most `limit` bytes; a pass that contains one of `ends` ends after it."""
    passes: list[range] = []
    begin = 0
    while begin < len(sizes):
        stop, total = begin, 0
        while stop < len(sizes) and (stop == begin or total + sizes[stop] <= limit):
            total += sizes[stop]
            stop += 1
        if stop < len(sizes):
            stop = next((end + 1 for end in range(stop - 1, begin - 1, -1) if end in ends), stop)
        passes.append(range(begin, stop))
        begin = stop
    return passes


def sum_positions(groups: Sequence[PromptGroup]) -> int:
    """Tokens of some groups, each prompt once."""
    return sum(group.total_tokens for group in groups)


def computed_positions(lm: CausalLM, groups: Sequence[PromptGroup]) -> int:
    """Positions that the model computes for some groups in its layout, padding included."""
    if lm.layout == "shared":
        return positions_of(groups, tree_of(lm))
    lengths = [len(single.branches[0].ids) for group in groups for single in separate(group)]
    return len(lengths) * max(lengths) if lm.padding else sum(lengths)

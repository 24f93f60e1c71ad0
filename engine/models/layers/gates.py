"""Runs any range of a decoder's layers through the decoder's own forward.

Every layer's `forward` gets a gate. Outside the range a gate passes the hidden states on; the gate before the range
inserts the given states; the last one takes them out. The decoder itself rebuilds masks, rotary tables, attention plans
and other layer inputs each time, which costs little compared with a layer. So nothing here depends on an architecture,
and the caller of the decoder (`scoring`) need not know about ranges.

Architectures whose layers exchange more than hidden states cannot run this way; `trial` detects them.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from dpoeng.engine.runtime.to_device import on_host, send

States = list[torch.Tensor]
"""Hidden states between two layers, one tensor per call of the decoder in a forward (usually one)."""


class LayersDone(BaseException):
    """Ends a forward after its range of layers. Derives from BaseException so that nothing handles it as an error."""


@dataclass(slots=True)
class _Stretch:
    """Layers `[begin, end)`: their inputs and their results."""

    begin: int
    end: int
    given: deque[torch.Tensor]
    taken: States = field(default_factory=list)
    takes: bool = False
    calls: int = 0


class Gates:
    """The gates of a decoder's layers. Without a range every forward is the model's own.

    Args:
        layers: the decoder's layers, in order.
        words: the input embedding.
        device: device of the hidden states; the embedding may be elsewhere.
        need: called with a layer's number before it runs, to load its weights.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        words: nn.Module,
        device: torch.device,
        need: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.device = device
        self.need = need
        self.count = len(layers)
        # The first layer that is run: another than 0 where stand-ins take the place of those below (a rehearsed trunk).
        self.first = 0
        self._limit = self.count
        self._stretch: _Stretch | None = None
        self._order: list[int] | None = None
        # Number of entries in the tuple that each layer returns; 0 for a plain tensor. Set by `observing`.
        self.entries: dict[int, int] = {}
        for number, layer in enumerate(layers):
            layer.forward = partial(self._layer, number, layer.forward)
        words.forward = partial(self._embed, words, words.forward)

    # ------------------------------------------------------------------ ranges

    def run_layer(self, number: int, states: States | None, forward: Callable[[], Any]) -> States:
        """Runs one layer, with gradient if enabled.

        Args:
            number: number of the layer.
            states: hidden states that enter it; None for the first layer, which uses the embedding.
            forward: calls the decoder once for each of `states`. Its result is not used, and it may be interrupted
                before it returns.

        Returns:
            the hidden states after the layer, in the shape of the input; of a last layer that computes only some
            positions (`engine/scoring/scored_end`), these.
        """
        calls = len(states) if states is not None else 0
        stretch = _Stretch(number, number + 1, deque(states or ()), takes=True, calls=calls)
        with self._within(stretch), contextlib.suppress(LayersDone):
            forward()
        return stretch.taken

    @contextlib.contextmanager
    def starting_at(self, begin: int, states: Iterable[torch.Tensor] = ()) -> Iterator[None]:
        """Within the block, every forward begins with layer `begin` (the number of layers: after the last one).

        Args:
            begin: nothing before it is computed.
            states: hidden states that enter it, one per call of the decoder; `give` adds more.
        """
        with self._within(_Stretch(begin, self.count, deque(states))):
            yield

    def give(self, states: Iterable[torch.Tensor]) -> None:
        """Sets the hidden states for the next forward within `starting_at`."""
        assert self._stretch is not None, "within starting_at"
        self._stretch.given = deque(states)

    @contextlib.contextmanager
    def only_first(self, count: int) -> Iterator[None]:
        """Within the block, the model has only this many layers."""
        before, self._limit = self._limit, min(count, self.count)
        try:
            yield
        finally:
            self._limit = before

    @contextlib.contextmanager
    def observing(self) -> Iterator[list[int]]:
        """Within the block, records the order in which layers run, and the form in which each returns hidden states."""
        self._order = []
        try:
            yield self._order
        finally:
            self._order = None

    def runs(self, number: int) -> bool:
        """Whether the current forward runs this layer instead of bypassing it."""
        return self._stretch is None or self._stretch.begin <= number < self._stretch.end

    @property
    def enters(self) -> bool:
        """Whether the forward at work begins at the bottom, and so uses what enters the first layer."""
        return self._stretch is None or self._stretch.begin <= self.first

    @contextlib.contextmanager
    def _within(self, stretch: _Stretch) -> Iterator[None]:
        before, self._stretch = self._stretch, stretch
        try:
            yield
        finally:
            self._stretch = before

    # ------------------------------------------------------------------ the gates

    def _layer(self, number: int, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        stretch = self._stretch
        if stretch is None:
            return self._as_it_is(number, forward, inputs, named)
        if stretch.begin <= number < stretch.end:
            self.need(number)
            output = forward(*inputs, **named)
            if stretch.takes and number == stretch.end - 1:
                stretch.taken.append(hidden_states_of(output))
                if len(stretch.taken) == stretch.calls:
                    raise LayersDone
                return self._passed(number, hidden_states_of(output).detach())
            return output
        if number == stretch.begin - 1:
            return self._passed(number, stretch.given.popleft())
        return self._passed(number, _entering(inputs, named))

    def _as_it_is(self, number: int, forward: Callable[..., Any], inputs: tuple[Any, ...], named: Any) -> Any:
        if number >= self._limit:
            return self._passed(number, _entering(inputs, named))
        self.need(number)
        output = forward(*inputs, **named)
        if self._order is not None:
            self._order.append(number)
            self.entries[number] = len(output) if isinstance(output, tuple) else 0
        return output

    def _passed(self, number: int, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which the layer would return them."""
        entries = self.entries.get(number, 0)
        return (hidden, *[None] * (entries - 1)) if entries else hidden

    def _embed(self, words: Any, forward: Callable[..., torch.Tensor], ids: torch.Tensor, *more: Any) -> torch.Tensor:
        """Looks tokens up; returns zeros if the result is not used. A stand-in looks nothing up."""
        if self._stretch is not None and self._stretch.begin > 0 and words.weight.shape[-1]:
            return torch.zeros((*ids.shape, words.weight.shape[-1]), dtype=words.weight.dtype, device=self.device)
        ids = on_host(ids) if words.weight.device.type == "cpu" else ids.to(words.weight.device)
        return send(forward(ids, *more), self.device)


def forward_inside(layer: nn.Module) -> Callable[..., Any]:
    """What a layer computes: its forward, without the gate if it has one."""
    forward: Callable[..., Any] = layer.forward
    return forward.args[1] if _is_gate(forward) else forward  # type: ignore[attr-defined]


def put_inside(layer: Any, forward: Callable[..., Any]) -> None:
    """Replaces what a layer computes; a gate around it stays."""
    gate = layer.forward
    layer.forward = partial(gate.func, gate.args[0], forward) if _is_gate(gate) else forward


def _is_gate(forward: Any) -> bool:
    return isinstance(forward, partial) and getattr(forward.func, "__func__", None) is Gates._layer


def hidden_states_of(output: Any) -> torch.Tensor:
    """The hidden states in a layer's output: its first element."""
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _entering(inputs: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    states: torch.Tensor = inputs[0] if inputs else named["hidden_states"]
    return states

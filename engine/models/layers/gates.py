"""Any stretch of a decoder's layers, run by the decoder's own forward.

Every layer's `forward` gets a gate. Outside of a stretch a gate passes the hidden states on; the gate before it puts in
those that are given; the last one takes them out. Masks, rotary tables, attention plans and what else the
layers are given are made anew by the decoder itself each time, which costs little beside a layer. So nothing here knows
an architecture, and whoever calls the decoder (`scoring`) need not know of stretches.

An architecture whose layers hand each other more than hidden states cannot be run so; `trial` finds it.
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

States = list[torch.Tensor]
"""Hidden states between two layers, a tensor for each call of the decoder in one forward (as a rule one)."""


class LayersDone(BaseException):
    """Ends a forward whose stretch of layers has been run. No error: nothing on the way may take it for one."""


@dataclass(slots=True)
class _Stretch:
    """Layers `[begin, end)`: what they are given, and what they have made."""

    begin: int
    end: int
    given: deque[torch.Tensor]
    taken: States = field(default_factory=list)
    takes: bool = False
    calls: int = 0


class Gates:
    """The gates of a decoder's layers. Without a stretch every forward is the model's own.

    Args:
        layers: the decoder's layers, in its order.
        words: the input embedding.
        device: where hidden states are; the embedding may be elsewhere.
        need: called with a layer's number before it is run, to have its weights in place.
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
        # How many entries each layer returns in a tuple; 0 for a plain tensor. Learnt by `observing`.
        self.entries: dict[int, int] = {}
        for number, layer in enumerate(layers):
            layer.forward = partial(self._layer, number, layer.forward)
        words.forward = partial(self._embed, words, words.forward)

    # ------------------------------------------------------------------ what is run

    def run_layer(self, number: int, states: States | None, forward: Callable[[], Any]) -> States:
        """Runs one layer, with gradient where that is on.

        Args:
            number: of the layer.
            states: hidden states that enter it; None for the first layer, which takes the embedding.
            forward: calls the decoder, once for each of `states`. What it returns is not used, and it may be ended
                before it returns.

        Returns:
            the hidden states after the layer, in the shape in which they came.
        """
        calls = len(states) if states is not None else 0
        stretch = _Stretch(number, number + 1, deque(states or ()), takes=True, calls=calls)
        with self._within(stretch), contextlib.suppress(LayersDone):
            forward()
        return stretch.taken

    @contextlib.contextmanager
    def starting_at(self, begin: int, states: Iterable[torch.Tensor] = ()) -> Iterator[None]:
        """Within it every forward begins with layer `begin` (the number of layers: after the last one).

        Args:
            begin: of what comes before it, nothing is computed.
            states: hidden states that enter it, one for each call of the decoder; `give` brings more.
        """
        with self._within(_Stretch(begin, self.count, deque(states))):
            yield

    def give(self, states: Iterable[torch.Tensor]) -> None:
        """The hidden states for the next forward within `starting_at`."""
        assert self._stretch is not None, "within starting_at"
        self._stretch.given = deque(states)

    @contextlib.contextmanager
    def only_first(self, count: int) -> Iterator[None]:
        """Within it the model has so many layers."""
        before, self._limit = self._limit, min(count, self.count)
        try:
            yield
        finally:
            self._limit = before

    @contextlib.contextmanager
    def observing(self) -> Iterator[list[int]]:
        """Within it the numbers of layers are noted as they are run, and in what shape each returns hidden states."""
        self._order = []
        try:
            yield self._order
        finally:
            self._order = None

    def runs(self, number: int) -> bool:
        """Whether the forward at work runs this layer, and does not pass hidden states by it."""
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
        """Hidden states as the layer would return them."""
        entries = self.entries.get(number, 0)
        return (hidden, *[None] * (entries - 1)) if entries else hidden

    def _embed(self, words: Any, forward: Callable[..., torch.Tensor], ids: torch.Tensor, *more: Any) -> torch.Tensor:
        """Looks tokens up; but zeros where what comes of them is not used. A stand-in for it looks none up."""
        if self._stretch is not None and self._stretch.begin > 0 and words.weight.shape[-1]:
            return torch.zeros((*ids.shape, words.weight.shape[-1]), dtype=words.weight.dtype, device=self.device)
        return forward(ids.to(words.weight.device), *more).to(self.device)


def hidden_states_of(output: Any) -> torch.Tensor:
    """The hidden states among what a layer returns: they come first."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _entering(inputs: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = inputs[0] if inputs else named["hidden_states"]
    return found

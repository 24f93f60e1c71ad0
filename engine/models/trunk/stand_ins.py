"""Stand-ins for the embedding and the lower layers of a decoder, so that its own forward begins at a layer.

The decoder's code runs unchanged: masks, rotary tables and the loop over its layers. The last stand-in returns the
stored states, whatever its input. If upper layers need more than hidden states from below (shared keys and values, an
embedding per layer), the numbers differ or the forward fails, which `rehearsing` detects.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dpoeng.engine.models.model import CausalLM, decoder_layers, decoder_of
from dpoeng.engine.models.trunk.layers import layer_list


class Passing(nn.Module):
    """Replaces a missing layer: returns its input.

    Args:
        layer: the replaced layer; plain attributes by which a decoder chooses masks are kept.
        as_tuple: whether layers of this decoder return tuples.
    """

    def __init__(self, layer: nn.Module, *, as_tuple: bool) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if isinstance(value, (str, int, float)) and name != "training":
                setattr(self, name, value)
        self._as_tuple = as_tuple

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self._as_tuple else hidden_states


class Entry(Passing):
    """Replaces the layer below the trunk: returns `states` [B, T, H], which are set before each forward."""

    def __init__(self, layer: nn.Module, *, number: int, as_tuple: bool) -> None:
        super().__init__(layer, as_tuple=as_tuple)
        self.number = number
        self.states: torch.Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        assert self.states is not None, "a forward above a trunk needs its states"
        return (self.states,) if self._as_tuple else self.states


class NoEmbedding(nn.Module):
    """Replaces the input embedding: returns the states, whose shape, dtype and device the decoder reads."""

    def __init__(self, rows: int, entry: Entry) -> None:
        super().__init__()
        self._rows = rows
        self._entry = [entry]  # in a list, so that it is not registered as a child

    @property
    def weight(self) -> torch.Tensor:
        """[V, 0], to give the number of tokens."""
        return torch.empty(self._rows, 0)

    def forward(self, *_: Any) -> torch.Tensor:
        (entry,) = self._entry
        assert entry.states is not None, "a forward above a trunk needs its states"
        return entry.states


def entry_of(base: nn.Module) -> Entry | None:
    """The stand-in of a model that begins at a trunk; None for a whole model."""
    return next((module for module in base.modules() if isinstance(module, Entry)), None)


def cut_below(base: Any, number: int, *, as_tuple: bool | None = None) -> Entry:
    """Replaces a model's layers below `number`, and its input embedding unless the head is the same tensor.

    Args:
        base: a causal language model, possibly without weights yet.
        number: the first layer that stays.
        as_tuple: whether its layers return tuples; None determines it by running the first one.
    """
    backbone = decoder_of(base)
    if as_tuple is None:
        as_tuple = returns_tuples(backbone)
    _, layers = layer_list(backbone)
    entry = Entry(layers[number - 1], number=number, as_tuple=as_tuple)
    for below in range(number - 1):
        layers[below] = Passing(layers[below], as_tuple=as_tuple)
    layers[number - 1] = entry
    if not shares_embedding(base):
        base.set_input_embeddings(NoEmbedding(base.get_input_embeddings().weight.shape[0], entry))
    return entry


def stood_for(base: nn.Module) -> tuple[str, ...]:
    """Prefixes, with their last dot, of the names that a model beginning at a trunk lacks."""
    return tuple(f"{name}." for name, module in base.named_modules() if isinstance(module, (Passing, NoEmbedding)))


def without_stand_ins(base: nn.Module, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' loading info without the tensors that stand-ins replace."""
    places = stood_for(base)
    left = [name for name in loaded["unexpected_keys"] if not name.startswith(places)]
    return {**loaded, "unexpected_keys": left}


def shares_embedding(base: Any) -> bool:
    """Whether the head is the embedding's tensor, which then must stay."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    text = base.config.get_text_config(decoder=True)
    tied = getattr(base.config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)
    return bool(tied) or head is None or head.weight is embedding.weight


class _Seen(Exception):  # noqa: N818  (no error)
    """Ends a forward once the required information is there."""


@torch.no_grad()
def returns_tuples(backbone: nn.Module) -> bool:
    """Whether a decoder's layers return tuples; runs the first one on the decoder's device."""
    answers: list[bool] = []

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        answers.append(isinstance(output, tuple))
        raise _Seen

    hook = decoder_layers(backbone)[0].register_forward_hook(look)
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(backbone.parameters()).device)
        with contextlib.suppress(_Seen):
            backbone(input_ids=ids, use_cache=False)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError):
        return False  # it cannot run without weights: the comparison with the cache will show a wrong answer
    finally:
        hook.remove()
    return bool(answers and answers[0])


@contextlib.contextmanager
def rehearsing(lm: CausalLM, number: int) -> Iterator[Entry]:
    """Makes a whole model begin at layer `number`; restores its own layers afterwards."""
    _, layers = layer_list(lm.backbone)
    below, embedding, before = list(layers[:number]), lm.base.get_input_embeddings(), lm.entry
    lm.entry = cut_below(lm.base, number, as_tuple=returns_tuples(lm.backbone))
    gates: Any = lm.by_layer.gates if lm.by_layer is not None else None
    if gates is not None:
        gates.first = number
    try:
        yield lm.entry
    finally:
        if gates is not None:
            gates.first = 0
        lm.base.set_input_embeddings(embedding)
        for place, layer in enumerate(below):
            layers[place] = layer
        lm.entry = before


class Reached(Exception):  # noqa: N818  (no error)
    """Ends a forward at the watched layer; `states` [B, T, H] are its input."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


class Watch:
    """Sees the states that enter a layer in each forward of a whole model. Create it with `watching`.

    Args:
        number: the layer.
        see: called with the description of each forward's content (`told`), and the states [B, T, H].
        stops: whether forwards end there, with `Reached`.
        runs: whether the current forward runs this layer; a model that runs layer by layer may be at another one.
    """

    def __init__(
        self, number: int, see: Callable[[Any, torch.Tensor], None], *, stops: bool, runs: Callable[[int], bool]
    ) -> None:
        self.number, self._see, self._stops, self._runs = number, see, stops, runs
        self.told: Any = None

    def look(self, _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """The pre-hook of the layer."""
        if not self._runs(self.number):
            return
        states = inputs[0] if inputs else named["hidden_states"]
        self._see(self.told, states)
        if self._stops:
            raise Reached(states)


@contextlib.contextmanager
def watching(lm: CausalLM, number: int, see: Callable[[Any, torch.Tensor], None], *, stops: bool) -> Iterator[None]:
    """Watches the states that enter layer `number` of a whole model, in every forward of the block."""
    _, layers = layer_list(lm.backbone)
    runs = (lambda _: True) if lm.by_layer is None else lm.by_layer.gates.runs
    lm.watch = Watch(number, see, stops=stops, runs=runs)
    hook = layers[number].register_forward_pre_hook(lm.watch.look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        lm.watch = None

"""Recurrent and convolution layers over packed rows: the state at a prompt's end starts each of its branches.

Gated delta nets, Mamba-2 and short convolutions read a text from left to right and keep a state. transformers lets such
a layer continue from a state in only one way: through a cache, which the layer asks for its old states and gives the
new ones. `_States` is such a cache for one layer; unlike transformers' own it never copies in place, so gradients flow
from the branches through the state into the prompt.

A layer runs twice over a row: over all prompts, then over all branches. Prompts of similar length are padded on the
left and run together, so that each state is that of its prompt's end; branches are padded on the right. Nothing here
depends on an architecture's name: `choose_layout` tests whether the numbers are right. Fused kernels
(flash-linear-attention, causal-conv1d, mamba-ssm) are used as in transformers, since the layer's own code runs.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from dpoeng.cache.words import counted
from dpoeng.engine.runtime.to_device import to_device
from dpoeng.engine.scoring.layout import GroupSpan

_UPDATES = {"update_conv_state", "update_recurrent_state"}
_CACHES = ("cache", "cache_params", "past_key_values")  # since transformers 5.24, and before
_MASKS = ("attention_mask", "conv_mask")

PADDING = 1.25
"""Limit for positions, padding included, per real one in a rectangle; other texts run separately."""


@dataclass(frozen=True, slots=True, eq=False)
class Rectangle:
    """Texts of a row, padded to one length.

    Attributes:
        rows: [B * L], the row's position at each place; padding repeats position 0.
        shape: (B, L).
        mask: [B, L], 1 on real positions; None if no text has padding before it.
        states: [B], index of the prompt's state that each text starts from; None for the prompts themselves.
    """

    rows: torch.Tensor
    shape: tuple[int, int]
    mask: torch.Tensor | None
    states: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Forks:
    """A row's rectangles, and [T], the place of each position of the row in their concatenated, flattened outputs.

    States are numbered in the order of the prompts' rectangles.
    """

    prompts: tuple[Rectangle, ...]
    branches: tuple[Rectangle, ...]
    places: torch.Tensor


def forks(groups: Sequence[GroupSpan], device: torch.device) -> Forks:
    """The rectangles of a row's spans. An empty prompt has the state of its padding, which is zero."""
    prompts = [(group.prompt_begin, group.prompt_end) for group in groups]
    branches = [(i, *branch) for i, group in enumerate(groups) for branch in group.branches]
    shared = any(end > begin for begin, end in prompts)
    order = _alike([end - begin for begin, end in prompts]) if shared else []
    state_of_prompt = {prompt: state for state, prompt in enumerate(i for part in order for i in part)}
    places = np.zeros(max(end for _, _, end in branches), dtype=np.int64)
    cursor = 0

    def rectangle(spans: Sequence[tuple[int, int]], states: Sequence[int] | None) -> Rectangle:
        nonlocal cursor
        sizes = [end - begin for begin, end in spans]
        # At least two positions after a state: with a single one, layers use their decoding kernels, which change the
        # state in place and have no gradient.
        length = max(*sizes, 1 if states is None else 2)
        rows = np.zeros((len(spans), length), dtype=np.int64)
        mask = np.zeros((len(spans), length), dtype=np.int64)
        for i, (begin, end) in enumerate(spans):
            first = length - sizes[i] if states is None else 0
            rows[i, first : first + sizes[i]] = np.arange(begin, end)
            mask[i, first : first + sizes[i]] = 1
            places[begin:end] = cursor + i * length + first + np.arange(sizes[i])
        cursor += rows.size
        return Rectangle(
            to_device(rows.reshape(-1), device),
            rows.shape,
            to_device(mask, device) if states is None and not mask.all() else None,
            to_device(np.array(states, dtype=np.int64), device) if states is not None and shared else None,
        )

    before = tuple(rectangle([prompts[i] for i in part], None) for part in order)
    after = tuple(
        rectangle([branches[i][1:] for i in part], [state_of_prompt.get(branches[i][0], 0) for i in part])
        for part in _alike([end - begin for _, begin, end in branches])
    )
    return Forks(before, after, to_device(places, device))


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of texts, longest first, in groups that need at most `PADDING` positions per real one."""
    parts: list[list[int]] = []
    longest = real = 0
    for i in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        if parts and longest * (len(parts[-1]) + 1) <= PADDING * (real + lengths[i]):
            parts[-1].append(i)
            real += lengths[i]
        else:
            parts.append([i])
            longest = real = lengths[i]
    return parts


@dataclass(slots=True, eq=False)
class _States:
    """One layer's states in the form that transformers' layers expect of a cache, by index (some have several)."""

    conv: dict[int, torch.Tensor] = field(default_factory=dict)
    recurrent: dict[int, torch.Tensor] = field(default_factory=dict)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The last inputs of a convolution [B, C, K], or None."""
        return self.conv.get(state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        """Stores the last inputs of a convolution; returns all that it runs over: the previous and the new ones."""
        before = self.conv.get(state_idx)
        seen = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        length = conv_kernel_size or conv_states.shape[-1]
        short = max(0, length - seen.shape[-1])
        self.conv[state_idx] = nn.functional.pad(seen, (short, 0))[..., -length:]
        return seen

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The state of a recurrence [B, ...], or None."""
        return self.recurrent.get(state_idx)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Stores the state of a recurrence."""
        self.recurrent[state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether there is a state to continue from."""
        return bool(self.conv or self.recurrent)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether old states are kept to go back to: never."""
        return False

    def starting(self, texts: torch.Tensor) -> _States:
        """The start states of these texts [B]."""
        conv = {kind: state.index_select(0, texts) for kind, state in self.conv.items()}
        return _States(conv, {kind: state.index_select(0, texts) for kind, state in self.recurrent.items()})


def _joined(parts: Sequence[_States]) -> _States:
    def join(states: Sequence[dict[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
        return {kind: torch.cat([one[kind] for one in states]) for kind in states[0]}

    return _States(join([part.conv for part in parts]), join([part.recurrent for part in parts]))


def fork_states(backbone: nn.Module) -> list[nn.Module]:
    """Makes layers with a state follow a row's plan; without a plan they run as before. Returns the layers.

    Can be called repeatedly: a layer is changed only once.
    """
    layers = [module for module in backbone.modules() if _keeps_state(type(module))]
    for layer in layers:
        if not (isinstance(layer.forward, partial) and layer.forward.func is _forked):
            takes = inspect.signature(layer.forward).parameters
            cache = next(name for name in _CACHES if name in takes)
            mask = next((name for name in _MASKS if name in takes), None)
            layer.forward = partial(_forked, layer.forward, cache, mask)
    return layers


def describe_forks(layers: int) -> str:
    """Describes the layers with a state and the code that computes them; empty if there are none."""
    if not layers:
        return ""
    kernels = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}
    installed = [name for package, name in kernels.items() if importlib.util.find_spec(package)]
    code = (
        f"with {', '.join(installed)} where they fit"
        if installed
        else f"in PyTorch, without {', '.join(kernels.values())}"
    )
    return f"; state passes from prompt to response in {counted(layers, 'layer')}, {code}"


def _keeps_state(kind: type[nn.Module]) -> bool:
    """Whether a class of layers reads its state from a cache and writes it to one."""
    methods = [method for method in vars(kind).values() if inspect.isfunction(method)]
    names = {name for method in methods for name in inspect.unwrap(method).__code__.co_names}
    return bool(names & _UPDATES) and any(name in inspect.signature(kind.forward).parameters for name in _CACHES)


def _forked(
    forward: Callable[..., torch.Tensor],
    of_cache: str,
    of_mask: str | None,
    /,
    hidden_states: torch.Tensor,
    *others: Any,
    dpoeng_plan: Any = None,
    **named: Any,
) -> torch.Tensor:
    """Runs a layer over a row [1, T, H] -> [1, T, H], by its own `forward(hidden_states, cache, mask)` on rectangles.

    `of_cache`, `of_mask`: what these arguments are called. `dpoeng_plan`: an `attention.AttentionPlan`.
    """
    if dpoeng_plan is None:
        return forward(hidden_states, *others, **named)
    if others or named.get(of_mask or "") is not None or named.get(of_cache) is not None:
        raise ValueError("a layer with a state takes no mask and no cache here: the plan defines the order")
    plan: Forks = dpoeng_plan.forks(hidden_states)
    row = hidden_states[0]

    def over(rectangle: Rectangle, states: _States) -> torch.Tensor:
        inputs = row.index_select(0, rectangle.rows).view(*rectangle.shape, -1)
        masked = named | {of_cache: states} | ({of_mask: rectangle.mask} if of_mask else {})
        return forward(hidden_states=inputs, **masked).flatten(0, 1)

    ends = [_States() for _ in plan.prompts]
    outputs = [over(rectangle, end) for rectangle, end in zip(plan.prompts, ends, strict=True)]
    state = _joined(ends) if ends else _States()
    starts = [_States() if one.states is None else state.starting(one.states) for one in plan.branches]
    outputs += [over(rectangle, start) for rectangle, start in zip(plan.branches, starts, strict=True)]
    return torch.cat(outputs).index_select(0, plan.places)[None]

"""Computes the end of a decoder only for scored positions: its last layer after the keys and values, and its last norm.

A position that predicts no scored token serves others only as key and value, and after the last attention not at all.
So in the last layer every position computes its key and value, while queries, output projection, MLP and
norms are computed only for positions that predict a scored token. Only for packed rows through FlashAttention
(`varlen`) on a GPU: products of fewer rows may round differently, so a CPU's numbers stay unchanged.

Nothing here depends on an architecture's name. The layer's own code runs twice: up to its attention over all positions,
then whole over the few, using that attention's result. `choose_layout` tests whether the numbers are right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from dpoeng.engine.models.layers.gates import forward_inside, put_inside
from dpoeng.engine.models.model import CausalLM, decoder_layers
from dpoeng.engine.scoring.attention import AttentionPlan


class _Reached(Exception):  # noqa: N818  (no error)
    """Ends a forward at the attention."""


def end_at_scored(lm: CausalLM, run: Callable[[], Any]) -> bool:
    """Makes the last decoder layer compute scored positions only, for packed rows through varlen.

    Call it before `enable_gradient_checkpointing`, which then wraps it. A layer that is loaded when it runs keeps its
    gate outside, so that both orders of the loops compute the same positions.

    Args:
        lm: the model, in the shared layout, with `attention` varlen.
        run: a forward over packed rows.

    Returns:
        Whether the last layer has one attention that takes a row's plan, followed by an output projection.
    """
    layer: Any = decoder_layers(lm.backbone)[-1]
    names = end_of(lm) or _parts(layer, run)
    if names is not None:
        put_end(lm, names)
    return names is not None


def put_end(lm: CausalLM, names: tuple[str, str]) -> None:
    """Makes the last decoder layer compute scored positions only, given the names that `end_of` returns."""
    layer: Any = decoder_layers(lm.backbone)[-1]
    if end_of(lm) is None:
        put_inside(layer, partial(_over_scored, layer, *names, forward_inside(layer)))
    lm.scored_end = True


def end_of(lm: CausalLM) -> tuple[str, str] | None:
    """The last layer's attention and the part of it that runs last, by name; None if `end_at_scored` has not run."""
    forward = forward_inside(decoder_layers(lm.backbone)[-1])
    if isinstance(forward, partial) and forward.func is _over_scored:
        _, attention, output, _ = forward.args
        return attention, output
    return None


def _parts(layer: nn.Module, run: Callable[[], Any]) -> tuple[str, str] | None:
    """Names of a layer's attention, and of the part of it that is called last, determined by a forward."""
    takes_plan: list[str] = []
    called: dict[str, list[str]] = {}
    hooks = []
    for name, child in layer.named_children():
        called[name] = []

        def look(_module: nn.Module, _inputs: Any, named: dict[str, Any], name: str = name) -> None:
            if named.get("dpoeng_plan") is not None:
                takes_plan.append(name)

        hooks.append(child.register_forward_pre_hook(look, with_kwargs=True))
        for inner_name, inner in child.named_children():
            hooks.append(inner.register_forward_pre_hook(_noting(called[name], inner_name)))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    once = len(takes_plan) == 1 and bool(called[takes_plan[0]])
    return (takes_plan[0], called[takes_plan[0]][-1]) if once else None


def _noting(names: list[str], name: str) -> Callable[..., None]:
    return lambda *_: names.append(name)


def _over_scored(
    layer: Any,
    attention_name: str,
    output_name: str,
    forward: Callable[..., Any],
    hidden_states: torch.Tensor,
    *others: Any,
    **named: Any,
) -> Any:
    """Runs a layer over a row [1, T, H]; returns its output at the M positions of the plan's `last`, [1, M, H]."""
    plan: AttentionPlan | None = named.get("dpoeng_plan")
    if plan is None or plan.last is None:
        return forward(hidden_states, *others, **named)
    rows = plan.last.rows_of(hidden_states)
    attention = getattr(layer, attention_name)
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(*inputs: Any, **keywords: Any) -> None:
        given.append((inputs, keywords))
        raise _Reached

    with _forward_of(attention, stop), contextlib.suppress(_Reached):
        forward(hidden_states, *others, **named)
    ((inputs, keywords),) = given
    # The attention's code expects all its rows back, so rows that are not needed are 0 up to here.
    hook = getattr(attention, output_name).register_forward_pre_hook(
        lambda _module, states: (states[0].index_select(1, rows), *states[1:])
    )
    try:
        attended = attention(*inputs, **{**keywords, "dpoeng_plan": plan.last})
    finally:
        hook.remove()
    with _forward_of(attention, lambda *_, **__: attended):
        return forward(hidden_states.index_select(1, rows), *others, **named)


@contextlib.contextmanager
def _forward_of(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Replaces a module's forward within the block."""
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own

"""The end of a decoder over scored positions only: its last layer behind the attention, and its last norm.

A hidden state that predicts no scored token is needed by other positions as key and value, and after the last attention
by none. So in the last layer every position gives its key and value, while queries, output projection, MLP and norms
are those of the positions that predict one. For packed rows through FlashAttention (`varlen`), on a GPU: a product of
fewer rows may round otherwise, so a CPU's numbers stay as they are.

Nothing here knows an architecture by name. The layer's own code runs twice: up to its attention over all positions, and
whole over the few, with what that attention gives. `choose_layout` tries whether the numbers come out right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from dpoeng.engine.models.model import CausalLM, decoder_layers
from dpoeng.engine.scoring.attention import AttentionPlan


class _Reached(Exception):  # noqa: N818  (no error)
    """Ends a forward at the attention."""


def end_at_scored(lm: CausalLM, run: Callable[[], Any]) -> bool:
    """Make the last decoder layer compute scored positions only, for packed rows through varlen.

    To be called before layers are recomputed (`enable_gradient_checkpointing`), which then wraps this.

    Args:
        lm: the model, in the shared layout, with `attention` varlen.
        run: a forward over packed rows.

    Returns:
        whether the last layer has one attention that takes a row's plan, and an output projection behind it.
    """
    layer: Any = decoder_layers(lm.backbone)[-1]
    if isinstance(layer.forward, partial) and layer.forward.func is _over_scored:
        lm.scored_end = True
        return True
    names = _parts(layer, run)
    if names is None:
        return False
    layer.forward = partial(_over_scored, layer, *names, layer.forward)
    lm.scored_end = True
    return True


def _parts(layer: nn.Module, run: Callable[[], Any]) -> tuple[str, str] | None:
    """Names of a layer's attention, and in that of the part that is called last: found by a forward."""
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
    """A layer over a row [1, T, H] -> its output at the M positions of the plan's `last`, [1, M, H]."""
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
    # The attention's code expects as many rows as it was given, so those that nobody asked for are 0 up to here.
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
    """Let a module compute something else for a while."""
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own

"""The forward of an experts module over stacks, quantised or adapted by LoRA.

The arithmetic is that of transformers' `grouped_mm` (`transformers/integrations/moe.py`): tokens sorted by expert, one
product per expert, results weighted by the router and summed over a token's experts. peft's forward of an adapted stack
computes the update of every weight of every expert, as large as the stack; here each token is multiplied by A and B.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dpoeng.engine.models.experts.product import add_update, grouped_product
from dpoeng.engine.models.experts.stacks import experts_modules, held_by, stack_names, stack_of

Updates = Mapping[str, Sequence[tuple[torch.Tensor, torch.Tensor, float]]]
"""Stack -> LoRA's (A [E, R, I], B [E, O, R], scale) of each active adapter."""


def experts_forward(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    updates: Updates | None = None,
) -> torch.Tensor:
    """Runs tokens [T, H] through their experts [T, K], weighted by [T, K] -> [T, H]."""
    count = stack_of(experts, "down_proj").shape[0]
    each = top_k_index.shape[-1]
    chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
    bounds = _bounds(chosen, count)
    x = hidden_states.index_select(0, order // each)

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        out = grouped_product(x, stack_of(experts, name), bounds)
        for a, b, scale in (updates or {}).get(name, ()):
            out = add_update(out, x, a, b, scale, bounds)
        return out + getattr(experts, f"{name}_bias")[chosen] if experts.has_bias else out

    up, down = ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"
    inner = product(up, x)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    out = product(down, inner)
    if getattr(experts, "has_post_expert_norm", False):
        out = experts.post_expert_norm(out)
    weighted = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(-1, each, out.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def _bounds(chosen: torch.Tensor, count: int) -> list[int]:
    """Where each expert's tokens begin and end; without values (meta), as even as possible."""
    if chosen.is_meta:
        return [len(chosen) * expert // count for expert in range(count + 1)]
    edges = torch.searchsorted(chosen, torch.arange(count + 1, device=chosen.device))
    return edges.tolist()


def multiply_by_stacks(model: nn.Module) -> None:
    """Makes experts modules multiply by their stacks as stored; these may be quantised, now or later."""
    for _, module in experts_modules(model):
        module.forward = types.MethodType(experts_forward, module)


def use_stack_product(model: nn.Module) -> None:
    """Applies LoRA on stacks (peft's `target_parameters`) token by token, if the stacks are frozen."""
    for module in model.modules():
        chain, experts = _wrappers(module)
        if chain and stack_names(experts) and "forward" not in module.__dict__:
            module.forward = types.MethodType(_adapted_forward, module)


def use_peft_stack_product(model: nn.Module) -> None:
    """Restores peft's own forward of wrapped stacks, if these are not quantised."""
    for module in model.modules():
        chain, experts = _wrappers(module)
        if chain and all(held_by(parameter) is None for parameter in experts.parameters()):
            module.__dict__.pop("forward", None)


def _wrappers(module: Any) -> tuple[list[Any], Any]:
    """peft's wrappers from this one inwards, one per parameter, and the innermost module."""
    chain = []
    while type(module).__name__ == "ParamWrapper":
        chain.append(module)
        module = module.base_layer
    return chain, module


def _adapted_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    chain, experts = _wrappers(self)
    if any(wrapper.merged for wrapper in chain):
        merged: torch.Tensor = type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        return merged
    updates = {wrapper.parameter_name: _factors(wrapper) for wrapper in chain}
    return experts_forward(experts, hidden_states, top_k_index, top_k_weights, updates)


def _factors(wrapper: Any) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    if wrapper.disable_adapters:
        return []
    count = wrapper.num_experts
    factors = []
    for name in wrapper.active_adapters:
        if name in wrapper.lora_A:
            a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
            factors.append((a.reshape(count, -1, a.shape[-1]), b, wrapper.scaling[name]))
    return factors

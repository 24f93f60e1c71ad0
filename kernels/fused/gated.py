"""A gated activation: `act(gate) * up` with SiLU or GELU's tanh form, in float32, rounded once.

(Shazeer 2020, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202)
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gated(gate: Tensor, up: Tensor, *, tanh: bool = False) -> Tensor:
    """`act(gate) * up` for tensors of one shape, with both gradients. `tanh`: GELU's tanh form instead of SiLU."""
    out: Tensor = _Gated.apply(gate, up, tanh)  # type: ignore[no-untyped-call]
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.tanh = tanh
        if gate.is_cuda:
            from dpoeng.kernels.fused.kernels import open_gate

            return open_gate(gate, up, tanh=tanh)
        out: Tensor = _forward_op(gate, up, tanh)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if gate.is_cuda:
            from dpoeng.kernels.fused.kernels import gate_gradients

            return (*gate_gradients(upstream[0], gate, up, tanh=ctx.tanh), None)
        return (*_backward_op(upstream[0], gate, up, ctx.tanh), None)


def plain_gated(gate: Tensor, up: Tensor, *, tanh: bool = False) -> Tensor:
    """The formula in plain PyTorch, in float32 (float64 for float64) with one rounding."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    opened = F.gelu(gate.to(wide), approximate="tanh") if tanh else F.silu(gate.to(wide))
    return (opened * up.to(wide)).to(gate.dtype)


@torch.library.custom_op("dpoeng::gated", mutates_args=())
def _forward_op(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return plain_gated(gate, up, tanh=tanh).clone()


@_forward_op.register_fake
def _(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("dpoeng::gated_backward", mutates_args=())
def _backward_op(upstream: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gate.dtype, torch.float32)
    x, above, pull = (tensor.to(wide) for tensor in (gate, up, upstream))
    # act(x) = x sigmoid(u): u = x for SiLU, u = 2 sqrt(2/pi) (x + 0.044715 x^3) for GELU's tanh form.
    factor = 2 * math.sqrt(2 / math.pi)
    inner = factor * (x + 0.044715 * x**3) if tanh else x
    slope = factor * (1 + 3 * 0.044715 * x**2) if tanh else torch.ones_like(x)
    share = torch.sigmoid(inner)
    gate_grad = pull * above * (share + x * share * (1 - share) * slope)
    return gate_grad.to(gate.dtype), (pull * x * share).to(up.dtype)


@_backward_op.register_fake
def _(upstream: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)

"""RMSNorm with a frozen weight: `x / sqrt(mean(x^2) + eps) * (weight + offset)`, in float32, rounded once.

Saves only x for the backward, where torch's operations save three tensors of its size in float32.
(Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; the offset of 1 is Gemma's)
"""

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMSNorm of x [..., H], weight [H] -> [..., H] in the dtype of x. Only x has a gradient."""
    out: Tensor = _RmsNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        return _normalize(x, weight, eps, offset, None)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return _normalize(x, weight, ctx.eps, ctx.offset, upstream[0]), None, None, None


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The formula in plain PyTorch, in float32 (float64 for float64) with one rounding."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide)
    inverse = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return (values * inverse * (weight.to(wide) + offset)).to(x.dtype)


def _normalize(x: Tensor, weight: Tensor, eps: float, offset: float, upstream: Tensor | None) -> Tensor:
    if x.is_cuda:
        from dpoeng.kernels.fused.kernels import normalize

        return normalize(x, weight, eps, offset, upstream)
    arguments = (x, weight, eps, offset)
    out: Tensor = _forward_op(*arguments) if upstream is None else _backward_op(upstream, *arguments)
    return out


@torch.library.custom_op("dpoeng::rms_norm", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return plain_rms_norm(x, weight, eps, offset).clone()


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("dpoeng::rms_norm_backward", mutates_args=())
def _backward_op(upstream: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    values, pull = x.to(wide), upstream.to(wide) * (weight.to(wide) + offset)
    inverse = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    normed = values * inverse
    return (inverse * (pull - normed * (pull * normed).mean(-1, keepdim=True))).to(x.dtype)


@_backward_op.register_fake
def _(upstream: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return torch.empty_like(x)

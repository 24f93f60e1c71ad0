"""Rotary positions of queries and keys in one launch: `x cos + rotate_half(x) sin`, in float32, rounded once.

(Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864; halves in the order of GPT-NeoX and transformers)
"""

from typing import Any

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated q [B, Hq, T, D] and k [B, Hk, T, D]; cos and sin [1 or B, T, D] get no gradient.

    The memory layout of the results is [B, T, H, D], as in the projections' outputs and FlashAttention's inputs.
    """
    turned: tuple[Tensor, Tensor] = _Rotary.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)  # type: ignore[no-untyped-call]
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin, inverse=False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*_turn(*upstream, *ctx.saved_tensors, inverse=True), None, None)


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch for [B, T, H, D], in float32 (float64 for float64) with one rounding."""
    return tuple(_plain_turn(x, cos, sin, 1.0) for x in (q, k))  # type: ignore[return-value]


def _plain_turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    (a, b), (cos_1, cos_2), (sin_1, sin_2) = (
        part.to(wide).chunk(2, dim=-1) for part in (x, cos.unsqueeze(2), sin.unsqueeze(2))
    )
    if sign < 0:  # the transposed rotation
        sin_1, sin_2 = -sin_2, -sin_1
    return torch.cat([a * cos_1 - b * sin_1, b * cos_2 + a * sin_2], dim=-1).to(x.dtype)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    if q.is_cuda:
        from dpoeng.kernels.fused.kernels import turn

        return turn(q, k, cos, sin, inverse=inverse)
    turned: tuple[Tensor, Tensor] = _turn_op(q, k, cos, sin, inverse)
    return turned


@torch.library.custom_op("dpoeng::rotary", mutates_args=())
def _turn_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    sign = -1.0 if inverse else 1.0
    return _plain_turn(q, cos, sin, sign).contiguous(), _plain_turn(k, cos, sin, sign).contiguous()


@_turn_op.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )

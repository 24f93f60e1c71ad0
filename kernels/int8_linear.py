"""A frozen linear layer with its weight in 8 bits: widened for the product, with activations as they are.

LLM.int8(), bitsandbytes' product on a GPU, rounds activations to 8 bits too, but for columns with outliers, which it
looks for over all rows of a forward. So a text's log-probs depend on what else is in its batch, by as much as the 8
bits themselves cost (docs/memory.md), and a cached reference could not be met again in batches of another size. Here
nothing is read off other rows or back from the device, and the backward needs the weight alone. What still moves with
the number of rows is the order of a sum, as in any 16-bit layer: cuBLAS chooses its kernel by it.
It costs a pass over the weight in 16 bits in each product.
(Dettmers et al. 2022, LLM.int8(), https://arxiv.org/abs/2208.07339)

Knows nothing of models.
"""

from typing import Any

import torch
from torch import Tensor

from dpoeng.kernels.cpu_linear import linear, multiplies_as_cpu, owned_linear


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias` for x [..., I] -> [..., O], W = codes [O, I] int8 * scales [O] / 127, in the dtype of x.

    The gradient of x alone: codes have none. What is returned is no view, so that it may be added to in place.
    """
    out: Tensor = _Int8Linear.apply(x, codes, scales, bias)  # type: ignore[no-untyped-call]
    return out


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """Save the weight in its stored form, and nothing of x."""
        ctx.save_for_backward(codes, scales)
        return owned_linear(x, widened(codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        codes, scales = ctx.saved_tensors
        return linear(upstream[0], widened(codes, scales, upstream[0].dtype).T), None, None, None


def widened(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] that 8-bit codes stand for, each entry rounded once; on a GPU in one pass."""
    if not multiplies_as_cpu(codes) and dtype != torch.float64:
        weight: Tensor = _widen_op(codes, scales, dtype)
        return weight
    return _plain_widened(codes, scales, dtype)


def _plain_widened(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


@torch.library.custom_op("dpoeng::widen_int8", mutates_args=())
def _widen_op(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    from dpoeng.kernels.widen_kernel import widen

    return widen(codes, scales, dtype)


@_widen_op.register_fake
def _(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)

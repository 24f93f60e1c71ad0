"""A frozen linear layer with 8-bit weights: the weight is widened for the product, activations stay as they are.

LLM.int8(), bitsandbytes' product on a GPU, also rounds activations to 8 bits, except for outlier columns that it looks
for over all rows of a forward. A text's log-probs then depend on the rest of its batch, by as much as the 8 bits
themselves cost (docs/memory.md), and batches of another size could not reproduce a cached reference. Here a row's
result does not read other rows or wait for the device, and the backward needs only the weight. Only the order of sums
still depends on the number of rows, as in any 16-bit layer, because cuBLAS chooses its kernel by it.
It costs one pass over the weight in 16 bits per product.
(Dettmers et al. 2022, LLM.int8(), https://arxiv.org/abs/2208.07339)

Independent of models.
"""

from typing import Any

import torch
from torch import Tensor

from dpoeng.kernels.cpu_linear import linear, multiplies_as_cpu, owned_linear


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias` for x [..., I] -> [..., O], W = codes [O, I] int8 * scales [O] / 127, in the dtype of x.

    Only x has a gradient: codes have none. The result is not a view, so that it can be added to in place.
    """
    out: Tensor = _Int8Linear.apply(x, codes, scales, bias)  # type: ignore[no-untyped-call]
    return out


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """Saves the weight in its stored form, and nothing of x."""
        ctx.save_for_backward(codes, scales)
        return owned_linear(x, widened(codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        codes, scales = ctx.saved_tensors
        return linear(upstream[0], widened(codes, scales, upstream[0].dtype).T), None, None, None


def widened(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] of these 8-bit codes, each entry rounded once; a single pass on a GPU."""
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

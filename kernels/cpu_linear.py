"""16-bit linear layers for CPUs without 16-bit units: products in float32, with weights widened tile by tile.

torch emulates such products: on a CPU with only AVX2, 8 times slower than float32, and 40 times in the backward. Many
rows share a tile widened to float32, so widening costs little, and the weights stay in 16 bits. Sums are float32 and
rounded once, as in bfloat16 hardware.

Independent of models.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpoeng.kernels.head import sum_dtype

ROWS = 1024  # rows that share a widened tile
TILE_BYTES = 32 * 2**20  # limit of a widened tile, and of its part of the rows and of the result

# Devices that multiply as a CPU does: also the meta device while a step on a CPU is simulated.
_devices = {"cpu"}


def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX).

    Products are then rounded to bfloat16, as in eager PyTorch. Other CPUs widen tiles to float32, which is faster there
    and keeps every product exact.
    """
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU multiplies tensors of the given dtype."""
    return torch.bfloat16 if dtype == torch.bfloat16 and native_bf16() else sum_dtype(dtype)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype in which a tensor is multiplied on its device; on a GPU its own dtype."""
    return product_dtype(x.dtype) if x.device.type in _devices else x.dtype


def multiplies_as_cpu(x: Tensor) -> bool:
    """Whether a tensor is multiplied as on a CPU; False on a GPU, and on the meta device when it stands for one."""
    return x.device.type in _devices


@contextlib.contextmanager
def as_on_cpu() -> Iterator[None]:
    """Makes products on the meta device take as much memory as on a CPU."""
    _devices.add("meta")
    try:
        yield
    finally:
        _devices.discard("meta")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias` for x [..., I], W [O, I], bias [O] -> [..., O], in the dtype of x and W, with all gradients."""
    if dtype_of_products(x) == x.dtype:
        return F.linear(x, weight, bias)
    out: Tensor = _WideLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def owned_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` for use inside an autograd function: without gradients, and the result is not a view.

    torch's result is a view if there is a bias, and autograd forbids in-place additions to a view from a function.
    """
    if dtype_of_products(x) != x.dtype:
        return _wide(x, weight, bias)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    rows, flat = x.reshape(-1, x.shape[-1]), out.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.T, out=flat)
    else:
        torch.addmm(bias.to(x.dtype), rows, weight.T, out=flat)
    return out


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        # The backward of a frozen weight needs no input: with LoRA no layer saves one.
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return _wide(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad = upstream[0].reshape(-1, upstream[0].shape[-1])
        x_grad = _wide(upstream[0], weight.T) if wants_x else None
        weight_grad = _wide(grad.T, x.reshape(-1, x.shape[-1]).T) if wants_weight else None
        return x_grad, weight_grad, grad.sum(0) if wants_bias else None


def _wide(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a b^T + bias` for a [..., K], b [N, K] -> [..., N], summed in `product_dtype`, rounded once; not a view."""
    wide = dtype_of_products(a)
    # At least 256 rows or columns at a time: with fewer, BLAS spends its time moving operands.
    width = a.shape[-1] * wide.itemsize
    step = min(ROWS, max(256, TILE_BYTES // width))
    tile = max(256, TILE_BYTES // max(width, step * wide.itemsize))
    result = a.new_empty((*a.shape[:-1], b.shape[0]))
    rows, out = a.reshape(-1, a.shape[-1]), result.view(-1, b.shape[0])
    for low in range(0, b.shape[0], tile):
        columns = slice(low, low + tile)
        factor = b[columns].to(wide).T
        for start in range(0, rows.shape[0], step):
            some = slice(start, start + step)
            product = rows[some].to(wide) @ factor
            out[some, columns] = product if bias is None else product.add_(bias[columns])
    return result

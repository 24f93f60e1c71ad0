"""A LoRA layer's products over a bfloat16 base on a GPU: float32 factors, multiplied as two bfloat16 parts each.

    add_update   out + scale * (x A^T) B^T, in out
    gradients    of A, B and x, from the gradient of out and what `add_update` returned

Two bfloat16 parts keep 16 of a float32 factor's 24 bits. Sums are float32 and rounded once where they are added to
bfloat16. Chunks of float32 products, as on a CPU, would cost as much as the rest of the layer, because the matrix units
do not multiply float32. The kernels are in `low_rank_kernels`.

Independent of models.
"""

import torch
from torch import Tensor

from dpoeng.kernels.cpu_linear import multiplies_as_cpu
from dpoeng.kernels.tiles import SPAN


def splits(x: Tensor, a: Tensor) -> bool:
    """Whether a product of x with float32 factors uses bfloat16 parts: on a GPU, over a bfloat16 base.

    float16 cannot represent the second part, which would be below its smallest number.
    """
    return x.dtype == torch.bfloat16 and a.dtype == torch.float32 and not multiplies_as_cpu(x)


def add_update(out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Adds `scale * (x A^T) B^T` to out [T, O] for x [T, I], A [r, I], B [O, r]; returns x A^T, [T, r] float32."""
    return _add_product(out, _rows_times_factor(x, a, 1.0, True), b, scale, False, True)


def gradients(
    grads: Tensor,
    x: Tensor | None,
    a: Tensor,
    b: Tensor,
    low: Tensor | None,
    scale: float,
    x_grad: Tensor | None,
    *,
    add: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A (needs x [T, I]) and B (needs low [T, r] from `add_update`).

    With `x_grad` [T, I], writes the gradient of x there, or adds to it. `grads` [T, O] is the gradient of out.
    """
    b_grad = _factor_gradient(low, grads, scale, False) if low is not None else None
    if x is None and x_grad is None:
        return None, b_grad
    sums = _rows_times_factor(grads, b, scale, False)
    low_grad = _add_product(x_grad, sums, a, 1.0, True, add) if x_grad is not None else sums.sum(0)
    return (_factor_gradient(low_grad, x, 1.0, True) if x is not None else None), b_grad


# Each calls its kernel on a GPU. Elsewhere it is a custom operation: on the meta device, where steps are simulated, one
# that can be counted; on a CPU, which only tests use, the kernel's arithmetic in plain PyTorch. The kernels are not
# wrapped in operations, because dispatch would cost as much time as a launch.


def _rows_times_factor(x: Tensor, factor: Tensor, scale: float, by_rank: bool) -> Tensor:
    if x.is_cuda:
        from dpoeng.kernels.low_rank_kernels import rows_times_factor

        return rows_times_factor(x, factor, scale, by_rank=by_rank)
    sums: Tensor = _rows_op(x, factor, scale, by_rank)
    return sums


def _add_product(out: Tensor, sums: Tensor, factor: Tensor, scale: float, by_rank: bool, add: bool) -> Tensor:
    if out.is_cuda:
        from dpoeng.kernels.low_rank_kernels import add_product

        return add_product(out, sums, factor, scale, by_rank=by_rank, add=add)
    low: Tensor = _add_op(out, sums, factor, scale, by_rank, add)
    return low


def _factor_gradient(low: Tensor, y: Tensor, scale: float, by_rank: bool) -> Tensor:
    if y.is_cuda:
        from dpoeng.kernels.low_rank_kernels import factor_gradient

        return factor_gradient(low, y, scale, by_rank=by_rank)
    grad: Tensor = _gradient_op(low, y, scale, by_rank)
    return grad


@torch.library.custom_op("dpoeng::low_rank_rows", mutates_args=())
def _rows_op(x: Tensor, factor: Tensor, scale: float, by_rank: bool) -> Tensor:
    spans = zip(torch.split(x, SPAN, 1), torch.split(factor if by_rank else factor.T, SPAN, 1), strict=True)
    sums = []
    for some, f in spans:
        high, rest = _parts(f)
        sums.append(scale * (some.float() @ high.T + some.float() @ rest.T))
    return torch.stack(sums)


@_rows_op.register_fake
def _(x: Tensor, factor: Tensor, scale: float, by_rank: bool) -> Tensor:
    spans, rank = -(-x.shape[1] // SPAN), factor.shape[0 if by_rank else 1]
    return x.new_empty((spans, x.shape[0], rank), dtype=torch.float32)


@torch.library.custom_op("dpoeng::add_low_rank", mutates_args=("out",))
def _add_op(out: Tensor, sums: Tensor, factor: Tensor, scale: float, by_rank: bool, add: bool) -> Tensor:
    low = sums.sum(0)
    (high, rest), (f_high, f_rest) = _parts(low), _parts(factor if by_rank else factor.T)
    product = scale * (high @ f_rest + rest @ f_high + high @ f_high)
    out.copy_(product + out.float() if add else product)
    return low


@_add_op.register_fake
def _(out: Tensor, sums: Tensor, factor: Tensor, scale: float, by_rank: bool, add: bool) -> Tensor:
    return sums.new_empty(sums.shape[1:])


@torch.library.custom_op("dpoeng::low_rank_gradient", mutates_args=())
def _gradient_op(low: Tensor, y: Tensor, scale: float, by_rank: bool) -> Tensor:
    high, rest = _parts(low)
    grad = scale * (rest.T @ y.float() + high.T @ y.float())
    return grad.contiguous() if by_rank else grad.T.contiguous()


@_gradient_op.register_fake
def _(low: Tensor, y: Tensor, scale: float, by_rank: bool) -> Tensor:
    rank, width = low.shape[1], y.shape[1]
    return low.new_empty((rank, width) if by_rank else (width, rank))


def _parts(factor: Tensor) -> tuple[Tensor, Tensor]:
    """hi and lo with hi + lo = factor to 16 bits; both are bfloat16 numbers stored as float32."""
    high = factor.bfloat16().float()
    return high, (factor - high).bfloat16().float()

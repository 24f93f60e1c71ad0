"""log p(target) from logits, for models whose head is not a plain frozen linear layer.

    token_logps = log_softmax(logits.float(), -1).gather(-1, targets)

Forward and backward are one fused pass each (kernels/row_kernels.py on a GPU, blocks of rows in PyTorch elsewhere).
Saved for the backward: the logits themselves and two numbers per row. Never allocated: float32 copies, log_softmax or
softmax of the logits; with `inplace=True` not even their gradient.
"""

from typing import Any

import torch
from torch import Tensor

from dpoeng.kernels.head import FLOATS, sum_dtype

BLOCK_ENTRIES = 2**20  # logits per block of rows outside the GPU: 4 MiB in float32


def token_logps_from_logits(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, inplace: bool = False
) -> Tensor:
    """log p(target) per row, differentiable by the logits.

    Args:
        logits: `[N, V]`, bfloat16, float16, float32 or float64; the last dimension contiguous.
        targets: `[N]` int64 in `[0, V)` or `ignore_index`.
        ignore_index: Rows with this target get 0.0 and no gradient.
        inplace: Let the backward overwrite the logits with their gradient. Nothing else may read them afterwards;
            another loss or a second backward stops at autograd's version check.

    Returns:
        `[N]` log-probs in nats, float32 (float64 for float64 logits), at most 0.

    ValueError: Shapes, dtypes or strides do not fit.
    IndexError: A target is outside the vocabulary, on a CPU. On a GPU that row is NaN.
        NotImplementedError: A second backward.
    """
    if logits.ndim != 2 or logits.dtype not in FLOATS or logits.shape[1] == 0:
        raise ValueError(f"logits must be float [N, V]; got {logits.dtype} {tuple(logits.shape)}")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64 or targets.device != logits.device:
        raise ValueError(
            f"targets must be int64 [N] = [{logits.shape[0]}] on {logits.device}; got {targets.dtype} "
            f"{tuple(targets.shape)} on {targets.device}"
        )
    if logits.stride(1) != 1:
        raise ValueError(
            f"the vocabulary must be the contiguous dimension of the logits; strides are {logits.stride()}"
        )
    logps: Tensor = _forward_op(logits, targets, ignore_index, inplace)[0]
    return logps


def plain_token_logps_from_logits(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """The same in plain PyTorch: the readable specification."""
    scored = targets != ignore_index
    columns = torch.where(scored, targets, 0).unsqueeze(1)
    picked = torch.log_softmax(logits.to(sum_dtype(logits.dtype)), -1).gather(1, columns).squeeze(1)
    return torch.where(scored, picked, 0.0)


# --- outside the GPU: blocks of rows in PyTorch ---


def _blocks(logits: Tensor) -> list[slice]:
    step = max(1, BLOCK_ENTRIES // logits.shape[1])
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]


def _exponentials(logits: Tensor, targets: Tensor, scored: Tensor, peak: Tensor | None) -> tuple[Tensor, ...]:
    """`exp(z - peak)` without the target `[R, V]`, and per row the target's column, `z_target - peak` and `peak`."""
    z = logits.to(sum_dtype(logits.dtype), copy=True)
    column = torch.where(scored, targets, 0).unsqueeze(1)
    if peak is None:
        peak = z.amax(1)
    below = z.gather(1, column).squeeze(1) - peak
    z.sub_(torch.where(peak == -torch.inf, 0.0, peak).unsqueeze(1)).exp_().scatter_(1, column, 0.0)
    return z, column, below, peak


def _blocked_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    scored = targets != ignore_index
    wrong = scored & ((targets < 0) | (targets >= logits.shape[1]))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(f"target {int(targets[row])} in row {row} is outside the vocabulary of {logits.shape[1]}")
    logps, peaks, rests = (logits.new_empty(logits.shape[0], dtype=sum_dtype(logits.dtype)) for _ in range(3))
    for rows in _blocks(logits):
        z, _, below, peaks[rows] = _exponentials(logits[rows], targets[rows], scored[rows], None)
        rests[rows] = rest = z.sum(1)
        picked = torch.where(below == 0, -torch.log1p(rest), below - (rest + below.exp()).log())
        logps[rows] = torch.where(scored[rows], picked, 0.0)
    return logps, peaks, rests


def _blocked_backward(
    logits: Tensor, targets: Tensor, upstream: Tensor, sums: tuple[Tensor, Tensor], grad: Tensor, ignore_index: int
) -> None:
    scored = targets != ignore_index
    for rows in _blocks(logits):
        peak, rest = sums[0][rows], sums[1][rows]
        z, column, below, _ = _exponentials(logits[rows], targets[rows], scored[rows], peak)
        factor = upstream[rows] / (rest + below.exp())
        z.mul_(-factor.unsqueeze(1)).scatter_(1, column, (rest * factor).unsqueeze(1))
        grad[rows] = torch.where(scored[rows].unsqueeze(1), z, 0.0)


# --- registration ---


@torch.library.custom_op("dpoeng::row_logps", mutates_args=())
def _forward_op(logits: Tensor, targets: Tensor, ignore_index: int, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _blocked_forward(logits, targets, ignore_index)


@_forward_op.register_kernel("cuda")
def _(logits: Tensor, targets: Tensor, ignore_index: int, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    if logits.dtype == torch.float64:
        return _blocked_forward(logits, targets, ignore_index)
    from dpoeng.kernels import row_kernels

    return row_kernels.forward(logits, targets, ignore_index)


@_forward_op.register_fake
def _(logits: Tensor, targets: Tensor, ignore_index: int, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    empty = logits.new_empty(logits.shape[0], dtype=sum_dtype(logits.dtype))
    return empty, torch.empty_like(empty), torch.empty_like(empty)


def _fill(
    logits: Tensor, targets: Tensor, upstream: Tensor, peaks: Tensor, rests: Tensor, grad: Tensor, ignore_index: int
) -> None:
    if logits.is_cuda and logits.dtype != torch.float64:
        from dpoeng.kernels import row_kernels

        row_kernels.backward(logits, targets, upstream, (peaks, rests), grad, ignore_index)
    else:
        _blocked_backward(logits, targets, upstream, (peaks, rests), grad, ignore_index)


@torch.library.custom_op("dpoeng::row_logps_backward", mutates_args=())
def _backward_op(
    logits: Tensor, targets: Tensor, upstream: Tensor, peaks: Tensor, rests: Tensor, ignore_index: int
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _fill(logits, targets, upstream, peaks, rests, grad, ignore_index)
    return grad


@_backward_op.register_fake
def _(logits: Tensor, targets: Tensor, upstream: Tensor, peaks: Tensor, rests: Tensor, ignore_index: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("dpoeng::row_logps_backward_", mutates_args=("logits",))
def _backward_inplace_op(
    logits: Tensor, targets: Tensor, upstream: Tensor, peaks: Tensor, rests: Tensor, ignore_index: int
) -> None:
    _fill(logits, targets, upstream, peaks, rests, logits, ignore_index)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, ctx.ignore_index, ctx.inplace = inputs
    _, peaks, rests = output
    ctx.mark_non_differentiable(peaks, rests)
    ctx.save_for_backward(logits, targets, peaks, rests)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True
        raise NotImplementedError(
            "token_logps_from_logits has no second derivative. Use plain_token_logps_from_logits where a double "
            "backward (create_graph=True) is needed."
        )
    logits, targets, peaks, rests = ctx.saved_tensors
    if ctx.inplace:
        logits = logits.detach()
        _backward_inplace_op(logits, targets, upstream, peaks, rests, ctx.ignore_index)
        grad = logits
    else:
        grad = _backward_op(logits, targets, upstream, peaks, rests, ctx.ignore_index)
    return grad, None, None, None


_forward_op.register_autograd(_backward, setup_context=_keep)

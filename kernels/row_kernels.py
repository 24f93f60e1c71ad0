"""Triton row kernels: log p(target) from logits `[N, V]`, forward and backward. One program per row, two reads.

    forward:   logps = log_softmax(logits.float(), -1).gather(-1, targets)
    backward:  grad  = upstream * (one_hot(targets) - softmax(logits))     # may overwrite the logits

Never allocated: float32 copies of the logits, log_softmax or softmax. Saved for the backward: 2 numbers per row.
"""

# Triton parses these signatures itself, and its decorator has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpoeng.kernels.device import launching_on
from dpoeng.kernels.rows import gradient_entries, load_raw, logp_of, row_sums, target_logit
from dpoeng.kernels.tiles import row_tile


@triton.jit
def row_forward(
    logits, targets, logps, peaks, rests, stride, size, ignore_index, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    counts = target != ignore_index
    peak, rest, below = row_sums(logits + row * stride, None, target, tl.where(counts, size, 0), 1.0, 1.0, BLOCK, False)
    tl.store(logps + row, tl.where(counts, logp_of(below, rest), 0.0))
    tl.store(peaks + row, peak)
    tl.store(rests + row, rest)


@triton.jit
def row_backward(
    logits, targets, upstream, peaks, rests, grad, stride, grad_stride, size, ignore_index, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    peak = tl.load(peaks + row)
    rest = tl.load(rests + row)
    source = logits + row * stride
    below = target_logit(source, None, target, size, 1.0, 1.0, False) - peak
    total = rest + tl.exp(below)
    tl.debug_barrier()  # in place: every warp must read the target's entry before one overwrites it
    # An ignored row must be 0 even if its logits or its upstream gradient are not finite.
    counts = target != ignore_index
    scale = tl.load(upstream + row).to(tl.float32)
    for low in range(0, size, BLOCK):
        cols = low + tl.arange(0, BLOCK)
        mask = cols < size
        z = load_raw(source, None, cols, mask)
        entries = gradient_entries(z, scale, cols, target, peak, rest, total)
        entries = tl.where(counts, entries, 0.0)
        tl.store(grad + row * grad_stride + cols, entries.to(grad.dtype.element_ty), mask=mask)


def forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, and two numbers per row for the backward. All `[N]` float32."""
    n, size = logits.shape
    logps, peaks, rests = (logits.new_empty(n, dtype=torch.float32) for _ in range(3))
    if n:
        tile = row_tile()
        with launching_on(logits):
            row_forward[(n,)](
                logits, targets.contiguous(), logps, peaks, rests, logits.stride(0), size, ignore_index,
                BLOCK=tile.block, **tile.options,
            )  # fmt: skip
    return logps, peaks, rests


def backward(
    logits: Tensor, targets: Tensor, upstream: Tensor, sums: tuple[Tensor, Tensor], grad: Tensor, ignore_index: int
) -> None:
    """Fills `grad` `[N, V]`, which may be `logits` itself: every program reads an entry before it writes it."""
    n, size = logits.shape
    if n:
        tile = row_tile()
        with launching_on(logits):
            row_backward[(n,)](
                logits, targets.contiguous(), upstream.contiguous(), *sums, grad, logits.stride(0), grad.stride(0),
                size, ignore_index, BLOCK=tile.block, **tile.options,
            )  # fmt: skip

"""GPU: the three products of a LoRA layer; float32 factors are multiplied as two bfloat16 parts each.

    low_rank_rows       low  = scale * x F^T           [T, W] x [r, W] -> [T, r], one sum per span of columns
    add_low_rank        out += scale * low F           [T, r] x [r, W] -> [T, W]
    low_rank_gradient   grad = scale * low^T y         [T, r] x [T, W] -> [r, W]

A factor is split as it is read, in registers: hi = bfloat16(F), lo = bfloat16(F - hi). The matrix units add the
products of the parts in float32; lo * lo is below float32's rounding of the sum and is left out. A layer takes two
launches forward and four backward. Plain products took seven and eighteen, most of them to split.

`low_rank_rows` divides the columns into spans of fixed width, so that few rows also fill a GPU; the next kernel adds
the spans in order. A row's numbers depend on that row alone, and every sum has one order. The number of rows is not
part of what is compiled. The tiles were chosen by the compilers' reports (`python -m dpoeng.kernels.aot`), and not
timed.
"""

# Triton parses these signatures itself, and its decorator has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpoeng.kernels.device import launching_on
from dpoeng.kernels.linear_logps import multiply
from dpoeng.kernels.tiles import SPAN, low_rank_tile


@triton.jit
def _load_factor(factor, ranks, cols, width, rank, BY_RANK: tl.constexpr):
    """[ranks, cols] of a float32 factor stored as [r, W] (BY_RANK) or [W, r]."""
    inside = (ranks < rank) & (cols < width)
    at = ranks * width + cols if BY_RANK else cols * rank + ranks
    return tl.load(factor + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["n"])
def low_rank_rows(
    x,
    factor,
    sums,
    n,
    width,
    rank,
    scale,
    BY_RANK: tl.constexpr,
    SPAN: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    span = tl.program_id(1)
    ranks = tl.program_id(2) * RANK + tl.arange(0, RANK)
    wide_rows = rows.to(tl.int64)
    total = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, width), COLS):
        cols = start + tl.arange(0, COLS)
        part = tl.load(
            x + wide_rows[:, None] * width + cols[None, :],
            mask=(rows < n)[:, None] & (cols < width)[None, :],
            other=0.0,
        )
        f = _load_factor(factor, ranks[None, :], cols[:, None], width, rank, BY_RANK)
        high = f.to(tl.bfloat16)
        total = multiply(part, high, total, UPCAST)
        total = multiply(part, (f - high.to(tl.float32)).to(tl.bfloat16), total, UPCAST)
    at = (span * n + wide_rows[:, None]) * rank + ranks[None, :]
    tl.store(sums + at, total * scale, mask=(rows < n)[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["n"])
def add_low_rank(
    out,
    sums,
    factor,
    low,
    n,
    width,
    rank,
    spans,
    scale,
    ADD: tl.constexpr,
    BY_RANK: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    wide_rows = rows.to(tl.int64)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for first in range(0, rank, RANK):
        ranks = first + tl.arange(0, RANK)
        inside = (rows < n)[:, None] & (ranks < rank)[None, :]
        some = tl.zeros([ROWS, RANK], dtype=tl.float32)
        for span in range(spans):
            at = (span * n + wide_rows[:, None]) * rank + ranks[None, :]
            some += tl.load(sums + at, mask=inside, other=0.0)
        if tl.program_id(1) == 0:  # saved for the gradients
            tl.store(low + wide_rows[:, None] * rank + ranks[None, :], some, mask=inside)
        f = _load_factor(factor, ranks[:, None], cols[None, :], width, rank, BY_RANK)
        high, f_high = some.to(tl.bfloat16), f.to(tl.bfloat16)
        total = multiply(high, (f - f_high.to(tl.float32)).to(tl.bfloat16), total, UPCAST)
        total = multiply((some - high.to(tl.float32)).to(tl.bfloat16), f_high, total, UPCAST)
        total = multiply(high, f_high, total, UPCAST)
    total = total * scale
    place = out + wide_rows[:, None] * width + cols[None, :]
    inside = (rows < n)[:, None] & (cols < width)[None, :]
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def low_rank_gradient(
    low,
    y,
    grad,
    n,
    width,
    rank,
    scale,
    BY_RANK: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    ranks = tl.program_id(1) * RANK + tl.arange(0, RANK)
    total = tl.zeros([RANK, COLS], dtype=tl.float32)
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        wide_rows = rows.to(tl.int64)
        turned = tl.load(
            low + wide_rows[None, :] * rank + ranks[:, None],
            mask=(rows < n)[None, :] & (ranks < rank)[:, None],
            other=0.0,
        )
        part = tl.load(
            y + wide_rows[:, None] * width + cols[None, :],
            mask=(rows < n)[:, None] & (cols < width)[None, :],
            other=0.0,
        )
        high = turned.to(tl.bfloat16)
        total = multiply((turned - high.to(tl.float32)).to(tl.bfloat16), part, total, UPCAST)
        total = multiply(high, part, total, UPCAST)
    at = ranks[:, None] * width + cols[None, :] if BY_RANK else cols[None, :] * rank + ranks[:, None]
    tl.store(grad + at, total * scale, mask=(ranks < rank)[:, None] & (cols < width)[None, :])


def rows_times_factor(x: Tensor, factor: Tensor, scale: float, *, by_rank: bool) -> Tensor:
    """`scale * x F^T` for x [T, W] bfloat16, F [r, W] or [W, r] float32 -> [S, T, r], to be summed over S spans."""
    x, factor = x.contiguous(), factor.contiguous()
    (n, width), rank = x.shape, factor.shape[0 if by_rank else 1]
    spans = triton.cdiv(width, SPAN)
    sums = torch.empty((spans, n, rank), dtype=torch.float32, device=x.device)
    tile, block = low_rank_tile("rows", rank)
    with launching_on(x):
        low_rank_rows[(triton.cdiv(n, tile.rows), spans, triton.cdiv(rank, block))](
            x, factor, sums, n, width, rank, scale,
            BY_RANK=by_rank, SPAN=SPAN, RANK=block, ROWS=tile.rows, COLS=tile.cols, UPCAST=_upcast(), **tile.options,
        )  # fmt: skip
    return sums


def add_product(out: Tensor, sums: Tensor, factor: Tensor, scale: float, *, by_rank: bool, add: bool) -> Tensor:
    """Adds `scale * low F` to out [T, W], or writes it there; returns low = sum over spans, [T, r] float32.

    Raises:
        ValueError: `out` is not contiguous: the result would go to a copy.
    """
    if not out.is_contiguous():
        raise ValueError("the output of a LoRA layer must be contiguous")
    factor = factor.contiguous()
    (spans, n, rank), width = sums.shape, out.shape[1]
    low = torch.empty((n, rank), dtype=torch.float32, device=out.device)
    tile, block = low_rank_tile("add", rank)
    with launching_on(out):
        add_low_rank[(triton.cdiv(n, tile.rows), triton.cdiv(width, tile.cols))](
            out, sums, factor, low, n, width, rank, spans, scale,
            ADD=add, BY_RANK=by_rank, RANK=block, ROWS=tile.rows, COLS=tile.cols, UPCAST=_upcast(), **tile.options,
        )  # fmt: skip
    return low


def factor_gradient(low: Tensor, y: Tensor, scale: float, *, by_rank: bool) -> Tensor:
    """`scale * low^T y` for low [T, r] float32, y [T, W] bfloat16 -> [r, W] or [W, r] float32."""
    y = y.contiguous()
    (n, rank), width = low.shape, y.shape[1]
    grad = torch.empty((rank, width) if by_rank else (width, rank), dtype=torch.float32, device=y.device)
    tile, block = low_rank_tile("gradient", rank)
    with launching_on(y):
        low_rank_gradient[(triton.cdiv(width, tile.cols), triton.cdiv(rank, block))](
            low, y, grad, n, width, rank, scale,
            BY_RANK=by_rank, RANK=block, ROWS=tile.rows, COLS=tile.cols, UPCAST=_upcast(), **tile.options,
        )  # fmt: skip
    return grad


def _upcast() -> bool:
    return bool(triton.knobs.runtime.interpret)

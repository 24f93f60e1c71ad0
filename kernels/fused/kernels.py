"""The Triton kernels of `rms_norm`, `rotary` and `gated`, forward and backward.

Each row is read once and stays in registers. Its numbers depend on that row alone, and every sum has one order. The
number of rows is not part of what is compiled: another number would not be another program.
"""

# Triton parses these signatures itself, and its decorator has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpoeng.kernels.device import launching_on
from dpoeng.kernels.tiles import launch_options

ELEMENTS = 4096  # per program
GATED_BLOCK = {"cuda": 1024, "hip": 2048}  # 16 bytes a thread; AMD's warps have twice as many


@triton.jit(do_not_specialize=["n"])
def rms_norm_forward(x, weight, out, n, width, eps, OFFSET: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    at = rows.to(tl.int64)[:, None] * width + cols[None, :]
    inside = (rows < n)[:, None] & (cols < width)[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
    factor = tl.load(weight + cols, mask=cols < width, other=0.0).to(tl.float32) + OFFSET
    tl.store(out + at, (values * inverse[:, None] * factor[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def rms_norm_backward(
    upstream, x, weight, out, n, width, eps, OFFSET: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    at = rows.to(tl.int64)[:, None] * width + cols[None, :]
    inside = (rows < n)[:, None] & (cols < width)[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
    factor = tl.load(weight + cols, mask=cols < width, other=0.0).to(tl.float32) + OFFSET
    pull = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
    normed = values * inverse[:, None]
    along = tl.sum(pull * normed, axis=1) / width
    tl.store(out + at, (inverse[:, None] * (pull - normed * along[:, None])).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_heads(x, out, token, cos, cos_2, sin, sin_2, cols, heads, half, INVERSE: tl.constexpr, HEADS: tl.constexpr):
    """Rotates one token's heads, [heads, 2 half]: (a, b) -> (a cos - b sin, b cos_2 + a sin_2)."""
    rows = tl.arange(0, HEADS)
    at = (token * heads + rows)[:, None] * (2 * half) + cols[None, :]
    inside = (rows < heads)[:, None] & (cols < half)[None, :]
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:  # the transposed rotation, for the gradient
        new_first = first * cos[None, :] + second * sin_2[None, :]
        new_second = second * cos_2[None, :] - first * sin[None, :]
    else:
        new_first = first * cos[None, :] - second * sin[None, :]
        new_second = second * cos_2[None, :] + first * sin_2[None, :]
    tl.store(out + at, new_first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + half, new_second.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["angles"])
def rotate(
    q,
    k,
    q_out,
    k_out,
    cosines,
    sines,
    q_heads,
    k_heads,
    half,
    angles,
    INVERSE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, HALF)
    at, inside = (token % angles) * (2 * half) + cols, cols < half
    cos = tl.load(cosines + at, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cosines + at + half, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sines + at, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sines + at + half, mask=inside, other=0.0).to(tl.float32)
    _rotate_heads(q, q_out, token, cos, cos_2, sin, sin_2, cols, q_heads, half, INVERSE, Q_HEADS)
    _rotate_heads(k, k_out, token, cos, cos_2, sin, sin_2, cols, k_heads, half, INVERSE, K_HEADS)


@triton.jit
def _gate(x, TANH: tl.constexpr):
    """x sigmoid(u) and its derivative; u = x for SiLU, u = 2 sqrt(2/pi) (x + 0.044715 x^3) for GELU's tanh form."""
    if TANH:
        inner, slope = 1.5957691216057308 * (x + 0.044715 * x * x * x), 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        inner, slope = x, 1.0
    share = 1 / (1 + tl.exp(-inner))
    return x * share, share + x * share * (1 - share) * slope


@triton.jit
def gated_forward(gate, up, out, size, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    opened, _ = _gate(tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32), TANH)
    value = opened * tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def gated_backward(upstream, gate, up, gate_grad, up_grad, size, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    opened, slope = _gate(tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32), TANH)
    pull = tl.load(upstream + at, mask=at < size, other=0.0).to(tl.float32)
    above = tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(gate_grad + at, (pull * above * slope).to(gate_grad.dtype.element_ty), mask=at < size)
    tl.store(up_grad + at, (pull * opened).to(up_grad.dtype.element_ty), mask=at < size)


def normalize(x: Tensor, weight: Tensor, eps: float, offset: float, upstream: Tensor | None = None) -> Tensor:
    """RMSNorm of x [..., H], or the gradient of x if `upstream` is given."""
    x, weight = x.contiguous(), weight.contiguous()
    width = x.shape[-1]
    n, columns = x.numel() // width, triton.next_power_of_2(width)
    rows, out = max(1, ELEMENTS // columns), torch.empty_like(x)
    sizes = {"OFFSET": offset, "ROWS": rows, "COLS": columns, **launch_options(norm_warps(rows * columns))}
    with launching_on(x):
        grid = (triton.cdiv(n, rows),)
        if upstream is None:
            rms_norm_forward[grid](x, weight, out, n, width, eps, **sizes)
        else:
            rms_norm_backward[grid](upstream.contiguous(), x, weight, out, n, width, eps, **sizes)
    return out


def norm_warps(elements: int) -> int:
    """Warps for 16 entries a thread, so that a row of any width stays in registers."""
    return min(16, max(1, elements // 512))


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Rotated q [B, T, Hq, D] and k [B, T, Hk, D]; cos and sin [1 or B, T, D]."""
    q, k, cos, sin = q.contiguous(), k.contiguous(), cos.contiguous(), sin.contiguous()
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    batch, tokens, q_heads, size = q.shape
    with launching_on(q):
        rotate[(batch * tokens,)](
            q, k, q_out, k_out, cos, sin, q_heads, k.shape[2], size // 2, cos.shape[0] * tokens,
            INVERSE=inverse, Q_HEADS=triton.next_power_of_2(q_heads), K_HEADS=triton.next_power_of_2(k.shape[2]),
            HALF=triton.next_power_of_2(size // 2), **launch_options(4),
        )  # fmt: skip
    return q_out, k_out


def open_gate(gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
    """act(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out, size, block = torch.empty_like(gate), gate.numel(), _gated_block()
    with launching_on(gate):
        gated_forward[(triton.cdiv(size, block),)](gate, up, out, size, TANH=tanh, BLOCK=block, **launch_options(4))
    return out


def gate_gradients(upstream: Tensor, gate: Tensor, up: Tensor, *, tanh: bool) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    upstream, gate, up = upstream.contiguous(), gate.contiguous(), up.contiguous()
    gate_grad, up_grad, size, block = torch.empty_like(gate), torch.empty_like(up), gate.numel(), _gated_block()
    with launching_on(gate):
        gated_backward[(triton.cdiv(size, block),)](
            upstream, gate, up, gate_grad, up_grad, size, TANH=tanh, BLOCK=block, **launch_options(4)
        )
    return gate_grad, up_grad


def _gated_block() -> int:
    return GATED_BLOCK["hip" if torch.version.hip else "cuda"]

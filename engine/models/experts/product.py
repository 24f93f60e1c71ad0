"""Products of tokens with their experts' matrices, and with LoRA's: exact, for a few experts at a time.

Tokens are sorted by expert. The backward of a frozen stack needs only its weights, so no tokens are saved; LoRA's saves
them unchanged. At most `PART_BYTES` of widened weights exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dpoeng.engine.models.experts.stacks import Stack
from dpoeng.kernels.cpu_linear import linear

PART_BYTES = 256 * 2**20
"""Limit for matrices that are widened together."""


def grouped_product(x: torch.Tensor, stack: Stack, bounds: Sequence[int]) -> torch.Tensor:
    """x [S, I] -> [S, O]: rows `bounds[e]` to `bounds[e + 1]` are multiplied by the transposed matrix of expert e."""
    out: torch.Tensor = _Grouped.apply(x, stack, bounds)  # type: ignore[no-untyped-call]
    return out


def add_update(
    out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, bounds: Sequence[int]
) -> torch.Tensor:
    """Adds `scale * (x A_e^T) B_e^T` to out in place, for LoRA's a [E, R, I] and b [E, O, R], in their dtype."""
    updated: torch.Tensor = _Update.apply(out, x, a, b, scale, bounds)  # type: ignore[no-untyped-call]
    return updated


def _spans(bounds: Sequence[int], first: int, last: int, meta: bool) -> Iterator[tuple[int, slice]]:
    """Each expert with tokens, and its rows; without values (`dpoeng plan`) only the first two."""
    spans = ((e, slice(bounds[e], bounds[e + 1])) for e in range(first, last) if bounds[e] < bounds[e + 1])
    for i, span in enumerate(spans):
        if meta and i == 2:
            return
        yield span


def _multiply(x: torch.Tensor, out: torch.Tensor, stack: Stack, bounds: Sequence[int], *, back: bool) -> None:
    experts, outputs, inputs = stack.shape
    step = max(1, PART_BYTES // (outputs * inputs * x.element_size()))
    for first in range(0, step if x.is_meta else experts, step):
        last = min(first + step, experts)
        if bounds[first] == bounds[last]:
            continue
        weights = stack.widened(first, last, x.dtype)
        for expert, rows in _spans(bounds, first, last, x.is_meta):
            weight = weights[expert - first]
            out[rows] = linear(x[rows], weight.T if back else weight)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stack: Stack, bounds: Sequence[int]) -> torch.Tensor:
        """Saves nothing of x."""
        ctx.stack, ctx.bounds = stack, bounds
        out = x.new_empty(x.shape[0], stack.shape[1])
        _multiply(x, out, stack, bounds, back=False)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of x."""
        grad = upstream[0].new_empty(upstream[0].shape[0], ctx.stack.shape[2])
        _multiply(upstream[0], grad, ctx.stack, ctx.bounds, back=True)
        return grad, None, None


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        bounds: Sequence[int],
    ) -> torch.Tensor:
        """Saves x and x A^T [S, R]."""
        low = x.new_empty((x.shape[0], a.shape[1]), dtype=a.dtype)
        for expert, rows in _spans(bounds, 0, len(a), x.is_meta):
            low[rows] = x[rows].to(a.dtype) @ a[expert].T
            out[rows] += (scale * (low[rows] @ b[expert].T)).to(out.dtype)
        ctx.save_for_backward(x, a, b, low)
        ctx.scale, ctx.bounds = scale, bounds
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of out, x, A and B."""
        x, a, b, low = ctx.saved_tensors
        grads = upstream[0]
        x_grad = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        a_grad, b_grad = torch.zeros_like(a), torch.zeros_like(b)
        for expert, rows in _spans(ctx.bounds, 0, len(a), x.is_meta):
            grad = grads[rows].to(b.dtype) * ctx.scale
            b_grad[expert] = grad.T @ low[rows]
            low_grad = grad @ b[expert]
            a_grad[expert] = low_grad.T @ x[rows].to(a.dtype)
            if x_grad is not None:
                x_grad[rows] = (low_grad @ a[expert]).to(x.dtype)
        return grads, x_grad, a_grad, b_grad, None, None

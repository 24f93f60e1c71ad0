"""Weights as stored: codes, scales and zero points, widened for a product and freed after it.

A weight is `(code - zero point) * scale`, computed in float32 and rounded once to the dtype of the product. Codes and
zero points are whole numbers up to 256, or floats of 4 or 8 bits: all exact in bfloat16, so that the product with the
scale is the only rounding.

The parameter of such a layer is a placeholder, like that of quantised experts (`experts/stacks`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpoeng.engine.models.experts.stacks import held_by, placeholder
from dpoeng.kernels.cpu_linear import linear, owned_linear

PART_NUMBERS = 2**23
"""The number of weights to widen at a time, with a few temporary bytes each."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredWeight:
    """One matrix [O, I].

    Attributes:
        codes: [O, I] in float8 or int8; or [O, bytes], uint8, if `table` gives the meaning of a byte's codes.
        scales: [A, B], each for `block` weights; in the files' dtype.
        shape: (O, I).
        block: rows and columns that share a scale; the last ones may be fewer.
        zeros: whole numbers [A, B] to subtract from the codes first; None if there are none.
        groups: [I], int32: the column of `scales` for each input; None if they are consecutive.
        table: [256, codes per byte], float32; shared by all weights of its kind.
        divisor: [1], float32, by which all scales are divided; None for 1.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, int]
    block: tuple[int, int]
    zeros: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    table: torch.Tensor | None = None
    divisor: torch.Tensor | None = None

    def widened(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [O, I] in `dtype`."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        self.widen_into(out)
        return out

    @torch.no_grad()
    def widen_into(self, out: torch.Tensor) -> None:
        """Writes the matrix into `out` [O, I], some rows at a time."""
        rows, columns = self.shape
        height = self.block[0] if len(self.scales) > 1 else 1
        step = height * max(1, PART_NUMBERS // (columns * height))
        starts = range(0, rows, step)
        for start in starts[:2] if out.is_meta else starts:  # in `dpoeng plan`, two need as much memory as all
            some = slice(start, min(start + step, rows))
            self._widen_rows(some, out[some])

    def _widen_rows(self, rows: slice, out: torch.Tensor) -> None:
        codes = self.codes[rows]
        if self.table is None:
            out.copy_(codes)
        else:
            values = self.table.to(out.dtype).index_select(0, codes.reshape(-1).int())
            out.copy_(values.view(len(codes), -1)[:, : self.shape[1]])
        if self.zeros is not None:
            self._each(rows, out, self.zeros.float(), torch.Tensor.sub_)
        scales = self.scales.float()
        self._each(rows, out, scales if self.divisor is None else scales / self.divisor, torch.Tensor.mul_)

    def _each(self, rows: slice, out: torch.Tensor, grid: torch.Tensor, operation: Any) -> None:
        """Applies an operation in place with the grid's value for each weight's block."""
        height, width = self.block
        if len(grid) > 1:
            first = rows.start // height
            grid = grid[first : first - (-len(out) // height)]
            grid = grid if height == 1 else grid.repeat_interleave(height, 0)[: len(out)]
        if self.groups is not None:
            operation(out, grid.index_select(1, self.groups))
            return
        whole = self.shape[1] // width
        if whole:
            each = out[:, : whole * width].view(len(out), whole, width)
            operation(each, grid[:, :whole, None])
        if whole * width < self.shape[1]:
            operation(out[:, whole * width :], grid[:, whole:])

    def tensors(self) -> list[torch.Tensor]:
        """The tensors in memory."""
        held = (self.codes, self.scales, self.zeros, self.groups, self.table, self.divisor)
        return [tensor for tensor in held if tensor is not None]

    def __deepcopy__(self, memo: Any) -> StoredWeight:
        """Returns itself: copies of a model share frozen weights."""
        return self


@dataclass(frozen=True, slots=True, eq=False)
class StoredStack:
    """Experts whose matrices [O, I] are one or more stored ones, concatenated by rows: for example `gate` and `up`."""

    experts: Sequence[Sequence[StoredWeight]]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, O, I)."""
        return len(self.experts), sum(part.shape[0] for part in self.experts[0]), self.experts[0][0].shape[1]

    def widened(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """The matrices [n, O, I] of some consecutive experts."""
        device = self.experts[0][0].codes.device
        out = torch.empty((last - first, *self.shape[1:]), dtype=dtype, device=device)
        some = self.experts[first:last]
        for matrix, parts in list(zip(out, some, strict=True))[: 2 if out.is_meta else None]:
            start = 0
            for part in parts:
                part.widen_into(matrix[start : start + part.shape[0]])
                start += part.shape[0]
        return out

    def tensors(self) -> list[torch.Tensor]:
        """The tensors in memory."""
        return [tensor for parts in self.experts for part in parts for tensor in part.tensors()]

    def __deepcopy__(self, memo: Any) -> StoredStack:
        """Returns itself: copies of a model share frozen weights."""
        return self


class StoredLinear(nn.Linear):
    """A frozen linear layer over a `StoredWeight`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T + bias` for x [..., I] -> [..., O], in the dtype of x."""
        held = held_by(self.weight)
        if held is None:  # a copy that an adapter trained (peft's modules_to_save)
            return linear(x, self.weight, self.bias)
        out: torch.Tensor = _Product.apply(x, held, self.bias)  # type: ignore[no-untyped-call]
        return out


def store_linear(module: nn.Linear, weight: StoredWeight, dtype: torch.dtype) -> None:
    """Turns a linear layer into one with a stored weight."""
    assert type(module) is nn.Linear
    module.__class__ = StoredLinear
    like = torch.empty((1, 1), dtype=dtype, device=weight.codes.device).expand(weight.shape)
    module.weight = placeholder(weight, like)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """Saves nothing of x, and only the stored weight."""
        ctx.weight = weight
        return owned_linear(x, weight.widened(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x and of the bias."""
        wants_x, _, wants_bias = ctx.needs_input_grad
        x_grad = linear(upstream[0], ctx.weight.widened(upstream[0].dtype).T) if wants_x else None
        bias_grad = upstream[0].reshape(-1, upstream[0].shape[-1]).sum(0) if wants_bias else None
        return x_grad, None, bias_grad


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@functools.lru_cache(maxsize=64)
def code_table(bits: int, offset: int, device: torch.device, *, floats: bool = False) -> torch.Tensor:
    """The meaning of each byte's codes, the lowest bits first: whole numbers minus an offset, or e2m1 floats."""
    values = [*_E2M1, *(-value for value in _E2M1)] if floats else [float(code - offset) for code in range(1 << bits)]
    mask, shifts = (1 << bits) - 1, range(0, 8, bits)
    return torch.tensor([[values[byte >> shift & mask] for shift in shifts] for byte in range(256)], device=device)

"""GPU: widens int8 codes to a 16-bit or float32 weight in one pass.

    weight = codes.float() * (scales / 127)[:, None], rounded once

It moves 3 bytes per 16-bit weight (reads one, writes two); a cast and an in-place product move 7.
"""

# Triton parses these signatures itself, and its decorator has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpoeng.kernels.device import launching_on
from dpoeng.kernels.tiles import WIDEN


@triton.jit
def widen_int8(codes, scales, out, width, inverse, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    scale = tl.load(scales + row) * inverse
    values = tl.load(codes + row * width + cols, mask=mask, other=0).to(tl.float32) * scale
    tl.store(out + row * width + cols, values.to(out.dtype.element_ty), mask=mask)


def widen(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`codes` [O, I] int8, `scales` [O] float32 -> [O, I] in `dtype`."""
    codes, scales = codes.contiguous(), scales.contiguous()
    out = torch.empty_like(codes, dtype=dtype)
    rows, width = codes.shape
    tile = WIDEN["hip" if torch.version.hip else "cuda"]
    if out.numel():
        with launching_on(codes):
            widen_int8[(rows, triton.cdiv(width, tile.block))](
                codes, scales, out, width, 1.0 / 127.0, BLOCK=tile.block, **tile.options
            )
    return out

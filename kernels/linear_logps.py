"""GPU scoring: log p(target) from hidden states and head in one fused Triton kernel and a small merge. No gradient.

    logps = log_softmax(map(hidden @ weight.T).float(), -1).gather(-1, targets)

A program multiplies one tile of rows with one tile of the vocabulary in float32 and stores three numbers per row: the
peak and the sum of exp(z - peak) over the tile without the target, and the target's logit if the tile contains it. The
merge combines the tiles in order. There are no atomics, so the result repeats bit for bit. Neither tile nor order of
sums depends on N, so a row's log-prob does not depend on the rest of the batch.

Logits are never allocated, only two float32 `[V / tile, N]` (19 MB for 4096 tokens of a vocabulary of 152k).
"""

# Triton parses these signatures itself, and its decorator has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpoeng.kernels.device import launching_on
from dpoeng.kernels.head import Head
from dpoeng.kernels.rows import logp_of, map_logits
from dpoeng.kernels.tiles import MERGE_ROWS, LinearTile, launch_options, linear_tile


@triton.jit(do_not_specialize=["n"])
def linear_partials(
    hidden, weight, bias, targets, peaks, rests, target_logits, n, size, width, hidden_stride, weight_stride,
    inner, outer, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, RAGGED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share GROUP row tiles and go through the vocabulary together, so both operands stay in L2.
    program = tl.program_id(0)
    row_tiles = tl.cdiv(n, ROWS)
    per_group = GROUP * tl.cdiv(size, COLS)
    first = program // per_group * GROUP
    in_group = tl.minimum(row_tiles - first, GROUP)
    row_tile_id = first + program % per_group % in_group
    col_tile_id = program % per_group // in_group

    first_row = row_tile_id * ROWS
    first_col = col_tile_id * COLS
    rows = first_row + tl.arange(0, ROWS)
    cols = first_col + tl.arange(0, COLS)
    depth = tl.arange(0, DEPTH)
    # 64-bit offsets once for the tile, 32-bit ones within it, to save registers. Rows and columns past the end read the
    # last one instead of masking every load; their results are dropped below.
    a = hidden + first_row.to(tl.int64) * hidden_stride
    b = weight + first_col.to(tl.int64) * weight_stride
    a_offsets = tl.minimum(tl.arange(0, ROWS), n - 1 - first_row)[:, None] * hidden_stride + depth[None, :]
    b_offsets = tl.minimum(tl.arange(0, COLS), size - 1 - first_col)[None, :] * weight_stride + depth[:, None]
    raw = tl.zeros((ROWS, COLS), tl.float32)
    for _ in range(0, width // DEPTH * DEPTH, DEPTH):
        raw = multiply(tl.load(a + a_offsets), tl.load(b + b_offsets), raw, UPCAST)
        a += DEPTH
        b += DEPTH
    if RAGGED:
        left = depth < width % DEPTH
        a_tail = tl.load(a + a_offsets, mask=left[None, :], other=0.0)
        b_tail = tl.load(b + b_offsets, mask=left[:, None], other=0.0)
        raw = multiply(a_tail, b_tail, raw, UPCAST)

    if bias is not None:
        raw += tl.load(bias + cols, mask=cols < size, other=0.0).to(tl.float32)[None, :]
    z, _ = map_logits(raw, inner, outer, SOFTCAP)
    target = tl.load(targets + rows, mask=rows < n, other=-1)
    local = tl.arange(0, COLS)[None, :]
    here = (target >= first_col) & (target < tl.minimum(first_col + COLS, size))
    target_in_tile = tl.where(here, target - first_col, -1).to(tl.int32)
    is_target = local == target_in_tile[:, None]
    target_logit = tl.sum(tl.where(is_target, z, 0.0), 1)
    # Peak and sum exclude the target: this way only one tile of registers is live at a time, not two.
    z = tl.where(is_target | (local >= size - first_col), -float("inf"), z)
    peak = tl.max(z, 1)
    anchor = tl.where(peak == -float("inf"), 0.0, peak)
    rest = tl.sum(tl.exp(z - anchor[:, None]), 1)
    slot = col_tile_id.to(tl.int64) * n + rows
    tl.store(peaks + slot, peak, mask=rows < n)
    tl.store(rests + slot, rest, mask=rows < n)
    tl.store(target_logits + rows, target_logit, mask=here & (rows < n))


@triton.jit
def multiply(a, b, total, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies the raw bits of bfloat16 (triton-lang/triton#11584)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit(do_not_specialize=["n"])
def merge_partials(
    peaks, rests, target_logits, targets, logps, n, tiles, ignore_index, ROWS: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < n
    target_logit = tl.load(target_logits + rows, mask=mask, other=0.0)
    peak = tl.where(target_logit == target_logit, target_logit, -float("inf"))
    rest = tl.zeros((ROWS,), tl.float32)
    for tile in range(tiles):
        slot = tl.cast(tile, tl.int64) * n + rows
        tile_peak = tl.load(peaks + slot, mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tile_peak)
        anchor = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        tile_rest = tl.load(rests + slot, mask=mask, other=0.0)
        rest = rest * tl.exp(peak - anchor) + tile_rest * tl.exp(tile_peak - anchor)
        peak = new_peak
    target = tl.load(targets + rows, mask=mask, other=0)
    tl.store(logps + rows, tl.where(target == ignore_index, 0.0, logp_of(target_logit - peak, rest)), mask=mask)


def fused_logps(
    hidden: Tensor, head: Head, targets: Tensor, ignore_index: int, *, tile: LinearTile | None = None
) -> Tensor:
    """Log-probs `[N]` float32 for `hidden` `[N, H]`. `tile` is for tests and tuning."""
    n = hidden.shape[0]
    logps = hidden.new_empty(n, dtype=torch.float32)
    if n == 0:
        return logps
    tile = tile or linear_tile(hidden.device, hidden.dtype)
    hidden, weight, targets = _unit_stride(hidden), _unit_stride(head.weight), targets.contiguous()
    tiles = triton.cdiv(head.vocabulary, tile.cols)
    peaks, rests = (hidden.new_empty((tiles, n), dtype=torch.float32) for _ in range(2))
    target_logits = torch.full_like(logps, torch.nan)  # stays NaN for a target outside every tile
    with launching_on(hidden):
        linear_partials[(triton.cdiv(n, tile.rows) * tiles,)](
            hidden, weight, head.bias, targets, peaks, rests, target_logits, n, head.vocabulary, hidden.shape[1],
            hidden.stride(0), weight.stride(0), head.inner, head.outer, SOFTCAP=head.softcap is not None,
            ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, GROUP=tile.group,
            RAGGED=hidden.shape[1] % tile.depth != 0, UPCAST=triton.knobs.runtime.interpret,
            **tile.options,
        )  # fmt: skip
        merge_partials[(triton.cdiv(n, MERGE_ROWS),)](
            peaks, rests, target_logits, targets, logps, n, tiles, ignore_index, ROWS=MERGE_ROWS, **launch_options(4)
        )
    return logps


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()

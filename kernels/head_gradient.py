"""Gradients for a trained head: of log p(target) by hidden states, weight and bias, from recomputed logits.

With `d = (one_hot(y) - softmax(z)) * dz/draw * upstream` [N, V], one row per token, never whole in memory:

    d hidden = d @ weight        d weight = d.T @ hidden        d bias = d.sum(0)

A unit gradient stored by the forward, as for a frozen head, would not help: the weight's gradient needs `d` once the
upstream gradient is known. So the backward recomputes the logits: four products with the forward's, where autograd over
whole logits needs three. Sums over tokens are at least float32 and rounded once.

Independent of autograd.
"""

import torch
from torch import Tensor

from dpoeng.kernels.cpu_linear import product_dtype
from dpoeng.kernels.head import Head, sum_dtype
from dpoeng.kernels.tiled_logps import ROW_STEP, ROWS, map_logits, raw_logits, tile_size

Gradients = tuple[Tensor, Tensor, Tensor]
"""Gradients by hidden states [N, H], weight [V, H] and bias ([V], or [0] without one)."""

SLICE = 16384
"""Vocabulary entries per product of the weight's gradient on a GPU; its float32 copy lies beside the sum."""


def tiled_gradients(hidden: Tensor, head: Head, targets: Tensor, sums: Tensor, upstream: Tensor) -> Gradients:
    """Gradients in tiles of the vocabulary, in plain PyTorch: the backend of CPUs.

    Args:
        hidden: `[N, H]`.
        head: weight `[V, H]` of the same dtype.
        targets: `[N]` int64, each in `[0, V)`.
        sums: `[3, N]`, as `tiled_logps` filled it for the same arguments.
        upstream: `[N]`, the derivative of the loss by each log-prob.
    """
    n = hidden.shape[0]
    wide, narrow = sum_dtype(hidden.dtype), product_dtype(hidden.dtype)
    tile = tile_size(hidden.dtype)
    starts = range(0, n, ROWS)
    padded = [_padded(hidden[start : start + ROWS].to(narrow)) for start in starts]
    by_hidden = [rows.new_zeros(rows.shape, dtype=wide) for rows in padded]
    by_weight = torch.empty_like(head.weight)
    by_bias = torch.empty_like(head.bias) if head.bias is not None else hidden.new_empty(0)
    scratch = hidden.new_empty(max((len(rows) for rows in padded), default=0) * min(tile, head.vocabulary), dtype=wide)
    for low in range(0, head.vocabulary, tile):
        weight = head.weight[low : low + tile].to(narrow)
        total_weight = weight.new_zeros(weight.shape, dtype=wide)
        total_bias = weight.new_zeros(weight.shape[0], dtype=wide)
        for start, rows, by_rows in zip(starts, padded, by_hidden, strict=True):
            d = scratch[: len(rows) * weight.shape[0]].view(len(rows), weight.shape[0])
            raw_logits(rows, weight, d)
            some = slice(start, start + ROWS)
            count = len(targets[some])
            _derivatives(d[:count], head, low, targets[some], sums[:, some], upstream[some])
            d[count:] = 0.0
            total_bias += d.sum(0)
            if narrow == wide:
                by_rows.addmm_(d, weight)
                total_weight.addmm_(d.T, rows)
            else:
                # An explicit copy: `add_` makes the same float32 copy internally, but a simulated step would miss it.
                small = d.to(narrow)
                by_rows.add_((small @ weight).to(wide))
                total_weight.add_((small.T @ rows).to(wide))
        by_weight[low : low + tile] = total_weight
        if head.bias is not None:
            by_bias[low : low + tile] = total_bias
    parts = [part[: n - start] for start, part in zip(starts, by_hidden, strict=True)]
    return torch.cat(parts).to(hidden.dtype) if parts else torch.empty_like(hidden), by_weight, by_bias


def _padded(rows: Tensor) -> Tensor:
    """Pads with zeros to a multiple of `ROW_STEP` rows, as the forward does: then logits are bitwise equal."""
    pad = -len(rows) % ROW_STEP
    return torch.cat([rows, rows.new_zeros((pad, rows.shape[1]))]) if pad else rows


def _derivatives(z: Tensor, head: Head, low: int, targets: Tensor, sums: Tensor, upstream: Tensor) -> None:
    """Turns raw products `[R, T]` of a tile into `d`, in place."""
    slopes = map_logits(z, head, low)
    peak, rest, total = sums
    factor = upstream.to(z.dtype) / total
    inside = ((targets >= low) & (targets < low + z.shape[1])).unsqueeze(1)
    column = torch.where(inside, targets.unsqueeze(1) - low, 0)
    z.sub_(torch.where(peak == -torch.inf, 0.0, peak).unsqueeze(1)).exp_().mul_(-factor.unsqueeze(1))
    # The target's entry comes from the sum of the others: if p is close to 1, computing 1 - p cancels its digits.
    z.scatter_(1, column, torch.where(inside, (rest * factor).unsqueeze(1), z.gather(1, column)))
    z.mul_(head.outer if slopes is None else slopes)


def chunked_gradients(hidden: Tensor, head: Head, targets: Tensor, ignore_index: int, upstream: Tensor) -> Gradients:
    """Gradients in chunks of rows, around the Triton pass that a frozen head uses: the backend of GPUs.

    Args:
        hidden: `[N, H]` bfloat16, float16 or float32.
        head: weight `[V, H]` of the same dtype.
        targets: `[N]` int64; rows with `ignore_index` have no gradient.
        ignore_index: see `targets`.
        upstream: `[N]`, the derivative of the loss by each log-prob.
    """
    from dpoeng.kernels.tiles import chunk_shape
    from dpoeng.kernels.unit_gradient import fused_pass, product

    n, size = hidden.shape[0], head.vocabulary
    rows, padded = chunk_shape(n, size)
    buffer = hidden.new_empty((rows, padded), dtype=torch.float32)
    raw, d = buffer[:, :size], buffer.view(hidden.dtype)[:, :size]
    logps = hidden.new_empty(n, dtype=torch.float32)
    by_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    by_weight = hidden.new_zeros((size, hidden.shape[1]), dtype=torch.float32)
    by_bias = hidden.new_zeros(size if head.bias is not None else 0, dtype=torch.float32)
    part = hidden.new_empty((min(SLICE, size), hidden.shape[1]), dtype=torch.float32)
    for start in range(0, n, rows):
        some = slice(start, min(n, start + rows))
        count = some.stop - start
        product(hidden[some], head.weight.T, raw[:count])
        fused_pass(raw[:count], head, targets[some], ignore_index, logps[some], d[:count])
        now = d[:count].mul_(upstream[some].unsqueeze(1))
        torch.mm(now, head.weight, out=by_hidden[some])
        for low in range(0, size, SLICE):
            entries = slice(low, min(size, low + SLICE))
            slot = part[: entries.stop - low]
            product(now[:, entries].T, hidden[some], slot)
            by_weight[entries] += slot
        if head.bias is not None:
            by_bias += now.sum(0, dtype=torch.float32)
    return (
        by_hidden,
        by_weight.to(head.weight.dtype),
        by_bias.to(by_bias.dtype if head.bias is None else head.bias.dtype),
    )

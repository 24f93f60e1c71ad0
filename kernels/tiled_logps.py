"""Token log-probs and their unit gradient in tiles of the vocabulary, in plain PyTorch: the backend of CPUs.

The derivative of log p(y) by the hidden state is `W_y - sum_v p_v W_v` (without a softcap): attention of one query over
the vocabulary, with the head as keys and values. So it can be computed as in FlashAttention (Dao et al. 2022,
https://arxiv.org/abs/2205.14135, section 3.1): one pass over tiles of the vocabulary with a running maximum, a running
sum and a running weighted sum of head rows, rescaled whenever the maximum grows. It takes two matrix products and at
most `ROWS x TILE` logits of memory, in training as in scoring.

A row's result must not depend on its neighbours. Rows interact only in the matrix products, where BLAS uses other code
for few rows. Blocks are therefore padded to a multiple of `ROW_STEP` rows; from there on MKL's results were bitwise
independent of the row count (tests/kernels/test_token_logps.py checks this on the machine where it runs).

Independent of autograd and of ignored targets.
"""

import torch
from torch import Tensor

from dpoeng.kernels.cpu_linear import product_dtype
from dpoeng.kernels.head import Head, sum_dtype

ROWS = 1024  # rows that share one pass over the head
ROW_STEP = 16
TILE = 1024  # vocabulary entries; ROWS x TILE float32 is 4 MiB
TILE_BF16 = 4096  # if the CPU multiplies bfloat16 in hardware: fewer, larger products


def tile_size(dtype: torch.dtype) -> int:
    """Vocabulary entries per tile."""
    return TILE_BF16 if product_dtype(dtype) == torch.bfloat16 else TILE


def raw_logits(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """Writes rows `[R, H]` times a tile of the head `[T, H]`, both in `product_dtype`, to `out` `[R, T]`."""
    if out.dtype == rows.dtype:
        torch.mm(rows, weight.T, out=out)
    else:
        out.copy_(rows @ weight.T)


def tiled_logps(
    hidden: Tensor, head: Head, targets: Tensor, unit_gradient: Tensor | None = None, sums: Tensor | None = None
) -> Tensor:
    """log p(target) per row; fills `unit_gradient` and `sums` if given.

    Args:
        hidden: `[N, H]`.
        head: weight `[V, H]` of the same dtype.
        targets: `[N]` int64, each in `[0, V)`.
        unit_gradient: `[N, H]`, overwritten with d logp / d hidden.
        sums: `[3, N]`, overwritten with the peak of the logits, the sum of exp(z - peak) over all but the target, and
            the sum over all.

    Returns:
        `[N]` float32 (float64 for float64 inputs).
    """
    logps = hidden.new_empty(hidden.shape[0], dtype=sum_dtype(hidden.dtype))
    for start in range(0, hidden.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        logps[rows] = _block(
            hidden[rows],
            head,
            targets[rows],
            None if unit_gradient is None else unit_gradient[rows],
            None if sums is None else sums[:, rows],
        )
    return logps


def _block(hidden: Tensor, head: Head, targets: Tensor, unit_gradient: Tensor | None, sums: Tensor | None) -> Tensor:
    n, width = hidden.shape
    pad = -n % ROW_STEP
    dtype, narrow = sum_dtype(hidden.dtype), product_dtype(hidden.dtype)
    tile = tile_size(hidden.dtype)

    h = hidden.new_zeros((n + pad, width), dtype=narrow)
    h[:n] = hidden
    y = targets.new_zeros(n + pad)
    y[:n] = targets
    scratch = h.new_empty((n + pad) * min(tile, head.vocabulary), dtype=dtype)
    peak = h.new_full((n + pad,), -torch.inf, dtype=dtype)  # running maximum of z
    rest = h.new_zeros(n + pad, dtype=dtype)  # running sum of exp(z - peak) over all but the target
    z_target = torch.zeros_like(rest)
    slope_target = torch.full_like(rest, head.outer)  # dz/draw at the target
    others = None if unit_gradient is None else h.new_zeros((n + pad, width), dtype=dtype)  # the same sum of head rows

    for low in range(0, head.vocabulary, tile):
        weight = head.weight[low : low + tile].to(narrow)  # a view unless it is widened
        z = scratch[: (n + pad) * weight.shape[0]].view(n + pad, weight.shape[0])
        raw_logits(h, weight, z)
        slopes = map_logits(z, head, low)

        inside = (y >= low) & (y < low + weight.shape[0])
        column = torch.where(inside, y - low, 0).unsqueeze(1)
        z_target = torch.where(inside, z.gather(1, column).squeeze(1), z_target)

        new_peak = torch.maximum(peak, z.amax(1))
        # If all logits so far are -inf, subtract 0: exp(-inf + inf) would be NaN, but the tile only adds nothing.
        anchor = torch.where(new_peak == -torch.inf, 0.0, new_peak)
        shrink = torch.exp(peak - anchor)
        peak = new_peak
        z.sub_(anchor.unsqueeze(1)).exp_()
        # Excludes the target: if p is close to 1, computing 1 - p cancels the digits that the others' sum still has.
        z.scatter_(1, column, torch.where(inside.unsqueeze(1), 0.0, z.gather(1, column)))
        rest.mul_(shrink).add_(z.sum(1))

        if others is not None:
            if slopes is not None:
                z.mul_(slopes)
                slope_target = torch.where(inside, slopes.gather(1, column).squeeze(1), slope_target)
            others.mul_(shrink.unsqueeze(1))
            if narrow == dtype:
                others.addmm_(z, weight)
            else:
                others.add_((z.to(narrow) @ weight).to(dtype))  # an explicit copy, which a simulated step sees

    below = z_target - peak  # NaN if all are -inf, as in log_softmax
    total = rest + below.exp()
    logps = torch.where(below == 0, -torch.log1p(rest), below - total.log())
    if sums is not None:
        sums.copy_(torch.stack([peak, rest, total])[:, :n])
    if others is not None and unit_gradient is not None:
        others.mul_((-1.0 if head.softcap else -head.outer) / total.unsqueeze(1))
        others.addcmul_(head.weight[y].to(dtype), (rest / total * slope_target).unsqueeze(1))
        unit_gradient.copy_(others[:n])
    return logps[:n]


def map_logits(z: Tensor, head: Head, low: int) -> Tensor | None:
    """Turns raw products `[R, T]` into logits in place; returns dz/draw `[R, T]` if a softcap makes it vary."""
    if head.bias is not None:
        z.add_(head.bias[low : low + z.shape[1]])
    slopes = None
    if head.softcap is not None:
        z.mul_(head.inner).tanh_()
        slopes = torch.addcmul(z.new_ones(()), z, z, value=-1.0).mul_(head.inner * head.outer)
    if head.outer != 1.0:
        z.mul_(head.outer)
    return slopes

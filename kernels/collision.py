"""log sum_v p_v^2, the log-probability that two draws from a row's distribution agree, without the logits.

    z = map(hidden @ weight.T)                                # [N, V], never built here
    log_collision = logsumexp(2 z, -1) - 2 logsumexp(z, -1)

One pass over tiles of the vocabulary in plain PyTorch on any device, with a running maximum and two running sums, as in
`tiled_logps`. At most `ROWS x TILE` logits exist at a time. No gradient.
"""

import torch
from torch import Tensor

from dpoeng.kernels.cpu_linear import dtype_of_products
from dpoeng.kernels.head import Head, sum_dtype
from dpoeng.kernels.tiled_logps import map_logits

ROWS = 1024
TILE = 4096


@torch.no_grad()
def log_collision(hidden: Tensor, head: Head) -> Tensor:
    """`[N, H]` hidden states -> `[N]` log sum_v p_v^2 in nats, at most 0; float32 (float64 for float64 inputs)."""
    logps = hidden.new_empty(hidden.shape[0], dtype=sum_dtype(hidden.dtype))
    for start in range(0, hidden.shape[0], ROWS):
        logps[start : start + ROWS] = _block(hidden[start : start + ROWS], head)
    return logps


def _block(hidden: Tensor, head: Head) -> Tensor:
    dtype, narrow = sum_dtype(hidden.dtype), dtype_of_products(hidden)
    hidden = hidden.to(narrow)
    peak = hidden.new_full((hidden.shape[0],), -torch.inf, dtype=dtype)
    once, twice = torch.zeros_like(peak), torch.zeros_like(peak)  # sums of exp(z - peak) and of its square
    for low in range(0, head.vocabulary, TILE):
        z = (hidden @ head.weight[low : low + TILE].to(narrow).T).to(dtype)
        map_logits(z, head, low)
        new_peak = torch.maximum(peak, z.amax(1))
        shrink = torch.exp(peak - new_peak)
        peak = new_peak
        z.sub_(peak.unsqueeze(1)).exp_()
        once.mul_(shrink).add_(z.sum(1))
        twice.mul_(shrink.square()).add_(z.square_().sum(1))
    return torch.log(twice) - 2 * torch.log(once)

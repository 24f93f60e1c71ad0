"""Losses of single responses with a label, desirable or not: pure functions, [B] float64 -> [B] losses.

Arguments have the same names everywhere:

- `ratio`: log pi/ref of the responses in nats, [B].
- `desirable`: 1 for a desirable response, 0 for others, [B].
- `beta`: how strongly the policy is kept near the reference, > 0.

All are finite, with finite gradients, for ratios up to at least +-1e4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def reference_point(mismatched_ratio: torch.Tensor) -> torch.Tensor:
    """max(0, mean of log pi/ref over mismatched responses), a scalar in nats without gradient.

    Ethayarajh et al. 2024, KTO, section 4.1, https://arxiv.org/abs/2402.01306: a biased estimate of KL(pi || ref) from
    responses of other prompts [B], clamped at 0.
    """
    return mismatched_ratio.detach().mean().clamp(min=0.0)


def kto_loss(ratio: torch.Tensor, desirable: torch.Tensor, beta: float, point: torch.Tensor) -> torch.Tensor:
    """1 - sigmoid(beta (ratio - point)) for a desirable response, 1 - sigmoid(beta (point - ratio)) for others.

    Ethayarajh et al. 2024, KTO, equation 8 without its weights, https://arxiv.org/abs/2402.01306
    """
    return torch.sigmoid(_sign(desirable) * beta * (point - ratio))


def apo_zero_unpaired_loss(ratio: torch.Tensor, desirable: torch.Tensor, beta: float) -> torch.Tensor:
    """1 - sigmoid(beta ratio) for a desirable response, sigmoid(beta ratio) for others: KTO with 0 as its point.

    D'Oosterlinck et al. 2024, APO, equation 7 response by response, https://arxiv.org/abs/2408.06266
    """
    return torch.sigmoid(-_sign(desirable) * beta * ratio)


def bco_loss(ratio: torch.Tensor, desirable: torch.Tensor, beta: float, shift: torch.Tensor | float) -> torch.Tensor:
    """-log sigmoid(beta ratio - shift) for a desirable response, -log sigmoid(shift - beta ratio) for others.

    Jung et al. 2024, BCO, section 4, https://arxiv.org/abs/2404.04656: a classifier's cross-entropy whose logit is the
    reward minus `shift`, the mean reward so far.
    """
    return -F.logsigmoid(_sign(desirable) * (beta * ratio - shift))


def _sign(desirable: torch.Tensor) -> torch.Tensor:
    return 2 * desirable - 1

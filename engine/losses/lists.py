"""Losses of several responses to one prompt and their scores: pure functions, a loss for each row. They know no batch.

Arguments are named alike everywhere; G rows have at most N responses:

- `rewards`: beta log pi/ref of the responses, [G, N] float64.
- `scores`: what the data set says of them, more is better, [G, N] float64.
- `mask`: true where there is a response, [G, N]; behind a row's last one the others hold 0.
- `scale`: what scores are multiplied by, > 0.

Responses of equal score say nothing about each other. All are finite, with finite gradients, for rewards of at least
+-1e4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def padded(values: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of rows one after the other [K] -> [G, N] with 0 behind, mask [G, N].

    `sizes`, how many each row has [G], is on the host: reading its maximum does not wait for the device.
    """
    mask = (torch.arange(int(sizes.max())) < sizes[:, None]).to(values.device)
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values), mask


def plackett_luce_loss(rewards: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """-sum_i log(exp r_i / (exp r_i + sum over j worse than i of exp r_j)): the ranking's likelihood, best first.

    Rafailov et al. 2023, DPO, appendix A.3, https://arxiv.org/abs/2305.18290. Of two responses it is DPO. Where scores
    are equal the order is not known, and each of these responses is compared with the worse ones alone.
    """
    worse = (scores[:, None, :] < scores[:, :, None]) & mask[:, None, :] & mask[:, :, None]  # [G, i, j]
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    among = rewards[:, None, :].masked_fill(~(worse | itself), -torch.inf)
    return (torch.logsumexp(among, -1) - rewards).sum(-1)


def listnet_loss(rewards: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Cross-entropy between softmax(scale scores) and softmax(rewards): which response is the best one.

    Cao et al. 2007, ListNet, top-one probabilities, https://www.microsoft.com/en-us/research/publication/
    learning-to-rank-from-pairwise-approach-to-listwise-approach/; the softmax loss of Liu et al. 2024, LiPO,
    https://arxiv.org/abs/2402.01878
    """
    target = torch.softmax((scale * scores).masked_fill(~mask, -torch.inf), -1)
    logps = torch.log_softmax(rewards.masked_fill(~mask, -torch.inf), -1)
    return -(target * logps.masked_fill(~mask, 0.0)).sum(-1)


def lipo_lambda_loss(rewards: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """-sum over i better than j of w_ij log sigmoid(r_i - r_j), w_ij = |2^s_i - 2^s_j| |1/D_i - 1/D_j|.

    s = scale scores; D_i = log(1 + place of i among the rewards, from 1). So a pair counts as much as its exchange
    would move the ranking's discounted gain; the weights carry no gradient. Liu et al. 2024, LiPO-lambda, section 4,
    https://arxiv.org/abs/2402.01878
    """
    with torch.no_grad():
        order = torch.argsort(rewards.masked_fill(~mask, -torch.inf), dim=-1, descending=True, stable=True)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        place = torch.empty_like(order).scatter(-1, order, places)
        discount, gain = 1 / torch.log(place.double() + 2), torch.exp2(scale * scores)
        weight = (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()
        better = (scores[:, :, None] > scores[:, None, :]) & mask[:, :, None] & mask[:, None, :]
        weight = torch.where(better, weight, 0.0)
    return -(weight * F.logsigmoid(rewards[:, :, None] - rewards[:, None, :])).sum((-1, -2))

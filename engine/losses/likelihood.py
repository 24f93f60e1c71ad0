"""Losses without a reference, and likelihood terms: pure functions, [B] float64 -> [B] losses.

They take their pairs from the cache like all others, but do not use its log-probs. `chosen_logps` and `rejected_logps`
are sums over a response's tokens in nats, `chosen_mean` and `rejected_mean` means over them; [B].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dpoeng.engine.losses.pairwise import sigmoid_loss

_LOG_P_MAX = -1e-15  # log p closer to 0 than this gives odds beyond float64


def sft_loss(chosen_logps: torch.Tensor, mean_tokens: float | torch.Tensor) -> torch.Tensor:
    """-chosen_logps / mean_tokens: its batch mean is the cross-entropy per chosen token of the batch, as in TRL.

    `mean_tokens` is the mean number of chosen tokens in the whole optimizer step.
    """
    return -chosen_logps / mean_tokens


def rpo_term(chosen_mean: torch.Tensor) -> torch.Tensor:
    """-log pi(chosen) / |chosen|; every pair has the same weight.

    Pang et al. 2024, equation 1, https://arxiv.org/abs/2404.19733, for the response alone.
    """
    return -chosen_mean


def simpo_loss(
    chosen_mean: torch.Tensor, rejected_mean: torch.Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """-log sigmoid(beta chosen_mean - beta rejected_mean - gamma).

    Meng et al. 2024, equation 6, https://arxiv.org/abs/2405.14734
    """
    return sigmoid_loss(chosen_mean - rejected_mean - gamma / beta, beta, label_smoothing)


def cpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    beta: float,
    *,
    alpha: float,
    mean_tokens: float | torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """-log sigmoid(beta (chosen_logps - rejected_logps)) + alpha sft.

    Xu et al. 2024, equation 3, https://arxiv.org/abs/2401.08417; the likelihood term is a mean per token, as in TRL.
    """
    preference = sigmoid_loss(chosen_logps - rejected_logps, beta, label_smoothing)
    return preference + alpha * sft_loss(chosen_logps, mean_tokens)


def orpo_loss(
    chosen_mean: torch.Tensor,
    rejected_mean: torch.Tensor,
    beta: float,
    *,
    chosen_logps: torch.Tensor,
    mean_tokens: float | torch.Tensor,
) -> torch.Tensor:
    """sft - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p), p = exp(mean log-prob).

    Hong et al. 2024, equations 4 to 7, https://arxiv.org/abs/2403.07691; `beta` is their lambda. The likelihood term
    covers the response; TRL's includes the prompt.
    """
    log_odds = _log_odds(chosen_mean) - _log_odds(rejected_mean)
    return sft_loss(chosen_logps, mean_tokens) - beta * F.logsigmoid(log_odds)


def _log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) from log p <= 0: log p - log(1 - e^log p), in the form that is exact on each side of ln 1/2."""
    log_p = torch.clamp(log_p, max=_LOG_P_MAX)
    near_one = log_p > -0.6931471805599453
    # Give each branch an argument with finite value and gradient, even where `where` selects the other branch.
    high = torch.log(-torch.expm1(torch.where(near_one, log_p, -1.0)))
    low = torch.log1p(-torch.exp(torch.where(near_one, -1.0, log_p)))
    return log_p - torch.where(near_one, high, low)

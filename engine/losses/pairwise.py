"""DPO and related losses that read the reference: pure functions, [B] float64 -> [B] losses.

Arguments have the same names everywhere:

- `delta`: chosen score minus rejected score, [B]. A score is log pi/ref of a response, or another f-divergence's form.
- `chosen_ratio`, `rejected_ratio`: log pi/ref of the responses in nats, [B].
- `beta`: how strongly the policy is kept near the reference, > 0.

All are finite, with finite gradients, for arguments up to at least +-1e4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

MAX_EXPONENT = 80.0
"""Exponents are clamped here, as in TRL: e^80 and its square are finite; beyond it the gradient is zero."""


def f_divergence_scores(ratio: torch.Tensor, kind: str, alpha: float) -> torch.Tensor:
    """f'(pi/ref) from log pi/ref, up to a constant: it replaces the log-ratio.

    Wang et al. 2023, "Beyond Reverse KL", table 1, https://arxiv.org/abs/2309.16240. The alpha
    divergence is scaled as in TRL, ((pi/ref)^(alpha - 1) - 1) / (alpha - 1), so that alpha = 1 is the reverse KL.
    """
    if kind == "reverse_kl" or (kind == "alpha_divergence" and abs(alpha - 1) < 1e-6):
        return ratio
    if kind == "forward_kl":
        return 1 - torch.exp(torch.clamp(-ratio, max=MAX_EXPONENT))
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    assert kind == "alpha_divergence", kind
    return torch.expm1(torch.clamp((alpha - 1) * ratio, max=MAX_EXPONENT)) / (alpha - 1)


def sigmoid_loss(delta: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO; with label smoothing e conservative DPO: -(1 - e) log sigmoid(beta delta) - e log sigmoid(-beta delta).

    Rafailov et al. 2023, equation 7, https://arxiv.org/abs/2305.18290; Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf. TRL from 0.29 on ignores `label_smoothing` here.
    """
    losses = -F.logsigmoid(beta * delta)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-beta * delta)
    return losses


def soft_sigmoid_loss(delta: torch.Tensor, beta: float, margin: torch.Tensor, scale: float) -> torch.Tensor:
    """DPO with soft labels: -p log sigmoid(beta delta) - (1 - p) log sigmoid(-beta delta), p = sigmoid(scale margin).

    `margin` [B] is the chosen response's score less the rejected one's: p is Bradley and Terry's probability that a
    judge of such scores prefers the former. Conservative DPO with a label for each pair, as in Furuta et al. 2024,
    section 2, https://arxiv.org/abs/2409.06691. It is least where beta delta = scale margin.
    """
    p = torch.sigmoid(scale * margin)
    return -p * F.logsigmoid(beta * delta) - (1 - p) * F.logsigmoid(-beta * delta)


def robust_loss(delta: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """DPO that is unbiased if a share e < 1/2 of the labels is flipped; it may be negative.

    (-(1 - e) log sigmoid(beta delta) + e log sigmoid(-beta delta)) / (1 - 2 e)
    Chowdhury et al. 2024, section 3.1, https://arxiv.org/abs/2403.00409
    """
    clean, flipped = F.logsigmoid(beta * delta), F.logsigmoid(-beta * delta)
    return (label_smoothing * flipped - (1 - label_smoothing) * clean) / (1 - 2 * label_smoothing)


def hinge_loss(delta: torch.Tensor, beta: float) -> torch.Tensor:
    """max(0, 1 - beta delta): SLiC on log-ratios.

    Zhao et al. 2023, SLiC-HF, https://arxiv.org/abs/2305.10425, normalised by the reference as in Liu et al. 2023,
    section 2.2, https://arxiv.org/abs/2309.06657
    """
    return torch.relu(1 - beta * delta)


def ipo_loss(mean_delta: torch.Tensor, tau: float) -> torch.Tensor:
    """(mean_delta - 1 / (2 tau))^2; `mean_delta` is the difference of scores per token, as in TRL.

    Azar et al. 2023, equation 17, https://arxiv.org/abs/2310.12036; its authors told TRL that they divide by the
    length.
    """
    return (mean_delta - 1 / (2 * tau)) ** 2


def exo_pair_loss(delta: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """KL(p || q) between p = (s, 1 - s), s = sigmoid(beta delta), and q = (1 - e, e).

    Ji et al. 2024, equation 16, https://arxiv.org/abs/2402.00856
    """
    scaled = beta * delta
    chosen = torch.sigmoid(scaled) * (F.logsigmoid(scaled) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-scaled) * (F.logsigmoid(-scaled) - math.log(label_smoothing))
    return chosen + rejected


def discopop_loss(delta: torch.Tensor, beta: float, tau: float) -> torch.Tensor:
    """Log-ratio modulated loss: m e^-x + (1 - m) (-log sigmoid(x)) with x = beta delta and m = sigmoid(x / tau).

    Lu et al. 2024, equation 5, https://arxiv.org/abs/2406.08414. The product m e^-x is computed in the exponent: its
    factors overflow separately, and TRL's loss is NaN there.
    """
    x = beta * delta
    return torch.exp(F.logsigmoid(x / tau) - x) - torch.sigmoid(-x / tau) * F.logsigmoid(x)


def nca_pair_loss(chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(r_c) - (log sigmoid(-r_c) + log sigmoid(-r_r)) / 2 with r = beta ratio.

    Chen et al. 2024, section 4.1 for two responses with one preferred, https://arxiv.org/abs/2402.05369
    """
    chosen, rejected = beta * chosen_ratio, beta * rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(
    chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float, shift: float = 0.0
) -> torch.Tensor:
    """-log sigmoid(r_c - shift) - log sigmoid(shift - r_r) with r = beta ratio: a classifier's loss on both responses.

    Jung et al. 2024, section 4, https://arxiv.org/abs/2404.04656. `shift` is their reward shift, a mean of earlier
    rewards; TRL omits it.
    """
    return -F.logsigmoid(beta * chosen_ratio - shift) - F.logsigmoid(shift - beta * rejected_ratio)


def sppo_hard_loss(chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float) -> torch.Tensor:
    """(chosen_ratio - 1 / (2 beta))^2 + (rejected_ratio + 1 / (2 beta))^2.

    Wu et al. 2024, equation 4.7 with P = 1 for the chosen and 0 for the rejected response,
    https://arxiv.org/abs/2405.00675
    """
    return (chosen_ratio - 0.5 / beta) ** 2 + (rejected_ratio + 0.5 / beta) ** 2


def apo_zero_loss(chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float) -> torch.Tensor:
    """1 - sigmoid(r_c) + sigmoid(r_r): chosen responses up, rejected ones down.

    D'Oosterlinck et al. 2024, equation 7, https://arxiv.org/abs/2408.06266
    """
    return torch.sigmoid(-beta * chosen_ratio) + torch.sigmoid(beta * rejected_ratio)


def apo_down_loss(chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float) -> torch.Tensor:
    """sigmoid(r_c) + 1 - sigmoid(r_c - r_r): both down, rejected ones further.

    D'Oosterlinck et al. 2024, equation 8, https://arxiv.org/abs/2408.06266
    """
    return torch.sigmoid(beta * chosen_ratio) + torch.sigmoid(-beta * (chosen_ratio - rejected_ratio))


def dpop_loss(chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float, penalty: float) -> torch.Tensor:
    """DPO-Positive: -log sigmoid(beta (delta - penalty max(0, -chosen_ratio))).

    Pal et al. 2024, equation 3, https://arxiv.org/abs/2402.13228
    """
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio - penalty * torch.relu(-chosen_ratio)))


def aot_loss(better: torch.Tensor, worse: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO's loss between equal quantiles of two samples, [B] each: sorts both, then subtracts.

    Melnyk et al. 2024, https://arxiv.org/abs/2406.05882. Paired: `better` is log pi(chosen) - log pi(rejected), `worse`
    the same under the reference. Unpaired: the log-ratios of the chosen and of the rejected responses. The i-th loss
    belongs to the i-th quantile, not to a pair, and depends on the whole batch.
    """
    return sigmoid_loss(better.sort().values - worse.sort().values, beta, label_smoothing)


def dynamic_beta(margins: torch.Tensor, beta: float, alpha: float, average: float) -> float:
    """beta (1 + alpha (mean(margins) - average)), at least 1e-3: the beta of one batch.

    Wu et al. 2024, section 4.2, https://arxiv.org/abs/2407.08639. `margins` are rewards of chosen minus rejected at the
    fixed beta, [B]; `average` is the moving average of their mean over previous steps.
    """
    return max(beta * (1 + alpha * (float(margins.detach().mean()) - average)), 1e-3)


def usual_pairs(
    margins: torch.Tensor, share: float, average: float, deviation: float, gumbel: torch.Tensor
) -> torch.Tensor:
    """Draws `share` of the pairs, at least one, preferring margins near the average; returns their indices [K].

    Wu et al. 2024, section 4.3, https://arxiv.org/abs/2407.08639: without replacement, with weights exp(-(margin -
    average)^2 / (2 deviation^2)). Adding independent Gumbel noise to the log-weights and taking the largest is such a
    draw (Kool et al. 2019, https://arxiv.org/abs/1903.06059). Without a deviation, as at the first step, all pairs are
    equally likely.
    """
    score = gumbel
    if deviation > 0:
        score = gumbel - 0.5 * ((margins.detach() - average) / deviation) ** 2
    return score.topk(max(1, int(share * len(score)))).indices

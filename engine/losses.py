"""Preference losses: pure functions of log-probabilities. They know no model and no cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceBatch:
    """What a loss may look at: per-token log-probs of B pairs, chosen and rejected branches in turn.

    Branch 2i is pair i's chosen response and branch 2i + 1 its rejected one. Per-token values and not sums, since
    length-normalised and LD-DPO losses need them.

    Attributes:
        policy: [N] float32, with gradient.
        reference: [N] float32, from the cache.
        branch: [N] int64, the branch that each token belongs to.
        pairs: B.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    branch: torch.Tensor
    pairs: int

    def sums(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-token values [N] -> (chosen sums [B], rejected sums [B]), added in float64."""
        total = torch.zeros(2 * self.pairs, dtype=torch.float64, device=values.device)
        total = total.index_add(0, self.branch, values.double())
        by_side = total.view(self.pairs, 2)
        return by_side[:, 0], by_side[:, 1]


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceLoss:
    """Losses and the quantities that are reported; all [B], float64; all but `losses` detached."""

    losses: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def sigmoid_loss(logits: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO: -log sigmoid(beta * logits), [B] -> [B].

    `logits` is the difference of log-ratios, (log pi/ref)(chosen) - (log pi/ref)(rejected).
    Rafailov et al. 2023, "Direct Preference Optimization", equation 7, https://arxiv.org/abs/2305.18290
    """
    return -F.logsigmoid(beta * logits)


LOSSES = {"sigmoid": sigmoid_loss}


def preference_loss(batch: PreferenceBatch, *, beta: float, loss_type: str = "sigmoid") -> PreferenceLoss:
    """Losses of a batch, one a pair.

    Args:
        batch: policy and reference log-probs of the same tokens.
        beta: how strongly the policy is held to the reference; > 0.
        loss_type: a name in `LOSSES`.
    """
    chosen, rejected = batch.sums(batch.policy)
    # Log-ratios are formed token by token, so that two large sums are never subtracted from each other.
    chosen_ratio, rejected_ratio = batch.sums(batch.policy - batch.reference)
    losses = LOSSES[loss_type](chosen_ratio - rejected_ratio, beta)
    return PreferenceLoss(
        losses=losses,
        chosen_logps=chosen.detach(),
        rejected_logps=rejected.detach(),
        chosen_rewards=beta * chosen_ratio.detach(),
        rejected_rewards=beta * rejected_ratio.detach(),
    )

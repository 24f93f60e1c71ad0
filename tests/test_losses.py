"""The DPO loss against arithmetic done by hand, and its gradient against finite differences."""

from __future__ import annotations

import math

import torch

from dpoeng.engine.losses import PreferenceBatch, preference_loss, sigmoid_loss


def batch(policy: list[float], reference: list[float], branch: list[int]) -> PreferenceBatch:
    return PreferenceBatch(
        policy=torch.tensor(policy, requires_grad=True),
        reference=torch.tensor(reference),
        branch=torch.tensor(branch),
        pairs=(max(branch) + 1) // 2,
    )


def test_by_hand() -> None:
    # Pair 0: chosen -1 - 2 = -3 (reference -4: ratio 1), rejected -5 (reference -3: ratio -2); logits 3.
    # Pair 1: equal to the reference; logits 0.
    made = batch([-1.0, -2.0, -5.0, -0.5, -0.25], [-1.5, -2.5, -3.0, -0.5, -0.25], [0, 0, 1, 2, 3])
    found = preference_loss(made, beta=0.5)
    assert found.chosen_logps.tolist() == [-3.0, -0.5]
    assert found.rejected_logps.tolist() == [-5.0, -0.25]
    assert found.chosen_rewards.tolist() == [0.5, 0.0]
    assert found.rejected_rewards.tolist() == [-1.0, 0.0]
    torch.testing.assert_close(
        found.losses.detach(), torch.tensor([math.log1p(math.exp(-1.5)), math.log(2)], dtype=torch.float64)
    )
    found.losses.sum().backward()
    # d/dlogits = -beta * sigmoid(-beta * logits); plus for chosen tokens, minus for rejected ones.
    pull = 0.5 / (1 + math.exp(1.5))
    assert made.policy.grad is not None
    torch.testing.assert_close(made.policy.grad, torch.tensor([-pull, -pull, pull, -0.25, 0.25]))


def test_rewards_carry_no_gradient() -> None:
    found = preference_loss(batch([-1.0, -2.0], [-1.0, -1.0], [0, 1]), beta=0.1)
    assert found.losses.requires_grad
    assert not any(
        t.requires_grad
        for t in (found.chosen_rewards, found.rejected_rewards, found.chosen_logps, found.rejected_logps)
    )


def test_extremes_stay_finite() -> None:
    logits = torch.tensor([1e4, -1e4], dtype=torch.float64, requires_grad=True)
    losses = sigmoid_loss(logits, 1.0)
    assert losses.tolist() == [0.0, 1e4]
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [0.0, -1.0]


def test_long_sums_keep_small_differences() -> None:
    """2,048 tokens near -10 each: float32 sums would lose the margin that float64 sums keep."""
    n = 2048
    reference = torch.full((2 * n,), -10.0)
    policy = reference.clone()
    policy[:n] += 1e-4
    made = PreferenceBatch(policy, reference, torch.arange(2).repeat_interleave(n), 1)
    expected = float((policy.double() - reference.double())[:n].sum())
    assert abs(float(preference_loss(made, beta=1.0).chosen_rewards[0]) - expected) < 1e-9

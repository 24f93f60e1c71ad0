"""Remarks on a run's curves, as an expert would make them: pure functions of its metrics.

Every rule states its figures. Thresholds mark where a practitioner would look again; they are not significance tests.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpoeng.cache.words import counted
from dpoeng.engine.losses.names import facts_of
from dpoeng.engine.training.intervals import FEW, wilson

_ENOUGH_PAIRS = 20
"""Minimum held-out pairs for remarks about their means."""
ENOUGH_STEPS = 8
"""Minimum logged steps for remarks about their course."""

Line = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Advice:
    """One remark: a stable code, the observation, and a suggestion."""

    code: str
    seen: str
    remedy: str

    def record(self) -> dict[str, Any]:
        """The remark as JSON values."""
        return asdict(self)


def advise(
    steps: Sequence[Line],
    evaluations: Sequence[Line],
    *,
    loss_type: Sequence[str],
    beta: float,
    held_out_pairs: int,
) -> list[Advice]:
    """Remarks on a run.

    Args:
        steps: metrics of logged steps, in order.
        evaluations: metrics of the evaluations, in order, under `eval_` names; the first is from before training.
        loss_type: losses of the run.
        beta: beta of the run.
        held_out_pairs: number of pairs in the evaluations.
    """
    # Remarks on log-probs compare the two responses of a pair.
    reference = any(facts_of(name).reference and facts_of(name).rows == "pairs" for name in loss_type)
    few = _few_pairs(held_out_pairs) if evaluations and held_out_pairs < FEW else None
    if held_out_pairs < _ENOUGH_PAIRS:
        evaluations = []
    remarks = [
        few,
        _displacement(steps, evaluations, beta) if reference else None,
        _length(evaluations[-1]) if evaluations else None,
        _not_moving(steps, beta) if reference else None,
        _saturated(steps, evaluations[-1] if evaluations else None),
        _overfitted(evaluations),
    ]
    return [advice for advice in remarks if advice is not None]


def _few_pairs(pairs: int) -> Advice:
    low, high = wilson(0.7, pairs)
    return Advice(
        "few-held-out-pairs",
        f"the evaluations are over {counted(pairs, 'pair')}, which is too few: an accuracy of 0.70 would have a 95 % "
        f"interval from {low:.2f} to {high:.2f}",
        f"hold out at least {FEW} pairs, better a few hundred (eval_share, or eval_view for a separate file)",
    )


def _displacement(steps: Sequence[Line], evaluations: Sequence[Line], beta: float) -> Advice | None:
    """Both responses become less likely. Razin et al. 2024, https://arxiv.org/abs/2410.08847"""
    if len(evaluations) >= 2:
        chosen, rejected = (
            evaluations[-1][f"eval_logps/{side}"] - evaluations[0][f"eval_logps/{side}"]
            for side in ("chosen", "rejected")
        )
        where = "held-out"
    elif len(steps) >= ENOUGH_STEPS:
        chosen, rejected = (_tail(steps, f"rewards/{side}") / beta for side in ("chosen", "rejected"))
        where = "training"
    else:
        return None
    if not (chosen < -1.0 and rejected < -1.0 and chosen < 0.1 * rejected):
        return None
    return Advice(
        "likelihood-displacement",
        f"{where} chosen responses lost {-chosen:.1f} nats of log-probability while rejected ones lost "
        f"{-rejected:.1f}: probability moves to other texts",
        "add a likelihood term (rpo_alpha 1), use loss_type dpop, raise beta, or train for fewer steps",
    )


def _length(last: Line) -> Advice | None:
    """Margins follow the difference of lengths and vanish under length control."""
    accuracy = last["eval_rewards/accuracies"]
    controlled = last.get("eval_rewards/accuracies_length_controlled")
    correlation = last.get("eval_rewards/margins_length_correlation")
    if controlled is None or correlation is None or abs(correlation) < 0.5 or accuracy - controlled < 0.1:
        return None
    taste = "longer" if correlation > 0 else "shorter"
    return Advice(
        "length-explains-margins",
        f"held-out margins follow the difference of lengths (correlation {correlation:+.2f}); accuracy is "
        f"{accuracy:.2f}, but {controlled:.2f} after length control: the policy may only prefer "
        f"{taste} texts",
        "use ld_alpha 0.5, loss_type sigmoid_norm or simpo, or balance the lengths of the pairs",
    )


def _not_moving(steps: Sequence[Line], beta: float) -> Advice | None:
    """The loss is still at its start: ln 2 for DPO."""
    if len(steps) < ENOUGH_STEPS:
        return None
    first, now = steps[0]["loss"], _tail(steps, "loss")
    moved = max(abs(_tail(steps, f"rewards/{side}")) / beta for side in ("chosen", "rejected"))
    if abs(now - first) > 0.01 * abs(first) or moved > 0.25:
        return None
    at = "ln 2" if math.isclose(first, math.log(2), abs_tol=1e-3) else f"{first:.3f}"
    return Advice(
        "loss-does-not-move",
        f"the loss began at {at} and is {now:.4f} after {len(steps)} logged steps; log-probs moved by {moved:.2f} nats",
        "raise learning_rate (LoRA takes 1e-5 to 2e-4), train for more steps, or give the LoRA more target modules",
    )


def _saturated(steps: Sequence[Line], last: Line | None) -> Advice | None:
    """Every training pair is right, so only margins can still grow."""
    if len(steps) < ENOUGH_STEPS or _tail(steps, "rewards/accuracies") < 0.99:
        return None
    seen = f"accuracy on training pairs was {_tail(steps, 'rewards/accuracies'):.2f} over the last quarter of the run"
    if last is not None and last["eval_rewards/accuracies"] < 0.9:
        seen += f", but {last['eval_rewards/accuracies']:.2f} on held-out ones: they are being memorised"
        return Advice("accuracy-saturated", seen, "train for fewer epochs, with a larger beta, or on more pairs")
    return Advice(
        "accuracy-saturated",
        seen + ": the pairs teach nothing more",
        "stop earlier, or use harder pairs",
    )


def _overfitted(evaluations: Sequence[Line]) -> Advice | None:
    """The held-out loss has risen."""
    losses = [line["eval_loss"] for line in evaluations]
    if len(losses) < 3:
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    if best == 0 or losses[-1] - losses[best] < 1e-3 + 0.1 * (losses[0] - losses[best]):
        return None
    return Advice(
        "held-out-loss-rises",
        f"the held-out loss was {losses[best]:.4f} at step {evaluations[best]['step']:.0f} and is {losses[-1]:.4f} now",
        "use load_best_model_at_end, early_stopping_patience, or fewer epochs",
    )


def _tail(steps: Sequence[Line], name: str) -> float:
    """The mean over the last quarter, since single steps are noisy."""
    return statistics.fmean(line[name] for line in steps[-max(len(steps) // 4, 1) :])

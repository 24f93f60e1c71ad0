"""Preference losses of a batch: from sums per pair to one loss per pair. Independent of models and caches.

There are two steps, so that an optimizer step can be split into any number of forwards: `pair_sums` reduces the output
of one forward, and `preference_loss` works on pairs. The loss functions are in `pairwise`, `likelihood`, `unpaired` and
`lists`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dpoeng.engine.losses import likelihood, lists, unpaired
from dpoeng.engine.losses import pairwise as pair
from dpoeng.engine.losses.names import LossSettings, facts_of
from dpoeng.engine.losses.own import OwnLoss
from dpoeng.engine.losses.sums import PairSums as PairSums
from dpoeng.engine.losses.sums import PreferenceBatch as PreferenceBatch
from dpoeng.engine.losses.sums import PreferenceLoss as PreferenceLoss
from dpoeng.engine.losses.sums import kl_per_token as kl_per_token
from dpoeng.engine.losses.sums import pair_sums as pair_sums

LossState = Mapping[str, float]
"""State that some losses carry from one optimizer step to the next; part of every checkpoint. Usually empty."""


@dataclass(frozen=True, slots=True, eq=False)
class _Terms:
    """Values computed once from the sums and shared by the losses of a mixture."""

    sums: PairSums
    settings: LossSettings
    state: LossState
    mean_tokens: float | torch.Tensor
    gumbel: torch.Tensor | None
    delta: torch.Tensor
    mean_delta: torch.Tensor

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.sums.chosen_logps / self.sums.chosen_tokens, self.sums.rejected_logps / self.sums.rejected_tokens


def preference_loss(
    sums: PairSums,
    settings: LossSettings,
    *,
    state: LossState | None = None,
    mean_tokens: float | None = None,
    gumbel: torch.Tensor | None = None,
) -> PreferenceLoss:
    """Computes the losses of pairs.

    Args:
        sums: the pairs: the whole optimizer step if `settings.whole_batch`, otherwise any part of it.
        settings: the losses and their parameters.
        state: the state left by the previous steps, see `next_state`.
        mean_tokens: mean number of chosen tokens over the optimizer step; None if `sums` is the whole step.
        gumbel: [B], independent draws for losses that select pairs at random; None if all pairs count, as in an
            evaluation.
    """
    scores = [
        pair.f_divergence_scores(ratio, settings.f_divergence_type, settings.f_alpha_divergence_coef)
        for ratio in (sums.chosen_ratio, sums.rejected_ratio)
    ]
    terms = _Terms(
        sums=sums,
        settings=settings,
        state=state or {},
        mean_tokens=_mean_tokens(sums) if mean_tokens is None else mean_tokens,
        gumbel=gumbel,
        delta=scores[0] - scores[1],
        mean_delta=scores[0] / sums.chosen_tokens - scores[1] / sums.rejected_tokens,
    )
    if sums.row_pairs is not None:
        return _of_ranked_rows(terms)
    losses = torch.zeros_like(terms.delta) + _pair_losses(terms)
    chosen_rewards, rejected_rewards = rewards(sums, settings)
    return PreferenceLoss(
        losses=losses * (sums.weights if sums.desirable is None else sums.weights * _label_weights(sums, settings)),
        chosen_logps=sums.chosen_logps.detach(),
        rejected_logps=sums.rejected_logps.detach(),
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        sums=sums.detached(),
        threshold=None if sums.desirable is None else _threshold(terms),
    )


def _pair_losses(terms: _Terms) -> torch.Tensor | float:
    """The weighted sum of the losses that look at pairs, [B]; 0 where there are none."""
    settings = terms.settings
    losses: torch.Tensor | float = 0.0
    for name, weight in _weighted(settings):
        if not facts_of(name).of_list:
            losses = losses + weight * (_own(terms, name) if isinstance(name, OwnLoss) else LOSSES[name](terms))
    if settings.rpo_alpha is not None:
        losses = losses + settings.rpo_alpha * likelihood.rpo_term(terms.means[0])
    return losses


def _weighted(settings: LossSettings) -> list[tuple[str, float]]:
    weights = settings.loss_weights or (1.0,) * len(settings.loss_type)
    return list(zip(settings.loss_type, weights, strict=True))


def _of_ranked_rows(terms: _Terms) -> PreferenceLoss:
    """The loss of each ranked row: the mean over its pairs, and what looks at all its responses at once."""
    sums, settings, rows = terms.sums, terms.settings, terms.sums.ranked
    assert rows is not None
    of_pairs = torch.zeros_like(terms.delta) + _pair_losses(terms)
    if settings.sorts_pairs:  # then a loss belongs to no pair, and none to a row
        losses = (of_pairs.mean() * sums.weights.mean()).expand(len(rows.pairs))
    else:
        losses = rows.means(of_pairs * sums.weights)
    rewarded, mask = lists.padded(settings.beta * rows.ratios, rows.sizes)
    scores, _ = lists.padded(rows.scores, rows.sizes)
    for name, weight in _weighted(settings):
        if name in LIST_LOSSES:
            losses = losses + weight * LIST_LOSSES[name](rewarded, scores, mask, settings)
    pair_rewards = rewards(sums, settings)
    best = torch.where(mask, scores, -torch.inf).amax(-1, keepdim=True)
    highest = rewarded.detach().masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    at_top = (rewarded.detach() == highest) & mask
    return PreferenceLoss(
        losses=losses * rows.weights,
        chosen_logps=rows.means(sums.chosen_logps.detach()),
        rejected_logps=rows.means(sums.rejected_logps.detach()),
        chosen_rewards=rows.means(pair_rewards[0]),
        rejected_rewards=rows.means(pair_rewards[1]),
        sums=sums.detached(),
        accuracies=rows.means((pair_rewards[0] > pair_rewards[1]).double()),
        top=(~at_top | (scores == best)).all(-1).double(),  # of equal rewards each has to be a best one
        pair_margins=pair_rewards[0] - pair_rewards[1],
    )


def _own(terms: _Terms, name: OwnLoss) -> torch.Tensor:
    """The values that the forward computed with a user's loss, [B]."""
    assert terms.sums.own is not None
    return terms.sums.own[:, terms.settings.own.index(name)]


def _label_weights(sums: PairSums, settings: LossSettings) -> torch.Tensor:
    """The weight of each unpaired row, by its label, [B]."""
    assert sums.desirable is not None
    return torch.where(sums.desirable > 0, settings.desirable_weight, settings.undesirable_weight)


def _threshold(terms: _Terms) -> torch.Tensor:
    """The reward above which an unpaired response counts as desirable, [B], from the first of the losses."""
    zero = torch.zeros_like(terms.sums.chosen_ratio.detach())
    if terms.settings.loss_type[0] == "kto":
        return zero + terms.settings.beta * unpaired.reference_point(terms.sums.rejected_ratio)
    if terms.settings.loss_type[0] == "bco":
        return zero + _reward_shift(terms.state, terms.sums, terms.settings)["bco_mean"]
    return zero


def rewards(sums: PairSums, settings: LossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """DPO's implicit reward: beta times the log-ratio, or for losses without a reference beta times their own score."""
    compared = [name for name in settings.loss_type if name != "sft"]
    chosen, rejected = sums.chosen_ratio, sums.rejected_ratio
    if compared and not any(facts_of(name).reference for name in compared):
        chosen, rejected = sums.chosen_logps, sums.rejected_logps
        if compared[0] in ("simpo", "orpo"):
            chosen, rejected = chosen / sums.chosen_tokens, rejected / sums.rejected_tokens
    return settings.beta * chosen.detach(), settings.beta * rejected.detach()


def next_state(state: LossState, sums: PairSums, settings: LossSettings) -> dict[str, float]:
    """The losses' state after an optimizer step over all of `sums`; the step itself used `state`."""
    after = dict(state)
    chosen, rejected = (settings.beta * ratio.detach() for ratio in (sums.chosen_ratio, sums.rejected_ratio))
    if "bco_pair" in settings.loss_type and settings.bco_reward_shift:
        count = state.get("bco_rewards", 0.0) + 2 * len(chosen)
        total = float(chosen.sum() + rejected.sum()) + state.get("bco_mean", 0.0) * state.get("bco_rewards", 0.0)
        after |= {"bco_rewards": count, "bco_mean": total / count}
    if "bco" in settings.loss_type:
        after |= _reward_shift(state, sums, settings)
    if "beta_dpo" in settings.loss_type:
        keep = settings.beta_dpo_momentum
        margins = chosen - rejected
        after["beta_dpo_margin"] = keep * state.get("beta_dpo_margin", 0.0) + (1 - keep) * float(margins.mean())
        if settings.beta_dpo_keep < 1 and len(margins) > 1:
            before = state.get("beta_dpo_deviation", 0.0)
            after["beta_dpo_deviation"] = keep * before + (1 - keep) * float(margins.std())
    return after


def _reward_shift(state: LossState, sums: PairSums, settings: LossSettings) -> dict[str, float]:
    """BCO's shift: the mean of all rewards so far, including this step, and their number."""
    before, rewards = state.get("bco_rewards", 0.0), settings.beta * sums.chosen_ratio.detach()
    count = before + len(rewards)
    return {"bco_rewards": count, "bco_mean": (state.get("bco_mean", 0.0) * before + float(rewards.sum())) / count}


def _unpaired(loss: Callable[..., torch.Tensor], *more: Callable[[_Terms], Any]) -> Callable[[_Terms], torch.Tensor]:
    """A loss of single responses' ratios, their labels, beta and the values of `more`."""

    def of(terms: _Terms) -> torch.Tensor:
        extra = [one(terms) for one in more]
        return loss(terms.sums.chosen_ratio, terms.sums.desirable, terms.settings.beta, *extra)

    return of


def _beta_dpo(terms: _Terms) -> torch.Tensor:
    settings, margins = terms.settings, terms.settings.beta * terms.delta
    average = terms.state.get("beta_dpo_margin", 0.0)
    if settings.beta_dpo_keep == 1 or terms.gumbel is None:
        beta = pair.dynamic_beta(margins, settings.beta, settings.beta_dpo_alpha, average)
        return pair.sigmoid_loss(terms.delta, beta)
    deviation = terms.state.get("beta_dpo_deviation", 0.0)
    selected = pair.usual_pairs(margins, settings.beta_dpo_keep, average, deviation, terms.gumbel)
    beta = pair.dynamic_beta(margins[selected], settings.beta, settings.beta_dpo_alpha, average)
    # Scaled so that the mean over all pairs equals the mean over the selected ones.
    losses = len(margins) / len(selected) * pair.sigmoid_loss(terms.delta[selected], beta)
    return torch.zeros_like(margins).index_add(0, selected, losses)


def _mean_tokens(sums: PairSums) -> torch.Tensor:
    """The mean number of chosen tokens: of ranked rows, of each row's mean over its pairs."""
    rows = sums.ranked
    return sums.chosen_tokens.mean() if rows is None else rows.means(sums.chosen_tokens).mean()


def _margins(terms: _Terms) -> torch.Tensor:
    assert terms.sums.row_margins is not None, "a loss of ranked rows"
    return terms.sums.row_margins


def _aot(terms: _Terms) -> torch.Tensor:
    sums, settings = terms.sums, terms.settings
    reference = sums.ref_chosen - sums.ref_rejected
    return pair.aot_loss(reference + terms.delta, reference, settings.beta, settings.label_smoothing)


def _ratios(loss: Callable[..., torch.Tensor], *names: str) -> Callable[[_Terms], torch.Tensor]:
    """A loss of the two log-ratios, beta and some settings."""

    def of(terms: _Terms) -> torch.Tensor:
        settings = (getattr(terms.settings, name) for name in ("beta", *names))
        return loss(terms.sums.chosen_ratio, terms.sums.rejected_ratio, *settings)

    return of


def _delta(loss: Callable[..., torch.Tensor], *names: str, mean: bool = False) -> Callable[[_Terms], torch.Tensor]:
    """A loss of the difference of scores (or of scores per token), beta and some settings."""

    def of(terms: _Terms) -> torch.Tensor:
        settings = (getattr(terms.settings, name) for name in ("beta", *names))
        return loss(terms.mean_delta if mean else terms.delta, *settings)

    return of


LIST_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, LossSettings], torch.Tensor]] = {
    "plackett_luce": lambda rewards, scores, mask, _: lists.plackett_luce_loss(rewards, scores, mask),
    "listnet": lambda rewards, scores, mask, of: lists.listnet_loss(rewards, scores, mask, of.score_scale),
    "lipo_lambda": lambda rewards, scores, mask, of: lists.lipo_lambda_loss(rewards, scores, mask, of.score_scale),
}


LOSSES: dict[str, Callable[[_Terms], torch.Tensor]] = {
    "sigmoid": _delta(pair.sigmoid_loss, "label_smoothing"),
    "sigmoid_norm": _delta(pair.sigmoid_loss, mean=True),
    "soft_sigmoid": lambda t: pair.soft_sigmoid_loss(t.delta, t.settings.beta, _margins(t), t.settings.score_scale),
    "robust": _delta(pair.robust_loss, "label_smoothing"),
    "ipo": _delta(pair.ipo_loss, mean=True),
    "hinge": _delta(pair.hinge_loss),
    "exo_pair": _delta(pair.exo_pair_loss, "label_smoothing"),
    "nca_pair": _ratios(pair.nca_pair_loss),
    "bco_pair": lambda t: pair.bco_pair_loss(
        t.sums.chosen_ratio, t.sums.rejected_ratio, t.settings.beta, t.state.get("bco_mean", 0.0)
    ),
    "sppo_hard": _ratios(pair.sppo_hard_loss),
    "aot": _aot,
    "aot_unpaired": lambda t: pair.aot_loss(
        t.sums.chosen_ratio, t.sums.rejected_ratio, t.settings.beta, t.settings.label_smoothing
    ),
    "apo_zero": _ratios(pair.apo_zero_loss),
    "apo_down": _ratios(pair.apo_down_loss),
    "discopop": _delta(pair.discopop_loss, "discopop_tau"),
    "dpop": _ratios(pair.dpop_loss, "dpop_lambda"),
    "beta_dpo": _beta_dpo,
    "simpo": lambda t: likelihood.simpo_loss(
        *t.means, t.settings.beta, t.settings.simpo_gamma, t.settings.label_smoothing
    ),
    "cpo": lambda t: likelihood.cpo_loss(
        t.sums.chosen_logps,
        t.sums.rejected_logps,
        t.settings.beta,
        alpha=t.settings.cpo_alpha,
        mean_tokens=t.mean_tokens,
        label_smoothing=t.settings.label_smoothing,
    ),
    "orpo": lambda t: likelihood.orpo_loss(
        *t.means, t.settings.beta, chosen_logps=t.sums.chosen_logps, mean_tokens=t.mean_tokens
    ),
    "sft": lambda t: likelihood.sft_loss(t.sums.chosen_logps, t.mean_tokens),
    "kto": _unpaired(unpaired.kto_loss, lambda t: unpaired.reference_point(t.sums.rejected_ratio)),
    "apo_zero_unpaired": _unpaired(unpaired.apo_zero_unpaired_loss),
    "bco": _unpaired(unpaired.bco_loss, lambda t: _reward_shift(t.state, t.sums, t.settings)["bco_mean"]),
}

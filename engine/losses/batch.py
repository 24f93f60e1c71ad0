"""Preference losses of a batch: per-token log-probs to sums of pairs to one loss a pair. Knows no model and no cache.

Two steps, so that an optimizer step may be cut into any number of forwards: `pair_sums` reduces what one forward gave,
and `preference_loss` looks at pairs. The loss functions themselves are in `pair_losses` and `likelihood_losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from dpoeng.engine.losses import likelihood
from dpoeng.engine.losses import pairwise as pair
from dpoeng.engine.losses.names import LOSS_FACTS, LossSettings

LossState = Mapping[str, float]
"""What some losses remember from one optimizer step to the next; part of every checkpoint. Empty for most."""


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceBatch:
    """Output of one forward: per-token log-probs of B pairs, chosen and rejected branches alternating.

    Branch 2i is pair i's chosen response and branch 2i + 1 its rejected one. Per-token values and not sums, since
    length-normalised and LD-DPO losses need them.

    Attributes:
        policy: [N] float32, with gradient.
        reference: [N] float32, from the cache.
        branch: [N] int64, ascending, the branch that each token belongs to.
        pairs: B.
        log_collision: [N] float32, log sum_v pi(v)^2 at each position, for `use_weighting`; else None.
        weights: [B] float64, the user's weight of each pair, or None.
        per_token: whether `reference` is known token by token; else a response's first token carries its sum, the
            others hold 0, and there is no KL.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    branch: torch.Tensor
    pairs: int
    log_collision: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    per_token: bool = True

    def lengths(self) -> torch.Tensor:
        """Tokens of each branch, [2B] int64; no synchronisation with the device."""
        total = torch.zeros(2 * self.pairs, dtype=torch.int64, device=self.branch.device)
        return total.index_add(0, self.branch, torch.ones_like(self.branch))

    def sums(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-token values [N] -> (chosen sums [B], rejected sums [B]), added in float64."""
        total = torch.zeros(2 * self.pairs, dtype=torch.float64, device=values.device)
        total = total.index_add(0, self.branch, values.double())
        by_side = total.view(self.pairs, 2)
        return by_side[:, 0], by_side[:, 1]


_GRADIENT = ("chosen_ratio", "rejected_ratio", "chosen_logps", "rejected_logps")


@dataclass(frozen=True, slots=True, eq=False)
class PairSums:
    """Inputs of the losses, a number a pair: all [B], float64.

    `_ratio` is log pi/ref and `ref_` log ref, both with LD-DPO's weights on the tokens; `_logps` are plain sums of the
    policy's log-probs; `_tokens` counts the scored tokens; `_kl` estimates the KL per token, or is NaN where that is
    not known; `weights` multiplies a pair's loss. Ratios and logps carry the gradient.
    """

    chosen_ratio: torch.Tensor
    rejected_ratio: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    chosen_kl: torch.Tensor
    rejected_kl: torch.Tensor
    weights: torch.Tensor

    @property
    def with_gradient(self) -> tuple[torch.Tensor, ...]:
        """The tensors that the losses are differentiated by."""
        return tuple(getattr(self, name) for name in _GRADIENT)

    def leaves(self) -> PairSums:
        """The same numbers as leaves of a new graph: `backward` on a loss of them leaves the gradient in `.grad`."""
        return replace(self, **{name: getattr(self, name).detach().clone().requires_grad_() for name in _GRADIENT})

    def detached(self) -> PairSums:
        """The same numbers without the graph, and so without the activations that it holds."""
        return replace(self, **{name: getattr(self, name).detach() for name in _GRADIENT})

    def on_host(self) -> PairSums:
        """The same numbers in the host's memory, without the graph, as they are sent to other processes."""
        return PairSums(**{f.name: getattr(self, f.name).detach().cpu() for f in fields(PairSums)})

    @staticmethod
    def join(parts: Sequence[PairSums]) -> PairSums:
        """The pairs of several forwards as one batch."""
        return PairSums(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(PairSums)})


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceLoss:
    """Losses and the quantities that are reported; all [B], float64; all but `losses` detached."""

    losses: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    sums: PairSums = field(repr=False)

    def on_host(self) -> PreferenceLoss:
        """As `PairSums.on_host`."""
        tensors = {f.name: getattr(self, f.name).detach().cpu() for f in fields(PreferenceLoss) if f.name != "sums"}
        return PreferenceLoss(**tensors, sums=self.sums.on_host())


def pair_sums(batch: PreferenceBatch, settings: LossSettings) -> PairSums:
    """Reduces a forward to its pairs."""
    # Log-ratios are formed token by token, so that two large sums are never subtracted from each other.
    ratio, reference = batch.policy - batch.reference, batch.reference
    lengths = batch.lengths()
    if settings.ld_alpha is not None:
        tail = ld_weights(batch.branch, lengths, settings.ld_alpha)
        ratio, reference = ratio * tail, reference * tail
    chosen_ratio, rejected_ratio = batch.sums(ratio)
    ref_chosen, ref_rejected = batch.sums(reference)
    chosen_logps, rejected_logps = batch.sums(batch.policy)
    tokens = lengths.double().view(batch.pairs, 2)
    with torch.no_grad():
        kl = kl_per_token(batch.policy.double(), batch.reference.double())
        chosen_kl, rejected_kl = batch.sums(kl if batch.per_token else torch.full_like(kl, torch.nan))
        weights = batch.weights
        if weights is None:
            weights = torch.ones(batch.pairs, dtype=torch.float64, device=batch.policy.device)
        if settings.use_weighting:
            weights = weights * wpo_weights(batch)
    return PairSums(
        chosen_ratio=chosen_ratio,
        rejected_ratio=rejected_ratio,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_tokens=tokens[:, 0],
        rejected_tokens=tokens[:, 1],
        chosen_kl=chosen_kl / tokens[:, 0],
        rejected_kl=rejected_kl / tokens[:, 1],
        weights=weights,
    )


def ld_weights(branch: torch.Tensor, lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    """1 for tokens up to the length of the shorter response of a pair, `alpha` for those beyond it; [N] float32.

    Liu et al. 2024, LD-DPO, https://arxiv.org/abs/2409.06411
    """
    position = torch.arange(len(branch), device=branch.device) - (lengths.cumsum(0) - lengths)[branch]
    shared = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    return torch.where(position < shared[branch], 1.0, alpha)


def wpo_weights(batch: PreferenceBatch) -> torch.Tensor:
    """How likely the policy itself would write both responses: a weight a pair, [B] float64, without gradient.

    exp of the mean over tokens of log pi(token) - log sum_v pi(v)^2, chosen times rejected. Zhou et al. 2024,
    equation 2 with sampled alignment, https://arxiv.org/abs/2406.11827
    """
    assert batch.log_collision is not None, "use_weighting needs the policy's collision probabilities"
    lengths = batch.lengths().double().view(batch.pairs, 2)
    chosen, rejected = batch.sums(batch.policy.detach().double() - batch.log_collision.double())
    return torch.exp(chosen / lengths[:, 0] + rejected / lengths[:, 1])


def kl_per_token(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """x - log x - 1 with x = ref/pi: never negative, and 0 only where both agree.

    Schulman 2020, http://joschu.net/blog/kl-approx.html, estimator k3 of KL(pi || ref). It would be unbiased on tokens
    drawn from the policy; on the tokens of given responses it measures how far the policy has moved there.
    """
    log_x = torch.clamp(reference - policy, max=pair.MAX_EXPONENT)
    return torch.expm1(log_x) - log_x


@dataclass(frozen=True, slots=True, eq=False)
class _Terms:
    """Values derived once from the sums and shared by the losses of a mixture."""

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
    """Losses of pairs.

    Args:
        sums: the pairs. Where `settings.whole_batch`, all of the optimizer step's; else any part of them.
        settings: which losses, and their parameters.
        state: what the steps before have left, see `next_state`.
        mean_tokens: mean number of chosen tokens over the optimizer step; None where `sums` is the whole step.
        gumbel: [B], independent draws for losses that choose pairs at random; None where all pairs count, as in an
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
        mean_tokens=sums.chosen_tokens.mean() if mean_tokens is None else mean_tokens,
        gumbel=gumbel,
        delta=scores[0] - scores[1],
        mean_delta=scores[0] / sums.chosen_tokens - scores[1] / sums.rejected_tokens,
    )
    weights = settings.loss_weights or (1.0,) * len(settings.loss_type)
    losses = torch.zeros_like(terms.delta)
    for name, weight in zip(settings.loss_type, weights, strict=True):
        losses = losses + weight * LOSSES[name](terms)
    if settings.rpo_alpha is not None:
        losses = losses + settings.rpo_alpha * likelihood.rpo_term(terms.means[0])
    chosen_rewards, rejected_rewards = rewards(sums, settings)
    return PreferenceLoss(
        losses=losses * sums.weights,
        chosen_logps=sums.chosen_logps.detach(),
        rejected_logps=sums.rejected_logps.detach(),
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        sums=sums.detached(),
    )


def rewards(sums: PairSums, settings: LossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """beta times the log-ratio, DPO's implicit reward; for losses without a reference beta times what they compare."""
    compared = [name for name in settings.loss_type if name != "sft"]
    chosen, rejected = sums.chosen_ratio, sums.rejected_ratio
    if compared and not any(LOSS_FACTS[name].reference for name in compared):
        chosen, rejected = sums.chosen_logps, sums.rejected_logps
        if compared[0] in ("simpo", "orpo"):
            chosen, rejected = chosen / sums.chosen_tokens, rejected / sums.rejected_tokens
    return settings.beta * chosen.detach(), settings.beta * rejected.detach()


def next_state(state: LossState, sums: PairSums, settings: LossSettings) -> dict[str, float]:
    """Return the losses' state after an optimizer step over all of `sums`; the step itself used `state`."""
    after = dict(state)
    chosen, rejected = (settings.beta * ratio.detach() for ratio in (sums.chosen_ratio, sums.rejected_ratio))
    if "bco_pair" in settings.loss_type and settings.bco_reward_shift:
        count = state.get("bco_rewards", 0.0) + 2 * len(chosen)
        total = float(chosen.sum() + rejected.sum()) + state.get("bco_mean", 0.0) * state.get("bco_rewards", 0.0)
        after |= {"bco_rewards": count, "bco_mean": total / count}
    if "beta_dpo" in settings.loss_type:
        keep = settings.beta_dpo_momentum
        margins = chosen - rejected
        after["beta_dpo_margin"] = keep * state.get("beta_dpo_margin", 0.0) + (1 - keep) * float(margins.mean())
        if settings.beta_dpo_keep < 1 and len(margins) > 1:
            before = state.get("beta_dpo_deviation", 0.0)
            after["beta_dpo_deviation"] = keep * before + (1 - keep) * float(margins.std())
    return after


def _beta_dpo(terms: _Terms) -> torch.Tensor:
    settings, margins = terms.settings, terms.settings.beta * terms.delta
    average = terms.state.get("beta_dpo_margin", 0.0)
    if settings.beta_dpo_keep == 1 or terms.gumbel is None:
        beta = pair.dynamic_beta(margins, settings.beta, settings.beta_dpo_alpha, average)
        return pair.sigmoid_loss(terms.delta, beta)
    deviation = terms.state.get("beta_dpo_deviation", 0.0)
    kept = pair.usual_pairs(margins, settings.beta_dpo_keep, average, deviation, terms.gumbel)
    beta = pair.dynamic_beta(margins[kept], settings.beta, settings.beta_dpo_alpha, average)
    # Scaled so that the mean over all pairs is that over the kept ones.
    losses = len(margins) / len(kept) * pair.sigmoid_loss(terms.delta[kept], beta)
    return torch.zeros_like(margins).index_add(0, kept, losses)


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
    """A loss of the difference of scores, or of scores per token; beta and some settings."""

    def of(terms: _Terms) -> torch.Tensor:
        settings = (getattr(terms.settings, name) for name in ("beta", *names))
        return loss(terms.mean_delta if mean else terms.delta, *settings)

    return of


LOSSES: dict[str, Callable[[_Terms], torch.Tensor]] = {
    "sigmoid": _delta(pair.sigmoid_loss, "label_smoothing"),
    "sigmoid_norm": _delta(pair.sigmoid_loss, mean=True),
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
}

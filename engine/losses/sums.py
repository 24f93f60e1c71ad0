"""Reduces a forward's output to sums: from per-token log-probs of branches to a few numbers per pair, and a loss.

Independent of models, caches and the loss functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from dpoeng.engine.losses.names import LossSettings
from dpoeng.engine.losses.own import LossInputs
from dpoeng.engine.losses.pairwise import MAX_EXPONENT


@dataclass(frozen=True, slots=True, eq=False)
class RankedRows:
    """G ranked rows of K responses, and the B pairs that are made of them, row after row.

    Attributes:
        pairs: [G] int64, pairs of each row; on the host, as `sizes`, since shapes depend on them.
        margins: [B] float64, the score of a pair's chosen response less that of its rejected one.
        weights: [G] float64, the user's weight of each row.
        sizes: [G] int64, responses of each row.
        ratios: [K] float64, log pi/ref of each response, with gradient.
        scores: [K] float64.
    """

    pairs: torch.Tensor
    margins: torch.Tensor
    weights: torch.Tensor
    sizes: torch.Tensor
    ratios: torch.Tensor
    scores: torch.Tensor

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """Values of pairs [B] -> their mean in each row [G]."""
        row = torch.repeat_interleave(torch.arange(len(self.pairs)), self.pairs).to(values.device)
        total = torch.zeros(len(self.pairs), dtype=values.dtype, device=values.device)
        return total.index_add(0, row, values) / self.pairs.to(values.device)


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceBatch:
    """Output of one forward: per-token log-probs of B pairs, alternating chosen and rejected branches.

    Branch 2i is pair i's chosen response and branch 2i + 1 its rejected one. Values are per token, because
    length-normalised and LD-DPO losses need them. For an unpaired row, branch 2i is its response and branch 2i + 1 the
    mismatched one, which has no tokens if the loss does not read it.

    Attributes:
        policy: [N] float32, with gradient.
        reference: [N] float32, from the cache.
        branch: [N] int64, ascending: the branch of each token.
        pairs: B.
        log_collision: [N] float32, log sum_v pi(v)^2 at each position, for `use_weighting`; else None.
        weights: [B] float64, the user's weight of each pair, or None.
        desirable: [B] float64, 1 for a desirable response of an unpaired row, else 0; None for pairs.
        per_token: whether `reference` is known per token; otherwise a response's first token carries its sum, the
            others are 0, and there is no KL.
        ranked: the rows that the pairs are of, where these are ranked; else None.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    branch: torch.Tensor
    pairs: int
    log_collision: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    desirable: torch.Tensor | None = None
    per_token: bool = True
    ranked: RankedRows | None = None

    def lengths(self) -> torch.Tensor:
        """Tokens of each branch, [2B] int64, without synchronising with the device."""
        total = torch.zeros(2 * self.pairs, dtype=torch.int64, device=self.branch.device)
        return total.index_add(0, self.branch, torch.ones_like(self.branch))

    def sums(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-token values [N] -> (chosen sums [B], rejected sums [B]), added in float64."""
        total = torch.zeros(2 * self.pairs, dtype=torch.float64, device=values.device)
        total = total.index_add(0, self.branch, values.double())
        by_side = total.view(self.pairs, 2)
        return by_side[:, 0], by_side[:, 1]


_GRADIENT = ("chosen_ratio", "rejected_ratio", "chosen_logps", "rejected_logps", "own", "row_ratios")


@dataclass(frozen=True, slots=True, eq=False)
class PairSums:
    """Inputs of the losses, one number per pair: all [B], float64.

    `_ratio` is log pi/ref and `ref_` log ref, both with LD-DPO's weights on the tokens; `_logps` are plain sums of the
    policy's log-probs; `_tokens` counts the scored tokens; `_kl` estimates the KL per token, NaN if unknown; `weights`
    multiplies a pair's loss. Ratios and logps carry the gradient.

    `own` has the values of the user's losses for each pair, [B, number of them], with gradient; None without any.

    For unpaired rows `desirable` has the labels (None for pairs), `chosen_` is the response, whatever its label, and
    `rejected_` the mismatched one.

    Of ranked rows these are the pairs made of them, and the `row_` fields those of `RankedRows`; None of other rows.
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
    desirable: torch.Tensor | None = None
    own: torch.Tensor | None = None
    row_pairs: torch.Tensor | None = None
    row_margins: torch.Tensor | None = None
    row_weights: torch.Tensor | None = None
    row_sizes: torch.Tensor | None = None
    row_ratios: torch.Tensor | None = None
    row_scores: torch.Tensor | None = None

    @property
    def ranked(self) -> RankedRows | None:
        """The ranked rows, or None."""
        if self.row_pairs is None:
            return None
        rows = (self.row_margins, self.row_weights, self.row_sizes, self.row_ratios, self.row_scores)
        return RankedRows(self.row_pairs, *(values for values in rows if values is not None))

    @property
    def with_gradient(self) -> dict[str, torch.Tensor]:
        """The tensors to differentiate the losses by."""
        return {name: getattr(self, name) for name in _GRADIENT if getattr(self, name) is not None}

    def leaves(self) -> PairSums:
        """The same numbers as leaves of a new graph: `backward` on their loss leaves the gradient in `.grad`."""
        return replace(self, **{name: x.detach().clone().requires_grad_() for name, x in self.with_gradient.items()})

    def detached(self) -> PairSums:
        """The same numbers without the graph, and so without its activations."""
        return replace(self, **{name: x.detach() for name, x in self.with_gradient.items()})

    def on_host(self) -> PairSums:
        """The same numbers in host memory without the graph, ready to be sent to other processes."""
        return PairSums(**_on_host(self))

    @staticmethod
    def join(parts: Sequence[PairSums]) -> PairSums:
        """The pairs of several forwards as one batch."""
        known = [f.name for f in fields(PairSums) if getattr(parts[0], f.name) is not None]
        return PairSums(**{name: torch.cat([getattr(part, name) for part in parts]) for name in known})


def _on_host(of: PairSums | PreferenceLoss) -> dict[str, torch.Tensor]:
    """Field -> its tensor in host memory, without the graph."""
    values = {f.name: getattr(of, f.name) for f in fields(of)}
    return {name: x.detach().cpu() for name, x in values.items() if isinstance(x, torch.Tensor)}


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceLoss:
    """Losses and reported quantities; all [B], float64; all but `losses` detached.

    `threshold` is the reward above which an unpaired response counts as desirable (None for pairs).

    Of ranked rows all are [G], a number a row: the mean over its pairs, which `sums` holds. `top` is 1 where a best
    response has the highest reward, and `accuracies` the share of pairs in the right order; `pair_margins`,
    [B], has the difference of rewards of each pair. None of other rows.
    `auxiliary` is the balancing loss of the forward's routers, the same for all its pairs; None if none is added.
    """

    losses: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    sums: PairSums = field(repr=False)
    threshold: torch.Tensor | None = None
    auxiliary: torch.Tensor | None = None
    accuracies: torch.Tensor | None = None
    top: torch.Tensor | None = None
    pair_margins: torch.Tensor | None = None

    def on_host(self) -> PreferenceLoss:
        """Like `PairSums.on_host`."""
        return PreferenceLoss(**_on_host(self), sums=self.sums.on_host())


def pair_sums(batch: PreferenceBatch, settings: LossSettings) -> PairSums:
    """Reduces a forward's output to sums per pair."""
    # Log-ratios are formed per token, so that two large sums are never subtracted from each other.
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
        desirable=batch.desirable,
        own=_own_losses(batch, settings) if settings.own else None,
        **({f"row_{f.name}": getattr(batch.ranked, f.name) for f in fields(RankedRows)} if batch.ranked else {}),
    )


def _own_losses(batch: PreferenceBatch, settings: LossSettings) -> torch.Tensor:
    """Values of each user-written loss for each pair, [B, number of them] float64."""
    inputs = loss_inputs(batch, settings.beta)
    return torch.stack([own.function(inputs).double() for own in settings.own], 1)


def loss_inputs(batch: PreferenceBatch, beta: float) -> LossInputs:
    """A forward's output for a user's loss: sums and padded tokens of both sides."""
    lengths = batch.lengths()
    position = torch.arange(len(batch.branch), device=batch.branch.device) - (lengths.cumsum(0) - lengths)[batch.branch]
    # Reading the longest length waits for the device once per side; built-in losses never wait.
    longest = lengths.view(-1, 2).amax(0).tolist()
    reference = batch.reference if batch.per_token else torch.full_like(batch.reference, torch.nan)
    sides: dict[str, torch.Tensor] = {}
    (chosen, rejected), (ref_chosen, ref_rejected) = batch.sums(batch.policy), batch.sums(batch.reference)
    sums = {"chosen": (chosen, ref_chosen), "rejected": (rejected, ref_rejected)}
    for number, side in enumerate(sums):
        of_this_side = batch.branch % 2 == number
        where = (batch.branch[of_this_side] // 2, position[of_this_side])
        padded = torch.zeros(batch.pairs, longest[number], dtype=torch.float64, device=batch.policy.device)
        sides |= {
            f"{side}_logps": sums[side][0],
            f"ref_{side}_logps": sums[side][1],
            f"{side}_token_logps": padded.index_put(where, batch.policy[of_this_side].double()),
            f"ref_{side}_token_logps": padded.index_put(where, reference[of_this_side].double()),
            f"{side}_mask": padded.index_put(where, torch.ones_like(reference[of_this_side]).double()) > 0,
            f"{side}_tokens": lengths[number::2].double(),
        }
    return LossInputs(**sides, beta=beta)


def ld_weights(branch: torch.Tensor, lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    """1 for tokens up to the length of the pair's shorter response, `alpha` for the others; [N] float32.

    Liu et al. 2024, LD-DPO, https://arxiv.org/abs/2409.06411
    """
    position = torch.arange(len(branch), device=branch.device) - (lengths.cumsum(0) - lengths)[branch]
    shared = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    return torch.where(position < shared[branch], 1.0, alpha)


def wpo_weights(batch: PreferenceBatch) -> torch.Tensor:
    """How likely the policy itself would write both responses: one weight per pair, [B] float64, without gradient.

    exp of the mean over tokens of log pi(token) - log sum_v pi(v)^2, chosen times rejected. Zhou et al. 2024,
    equation 2 with sampled alignment, https://arxiv.org/abs/2406.11827
    """
    assert batch.log_collision is not None, "use_weighting needs the policy's collision probabilities"
    lengths = batch.lengths().double().view(batch.pairs, 2)
    chosen, rejected = batch.sums(batch.policy.detach().double() - batch.log_collision.double())
    return torch.exp(chosen / lengths[:, 0] + rejected / lengths[:, 1])


def kl_per_token(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """x - log x - 1 with x = ref/pi: never negative, and 0 only where both agree.

    Schulman 2020, http://joschu.net/blog/kl-approx.html, estimator k3 of KL(pi || ref). It is unbiased on tokens drawn
    from the policy; on tokens of given responses it measures how far the policy has moved there.
    """
    log_x = torch.clamp(reference - policy, max=MAX_EXPONENT)
    return torch.expm1(log_x) - log_x

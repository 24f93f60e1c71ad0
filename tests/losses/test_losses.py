"""Losses against arithmetic done by hand, their gradients against finite differences, and what extremes do to them."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from dpoeng.engine.config.fields import LOSS_FIELDS, TrainConfig
from dpoeng.engine.losses.batch import (
    LIST_LOSSES,
    LOSSES,
    PairSums,
    PreferenceBatch,
    kl_per_token,
    next_state,
    pair_sums,
    preference_loss,
)
from dpoeng.engine.losses.metrics import preference_metrics
from dpoeng.engine.losses.names import LOSS_FACTS, OTHER_NAMES, LossSettings, LossType
from dpoeng.engine.losses.pairwise import usual_pairs

OF_PAIRS = [
    name for name, known in LOSS_FACTS.items() if known.rows == "pairs"
]  # others: test_unpaired.py, test_lists.py
LN2, LN3 = math.log(2), math.log(3)
NEEDED: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.125}}  # what a loss cannot do without


def batch(policy: list[float], reference: list[float], branch: list[int], **more: Any) -> PreferenceBatch:
    return PreferenceBatch(
        policy=torch.tensor(policy, requires_grad=True),
        reference=torch.tensor(reference),
        branch=torch.tensor(branch),
        pairs=(max(branch) + 1) // 2,
        **more,
    )


def sums(
    chosen_ratio: list[float],
    rejected_ratio: list[float],
    *,
    chosen_logps: list[float] | None = None,
    rejected_logps: list[float] | None = None,
    tokens: tuple[int, int] = (2, 1),
) -> PairSums:
    """Pairs of which only the log-ratios and plain log-probs are given, as leaves; the reference follows."""
    ratios = torch.tensor([chosen_ratio, rejected_ratio], dtype=torch.float64)
    logps = torch.tensor([chosen_logps or [-8.0] * len(chosen_ratio), rejected_logps or [-4.0] * len(chosen_ratio)])
    logps, one = logps.double(), torch.ones(len(chosen_ratio), dtype=torch.float64)
    return PairSums(
        *ratios, *logps, *(logps - ratios), tokens[0] * one, tokens[1] * one, 0 * one, 0 * one, one
    ).leaves()


def settings(loss_type: str, **more: Any) -> LossSettings:
    return LossSettings(loss_type=(loss_type,), **{"beta": 1.0, **NEEDED.get(loss_type, {}), **more})


def loss(pairs: PairSums, chosen: LossSettings, **more: Any) -> list[float]:
    found: list[float] = preference_loss(pairs, chosen, **more).losses.tolist()
    return found


# Log-ratios ln 2 and -ln 1.5: sigmoid of the chosen one is 2/3, of the rejected one 2/5, of their difference ln 3, 3/4.
BY_HAND: list[tuple[str, dict[str, Any], float]] = [
    ("sigmoid", {}, math.log(4 / 3)),
    ("sigmoid", {"beta": 2.0}, math.log(10 / 9)),
    ("sigmoid", {"label_smoothing": 0.25}, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
    ("robust", {"label_smoothing": 0.25}, 2 * (0.75 * math.log(4 / 3) - 0.25 * math.log(4))),
    ("robust", {}, math.log(4 / 3)),
    ("hinge", {"beta": 0.5}, 1 - LN3 / 2),
    ("hinge", {}, 0.0),
    ("ipo", {"beta": 0.25}, (LN2 / 2 + math.log(1.5) - 2) ** 2),  # two tokens chosen, one rejected
    ("sigmoid_norm", {}, math.log1p(math.exp(-LN2 / 2) / 1.5)),
    ("exo_pair", {"label_smoothing": 0.25}, 0.0),  # the policy has the smoothed labels' odds already
    ("exo_pair", {"label_smoothing": 0.125}, 0.75 * math.log(6 / 7) + 0.25 * LN2),
    ("nca_pair", {}, math.log(1.5) + 0.5 * LN3 - 0.5 * math.log(0.6)),
    ("bco_pair", {}, math.log(1.5) - math.log(0.6)),
    ("sppo_hard", {}, (LN2 - 0.5) ** 2 + (0.5 - math.log(1.5)) ** 2),
    ("apo_zero", {}, 1 / 3 + 2 / 5),
    ("apo_down", {}, 2 / 3 + 1 / 4),
    ("discopop", {"discopop_tau": 0.5}, 0.9 / 3 + 0.1 * math.log(4 / 3)),
    ("dpop", {}, math.log(4 / 3)),  # no penalty while the chosen response grew likelier
    ("beta_dpo", {"beta_dpo_alpha": 0.0}, math.log(4 / 3)),
    ("beta_dpo", {"beta_dpo_alpha": 1 / LN3}, math.log(10 / 9)),  # beta (1 + margin / ln 3) = 2
    ("aot", {}, math.log(4 / 3)),  # one pair alone is its own quantile
    ("aot_unpaired", {}, math.log(4 / 3)),
]


@pytest.mark.parametrize(("name", "more", "expected"), BY_HAND)
def test_one_pair_by_hand(name: str, more: dict[str, Any], expected: float) -> None:
    assert loss(sums([LN2], [-math.log(1.5)]), settings(name, **more)) == [pytest.approx(expected, abs=1e-14)]


def test_every_name_has_a_function_and_its_source() -> None:
    assert tuple(LOSSES) != ()
    assert {*LOSSES, *LIST_LOSSES} == set(LOSS_FACTS) == set(get_args(LossType))
    assert not set(OTHER_NAMES) & set(LOSS_FACTS)
    assert all(known.url.startswith("https://arxiv.org/abs/") and known.equation for known in LOSS_FACTS.values())
    by_hand = {name for name, _, _ in BY_HAND}
    assert set(OF_PAIRS) - by_hand == {"simpo", "cpo", "orpo", "sft"}  # below


def test_the_page_on_losses_has_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `") and line.count("|") >= 6][1:]
    rows = rows[: len(LOSS_FACTS)]
    names = [re.findall(r"`(\w+)`", line)[0] for line in rows]
    assert names == list(LOSS_FACTS)
    for name, line in zip(LOSS_FACTS, rows, strict=False):
        needs = {"yes": True, "no": False}[re.split(r"(?<!\\)\|", line)[4].strip()]
        assert needs == LOSS_FACTS[name].reference, name
    assert all(known.url in page for known in LOSS_FACTS.values())
    assert all(f"`{code}`" in page for code in ("likelihood-displacement", "loss-does-not-move", "accuracy-saturated"))


def test_settings_are_the_fields_of_the_config_with_its_defaults() -> None:
    assert LossSettings.of(TrainConfig()) == LossSettings()
    assert {*LossSettings.__dataclass_fields__, "pair_weight_column"} == set(LOSS_FIELDS)


def test_dpo_of_tokens_by_hand() -> None:
    # Pair 0: chosen -1 - 2 = -3 (reference -4: ratio 1), rejected -5 (reference -3: ratio -2); logits 3.
    # Pair 1: equal to the reference; logits 0.
    made = batch([-1.0, -2.0, -5.0, -0.5, -0.25], [-1.5, -2.5, -3.0, -0.5, -0.25], [0, 0, 1, 2, 3])
    chosen = settings("sigmoid", beta=0.5)
    found = preference_loss(pair_sums(made, chosen), chosen)
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
    assert found.losses.requires_grad
    assert not any(getattr(found, name).requires_grad for name in ("chosen_rewards", "rejected_rewards"))
    assert not any(getattr(found, name).requires_grad for name in ("chosen_logps", "rejected_logps"))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("reverse_kl", LN3),
        ("forward_kl", 1.0),  # 1 - 1/t: 1/2 and -1/2
        ("js_divergence", math.log(5 / 3)),  # 2t / (t + 1): 4/3 and 4/5
        ("alpha_divergence", 2 * (math.sqrt(1.5) - math.sqrt(0.5))),  # alpha 1/2: -2 (t^-1/2 - 1)
    ],
)
def test_f_divergences_by_hand(kind: str, expected: float) -> None:
    """t = pi/ref is 2 and 2/3; the hinge with a small beta shows the difference of scores as it is."""
    found = loss(sums([LN2], [-math.log(1.5)]), settings("hinge", beta=0.25, f_divergence_type=kind))
    assert found == [pytest.approx(1 - 0.25 * expected, abs=1e-14)]


def test_alpha_one_is_the_reverse_kl() -> None:
    pairs = sums([0.3, -2.0], [1.0, 0.5])
    near = settings("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 + 1e-7)
    assert loss(pairs, near) == loss(pairs, settings("sigmoid"))
    close = replace(near, f_alpha_divergence_coef=1 + 1e-5)
    assert loss(pairs, close) == pytest.approx(loss(pairs, settings("sigmoid")), rel=1e-4)


def test_dpo_positive_by_hand() -> None:
    """Chosen ratio -1, rejected -4: delta 3, less the penalty of 2 nats for one lost: 1."""
    assert loss(sums([-1.0], [-4.0]), settings("dpop", dpop_lambda=2.0)) == [pytest.approx(math.log1p(math.exp(-1)))]


def test_aot_by_hand() -> None:
    """Policy gaps 5, -2 against reference gaps 4, 0: sorted -2 - 0 and 5 - 4; unpaired ratios likewise.

    Sums in place of gaps would be -7, -8 against -8, -6, which sorts otherwise.
    """
    pairs = sums([1.0, 0.0], [0.0, 2.0], chosen_logps=[-1.0, -3.0], rejected_logps=[-6.0, -1.0])
    assert (pairs.ref_chosen - pairs.ref_rejected).tolist() == [4.0, 0.0]
    expected = [math.log1p(math.exp(2)), math.log1p(math.exp(-1))]
    assert loss(pairs, settings("aot")) == pytest.approx(expected)
    # Chosen ratios 0, 1 against rejected ratios 0, 2.
    assert loss(pairs, settings("aot_unpaired")) == pytest.approx([LN2, math.log1p(math.exp(1))])


def test_reference_free_losses_by_hand() -> None:
    """Two chosen tokens of p = 1/2 in the mean, one rejected token of p = 1/4; a reference that must not matter."""
    pairs = sums([7.0], [-9.0], chosen_logps=[-2 * LN2], rejected_logps=[-2 * LN2], tokens=(2, 1))
    assert loss(pairs, settings("simpo", beta=2.0, simpo_gamma=2 * LN2)) == [pytest.approx(LN2)]
    assert loss(pairs, settings("simpo", beta=2.0, simpo_gamma=0.0)) == [pytest.approx(math.log(5 / 4))]
    assert loss(pairs, settings("cpo", cpo_alpha=0.0)) == [pytest.approx(LN2)]
    assert loss(pairs, settings("cpo", cpo_alpha=0.5)) == [pytest.approx(1.5 * LN2)]
    assert loss(pairs, settings("orpo", beta=0.5)) == [pytest.approx(LN2 + 0.5 * math.log(4 / 3))]  # odds 1 and 1/3
    assert loss(pairs, settings("sft")) == [pytest.approx(LN2)]
    free = preference_loss(pairs, settings("simpo", beta=2.0))
    assert free.chosen_rewards.tolist() == [pytest.approx(-2 * LN2)]  # what the loss compares, not log-ratios
    here = sums([0.31], [-0.53])
    moved = replace(here, ref_chosen=here.ref_chosen + 0.47, chosen_ratio=here.chosen_ratio - 0.47)
    for name in OF_PAIRS:
        known = LOSS_FACTS[name]
        assert (loss(here, settings(name)) == loss(moved, settings(name))) == (not known.reference), name


def test_sft_is_the_mean_over_tokens_and_rpo_the_mean_over_pairs() -> None:
    """Chosen responses of 1 and 3 tokens, 4 and 6 nats."""
    made = batch([-4.0, -1.0, -1.0, -2.0, -3.0, -1.0], [-1.0] * 6, [0, 1, 2, 2, 2, 3])
    found = pair_sums(made, settings("sft"))
    sft = preference_loss(found, settings("sft")).losses
    assert sft.mean().item() == pytest.approx((4 + 6) / 4)
    rpo = preference_loss(found, settings("sigmoid", rpo_alpha=0.5)).losses - loss_tensor(found, "sigmoid")
    assert rpo.tolist() == pytest.approx([0.5 * 4, 0.5 * 2])
    # A part of a step knows the step's mean, so that the parts add up to the whole.
    part = pair_sums(batch([-4.0, -1.0], [-1.0, -1.0], [0, 1]), settings("sft"))
    assert loss(part, settings("sft"), mean_tokens=2.0) == [pytest.approx(2.0)]


def loss_tensor(pairs: PairSums, name: str) -> torch.Tensor:
    return preference_loss(pairs, settings(name)).losses


def test_a_mixture_is_the_weighted_sum() -> None:
    pairs = sums([0.3, -2.0], [1.0, 0.5])
    mixed = LossSettings(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0), beta=1.0)
    expected = 0.8 * loss_tensor(pairs, "sigmoid") + 0.2 * loss_tensor(pairs, "bco_pair") + loss_tensor(pairs, "sft")
    assert loss(pairs, mixed) == pytest.approx(expected.tolist())
    assert loss(pairs, replace(mixed, loss_weights=None)) == pytest.approx(
        sum(loss_tensor(pairs, name) for name in mixed.loss_type).tolist()  # type: ignore[union-attr]
    )


def test_ld_weights_the_tokens_beyond_the_shorter_response() -> None:
    """Chosen ratios 1, 1, 1 and rejected 2: with alpha 1/2 chosen counts 1 + 1/2 + 1/2."""
    made = batch([-1.0, -1.0, -1.0, -1.0], [-2.0, -2.0, -2.0, -3.0], [0, 0, 0, 1])
    found = pair_sums(made, settings("sigmoid", ld_alpha=0.5))
    assert (found.chosen_ratio.tolist(), found.rejected_ratio.tolist()) == ([2.0], [2.0])
    assert found.ref_chosen.tolist() == [-4.0]
    assert found.chosen_logps.tolist() == [-3.0]  # what is reported stays the plain log-prob
    found.chosen_ratio.sum().backward()
    assert made.policy.grad is not None
    assert made.policy.grad.tolist() == [1.0, 0.5, 0.5, 0.0]


def test_wpo_weights_by_hand() -> None:
    """p = 1/2 where two tokens share all, sum p^2 = 1/2: aligned 1. p = 1/8 of a uniform eight: 1 too. A p of 1/4
    where another token has 3/4: (1/4) / (10/16) = 2/5; its pair counts 2/5, and the weight carries no gradient."""
    policy = [math.log(1 / 2), math.log(1 / 8), math.log(1 / 4), math.log(1 / 2)]
    collisions = torch.tensor([math.log(1 / 2), math.log(1 / 8), math.log(10 / 16), math.log(1 / 2)])
    made = batch(policy, policy, [0, 1, 2, 3], log_collision=collisions)
    chosen = settings("sigmoid", use_weighting=True)
    found = pair_sums(made, chosen)
    assert found.weights.tolist() == pytest.approx([1.0, 0.4])
    assert not found.weights.requires_grad
    assert loss(found, chosen) == pytest.approx([LN2, 0.4 * LN2])


def test_weights_of_pairs_multiply_the_loss() -> None:
    made = batch([-1.0, -2.0, -1.0, -2.0], [-1.0, -2.0, -1.0, -2.0], [0, 1, 2, 3], weights=torch.tensor([0.0, 3.0]))
    assert loss(pair_sums(made, settings("sigmoid")), settings("sigmoid")) == pytest.approx([0.0, 3 * LN2])


def test_kl_is_zero_at_the_reference_and_positive_beside_it() -> None:
    policy, reference = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0 - LN2, -1.0 + LN2])
    assert kl_per_token(policy, reference).tolist() == pytest.approx([0.0, 0.5 + LN2 - 1, 2 - LN2 - 1])


def test_there_is_no_kl_with_sums_only() -> None:
    """A cache that was imported from sums carries each in the response's first token; all else is the same."""
    tokens = batch([-1.0, -2.0, -3.0], [-2.0, -2.5, -1.0], [0, 0, 1])
    whole = batch([-1.0, -2.0, -3.0], [-4.5, 0.0, -1.0], [0, 0, 1], per_token=False)
    known, summed = (
        preference_metrics([preference_loss(pair_sums(made, settings("sigmoid")), settings("sigmoid"))])
        for made in (tokens, whole)
    )
    assert known.pop("kl/chosen") > 0
    assert known.pop("kl/rejected") > 0
    assert summed == pytest.approx(known)


def test_states_of_losses_by_hand() -> None:
    pairs = sums([1.0, 3.0], [-2.0, 0.0])  # rewards at beta 1/2: 0.5, 1.5, -1, 0; margins 1.5, 1.5
    shifted = settings("bco_pair", beta=0.5, bco_reward_shift=True)
    once = next_state({}, pairs, shifted)
    assert once == {"bco_rewards": 4.0, "bco_mean": pytest.approx(0.25)}
    assert next_state({"bco_rewards": 4.0, "bco_mean": 1.25}, pairs, shifted)["bco_mean"] == pytest.approx(0.75)
    expected = math.log1p(math.exp(-0.25)) + math.log1p(math.exp(-1.25))  # rewards 0.5 and -1, shift 0.25
    assert loss(pairs, shifted, state=once)[0] == pytest.approx(expected)
    assert next_state({}, pairs, settings("bco_pair")) == {}
    dynamic = settings("beta_dpo", beta=0.5, beta_dpo_alpha=0.5, beta_dpo_momentum=0.8)
    state = next_state({"beta_dpo_margin": 0.5}, pairs, dynamic)
    assert state == {"beta_dpo_margin": pytest.approx(0.8 * 0.5 + 0.2 * 1.5)}
    beta = 0.5 * (1 + 0.5 * (1.5 - 0.5))
    assert loss(pairs, dynamic, state={"beta_dpo_margin": 0.5})[0] == pytest.approx(math.log1p(math.exp(-3 * beta)))


def test_the_filter_of_beta_dpo_by_hand() -> None:
    """Four pairs with margins 1, 2, 3, 9 at beta 1/2; half of them are kept."""
    pairs = sums([2.0, 4.0, 6.0, 18.0], [0.0] * 4)
    half = settings("beta_dpo", beta=0.5, beta_dpo_alpha=0.5, beta_dpo_momentum=0.8, beta_dpo_keep=0.5)
    state = {"beta_dpo_margin": 2.0, "beta_dpo_deviation": 1.0}
    # log weights -1/2, 0, -1/2, -49/2; with the noise 0, 0, 1.0, 23.9 the largest two are the third and the second
    noise = torch.tensor([0.0, 0.0, 1.0, 23.9], dtype=torch.float64)
    made = preference_loss(pairs, half, state=state, gumbel=noise)
    beta = 0.5 * (1 + 0.5 * (2.5 - 2.0))
    expected = [0.0, 2 * math.log1p(math.exp(-4 * beta)), 2 * math.log1p(math.exp(-6 * beta)), 0.0]
    assert made.losses.tolist() == pytest.approx(expected)
    made.losses.mean().backward()
    assert pairs.chosen_ratio.grad is not None
    assert (pairs.chosen_ratio.grad != 0).tolist() == [False, True, True, False]
    # Without noise to draw by, as in an evaluation, all count; without a deviation yet, the noise alone decides.
    assert (preference_loss(pairs, half, state=state).losses > 0).all()
    assert (preference_loss(pairs, half, gumbel=noise).losses > 0).tolist() == [False, False, True, True]
    after = next_state(state, pairs, half)
    spread = math.sqrt(((1 - 3.75) ** 2 + (2 - 3.75) ** 2 + (3 - 3.75) ** 2 + (9 - 3.75) ** 2) / 3)
    assert after == {
        "beta_dpo_margin": pytest.approx(0.8 * 2.0 + 0.2 * 3.75),
        "beta_dpo_deviation": pytest.approx(0.8 * 1.0 + 0.2 * spread),
    }


def test_the_filter_draws_as_its_weights_say() -> None:
    """One of three pairs, 20,000 times: the shares are those of exp(-(margin - mean)^2 / 2)."""
    margins = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    generator = np.random.default_rng(0)
    drawn = [
        int(usual_pairs(margins, 0.34, 0.0, 1.0, torch.from_numpy(generator.gumbel(size=3)))) for _ in range(20_000)
    ]
    weights = np.exp([0.0, -0.5, -2.0])
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, weights / weights.sum(), atol=0.01)


def variants() -> list[tuple[str, dict[str, Any]]]:
    every: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in OF_PAIRS]
    every += [
        (name, {"label_smoothing": 0.1}) for name, known in LOSS_FACTS.items() if "label_smoothing" in known.settings
    ]
    kinds = ("forward_kl", "js_divergence", "alpha_divergence")
    return every + [("sigmoid", {"f_divergence_type": kind}) for kind in kinds]


@pytest.mark.parametrize(("name", "more"), variants())
def test_gradients_equal_finite_differences(name: str, more: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    draws[2:] = -3 - draws[2:].abs()
    chosen = settings(name, **more) if name != "beta_dpo" else settings(name, beta_dpo_alpha=0.0)

    def total(*inputs: torch.Tensor) -> torch.Tensor:
        pairs = sums([0.0] * 5, [0.0] * 5)
        named = zip(("chosen_ratio", "rejected_ratio", "chosen_logps", "rejected_logps"), inputs, strict=True)
        return preference_loss(replace(pairs, **dict(named)), chosen, state={"bco_mean": 0.3}).losses

    assert torch.autograd.gradcheck(total, [row.clone().requires_grad_() for row in draws])


@pytest.mark.parametrize(("name", "more"), variants())
def test_extremes_stay_finite_with_finite_gradients(name: str, more: dict[str, Any]) -> None:
    edge = [0.0, 1e4, -1e4, 1e-8, -700.0, 89.0]
    grid = [(a, b) for a in edge for b in edge]
    logps = [min(a, -1e-300 if i % 2 else 0.0) for i, (a, _) in enumerate(grid)]
    pairs = sums(
        [a for a, _ in grid],
        [b for _, b in grid],
        chosen_logps=logps,
        rejected_logps=[min(b, 0.0) for _, b in grid],
    )
    for beta in (0.01, 0.1, 5.0):
        found = preference_loss(pairs, settings(name, **more, beta=beta)).losses
        assert torch.isfinite(found).all(), (name, beta)
        found.sum().backward()
        assert all(x.grad is None or torch.isfinite(x.grad).all() for x in pairs.with_gradient.values()), (name, beta)


def test_extremes_of_dpo_by_hand() -> None:
    pairs = sums([1e4, -1e4], [0.0, 0.0])
    preference_loss(pairs, settings("sigmoid")).losses.sum().backward()
    assert loss(pairs, settings("sigmoid")) == [0.0, 1e4]
    assert pairs.chosen_ratio.grad is not None
    assert pairs.chosen_ratio.grad.tolist() == [0.0, -1.0]


def test_long_sums_keep_small_differences() -> None:
    """2,048 tokens near -10 each: float32 sums would lose the margin that float64 sums keep."""
    n = 2048
    reference = torch.full((2 * n,), -10.0)
    policy = reference.clone()
    policy[:n] += 1e-4
    made = PreferenceBatch(policy, reference, torch.arange(2).repeat_interleave(n), 1)
    expected = float((policy.double() - reference.double())[:n].sum())
    found = preference_loss(pair_sums(made, settings("sigmoid")), settings("sigmoid"))
    assert abs(float(found.chosen_rewards[0]) - expected) < 1e-9

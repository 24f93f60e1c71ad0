"""Losses of ranked rows by hand, their gradients against finite differences, extremes, and rows put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dpoeng.engine.losses import lists
from dpoeng.engine.losses.batch import LIST_LOSSES, PairSums, preference_loss
from dpoeng.engine.losses.metrics import pair_values
from dpoeng.engine.losses.names import LOSS_FACTS, LossSettings
from dpoeng.engine.losses.pairwise import sigmoid_loss, soft_sigmoid_loss
from dpoeng.engine.training.batch_loss import compared_in
from dpoeng.engine.training.evaluation import summarise

LN2, LN3 = math.log(2), math.log(3)
OF_LISTS = [name for name, known in LOSS_FACTS.items() if known.of_list]


def row(rewards: Sequence[float], scores: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    known = torch.tensor([rewards], dtype=torch.float64)
    return known, torch.tensor([scores], dtype=torch.float64), torch.ones_like(known) > 0


# Rewards ln 2, 0 and ln 3: their exponentials 2, 1 and 3 are sixths.
REWARDS = (LN2, 0.0, LN3)
BY_HAND: list[tuple[Callable[..., torch.Tensor], tuple[float, ...], tuple[float, ...], float]] = [
    # The third is best with 3/6, then the first with 2/3.
    (lists.plackett_luce_loss, (2, 1, 3), (), LN3),
    (lists.plackett_luce_loss, (1, 2, 3), (), math.log(2) + math.log(3)),
    # One is better than two others of which nothing is known: 2/6. Two are better than one: 2/3 and 3/4.
    (lists.plackett_luce_loss, (1, 0, 0), (), LN3),
    (lists.plackett_luce_loss, (1, 0, 1), (), math.log(3 / 2) + math.log(4 / 3)),
    # softmax of the scores is 1/4, 1/4, 1/2; with twice the scale 1/6, 1/6, 4/6.
    (lists.listnet_loss, (0, 0, LN2), (1.0,), (LN3 + math.log(6)) / 4 + LN2 / 2),
    (lists.listnet_loss, (0, 0, LN2), (2.0,), (LN3 + math.log(6)) / 6 + 4 * LN2 / 6),
]


@pytest.mark.parametrize(("loss", "scores", "more", "expected"), BY_HAND)
def test_one_row_by_hand(loss: Any, scores: tuple[float, ...], more: tuple[float, ...], expected: float) -> None:
    assert loss(*row(REWARDS, scores), *more).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("scale", "gain"), [(1.0, 1.0), (2.0, 3.0)])
def test_lambda_weights_by_hand(scale: float, gain: float) -> None:
    """The better one stands second: -log sigmoid(-ln 2) = ln 3, times gain 2^1 - 2^0, times 1/ln 2 - 1/ln 3."""
    found = lists.lipo_lambda_loss(*row((0.0, LN2), (1, 0)), scale)
    assert found.item() == pytest.approx(gain * (LN3 / LN2 - 1), abs=1e-14)
    # Three responses: the exchange of places 1 and 3 weighs 1/ln 2 - 1/ln 4 = 1/(2 ln 2).
    found = lists.lipo_lambda_loss(*row((LN2, 0.0, LN3), (0, 0, 1)), 1.0)
    expected = math.log(4 / 3) / (2 * LN2) + math.log(5 / 3) * (1 / LN2 - 1 / LN3)
    assert found.item() == pytest.approx(expected, abs=1e-14)


def test_soft_labels_by_hand() -> None:
    """A margin of ln 3 is a label of 3/4, and at delta = ln 3 the loss is that label's entropy, its least value."""
    delta, margin = (torch.tensor([LN3], dtype=torch.float64, requires_grad=part) for part in (True, False))
    found = soft_sigmoid_loss(delta, 1.0, margin, 1.0)
    assert found.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-14)
    found.sum().backward()
    assert delta.grad is not None
    assert delta.grad.item() == pytest.approx(0.0, abs=1e-14)
    assert soft_sigmoid_loss(delta, 1.0, 1e6 * margin, 1.0).item() == pytest.approx(sigmoid_loss(delta, 1.0).item())


def test_two_responses_are_dpo() -> None:
    rewards = torch.tensor([[0.3, -0.4], [-2.0, 1.0]], dtype=torch.float64)
    scores, mask = torch.tensor([[2.0, 1.0], [5.0, 7.0]]).double(), torch.ones(2, 2) > 0
    expected = sigmoid_loss(torch.tensor([0.7, 3.0]).double(), 1.0)
    torch.testing.assert_close(lists.plackett_luce_loss(rewards, scores, mask), expected)
    certain = lists.listnet_loss(rewards, scores, mask, 1e6)  # a label that is certain
    torch.testing.assert_close(certain, expected)


def ranked_sums(ratios: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], which: str = "all") -> PairSums:
    """Rows of which only log-ratios and scores are given; a response has as many tokens as its place in the row."""
    flat = torch.tensor([x for some in ratios for x in some], dtype=torch.float64, requires_grad=True)
    settings = LossSettings(pairs_in_row=which)
    starts = np.cumsum([0, *map(len, ratios)])
    compared = [compared_in(some, settings) for some in scores]
    places = torch.from_numpy(np.concatenate([start + some for start, some in zip(starts, compared, strict=False)]))
    known = torch.tensor([x for some in scores for x in some], dtype=torch.float64)
    tokens = torch.tensor([float(k + 1) for some in ratios for k in range(len(some))]).double()
    chosen, rejected, one = flat[places[:, 0]], flat[places[:, 1]], torch.ones(len(places)).double()
    return PairSums(
        *(chosen, rejected, chosen - 9, rejected - 9, -9 * one, -9 * one),
        *(tokens[places[:, 0]], tokens[places[:, 1]], 0 * one, 0 * one, one),
        row_pairs=torch.tensor([len(some) for some in compared]),
        row_margins=known[places[:, 0]] - known[places[:, 1]],
        row_weights=torch.ones(len(ratios)).double(),
        row_sizes=torch.tensor([len(some) for some in ratios]),
        row_ratios=flat,
        row_scores=known,
    )


def test_rows_of_unequal_size_count_alike() -> None:
    """One pair in the first row, three in the second: each row's loss is the mean over its pairs."""
    sums = ranked_sums([[LN2, -math.log(1.5)], list(REWARDS)], [[1, 0], [2, 1, 3]])
    found = preference_loss(sums, LossSettings(beta=1.0))
    second = (math.log(5 / 3) + math.log(3 / 2) + math.log(4 / 3)) / 3  # 3 against 2, 2 against 1, 3 against 1
    assert found.losses.tolist() == pytest.approx([math.log(4 / 3), second], abs=1e-14)
    values = {name: value.tolist() for name, value in pair_values(found).items()}
    assert values["rewards/accuracies"] == [1.0, 1.0]
    assert values["rewards/margins"] == pytest.approx([LN3, (math.log(3 / 2) + LN2 + LN3) / 3])
    both = LossSettings(beta=1.0, loss_type=("sigmoid", "plackett_luce"), loss_weights=(0.5, 2.0))
    assert preference_loss(sums, both).losses.tolist() == pytest.approx(
        [2.5 * math.log(4 / 3), second / 2 + 2 * LN3], abs=1e-14
    )


def test_the_length_controlled_accuracy_is_over_all_pairs() -> None:
    """Where chosen is longer, both pairs are right; of the two where it is shorter, one. Rows: all right, none."""
    sums = ranked_sums([list(REWARDS), [0.0, 1.0]], [[2, 1, 3], [1, 0]])
    found = summarise(preference_loss(sums, LossSettings(beta=1.0)), [b"a", b"b"], {})
    assert found.metrics["rewards/accuracies"] == pytest.approx(0.5)
    assert found.metrics["rewards/accuracies_length_controlled"] == pytest.approx((1 + 1 / 2) / 2)
    # Pairs 0 over 1, 2 over 0, 2 over 1, and 0 over 1 of the second row; a response has one token more than the last.
    margins, longer = [LN2, LN3 - LN2, LN3, -1.0], [-1, 2, 1, -1]
    expected = np.corrcoef(margins, longer)[0, 1]
    assert found.metrics["rewards/margins_length_correlation"] == pytest.approx(expected)


def test_the_best_against_the_rest_and_shares_of_pairs() -> None:
    sums = ranked_sums([[0.0, 1.0, 2.0, 2.0]], [[3, 1, 2, 1]], "best")
    assert sums.row_pairs is not None
    assert sums.row_pairs.tolist() == [3]
    found = preference_loss(sums, LossSettings(beta=1.0, loss_type=("hinge",)))
    assert found.losses.tolist() == pytest.approx([(2 + 3 + 3) / 3])
    values = pair_values(preference_loss(ranked_sums([[0.0, 1.0, 2.0, 2.0]], [[3, 1, 2, 1]]), LossSettings(beta=1.0)))
    assert values["rewards/accuracies"].item() == pytest.approx(1 / 5)  # 2 above the first 1; the other 1 is as high
    assert values["rewards/top_accuracies"].item() == 0.0
    top = pair_values(preference_loss(ranked_sums([[1.0, 1.0, 0.0]], [[3, 3, 1]]), LossSettings(beta=1.0)))
    assert top["rewards/top_accuracies"].item() == 1.0


def test_which_responses_are_compared() -> None:
    scores = (2.0, 5.0, 2.0, 5.0)
    every, best = (compared_in(scores, LossSettings(pairs_in_row=which)).tolist() for which in ("all", "best"))
    assert every == [[1, 0], [1, 2], [3, 0], [3, 2]]
    assert best == [[1, 0], [1, 2]]


def test_sft_counts_tokens_alike_over_rows() -> None:
    sums = ranked_sums([[0.0, 0.0], [0.0, 0.0, 0.0]], [[1, 0], [1, 2, 3]])
    found = preference_loss(sums, LossSettings(loss_type=("sft",)))
    # Chosen: in the first row one of 1 token; in the second 3, 3 and 2 tokens. Mean tokens of rows: 1 and 8/3.
    assert found.losses.tolist() == pytest.approx([9 / ((1 + 8 / 3) / 2)] * 2)


@pytest.mark.parametrize("name", OF_LISTS)
def test_gradients_equal_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    sizes, scores = torch.tensor([4, 2, 3]), torch.tensor([1.0, 3, 2, 2, 0, 1, 2, 2, 0]).double()
    settings = LossSettings(loss_type=(name,), score_scale=0.7)

    def total(rewards: torch.Tensor) -> torch.Tensor:
        padded, mask = lists.padded(rewards, sizes)
        return LIST_LOSSES[name](padded, lists.padded(scores, sizes)[0], mask, settings)

    assert torch.autograd.gradcheck(total, [flat])
    alone = torch.cat([total_of(name, flat[a:b], scores[a:b], settings) for a, b in ((0, 4), (4, 6), (6, 9))])
    torch.testing.assert_close(total(flat), alone)  # a row's neighbours and the padding do not matter


def total_of(name: str, rewards: torch.Tensor, scores: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    return LIST_LOSSES[name](rewards[None], scores[None], torch.ones(1, len(rewards)) > 0, settings)


@pytest.mark.parametrize("name", OF_LISTS)
def test_extremes_stay_finite_with_finite_gradients(name: str) -> None:
    edge = [0.0, 1e4, -1e4, 1e-8, -700.0, 89.0]
    rewards = torch.tensor([[a, b, c] for a in edge for b in edge for c in edge]).double().requires_grad_()
    scores = torch.tensor([2.0, 1.0, 3.0]).double().expand_as(rewards)
    found = LIST_LOSSES[name](rewards, scores, torch.ones_like(rewards) > 0, LossSettings())
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert rewards.grad is not None
    assert torch.isfinite(rewards.grad).all()


def test_gradient_of_soft_labels() -> None:
    delta = torch.linspace(-3, 3, 5, dtype=torch.float64).requires_grad_()
    margin = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: soft_sigmoid_loss(x, 0.3, margin, 0.8), [delta])

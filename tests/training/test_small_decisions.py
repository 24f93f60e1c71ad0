"""Defaults, quantiles and dtypes of training that most examples would not show to be wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpoeng.engine.recipes.merge import Update
from dpoeng.engine.training import intervals
from dpoeng.engine.training.intervals import ACCURACY, CONTROLLED
from dpoeng.engine.training.order import plan_schedule


@pytest.mark.parametrize(("max_steps", "steps"), [(-1, 15), (0, 15), (1, 1), (99, 99)])
def test_max_steps_counts_from_one(max_steps: int, steps: int) -> None:
    schedule = plan_schedule(10, batch=2, epochs=3, max_steps=max_steps, seed=0)
    assert schedule.total_steps == steps


def test_intervals_leave_as_much_below_as_above() -> None:
    assert intervals._percentiles(np.arange(1001.0)) == pytest.approx((25.0, 975.0))
    low, high = intervals.wilson(0.5, 100)  # Wilson 1927 by hand: (0.5 + z^2/200 -+ z sqrt(0.0025 + z^2/40000)) / ...
    assert (low, high) == (pytest.approx(0.40383, abs=1e-5), pytest.approx(0.59617, abs=1e-5))


def test_the_length_controlled_accuracy_has_a_score_interval() -> None:
    """All pairs are right: the bootstrap alone would say 1.000 to 1.000."""
    count = 60
    longer = np.where(np.arange(count) % 2 == 0, 3.0, -3.0)
    values = {ACCURACY: np.ones(count), "rewards/margins": np.linspace(0.1, 1, count)}
    prompts = [str(i).encode() for i in range(count)]
    found = intervals.intervals(values, longer, prompts, seed=0)
    low, high = found[CONTROLLED]
    each = intervals.wilson(1.0, count / 2)[0]
    assert high == pytest.approx(1.0)
    assert low == pytest.approx(1 - np.sqrt(2 * (1 - each) ** 2) / 2)
    assert low < 0.95


def test_means_of_few_prompts_have_at_least_students_t() -> None:
    values = {"loss": np.array([1.0, 2.0, 4.0, 8.0])}
    low, high = intervals.intervals(values, np.zeros(4), [b"a", b"b", b"c", b"d"], seed=0)["loss"]
    half = 3.182 * np.std([1, 2, 4, 8], ddof=1) / 2
    assert low <= 3.75 - half + 1e-9
    assert high >= 3.75 + half - 1e-9


@pytest.mark.parametrize("transposed", [False, True])
def test_an_update_is_formed_in_float32(transposed: bool) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((8, 40), (30, 8)))
    delta = Update(a, b, 0.7, transposed).apply(torch.zeros((40, 30) if transposed else (30, 40), dtype=torch.bfloat16))
    exact = 0.7 * (b.double() @ a.double())
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), exact.T if transposed else exact, rtol=1e-5, atol=1e-5)

"""The order of pairs and the held-out share depend on the seed alone."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpoeng.engine.training.order import epoch_order, hold_out, plan_schedule


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_each_epoch_sees_each_row_once(rows: int, batch: int, epochs: int, seed: int) -> None:
    schedule = plan_schedule(rows, batch=batch, epochs=epochs, max_steps=-1, seed=seed)
    assert schedule.total_steps == epochs * schedule.steps_per_epoch
    for epoch in range(epochs):
        first = epoch * schedule.steps_per_epoch
        seen = [row for step in range(first, first + schedule.steps_per_epoch) for row in schedule.rows_of_step(step)]
        assert sorted(seen) == list(range(rows))
    sizes = [len(schedule.rows_of_step(step)) for step in range(schedule.steps_per_epoch)]
    assert all(size == batch for size in sizes[:-1])


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99), st.integers(0, 60))
def test_the_order_of_a_step_is_a_slice_of_a_seeded_permutation(rows: int, batch: int, seed: int, step: int) -> None:
    """The definition, computed again for every step: a run that is resumed at any step must meet the same rows."""
    schedule = plan_schedule(rows, batch=batch, epochs=9, max_steps=-1, seed=seed)
    epoch, within = divmod(step, schedule.steps_per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    assert schedule.rows_of_step(step) == order[within * batch : (within + 1) * batch].tolist()


def test_a_permutation_is_computed_once_an_epoch() -> None:
    schedule = plan_schedule(100, batch=4, epochs=3, max_steps=-1, seed=987)
    epoch_order.cache_clear()
    for step in range(schedule.total_steps):
        schedule.rows_of_step(step)
        schedule.rows_of_step(step)  # the loop asks twice: for the pairs, and for how many they were
    assert epoch_order.cache_info().misses == 3


def test_the_order_ignores_disturbed_random_state() -> None:
    schedule = plan_schedule(20, batch=4, epochs=2, max_steps=-1, seed=3)
    before = [schedule.rows_of_step(step) for step in range(10)]
    random.seed(1)
    np.random.seed(1)  # the disturbance is the point
    torch.manual_seed(1)
    assert [schedule.rows_of_step(step) for step in range(10)] == before
    assert before[:5] != before[5:]
    other = plan_schedule(20, batch=4, epochs=2, max_steps=-1, seed=4)
    assert other.rows_of_step(0) != before[0]


def test_steps_and_partial_epochs() -> None:
    assert plan_schedule(10, batch=4, epochs=0.5, max_steps=-1, seed=0).total_steps == 2
    assert plan_schedule(10, batch=4, epochs=3, max_steps=5, seed=0).total_steps == 5
    assert plan_schedule(10, batch=4, epochs=3, max_steps=-1, seed=0).epoch(3) == 1.0


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.floats(0.01, 0.9), st.integers(0, 5))
def test_no_prompt_is_on_both_sides(prompts: list[int], share: float, seed: int) -> None:
    keys = [bytes([p]) for p in prompts]
    train, held = hold_out(keys, share, seed)
    assert sorted(train + held) == list(range(len(prompts)))
    assert not {keys[i] for i in train} & {keys[i] for i in held}
    assert train
    if len(set(prompts)) > 1:
        assert held


def test_the_split_does_not_depend_on_the_order_of_rows() -> None:
    keys = [bytes([i]) for i in range(50)]
    _, held = hold_out(keys, 0.2, 7)
    assert len(held) == 10
    mixed = list(reversed(keys))
    _, held_mixed = hold_out(mixed, 0.2, 7)
    assert {keys[i] for i in held} == {mixed[i] for i in held_mixed}
    assert {keys[i] for i in hold_out(keys, 0.2, 8)[1]} != {keys[i] for i in held}


def test_nothing_is_held_out_unless_asked() -> None:
    assert hold_out([b"a", b"b"], 0.0, 1) == ([0, 1], [])


def test_the_held_out_share_is_rounded_to_the_nearest_prompt() -> None:
    """Ten prompts of one row: a prompt more is taken where at least half of it is wanted."""
    prompts = [bytes([i]) for i in range(10)]
    for share, expected in ((0.01, 1), (0.1, 1), (0.14, 1), (0.15, 2), (0.24, 2), (0.26, 3), (0.94, 9), (0.99, 9)):
        train, held_out = hold_out(prompts, share, seed=1)
        assert (len(held_out), len(train)) == (expected, 10 - expected), share


def test_no_steps_given_means_epochs() -> None:
    for max_steps, expected in ((-1, 9), (0, 9), (1, 1), (20, 20)):
        assert plan_schedule(12, batch=4, epochs=3, max_steps=max_steps, seed=0).total_steps == expected
    assert plan_schedule(12, batch=4, epochs=0.1, max_steps=-1, seed=0).total_steps == 1
    assert plan_schedule(12, batch=4, epochs=1.1, max_steps=-1, seed=0).total_steps == 4

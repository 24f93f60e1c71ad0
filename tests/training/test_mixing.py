"""Several views in one run and epochs in an order: which pairs a step sees, the same after a kill, and refusals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dpoeng_testing import pair_rows, tree, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.selection.mixed import MixedView
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.evaluate import evaluate_trained, find_trained
from dpoeng.engine.recipes.inputs import open_inputs
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import TrainSummary, train
from dpoeng.engine.training import step as step_module
from dpoeng.engine.training.arrangement import Arrangement, arranged_order
from dpoeng.engine.training.order import plan_schedule


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.05, 0.95), st.integers(0, 99))
def test_shares_and_passes(first: int, second: int, share: float, seed: int) -> None:
    """Each epoch has the shares, and over epochs no row of a set comes twice more than another."""
    rows = first + second
    arrangement = Arrangement((first, second), (share, 1 - share))
    seen: Counter[int] = Counter()
    for epoch in range(4):
        order = arranged_order(arrangement, seed, epoch).tolist()
        assert len(order) == rows
        assert abs(sum(row < first for row in order) - share * rows) < 1
        seen.update(order)
        for part in (range(first), range(first, rows)):
            times = [seen[row] for row in part]
            assert max(times) - min(times) <= 1


def test_an_epoch_in_order() -> None:
    """Ranks 1, 0, 1, 0: rows 1 and 3 come first, in an order that the seed and the epoch decide."""
    arrangement = Arrangement((4,), None, np.array([1.0, 0.0, 1.0, 0.0]))
    found = {tuple(arranged_order(arrangement, 0, epoch).tolist()) for epoch in range(20)}
    assert found == {(a, 4 - a, b, 2 - b) for a in (1, 3) for b in (0, 2)}
    schedule = plan_schedule(4, batch=2, epochs=2, max_steps=-1, seed=0, arrangement=arrangement)
    assert [sorted(schedule.rows_of_step(step)) for step in range(4)] == [[1, 3], [0, 2]] * 2


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """`a` holds the views one and two, `b` the view three, all of one reference."""
    folder, rows = tmp_path_factory.mktemp("mixing"), pair_rows(18)
    for cache, name, some in (("a", "one", rows[:8]), ("a", "two", rows[8:12]), ("b", "three", rows[12:])):
        rated = [{**row, "rating": i} for i, row in enumerate(some)]
        file = write_jsonl(folder / f"{name}.jsonl", rated)
        precompute_reference(PrecomputeConfig(pairs=(file,), model=str(tiny_model), cache=folder / cache))
    return folder


def settings(caches: Path, out: Path, **fields: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "cache": caches / "a", "output_dir": out, "view": "one", "mix_with": ("two", f"{caches / 'b'}:three"),
        "mix": (2, 1, 1), "eval_share": 0.2, "max_steps": 4, "learning_rate": 3e-3, "lora_r": 4, "save_steps": 1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    return TrainConfig(**{**values, **fields})


def run(caches: Path, out: Path, **fields: Any) -> TrainSummary:
    return train(settings(caches, out, **fields))


def test_several_views_are_one(caches: Path) -> None:
    one, two, three = View.open(caches / "a", "one"), View.open(caches / "a", "two"), View.open(caches / "b")
    mixed = MixedView([one, two, three])
    assert (len(mixed), mixed.name) == (18, "one+two+three")
    for row, (part, at) in {0: (one, 0), 7: (one, 7), 8: (two, 0), 12: (three, 0), -1: (three, 5)}.items():
        assert mixed.key(row) == part.key(at)
        assert mixed[row].chosen_logps.tolist() == part[at].chosen_logps.tolist()
        assert (mixed.source(row), mixed.extra(row)) == (part.source(at), part.extra(at))
    assert mixed.numbers().chosen_sum.tolist() == [row.chosen_sum for row in (mixed[i] for i in range(18))]
    with pytest.raises(IndexError):
        mixed[18]


def test_what_is_held_out_is_held_out_of_every_set(caches: Path, tmp_path: Path) -> None:
    inputs = open_inputs(settings(caches, tmp_path))
    trained, held_out = {*inputs.train_rows.prompts()}, {*inputs.held_out.prompts}
    assert trained
    assert held_out
    assert not trained & held_out
    view = inputs.view
    assert isinstance(view, MixedView)
    seen = [inputs.train_rows.indices[row] for step in range(200) for row in inputs.schedule.rows_of_step(step)]
    share = [np.mean([low <= row < high for row in seen]) for low, high in ((0, 8), (8, 12), (12, 18))]
    assert share == pytest.approx([0.5, 0.25, 0.25], abs=0.04)  # an epoch has some 14 pairs, rounded by set


def test_the_largest_margins_come_first(caches: Path, tmp_path: Path) -> None:
    for order, sign in (("easy_first", -1), ("hard_first", 1)):
        inputs = open_inputs(settings(caches, tmp_path, mix=None, order=order))
        rows, schedule = inputs.train_rows, inputs.schedule
        met = [rows[i] for step in range(schedule.steps_per_epoch) for i in schedule.rows_of_step(step)]
        margins = [sign * (pair.chosen_sum - pair.rejected_sum) for pair in met]
        assert margins == sorted(margins)
        assert len(met) == len(rows)
    rated = open_inputs(settings(caches, tmp_path, mix_with=(), mix=None, order="easy_first", order_by="column:rating"))
    rows, schedule = rated.train_rows, rated.schedule
    ratings = [rows.view.extra(rows.indices[i])["rating"] for step in (0, 1) for i in schedule.rows_of_step(step)]
    assert ratings == sorted(ratings, reverse=True)


def test_a_killed_mixture_ends_in_the_same_bytes(caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"order": "easy_first", "order_by": "margin_per_token"}
    run(caches, tmp_path / "whole", **fields)
    real, calls = step_module.batch_loss, 0

    def dying(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # in the third step, which has two forwards as all have
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(step_module, "batch_loss", dying)
    with pytest.raises(KeyboardInterrupt):
        run(caches, tmp_path / "killed", **fields)
    assert run(caches, tmp_path / "killed", **fields).resumed_from == 2
    assert tree(tmp_path / "killed", "adapter") == tree(tmp_path / "whole", "adapter")
    # Evaluated by its record alone, on the pairs that it held out of all sets.
    trained = find_trained(tmp_path / "whole")
    assert trained.run is not None
    found = evaluate_trained(trained, TrainConfig(**trained.run), None)
    assert found.view == "one+two+three"
    for changed in ({"mix": (1, 1, 1)}, {"mix_with": (f"{caches / 'b'}:", "two")}, {"order": "hard_first"}):
        with pytest.raises(UserError) as caught:
            run(caches, tmp_path / "whole", **{**fields, **changed})
        assert caught.value.code == "resume-changed"


def test_a_second_cache_is_not_dropped_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--cache", "a", "--cache=b", "--mix", "0.7,0.3"])
    assert stop.value.code == 2
    assert "--mix-with FOLDER:VIEW" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mix": (1, 1)}, "2 numbers for 3 sets"),
        ({"mix": (1, 0, 1)}, "above 0"),
        ({"mix_with": ("one",), "mix": None}, "named twice"),
        ({"order_by": "margin_per_token"}, "no effect"),
        ({"order": "easy_first", "order_by": "likelihood"}, "pattern"),
    ],
)
def test_settings_that_do_not_fit(caches: Path, tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(caches, tmp_path, **fields)

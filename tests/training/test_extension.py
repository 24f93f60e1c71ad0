"""A run that is made longer: the bytes of one of that length at a constant rate; else a note on the change of rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import pair_rows, tree, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.phase_two.finished import finished_run
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.training import loop as loop_module

LAST = "checkpoint-00000010"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("extension")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(14))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def config(cache: Path, out: Path, **fields: Any) -> TrainConfig:
    """With state that steps pass on: momentum, dropout, and a loss that remembers."""
    values: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "lora_r": 2,
        "lora_dropout": 0.1,
        "loss_type": ("beta_dpo",),
        "eval_share": 0.1,
        "parity_pairs": 2,
        **fields,
    }
    return TrainConfig(cache=cache, output_dir=out, **values)


class Notes:
    """Collects what the user would read."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def task(self, *arguments: Any, **options: Any) -> Any:
        from dpoeng.engine.runtime.progress import QUIET

        return QUIET.task(*arguments, **options)


def steps_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_at_a_constant_rate_an_extended_run_is_one_of_that_length(cache: Path, tmp_path: Path) -> None:
    whole, out, notes = tmp_path / "whole", tmp_path / "out", Notes()
    train(config(cache, whole, max_steps=10))
    train(config(cache, out))
    assert finished_run(config(cache, out, max_steps=10)) is None
    summary = train(config(cache, out, max_steps=10), notes)
    assert (summary.resumed_from, summary.steps, summary.already_complete) == (6, 10, False)
    assert any(
        "from 6 to 10 steps" in note and "equals that of an uninterrupted run of this length" in note
        for note in notes.said
    )
    assert steps_of(out) == steps_of(whole)
    weights = [name for name in tree(whole, "adapter", LAST) if name.endswith(".safetensors")]
    assert len(weights) == 3
    assert {name: tree(out)[name] for name in weights} == {name: tree(whole)[name] for name in weights}
    assert "10; planned for 6, extended to 10 after step 6" in (out / "adapter" / "README.md").read_text()
    assert train(config(cache, out, max_steps=10)).already_complete


def test_a_schedule_is_stretched_and_the_rates_are_reported(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"lr_scheduler_type": "cosine", "num_train_epochs": 1.0, "max_steps": -1, "save_steps": 1}
    longer = {**short, "num_train_epochs": 2.0}
    train(config(cache, tmp_path / "whole", **longer))
    for name in ("out", "killed"):
        train(config(cache, tmp_path / name, **short))
    done, total = len(steps_of(tmp_path / "out")), len(steps_of(tmp_path / "whole"))
    assert 1 < done < total
    notes = Notes()
    train(config(cache, tmp_path / "out", **longer), notes)
    before, after = (steps_of(tmp_path / "out")[step]["learning_rate"] for step in (done - 1, done))
    assert after == steps_of(tmp_path / "whole")[done]["learning_rate"] > 2 * before
    assert any(f"from {before:.3g} to {after:.3g}" in note and "cosine" in note for note in notes.said)

    real, calls = loop_module.train_step, 0

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop_module, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(config(cache, tmp_path / "killed", **longer))
    monkeypatch.undo()
    assert train(config(cache, tmp_path / "killed", **longer)).resumed_from == done + 2
    assert tree(tmp_path / "killed", "adapter") == tree(tmp_path / "out", "adapter")
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["extensions"] == [
        {"step": done, "planned": done, "steps": total}
    ]


@pytest.mark.parametrize("change", [{"max_steps": 5}, {"max_steps": 8, "beta": 0.3}, {"num_train_epochs": 9.0}])
def test_what_is_not_only_longer_is_refused(cache: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    train(config(cache, tmp_path))
    before = tree(tmp_path)
    with pytest.raises(UserError) as caught:
        train(config(cache, tmp_path, **change))
    assert caught.value.code == "resume-changed"
    assert all(f"{name} = {value}" in str(caught.value.found) for name, value in change.items())
    assert tree(tmp_path) == before


def test_a_run_that_stopped_early_or_in_a_sweep_is_not_extended(cache: Path, tmp_path: Path) -> None:
    early = {"early_stopping_patience": 1, "early_stopping_threshold": 9.0, "eval_steps": 1}
    assert train(config(cache, tmp_path, **early)).steps == 2
    with pytest.raises(UserError, match="resume-changed"):
        train(config(cache, tmp_path, max_steps=8, **early))
    train(config(cache, tmp_path / "other"))
    with pytest.raises(UserError, match="resume-changed"):
        train(config(cache, tmp_path / "other", max_steps=8), may_extend=False)

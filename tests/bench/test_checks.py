"""The checks that watch speed and memory: they pass, and a planted slow-down by two and planted leaks do not.

Every limit stands about half-way (in ratio) between what is seen and what a doubling gives; see bench/checks.py for why
a busy machine does not make it cross.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dpoeng.bench import checks
from dpoeng.bench.checks import Check, Subject, plain_scores, subject
from dpoeng.bench.kernels import naive
from dpoeng.cli.bench.commands import bench


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with subject(tmp_path_factory.mktemp("checks") / "model") as made:
        yield made


@pytest.fixture(scope="module")
def clean(on: Subject) -> dict[str, Check]:
    return {check.name: check for check in checks.run_checks(on)}


def twice(work: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        work(*arguments, **named)
        return work(*arguments, **named)

    return run


def test_everything_is_within_its_limits(clean: dict[str, Check]) -> None:
    assert len(clean) == 7
    for check in clean.values():
        assert check.ok, check


def test_the_twin_does_the_same_work(on: Subject) -> None:
    ours = checks.score_pairs(on.lm, on.pairs)
    theirs = plain_scores(on.twin, on.pairs).numpy()
    for row, (chosen, rejected) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(row.chosen_logps, chosen, atol=2e-5)
        np.testing.assert_allclose(row.rejected_logps, rejected, atol=2e-5)


def test_scoring_twice_as_slow_is_noticed(
    on: Subject, clean: dict[str, Check], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dpoeng.engine.scoring.pairs as engine

    monkeypatch.setattr(engine, "score_groups", twice(engine.score_groups))
    slow = checks.scoring_time(on)
    assert not slow.ok, slow
    assert slow.value > 1.6 * clean[slow.name].value


def test_steps_twice_as_slow_are_noticed(on: Subject, clean: dict[str, Check], monkeypatch: pytest.MonkeyPatch) -> None:
    import dpoeng.engine.training.step as engine

    monkeypatch.setattr(engine, "_gradient", twice(engine._gradient))
    monkeypatch.setattr(checks, "ATTEMPTS", 2)  # enough to see that a second one does not excuse it
    slow = checks.step_time(on)
    assert not slow.ok, slow
    assert slow.value > 1.5 * clean[slow.name].value


def test_whole_logits_are_noticed(clean: dict[str, Check]) -> None:
    back = checks.head_memory(naive)
    assert not back.ok
    assert back.value == pytest.approx(1.0)
    assert back.value > 10 * clean[back.name].value


def test_a_leak_of_scoring_is_noticed(on: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 KiB of tensors and 64 KiB of arrays a call: far below what resident memory could tell."""
    import dpoeng.engine.scoring.pairs as engine

    kept: list[Any] = []
    real = engine.score_groups

    def leaking(*arguments: Any) -> Any:
        kept.append((torch.ones(2048), np.ones(8192)))
        return real(*arguments)

    monkeypatch.setattr(engine, "score_groups", leaking)
    monkeypatch.setattr(checks, "ATTEMPTS", 2)
    tensors, objects = checks.scoring_growth(on)
    assert not tensors.ok
    assert not objects.ok
    assert tensors.value == 8192
    assert objects.value == pytest.approx(65536, rel=0.2)


def test_a_leak_of_steps_is_noticed(on: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual leak: somebody keeps every loss, for a mean; and what was read from the data."""
    import dpoeng.engine.training.step as engine

    kept: list[Any] = []
    real = engine.batch_loss

    def leaking(*arguments: Any, **named: Any) -> Any:
        kept.append((real(*arguments, **named), np.ones(8192)))
        return kept[-1][0]

    monkeypatch.setattr(engine, "batch_loss", leaking)
    monkeypatch.setattr(checks, "ATTEMPTS", 2)
    tensors, objects = checks.step_growth(on)
    assert not tensors.ok, tensors
    assert not objects.ok, objects
    assert objects.value > 65536


@pytest.mark.parametrize(("every", "fine"), [(2, False), (100, True)])
def test_only_what_comes_again_is_a_leak(monkeypatch: pytest.MonkeyPatch, every: int, fine: bool) -> None:
    """256 KiB that are kept every second time (there are two calls in what is compared), and once."""
    monkeypatch.setattr(checks, "ATTEMPTS", 2)
    kept: list[Any] = []
    calls = iter(range(1000))

    def work() -> None:
        if (next(calls) - 7) % every == 0:  # calls 0 to 5 prepare; 6 and 7 are the first that count
            kept.append(np.ones(2**15))

    _, objects = checks.growth("work", work)
    assert objects.ok is fine, objects


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Check("scoring, CPU time", 0.85, 1.2, "of plain PyTorch's")]
    monkeypatch.setattr(checks, "run_checks", lambda on: found)
    good = CliRunner().invoke(bench, ["checks"])
    assert (good.exit_code, "0.85" in good.output) == (0, True), good.output
    found.append(Check("head, peak memory", 0.9, 0.2, "of whole logits'"))
    bad = CliRunner().invoke(bench, ["checks"])
    assert bad.exit_code == 6, bad.output
    assert "too much" in bad.output

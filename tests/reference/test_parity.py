"""How far a policy may be from the cache: the limits themselves, and that each is the largest that passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCAB, make

from dpoeng.cache.schema import PairIds, ScoredPair
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.reference import parity as parity_module
from dpoeng.engine.reference.parity import (
    ParityReport,
    compare_with_cache,
    noisy_tolerance,
    parity_tolerance,
    same_precision,
    spread,
)
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.pairs import score_pairs


@pytest.mark.parametrize(
    ("dtype", "quantization", "reference", "nats"),
    [
        ("float32", "none", ("none", "float32"), 2e-3),
        ("bfloat16", "none", ("none", "bfloat16"), 6e-2),
        ("float16", "none", ("none", "float16"), 2e-2),
        ("bfloat16", "4bit", ("4bit", "bfloat16"), 6e-2),
        ("bfloat16", "none", ("none", "float32"), 0.1),
        ("bfloat16", "8bit", ("none", "bfloat16"), 0.3),
        ("bfloat16", "none", ("4bit", "bfloat16"), 1.0),
        ("bfloat16", "4bit", ("8bit", "bfloat16"), 1.0),
    ],
)
def test_differences_that_rounding_explains(
    dtype: str, quantization: str, reference: tuple[str, str], nats: float
) -> None:
    policy: Any = SimpleNamespace(dtype=getattr(torch, dtype), quantization=quantization)
    assert parity_tolerance(policy, *reference) == nats


def test_pairs_are_compared_from_first_to_last() -> None:
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread([7, 8], 4) == [7, 8]


# --------------------------------------------------------------------------- noise measured on the spot

TABLE = 2e-3


def test_a_tolerance_follows_the_noise_between_floor_and_ceiling() -> None:
    assert noisy_tolerance(TABLE, 0.0) == TABLE
    assert noisy_tolerance(TABLE, 1e-3) == pytest.approx(3e-3)
    assert noisy_tolerance(TABLE, 1.0) == pytest.approx(5e-3)


def test_whose_difference_is_noise() -> None:
    lm: Any = SimpleNamespace(dtype=torch.bfloat16, quantization="8bit")
    assert same_precision(lm, "8bit", "bfloat16")
    assert not same_precision(lm, "none", "bfloat16")
    assert not same_precision(lm, "8bit", "float32")


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    found = make("LlamaConfig", {})
    choose_layout(found)
    return found


@pytest.fixture(scope="module")
def cached(lm: CausalLM) -> list[ScoredPair]:
    rng = np.random.default_rng(0)
    ids = [PairIds(*(rng.integers(0, VOCAB, n, dtype=np.int32) for n in (5, 6, 4 + i))) for i in range(6)]
    return score_pairs(lm, ids)


def compared(lm: CausalLM, cached: list[ScoredPair], **settings: Any) -> ParityReport:
    how: dict[str, Any] = {"beta": 0.1, "batch_tokens": 1000, "tolerance": TABLE, "measures_noise": True, **settings}
    return compare_with_cache(lm, cached, range(len(cached)), **how)


def with_noise(monkeypatch: pytest.MonkeyPatch, nats: float) -> None:
    """A machine whose packed forwards are off by so much, up and down."""
    real = parity_module.score_batches

    def noisy(lm: Any, batches: Any) -> Iterator[list[ScoredPair]]:
        for rows in real(lm, batches):
            off = nats if len(rows) > 1 else 0.0
            yield [
                replace(row, chosen_logps=row.chosen_logps + off, rejected_logps=row.rejected_logps - off)
                for row in rows
            ]

    monkeypatch.setattr(parity_module, "score_batches", noisy)


def test_a_machine_with_more_noise_passes(
    lm: CausalLM, cached: list[ScoredPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = compared(lm, cached)
    assert quiet.ok
    assert (quiet.noise, quiet.tolerance) == (None, TABLE)  # nothing to explain, so nothing is run twice
    with_noise(monkeypatch, 1.5 * TABLE)
    found = compared(lm, cached)
    assert found.noise == pytest.approx(1.5 * TABLE, rel=1e-3)
    assert found.mean_diff == pytest.approx(1.5 * TABLE, rel=1e-3)
    assert found.tolerance == pytest.approx(2.5 * TABLE)
    assert found.ok
    assert found.record()["noise"] == found.noise
    assert not compared(lm, cached, measures_noise=False).ok  # where the user named a tolerance


def test_no_noise_excuses_everything(lm: CausalLM, cached: list[ScoredPair], monkeypatch: pytest.MonkeyPatch) -> None:
    with_noise(monkeypatch, 2.6 * TABLE)
    found = compared(lm, cached)
    assert not found.ok
    assert found.noise is None  # beyond the ceiling there is nothing to measure


def test_a_wrong_model_is_refused_though_it_is_near(lm: CausalLM, cached: list[ScoredPair]) -> None:
    """Its difference is one that noise could be, and its noise is not."""
    head: Any = lm.head
    right = head.weight.detach().clone()
    try:
        with torch.no_grad():
            head.weight.mul_(1.001)
            head.weight.copy_(right * (1 + 1e-3 * 1.5 * TABLE / compared(lm, cached, tolerance=1e3).mean_diff))
        found = compared(lm, cached)
    finally:
        with torch.no_grad():
            head.weight.copy_(right)
    assert TABLE < found.mean_diff < 2.5 * TABLE
    assert found.noise is not None
    assert found.noise < 1e-4
    assert found.tolerance == TABLE
    assert not found.ok

"""Conditions that a model without soft caps, or with certain tokens, would never show to be turned round."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpoeng.cache.schema import PairIds, as_ids
from dpoeng.engine.scoring import forward, pairs, varlen


def test_a_certain_token_has_no_log_prob_above_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding in the log-sum-exp leaves +1e-7, which the cache would refuse."""
    values = torch.tensor([1e-7, -1.0, 3e-7, -2.0])
    monkeypatch.setattr(pairs, "score_groups", lambda lm, groups: (values, [0, 2, 4]))
    lm: Any = None
    [row] = pairs.score_pairs(lm, [PairIds(as_ids([1]), as_ids([2, 3]), as_ids([4, 5]))])
    assert (row.chosen_logps.tolist(), row.rejected_logps.tolist()) == ([0.0, -1.0], [0.0, -2.0])
    assert row.chosen_logps.dtype == np.float32
    row.check()


@pytest.mark.parametrize(("softcap", "expected"), [(None, 40.0), (30.0, 30 * math.tanh(40 / 30))])
def test_logits_are_capped_where_the_model_caps_them(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, expected: float
) -> None:
    monkeypatch.setattr(forward, "head_transform", lambda lm: (softcap, 2.0))
    lm: Any = SimpleNamespace(head=lambda hidden: hidden)
    assert forward._logits(lm, torch.tensor([20.0])).item() == pytest.approx(expected)


@pytest.mark.parametrize(("softcap", "sinks"), [(30.0, None), (None, torch.zeros(2)), (30.0, torch.zeros(2))])
def test_flash_attention_refuses_what_it_lacks(softcap: float | None, sinks: torch.Tensor | None) -> None:
    states, rows = torch.zeros(1, 2, 3, 4), Any
    with pytest.raises(ValueError, match="neither"):
        varlen.varlen(states, states, states, rows, scaling=None, window=None, softcap=softcap, sinks=sinks)  # type: ignore[arg-type]

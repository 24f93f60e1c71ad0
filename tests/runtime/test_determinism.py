"""Deterministic algorithms, in a process whose GPU may have worked before."""

from __future__ import annotations

import os

import pytest
import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.runtime.determinism import full_determinism


def test_the_switch_is_set_for_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with full_determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


def test_products_that_can_no_longer_be_deterministic_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has looked at the environment before: at a product of the program that calls dpoeng."""

    def refused(*_: object) -> None:
        raise RuntimeError("Deterministic behavior was enabled with ...")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    ones = torch.ones(1, 1)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: ones)
    monkeypatch.setattr(torch, "mm", refused)
    with pytest.raises(UserError) as caught, full_determinism(True):
        pytest.fail("not reached")
    assert caught.value.where == "--full-determinism"
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in str(caught.value.remedy)
    assert not torch.are_deterministic_algorithms_enabled()

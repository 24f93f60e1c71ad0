"""How far a policy may be from the cache: the limits themselves, and that each is the largest that passes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpoeng.engine.reference.parity import parity_tolerance, spread


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
def test_what_rounding_explains(dtype: str, quantization: str, reference: tuple[str, str], nats: float) -> None:
    policy: Any = SimpleNamespace(dtype=getattr(torch, dtype), quantization=quantization)
    assert parity_tolerance(policy, *reference) == nats


def test_pairs_are_compared_from_first_to_last() -> None:
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread([7, 8], 4) == [7, 8]

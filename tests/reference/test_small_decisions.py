"""Fields of the reference's identity and rows of the parity check that a small example would not show to be missing."""

from __future__ import annotations

from typing import Any

import pytest

from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.reference import identity
from dpoeng.engine.reference.parity import spread


def digest(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> str:
    monkeypatch.setattr(identity, "weights_identity", lambda source, progress, without: "weights")
    monkeypatch.setattr(identity, "forward_config", lambda source: {"hidden_size": 8})
    monkeypatch.setattr(identity, "resolve_dtype", lambda source, dtype, device: "torch.bfloat16")
    monkeypatch.setattr(identity, "stored_quantization", lambda source: None)
    monkeypatch.setattr(identity, "has_routed_experts", lambda source: False)
    source: Any = None
    config = PrecomputeConfig.model_validate({"pairs": ["p.jsonl"], "device": "cpu", **fields})
    return identity.reference_spec(config, source, None, beside=identity.Beside()).digest


def test_every_way_to_quantise_is_another_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[dict[str, Any]] = [
        {"quantization": "none"},
        {"quantization": "8bit"},
        *(
            {"quantization": "4bit", "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
            for kind in ("nf4", "fp4")
            for double in (True, False)
        ),
    ]
    assert len({digest(monkeypatch, **way) for way in ways}) == len(ways)
    assert digest(monkeypatch, layout="separate") != digest(monkeypatch)
    assert digest(monkeypatch, batch_tokens=99) == digest(monkeypatch)


def test_rows_are_spread_over_all() -> None:
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread(range(10, 17), 3) == [10, 12, 14]
    assert spread([5, 6], 9) == [5, 6]

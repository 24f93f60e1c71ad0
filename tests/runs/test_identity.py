"""What a resumed run must share with its beginning, over releases too."""

from __future__ import annotations

from typing import Any

import pytest

from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.runs.identity import changes


def identity(**settings: Any) -> dict[str, Any]:
    config = TrainConfig.model_validate(settings)
    return {"settings": config.model_dump(mode="json"), "reference": "r", "pairs": "p", "eval_pairs": None}


@pytest.mark.parametrize("field", ["desirable_weight", "train_last_layers", "max_grad_norm"])
def test_a_field_that_is_newer_than_the_run_had_its_default(field: str) -> None:
    old = identity()
    del old["settings"][field]
    assert changes(old, identity()) == []
    different = {"desirable_weight": 2.0, "train_last_layers": 1, "max_grad_norm": 3.0}[field]
    loss = {"loss_type": "kto"} if field == "desirable_weight" else {}
    old["settings"]["loss_type"] = identity(**loss)["settings"]["loss_type"]
    default = getattr(TrainConfig.model_validate({}), field)
    assert (field, default, different) in changes(old, identity(**loss, **{field: different}))


def test_a_removed_setting_is_a_change() -> None:
    old = identity()
    old["settings"]["gone"] = 3
    assert changes(old, identity()) == [("gone", 3, None)]
    other = identity() | {"pairs": "q"}
    assert changes(identity(), other) == [("pairs", "p", "q")]

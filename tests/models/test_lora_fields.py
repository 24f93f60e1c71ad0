"""peft's settings of a LoRA: none is overlooked, and what dpoeng does not compute is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.lora_fields import COMPUTED, NAMES, REFUSED
from dpoeng.engine.models.sources import find_adapter


def test_every_field_of_pefts_config_has_been_gone_through() -> None:
    """A field that a new peft brings fails here: look at what it computes, then put it into one of the three."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - NAMES - COMPUTED - set(REFUSED) == set()
    assert not NAMES & COMPUTED
    assert not (NAMES | COMPUTED) & set(REFUSED)


def adapter_with(sft_adapter: Path, folder: Path, **fields: Any) -> Path:
    shutil.copytree(sft_adapter, folder)
    held = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**held, **fields}))
    return folder


WRONG: list[tuple[str, Any]] = [
    *((name, {"some": 1}) for name in REFUSED),
    ("a_field_of_next_year", True),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "loftq"),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_what_is_not_computed_is_refused_by_name(sft_adapter: Path, tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        find_adapter(str(adapter_with(sft_adapter, tmp_path / "adapter", **{field: value})))
    assert caught.value.code == "adapter-mismatch"
    assert field in str(caught.value.where)


def test_defaults_and_computed_fields_pass(sft_adapter: Path, tmp_path: Path) -> None:
    fields = {"use_dora": True, "init_lora_weights": "pissa", "a_field_of_next_year": None, "kasa_config": None}
    find_adapter(str(adapter_with(sft_adapter, tmp_path / "adapter", **fields)))

"""A checkpoint that is stored quantised gives the numbers of one that is quantised while it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from dpoeng_testing import pair_rows, room_for, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cli.quantize import quantize as quantize_command
from dpoeng.engine.config.fields import PrecomputeConfig, Quantization, TrainConfig
from dpoeng.engine.models.loading import with_stored_quantization
from dpoeng.engine.models.sources import find_model, stored_quantization
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.quantize import quantize
from dpoeng.engine.recipes.train import train


def precompute(folder: Path, model: Path, **fields: object) -> View:
    precompute_reference(
        PrecomputeConfig(pairs=(folder / "pairs.jsonl",), model=str(model), cache=folder / "cache", **fields)
    )
    return View.open(folder / "cache")


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_both_phases_on_a_stored_checkpoint(tmp_path: Path, tiny_model: Path, quantization: Quantization) -> None:
    """The same log-probs to the bit as quantising while loading; trained without a word about quantization."""
    for name in ("live", "stored"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "pairs.jsonl", pair_rows(6))
    done = CliRunner().invoke(
        quantize_command,
        [
            str(tiny_model),
            "--into",
            str(tmp_path / "model"),
            "--quantization",
            quantization,
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 0
    assert "dpoeng precompute-ref" in done.output
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    live = precompute(tmp_path / "live", tiny_model, quantization=quantization)
    stored = precompute(tmp_path / "stored", tmp_path / "model")
    assert stored.meta["reference"]["quantization"] == quantization
    assert stored.spec.digest != live.spec.digest, "other bytes of weights, so another reference"
    for i in range(len(live)):
        assert np.array_equal(live[i].chosen_logps, stored[i].chosen_logps)
        assert np.array_equal(live[i].rejected_logps, stored[i].rejected_logps)
    out = tmp_path / "out"
    summary = train(TrainConfig(cache=tmp_path / "stored" / "cache", output_dir=out, max_steps=2, eval_share=0.0))
    assert summary.steps == 2
    assert summary.parity is not None
    assert summary.parity.max_diff == 0.0


def test_what_the_checkpoint_says_stands(tmp_path: Path, tiny_model: Path) -> None:
    source = find_model(str(tiny_model))
    assert stored_quantization(source) is None
    assert with_stored_quantization(PrecomputeConfig(), source) == PrecomputeConfig()
    quantize(source, tmp_path / "model", quantization="8bit")
    held = find_model(str(tmp_path / "model"))
    found = with_stored_quantization(PrecomputeConfig(quantization="8bit"), held)
    assert found.quantization == "8bit"
    for wrong in ({"quantization": "4bit"}, {"quantization": "none"}):
        with pytest.raises(UserError) as caught:
            with_stored_quantization(PrecomputeConfig(**wrong), held)
        assert caught.value.code == "quantization-stored"
    with pytest.raises(UserError) as caught:
        quantize(held, tmp_path / "again", quantization="8bit")
    assert caught.value.code == "quantization-stored"
    with pytest.raises(UserError) as caught:
        quantize(source, tmp_path / "model", quantization="8bit")
    assert caught.value.code == "output-unwritable"


def test_a_full_disk_leaves_no_checkpoint(tmp_path: Path, tiny_model: Path) -> None:
    source = find_model(str(tiny_model))
    with pytest.raises(UserError) as caught, room_for(source.weight_files[0].stat().st_size // 4):
        quantize(source, tmp_path / "model", quantization="8bit")
    assert (caught.value.code, caught.value.exit_status) == ("output-unwritable", 5)
    assert list(tmp_path.iterdir()) == []
    quantize(source, tmp_path / "model", quantization="8bit")


def test_a_method_that_dpoeng_does_not_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "hqq", "bits": 4}}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        stored_quantization(find_model(str(tmp_path)))
    assert caught.value.code == "quantization-stored"
    assert "hqq" in str(caught.value)

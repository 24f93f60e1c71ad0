"""`dpoeng merge`: a checkpoint of plain transformers that answers as base and adapters do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from dpoeng_testing import pair_rows, room_for, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.cli.merge import merge as merge_command
from dpoeng.engine.config import PrecomputeConfig, TrainConfig
from dpoeng.engine.merge import merge_run
from dpoeng.engine.precompute import precompute_reference
from dpoeng.engine.train import train


def trained(tmp_path: Path, model: Path, adapter: Path | None, **fields: Any) -> Path:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(12))
    cache = tmp_path / "cache"
    quantization = fields.pop("quantization", "none")
    precompute_reference(
        PrecomputeConfig(
            pairs=(pairs,),
            model=str(model),
            adapter=str(adapter) if adapter else None,
            cache=cache,
            quantization=quantization,
        )
    )
    train(TrainConfig(cache=cache, output_dir=tmp_path / "out", max_steps=4, learning_rate=3e-2, **fields))
    return tmp_path / "out"


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.arange(40)[None]).logits.float()


def by_recipe(out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model as run.json says to load it."""
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec("\n".join(json.loads((out / "run.json").read_text())["load"]), names)
    return names["model"]


@pytest.mark.parametrize("mode", ["new", "stack", "continue"])
def test_the_merged_checkpoint_answers_as_base_and_adapters_do(
    tmp_path: Path, tiny_model: Path, sft_adapter: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = trained(tmp_path, tiny_model, None if mode == "new" else sft_adapter, adapter_mode=mode)
    summary = merge_run(out, tmp_path / "merged")
    expected = logits(by_recipe(out, monkeypatch))
    base = logits(AutoModelForCausalLM.from_pretrained(tiny_model))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert float((expected - base).abs().max()) > 0.05  # there is something to merge
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert summary.merged == (4 if mode == "continue" else 14)  # two of a layer's linear layers, or all seven
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|endoftext|>"


def test_from_an_8_bit_run_in_bfloat16(
    tmp_path: Path, tiny_model: Path, sft_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is added to the base as it is on disk, not to what 8 bits made of it."""
    from transformers import AutoModelForCausalLM

    out = trained(tmp_path, tiny_model, sft_adapter, adapter_mode="stack", quantization="8bit")
    result = CliRunner().invoke(
        merge_command, [str(out), "--into", str(tmp_path / "m"), "--dtype", "bfloat16"], catch_exceptions=False
    )
    assert "14 of" in result.output
    expected = logits(by_recipe(out, monkeypatch))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert merged.dtype == torch.bfloat16
    found = logits(merged.float())
    # Rounding the weights to bfloat16, and nothing else, is between the two.
    again = by_recipe(out, monkeypatch).merge_and_unload().bfloat16().float()
    torch.testing.assert_close(found, logits(again), atol=0.02, rtol=0.02)
    assert float((found - expected).abs().mean()) < 0.02


def test_what_cannot_be_merged_is_a_message(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="no finished run"):
        merge_run(tmp_path, tmp_path / "merged")
    out = trained(tmp_path, tiny_model, None, use_dora=True)
    with pytest.raises(UserError, match="use_dora"):
        merge_run(out, tmp_path / "merged")
    with pytest.raises(UserError, match="not empty"):
        merge_run(out, out)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    out = trained(tmp_path, tiny_model, None)
    other = tmp_path / "other"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50)).save_pretrained(other)
    with pytest.raises(UserError) as caught:
        merge_run(out, tmp_path / "merged", model=str(other))
    assert caught.value.code == "adapter-mismatch"


def test_a_full_disk_leaves_no_checkpoint(tmp_path: Path, tiny_model: Path) -> None:
    """Refused in the midst of the weights, and behind them."""
    out, before = trained(tmp_path, tiny_model, None), set(tmp_path.iterdir())
    weights = (tiny_model / "model.safetensors").stat().st_size
    for room in (weights // 2, 0):
        with pytest.raises(UserError) as caught, room_for(room):
            merge_run(out, tmp_path / "merged")
        assert (caught.value.code, caught.value.exit_status) == ("output-unwritable", 5)
        assert "--into" in caught.value.remedy
        assert set(tmp_path.iterdir()) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpoeng.engine.merge._copy_rest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_run(out, tmp_path / "merged")
    assert set(tmp_path.iterdir()) == before
    (tmp_path / "merged").mkdir()
    assert merge_run(out, tmp_path / "merged").folder == tmp_path / "merged"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file, not a folder"):
        merge_run(out, tmp_path / "file")


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt

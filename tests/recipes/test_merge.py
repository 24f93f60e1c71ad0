"""`dpoeng merge`: a checkpoint of plain transformers that answers as base and adapters do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from dpoeng_testing import pair_rows, room_for, write_jsonl
from safetensors.torch import load_file

from dpoeng.cache.errors import UserError
from dpoeng.cli.merge import merge as merge_command
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.models.sources import find_adapter, find_model
from dpoeng.engine.recipes import merge as merge_module
from dpoeng.engine.recipes.merge import merge, merge_run
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train


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
    """The model as run.json says to load it, on the base as it is on disk."""
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    lines = "\n".join(json.loads((out / "run.json").read_text())["load"])
    exec(lines.replace(", quantization_config=bits", ""), names)
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


def test_an_unmergeable_adapter_is_a_message(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="no finished run"):
        merge_run(tmp_path, tmp_path / "merged")
    out = trained(tmp_path, tiny_model, None)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    (out / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "layer_replication": [[0, 2], [0, 2]]}))
    with pytest.raises(UserError, match="repeats layers"):
        merge_run(out, tmp_path / "merged")
    with pytest.raises(UserError, match="not empty"):
        merge_run(out, out)
    (tmp_path / "outside").mkdir()
    (out / "linked").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a link"):
        merge_run(out, out / "linked")
    assert not list((tmp_path / "outside").iterdir())


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    out = trained(tmp_path, tiny_model, None)
    other = tmp_path / "other"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50)).save_pretrained(other)
    with pytest.raises(UserError) as caught:
        merge_run(out, tmp_path / "merged", model=str(other))
    assert caught.value.code == "adapter-mismatch"


def _merged_and_peft(tmp_path: Path, model: Path, **lora: Any) -> tuple[Any, Any]:
    """A random adapter, merged by dpoeng; and the same by peft."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(task_type="CAUSAL_LM", **lora))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    summary = merge(find_model(str(model)), [find_adapter(str(tmp_path / "adapter"))], tmp_path / "merged")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    return AutoModelForCausalLM.from_pretrained(summary.folder), peft


def with_biases(folder: Path, *, tied: bool) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=200, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4]}},
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 4, "rank_pattern": {"v_proj": 2}},
    ],
)
def test_parts_of_an_adapter_besides_lora_are_merged(tmp_path: Path, lora: dict[str, Any]) -> None:
    merged, peft = _merged_and_peft(tmp_path, with_biases(tmp_path / "model", tied=False), **lora)
    torch.testing.assert_close(logits(merged), logits(peft), atol=1e-4, rtol=0)


def test_dora_is_merged_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bytes that peft gives in a base that is loaded whole; its norms are the rows'."""
    model = with_biases(tmp_path / "model", tied=False)
    _merged_and_peft(tmp_path, model, target_modules=["q_proj", "down_proj"], use_dora=True)
    adapter = [find_adapter(str(tmp_path / "adapter"))]
    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "merge_whole", interrupted)
        merge(find_model(str(model)), adapter, tmp_path / "by_tensor")
    monkeypatch.setattr(merge_module, "_read_adapter", lambda *_args, **_more: False)
    merge(find_model(str(model)), adapter, tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("by_tensor", "whole"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-6, rtol=1e-6)
    magnitudes = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, magnitude in magnitudes.items():
        if "magnitude" in name:
            weight = one[name.split(".", 2)[2].replace("lora_magnitude_vector", "weight")]
            torch.testing.assert_close(weight.norm(dim=1), magnitude.abs(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("lora", "tied"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
    ],
)
def test_what_has_no_place_in_the_base_is_refused(tmp_path: Path, lora: dict[str, Any], tied: bool) -> None:
    with pytest.raises(UserError) as caught:
        _merged_and_peft(tmp_path, with_biases(tmp_path / "model", tied=tied), **lora)
    assert caught.value.code == "adapter-mismatch"
    assert not (tmp_path / "merged").exists()


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
        patch.setattr("dpoeng.engine.recipes.merge.copy_rest", interrupted)
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

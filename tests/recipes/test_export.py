"""`dpoeng export`: what llama.cpp, vLLM and transformers load answers as the trained policy does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from dpoeng_testing import pair_rows, write_jsonl
from safetensors.torch import load_file

import dpoeng
from dpoeng.cache.errors import UserError
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.models.gguf_files.architecture import architecture_of
from dpoeng.engine.models.gguf_files.tokenizer import _splitter
from dpoeng.engine.recipes.elsewhere import export as recipe
from dpoeng.engine.recipes.elsewhere.export import export
from dpoeng.engine.recipes.elsewhere.lora import max_lora_rank
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train


def trained(folder: Path, model: Path, adapter: Path | None, **fields: Any) -> TrainConfig:
    """The config of a finished run whose adapter moves log-probs by whole nats."""
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(6))
    precompute_reference(
        PrecomputeConfig(pairs=(pairs,), model=str(model), adapter=adapter and str(adapter), cache=folder / "cache")
    )
    config = TrainConfig(cache=folder / "cache", output_dir=folder / "out", max_steps=4, learning_rate=3e-2, **fields)
    train(config)
    return config


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, sft_adapter: Path) -> TrainConfig:
    """A run with two adapters, of other ranks on other layers."""
    return trained(tmp_path_factory.mktemp("stacked"), tiny_model, sft_adapter, adapter_mode="stack", lora_r=6)


def tensors(file: Path) -> dict[str, Any]:
    return {one.name: gguf.dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(file).tensors}


def of_run(config: TrainConfig) -> Path:
    assert isinstance(config.output_dir, Path)
    return config.output_dir


@pytest.mark.parametrize("dtype", ["auto", "q8_0"])
def test_a_gguf_model(stacked: TrainConfig, tmp_path: Path, dtype: str) -> None:
    """transformers reads it back by its own code; its log-probs are those of base and both adapters."""
    summary = export(of_run(stacked), "gguf", tmp_path / "m.gguf", stacked, dtype=dtype)
    assert summary.check is not None
    assert summary.check.pairs == 4
    assert summary.check.mean_diff < (1e-5 if dtype == "auto" else 0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == ("F32" if dtype == "auto" else "Q8_0")
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_a_gguf_adapter_does_to_the_base_what_merging_does(
    stacked: TrainConfig, tmp_path: Path, tiny_model: Path
) -> None:
    """In llama.cpp's own order of rows: base + b @ a is the merged model's file, tensor by tensor."""
    summary = export(of_run(stacked), "gguf-adapter", tmp_path / "a.gguf", stacked)
    assert summary.rank == 4 + 6  # side by side where both adapters are
    assert summary.check is not None
    assert summary.check.mean_diff < 1e-5
    export(of_run(stacked), "gguf", tmp_path / "m.gguf", stacked, check_pairs=0)
    base = write_base(tmp_path, tiny_model)
    found = tensors(tmp_path / "a.gguf")
    merged = tensors(tmp_path / "m.gguf")
    changed = 0
    for name, weight in tensors(base).items():
        if f"{name}.lora_a" in found:
            changed += 1
            weight = weight + found[f"{name}.lora_b"] @ found[f"{name}.lora_a"]
            assert np.abs(merged[name] - tensors(base)[name]).max() > 1e-3
        np.testing.assert_allclose(merged[name], weight, atol=1e-5)
    assert changed == 14


def write_base(folder: Path, model: Path) -> Path:
    from dpoeng.engine.models.gguf_files.write import write_gguf
    from dpoeng.engine.models.sources import find_model
    from dpoeng.engine.runtime.progress import QUIET

    write_gguf(
        folder / "base.gguf", find_model(str(model)), architecture_of(model), name="base", kind="f32", progress=QUIET
    )
    return folder / "base.gguf"


def test_an_adapter_for_vllm(stacked: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As vLLM reads it: one rank and one scale for all, A and B of plain names; one adapter in place of two."""
    words = ["export", str(of_run(stacked)), "--to", "vllm", "--into", str(tmp_path / "v")]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"--enable-lora --max-lora-rank 16 --lora-modules dpo={tmp_path / 'v'}" in said
    assert "nats per token from the trained policy, on 4 pairs" in said
    fields = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (10, 10)
    assert not {"rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save"} & set(fields)
    found = load_file(tmp_path / "v" / "adapter_model.safetensors")
    assert len(found) == 2 * 14
    for name, tensor in found.items():
        assert name.startswith("base_model.model.model.layers."), name
        assert tensor.shape[0 if name.endswith("lora_A.weight") else 1] == 10


def test_merged_is_compared_too(stacked: TrainConfig, tmp_path: Path) -> None:
    summary = export(of_run(stacked), "merged", tmp_path / "m", stacked)
    assert summary.check is not None
    assert summary.check.mean_diff < 1e-5
    assert (tmp_path / "m" / "tokenizer.json").is_file()


def test_the_python_function_does_what_the_command_does(
    stacked: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = dpoeng.export(stacked.output_dir, tmp_path / "one.gguf", to="gguf-adapter", check_pairs=2)
    assert written.check is not None
    assert (written.path, written.check.pairs) == (tmp_path / "one.gguf", 2)
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        main(["export", str(stacked.output_dir), "--to", "gguf-adapter", "--into", str(tmp_path / "two.gguf")])
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    with pytest.raises(UserError, match="beta"):
        dpoeng.export(stacked.output_dir, tmp_path / "three.gguf", to="gguf", beta=0.3)  # type: ignore[call-arg]


@pytest.mark.parametrize("target", ["merged", "gguf", "gguf-adapter", "vllm"])
def test_what_differs_is_not_kept(
    stacked: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any
) -> None:
    """Every way of writing, with one matrix wrong."""
    whole = {"merge": recipe.merge, "one_lora": recipe.one_lora}

    def wrong_merge(base: Any, adapters: Any, *args: Any, **kwargs: Any) -> Any:
        return whole["merge"](base, adapters[:1], *args, **kwargs)  # without the trained adapter

    def wrong_lora(*args: Any) -> Any:
        return {name: (a, -b) for name, (a, b) in whole["one_lora"](*args).items()}

    monkeypatch.setattr(recipe, "merge", wrong_merge)
    monkeypatch.setattr(recipe, "one_lora", wrong_lora)
    with pytest.raises(UserError, match="log-probs differ from the trained policy's") as caught:
        export(of_run(stacked), target, tmp_path / "x", stacked)
    assert caught.value.code == "export-differs"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [("use_dora", True, "DoRA"), ("modules_to_save", ["lm_head"], "whole modules"), ("bias", "all", "biases"),
     ("layer_replication", [[0, 2], [0, 2]], "repeated layers")],
)  # fmt: skip
@pytest.mark.parametrize("target", ["vllm", "gguf-adapter"])
def test_what_a_runtime_does_not_load_is_named(
    stacked: TrainConfig, tmp_path: Path, field: str, value: Any, word: str, target: Any
) -> None:
    file = of_run(stacked) / "adapter" / "adapter_config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), field: value}))
    try:
        with pytest.raises(UserError, match=word) as caught:
            export(of_run(stacked), target, tmp_path / "x", stacked)
    finally:
        file.write_text(before)
    assert caught.value.code == "export-adapter"
    assert "--to merged" in caught.value.remedy


def test_ranks_that_vllm_takes() -> None:
    assert [max_lora_rank(rank) for rank in (1, 8, 9, 64, 65, 300, 512)] == [8, 8, 16, 64, 128, 320, 512]
    with pytest.raises(UserError, match="rank 513"):
        max_lora_rank(513)


def test_a_run_of_all_weights(tmp_path: Path, tiny_model: Path) -> None:
    """Its checkpoint becomes GGUF as it is; the other targets need nothing written, and say so."""
    config = trained(tmp_path, tiny_model, None, use_peft=False)
    summary = export(tmp_path / "out", "gguf", tmp_path / "m.gguf", config)
    assert summary.check is not None
    assert summary.check.mean_diff < 1e-5
    for target in ("merged", "gguf-adapter", "vllm"):
        with pytest.raises(UserError) as caught:
            export(tmp_path / "out", target, tmp_path / "x", config)  # type: ignore[arg-type]
        assert caught.value.code == "full-finetuning"


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "tied"])
def test_other_architectures(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    """Biases and rows in the model's own order (Qwen2), norms of heads (Qwen3), a tied head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from dpoeng.engine.models.gguf import load_gguf_model

    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 0,
        "tie_word_embeddings": kind == "tied",
    }  # fmt: skip
    if kind == "qwen3":
        sizes["head_dim"] = 128
    if kind == "mistral":
        sizes["sliding_window"] = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama" if kind == "tied" else kind, **sizes)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    again = load_gguf_model(write_base(tmp_path, tmp_path / "m"), torch.float32)
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"mlp_bias": True}, "True"),
    ],
)
def test_what_is_left_to_llama_cpp(tmp_path: Path, tiny_model: Path, changed: dict[str, Any], word: str) -> None:
    fields = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, **changed}))
    with pytest.raises(UserError, match="convert_hf_to_gguf") as caught:
        architecture_of(tmp_path)
    assert word in str(caught.value.found)


def test_splitters() -> None:
    """By the pre-tokenizers of the models' own files."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    pattern += r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    digits = {"type": "Digits", "individual_digits": True}
    plain = {**level, "use_regex": True}
    for steps, name in (
        ([split, level], "qwen2"),
        ([{**split, "pattern": {"Regex": pattern.replace(r"\p{N}|", r"\p{N}{1,3}|")}}, level], "llama-bpe"),
        ([digits, plain], "smollm"),
        ([plain], "gpt-2"),
        ([{**split, "pattern": {"Regex": r"\d+"}}, level], None),
        ([{**digits, "individual_digits": False}, plain], None),
        ([{"type": "Metaspace"}], None),
    ):
        kinds = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
        assert _splitter({"pre_tokenizer": kinds}) == name

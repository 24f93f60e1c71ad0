"""A mixture of experts through both phases, evaluation and merge, with its experts in 4 and 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpoeng.bench.studies.tiny_models import save_tiny
from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.recipes.evaluate import evaluate_trained, find_trained
from dpoeng.engine.recipes.merge import merge_run
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.quantize import quantize
from dpoeng.engine.recipes.train import train


def run(work: Path, quantization: str, on_metrics: Any = None, **settings: Any) -> Any:
    """Both phases on four pairs; the adapter is on attention and on the experts."""
    rows = [
        {"prompt": f"How do tides work, {i}?", "chosen": f" The moon pulls, {i}.", "rejected": " No idea" * (1 + i % 3)}
        for i in range(4)
    ]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first = {"pairs": [work / "pairs.jsonl"], "model": str(work / "model"), "cache": work / "cache", "device": "cpu"}
    precompute_reference(PrecomputeConfig.model_validate(first | {"quantization": quantization, "dtype": "float32"}))
    second = {
        "cache": work / "cache",
        "output_dir": work / "run",
        "device": "cpu",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "eval_share": 0.0,
        "learning_rate": 1e-2,
    }
    return train(TrainConfig.model_validate(second | settings), on_metrics=on_metrics)


@pytest.mark.parametrize(
    ("model_type", "quantization"),
    [
        ("qwen3_moe", "4bit"),
        *(
            pytest.param(t, q, marks=pytest.mark.slow)
            for t, q in (("gpt_oss", "4bit"), ("qwen3_5_moe_text", "8bit"), ("mixtral", "8bit"))
        ),
    ],
)
def test_both_phases_agree_to_the_bit_over_quantized_experts(
    model_type: str, quantization: str, tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path / "model")
    summary = run(tmp_path, quantization, lora_target_parameters=("gate_up_proj", "down_proj"))
    assert summary.parity.max_diff == 0.0
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(adapter["target_parameters"]) == ["down_proj", "gate_up_proj"]
    seen = evaluate_trained(
        find_trained(tmp_path / "run"),
        TrainConfig.model_validate({"cache": tmp_path / "cache", "device": "cpu"}),
        "all",
    )
    assert seen.parity.max_diff == 0.0
    merge_run(tmp_path / "run", tmp_path / "merged")
    _is_base_and_adapter(tmp_path)


def test_a_run_with_lora_on_experts_continues_as_if_never_interrupted(tmp_path: Path) -> None:
    """Interrupted after its first step, over experts in 4 bits, with their balancing loss: the same adapter, byte for
    byte."""
    save_tiny("qwen3_moe", tmp_path / "model")
    settings = {"lora_target_parameters": ("gate_up_proj", "down_proj"), "router_aux_loss_coef": 0.1, "max_steps": 3}
    adapters = []
    for name in ("whole", "interrupted"):
        output = {"output_dir": tmp_path / name, "save_steps": 1}
        if name == "interrupted":
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, "4bit", on_metrics=_interrupt, **settings, **output)
            assert not (tmp_path / name / "adapter").exists()
        run(tmp_path, "4bit", **settings, **output)
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def _interrupt(line: Any) -> None:
    if line.get("step") == 2:
        raise KeyboardInterrupt


@torch.no_grad()
def _is_base_and_adapter(work: Path) -> None:
    """What was merged answers as plain transformers and peft do with the full-precision base and the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(2, 42)[None]
    merged = AutoModelForCausalLM.from_pretrained(work / "merged", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).eval()
    plain = base(input_ids=ids).logits
    policy = PeftModel.from_pretrained(base, str(work / "run" / "adapter")).eval()
    expected, found = policy(input_ids=ids).logits, merged(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_quantized_experts_are_not_written(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path / "model")
    with pytest.raises(UserError, match="quantised experts cannot be written"):
        quantize(find_model(str(tmp_path / "model")), tmp_path / "small", quantization="4bit")
    assert not (tmp_path / "small").exists()


def test_layers_left_in_the_files_give_the_same_bits(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path / "model")
    config = {"model": str(tmp_path / "model"), "cache": tmp_path / "cache", "device": "cpu", "quantization": "4bit"}
    run(tmp_path, "4bit")
    first = {"pairs": [tmp_path / "pairs.jsonl"], "dtype": "float32", "layer_offloading": "on"}
    again = precompute_reference(PrecomputeConfig.model_validate(config | first | {"cache": tmp_path / "other"}))
    views = [View.open(tmp_path / "cache"), View.open(tmp_path / "other", again.view)]
    for row in range(4):
        one, other = (view[row] for view in views)
        assert one.chosen_logps.tolist() == other.chosen_logps.tolist()

"""A base that others quantised through both phases, evaluation and merge: the numbers of its widened weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stored_checkpoints import write_mxfp4, write_stored

from dpoeng.bench.studies.tiny_models import save_tiny, tiny_config, tiny_model, tiny_tokenizer
from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.config.plan import PlanConfig
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.recipes.evaluate import evaluate_trained, find_trained
from dpoeng.engine.recipes.merge import merge_run
from dpoeng.engine.recipes.plan import make_plan
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.quantize import quantize
from dpoeng.engine.recipes.train import train


def make(work: Path, name: str, model_type: str) -> None:
    if name == "mxfp4":
        config = tiny_config(model_type)
        config.hidden_size = config.intermediate_size = 64
        tiny_model(config).save_pretrained(work / "plain")
        tiny_tokenizer().save_pretrained(work / "plain")
        write_mxfp4(work / "plain", work / "stored")
    else:
        save_tiny(model_type, work / "plain")
        write_stored(work / "plain", work / "stored", name)


def precompute(work: Path, model: str, **settings: Any) -> View:
    rows = [
        {"prompt": f"How do tides work, {i}?", "chosen": f" The moon pulls, {i}.", "rejected": " No idea" * (1 + i % 3)}
        for i in range(4)
    ]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first = {"pairs": [work / "pairs.jsonl"], "model": str(work / model), "cache": work / f"cache-{model}"}
    precompute_reference(PrecomputeConfig.model_validate(first | {"device": "cpu", "dtype": "float32"} | settings))
    return View.open(work / f"cache-{model}")


def settings(work: Path, **more: Any) -> TrainConfig:
    fields = {
        "cache": work / "cache-stored",
        "output_dir": work / "run",
        "device": "cpu",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "eval_share": 0.0,
        "learning_rate": 1e-2,
    }
    return TrainConfig.model_validate(fields | more)


STACKS = {"lora_target_parameters": ("gate_up_proj", "down_proj")}


@pytest.mark.parametrize(
    ("name", "model_type", "more"),
    [
        ("gptq, any order", "qwen3", {}),
        ("mxfp4", "gpt_oss", STACKS),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("fp8 blocks", "deepseek_v3", STACKS),
                ("fp8 tensor", "llama", {}),
                ("awq", "qwen3_moe", STACKS),
                ("pack-quantized, zero points", "mixtral", {}),
                ("nvfp4", "qwen3", {}),
            )
        ),
    ],
)
def test_both_phases_over_stored_codes(name: str, model_type: str, more: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path, name, model_type)
    stored, plain = precompute(tmp_path, "stored"), precompute(tmp_path, "plain")
    assert stored.meta["reference"]["quantization"] == "stored"
    assert stored.spec.digest != plain.spec.digest
    for i in range(len(plain)):
        np.testing.assert_allclose(stored[i].chosen_logps, plain[i].chosen_logps, atol=2e-5)
        np.testing.assert_allclose(stored[i].rejected_logps, plain[i].rejected_logps, atol=2e-5)
    summary = train(settings(tmp_path, **more))
    assert summary.steps == 2
    assert summary.parity is not None
    assert summary.parity.max_diff == 0.0
    held = TrainConfig.model_validate({"cache": tmp_path / "cache-stored", "device": "cpu"})
    assert evaluate_trained(find_trained(tmp_path / "run"), held, "all").parity.max_diff == 0.0
    merge_run(tmp_path / "run", tmp_path / "merged", dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    _is_plain_base_and_adapter(tmp_path)


@torch.no_grad()
def _is_plain_base_and_adapter(work: Path) -> None:
    """What was merged answers as transformers and peft do with the plain base and the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(2, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(work / "plain", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, work / "run" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(work / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=2e-4, rtol=1e-4)


def test_impossible_codes_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "awq", "qwen3")
    with pytest.raises(UserError) as caught:
        precompute(tmp_path, "stored", layer_offloading="on")
    assert caught.value.code == "quantization-stored"
    with pytest.raises(UserError) as caught:
        precompute(tmp_path, "stored", quantization="4bit")
    assert caught.value.code == "quantization-stored"
    with pytest.raises(UserError) as caught:
        quantize(find_model(str(tmp_path / "stored")), tmp_path / "q", quantization="4bit")
    assert caught.value.code == "quantization-stored"
    precompute(tmp_path, "stored")
    with pytest.raises(UserError) as caught:
        train(settings(tmp_path, use_peft=False))
    assert (caught.value.code, "full-precision" in str(caught.value.remedy)) == ("full-finetuning", True)
    with pytest.raises(UserError) as caught:
        train(settings(tmp_path, use_dora=True))
    assert caught.value.code == "adapter-mode"


def test_a_trunk_over_stored_codes(tmp_path: Path) -> None:
    make(tmp_path, "gptq", "qwen3")
    precompute(tmp_path, "stored", trunk_layer=1)
    summary = train(settings(tmp_path, layers_to_transform=(1,)))
    assert summary.parity is not None
    assert summary.parity.max_diff < 1e-6


def test_plan_takes_the_files_as_they_are(tmp_path: Path) -> None:
    make(tmp_path, "fp8 blocks", "qwen3")
    asked = {"gpu": ("24gb",), "max_length": 64, "compare": False}
    plans = {name: make_plan(PlanConfig(model=str(tmp_path / name), **asked)) for name in ("stored", "plain")}
    assert plans["stored"].request.quantization == "stored"
    assert plans["plain"].request.quantization == "8bit"
    with pytest.raises(UserError) as caught:
        make_plan(PlanConfig(model=str(tmp_path / "stored"), quantization="4bit", **asked))
    assert caught.value.code == "quantization-stored"

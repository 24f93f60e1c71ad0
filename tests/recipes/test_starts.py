"""Runs that would start wrong, or end without a result, are found before step one; odd starts go all the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.bench.studies.tiny_models import save_tiny, tiny_tokenizer
from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.models import model as models
from dpoeng.engine.recipes.evaluate import evaluate_trained, find_trained
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train


def cache_of(folder: Path, model: Path, adapter: Path | None = None, pairs: int = 6) -> Path:
    file = write_jsonl(folder / "pairs.jsonl", pair_rows(pairs))
    precompute_reference(
        PrecomputeConfig(
            pairs=(file,), model=str(model), adapter=str(adapter) if adapter else None, cache=folder / "cache"
        )
    )
    return folder / "cache"


def settings(folder: Path, **fields: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "cache": folder / "cache",
            "output_dir": folder / "out",
            "max_steps": 1,
            "eval_share": 0.0,
            "gradient_checkpointing": True,
            **fields,
        }
    )


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("opt", tmp_path_factory.mktemp("opt") / "model")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_first_loss_of_a_model_with_dropout_is_ln_2(opt: Path, tmp_path: Path) -> None:
    cache_of(tmp_path, opt)
    assert json.loads((opt / "config.json").read_text())["dropout"] == 0.1
    assert train(settings(tmp_path)).first["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_model_that_computes_otherwise_in_training_stops_at_step_one(
    opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was: layers told that they are trained, which switches the base's dropout on."""
    cache_of(tmp_path, opt)
    real = models.set_mode

    def set_mode(lm: Any, *, training: bool) -> None:
        real(lm, training=training)
        for layer in models.decoder_layers(lm.backbone):
            layer.training = training

    monkeypatch.setattr("dpoeng.engine.recipes.policy.set_mode", set_mode)
    with pytest.raises(UserError, match="first training forward") as caught:
        train(settings(tmp_path))
    assert caught.value.code == "parity-failed"
    assert not (tmp_path / "out" / "adapter").exists()


def test_dropout_of_the_adapter_itself_is_not_an_error(tiny_model: Path, tmp_path: Path) -> None:
    cache_of(tmp_path, tiny_model)
    train(settings(tmp_path, lora_dropout=0.5))


def sft(model: Path, folder: Path, **lora: Any) -> Path:
    """An adapter as an SFT run leaves it, made and saved by plain peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(
        base, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **lora})
    )
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}])
def test_a_start_that_changes_the_base_continues_and_is_evaluated(
    tiny_model: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    """The reference and the policy each take the start out of their own base."""
    adapter = sft(tiny_model, tmp_path / "sft", **lora)
    cache_of(tmp_path, tiny_model, adapter)
    summary = train(settings(tmp_path, adapter_mode="continue", learning_rate=1e-2, max_steps=3))
    assert summary.first["loss"] == pytest.approx(0.693147, abs=1e-4)
    found = evaluate_trained(find_trained(tmp_path / "out"), TrainConfig(cache=tmp_path / "cache"), "all")
    assert found.parity.mean_diff < 1e-4
    assert found.evaluation.metrics["loss"] < 0.6931


def test_an_unsavable_adapter_is_found_before_the_first_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = sft(tiny_model, tmp_path / "sft", trainable_token_indices=[3, 4])
    cache_of(tmp_path, tiny_model, adapter)

    def steps(*_: Any) -> None:
        raise AssertionError("a step was done")

    monkeypatch.setattr("dpoeng.engine.recipes.phase_two.tracked.run_steps", steps)
    with pytest.raises(UserError) as caught:
        train(settings(tmp_path, adapter_mode="stack"))
    assert caught.value.code == "adapter-unsavable"


def test_texts_beyond_the_table_of_positions_are_refused(opt: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Name a colour. " * 20, "chosen": " Red", "rejected": " Seven"}]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(UserError, match="more tokens than this model has positions") as caught:
        precompute_reference(PrecomputeConfig(pairs=(file,), model=str(opt), cache=tmp_path / "cache"))
    assert "--max-length 256" in str(caught.value.remedy)

"""TRL 1.16 trained on a cached reference, against TRL on one that it computed itself. Run by `make test-peers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.recipes.elsewhere.reference_files import export_for
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.trl import with_cached_reference

pytestmark = [pytest.mark.peers]

ROWS = 12


def scored(folder: Path, model: Path, adapter: Path | None, **fields: Any) -> Path:
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(ROWS))
    config = {"pairs": (pairs,), "model": str(model), "adapter": adapter and str(adapter), "cache": folder / "cache"}
    precompute_reference(PrecomputeConfig(**{**config, **fields}))
    return folder / "cache"


def trainer(folder: Path, model: Path, adapter: Path | None, **settings: Any) -> Any:
    """TRL's, as its users make it: text in, nothing replaced. Without an adapter it trains all weights."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        policy = PeftModel.from_pretrained(policy, adapter, is_trainable=True)
    rows = Dataset.from_list(
        [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pair_rows(ROWS)]
    )
    config = DPOConfig(output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to=[], save_strategy="no",
                       gradient_checkpointing=False, disable_tqdm=True, logging_steps=1, max_steps=6, seed=0,
                       learning_rate=1e-3, per_device_train_batch_size=3, eval_strategy="steps", eval_steps=3,
                       **settings)  # fmt: skip
    return DPOTrainer(model=policy, args=config, train_dataset=rows, eval_dataset=rows.select(range(4)),
                      processing_class=AutoTokenizer.from_pretrained(model))  # fmt: skip


def curve(run: Any) -> list[float]:
    """Losses and margins of every step, and of the evaluations; all below 1."""
    run.train()
    lines = run.state.log_history
    names = ("loss", "rewards/margins", "eval_loss", "eval_rewards/margins")
    return [float(line[name]) for line in lines for name in names if name in line]


@pytest.mark.parametrize(
    ("with_adapter", "settings", "fields"),
    [
        (True, {}, {}),  # the reference is base + SFT adapter: TRL keeps a copy of it
        (False, {}, {}),  # all weights: TRL loads a second model
        (True, {"ld_alpha": 0.3}, {}),
        (True, {"max_length": 55}, {"max_length": 55}),  # some responses are cut
    ],
    ids=["adapter", "all weights", "ld_alpha", "truncated"],
)
def test_a_run_from_the_cache_is_that_of_its_own_values(
    tmp_path: Path, tiny_model: Path, sft_adapter: Path, with_adapter: bool, settings: Any, fields: Any
) -> None:
    adapter = sft_adapter if with_adapter else None
    cache = scored(tmp_path, tiny_model, adapter, **fields)
    own = curve(trainer(tmp_path, tiny_model, adapter, precompute_ref_log_probs=True, **settings))
    cached = trainer(tmp_path, tiny_model, adapter, **settings)
    if settings.get("max_length"):
        lengths = [len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in cached.train_dataset]
        assert min(lengths) < 55 < max(lengths)
    found = curve(with_cached_reference(cached, cache))
    assert len(found) == len(own) == 6 * 2 + 2 * 2
    assert max(abs(a - b) for a, b in zip(found, own, strict=True)) < 1e-5
    assert abs(own[0] - own[-2]) > 1e-3  # it trains


def test_the_exported_file_gives_the_same_run(tmp_path: Path, tiny_model: Path, sft_adapter: Path) -> None:
    """The two lines that the command prints."""
    from datasets import Dataset

    cache = scored(tmp_path, tiny_model, sft_adapter)
    export_for("trl", View.open(cache), tmp_path / "trl.parquet")
    own = curve(trainer(tmp_path, tiny_model, sft_adapter, precompute_ref_log_probs=True, max_length=None))
    run = trainer(tmp_path, tiny_model, sft_adapter, max_length=None)
    run.eval_dataset = None
    run.args.eval_strategy = "no"
    run.train_dataset = Dataset.from_parquet(str(tmp_path / "trl.parquet"), cache_dir=str(tmp_path / "hf"))
    run.precompute_ref_logps = True
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert losses == pytest.approx([own[0], own[2], own[4], *losses[3:]], abs=1e-5)


def test_trl_computes_other_numbers_for_another_model(tmp_path: Path, tiny_model: Path, sft_adapter: Path) -> None:
    cache = scored(tmp_path, tiny_model, sft_adapter)
    with pytest.raises(UserError, match="differs from the cache"):
        with_cached_reference(trainer(tmp_path, tiny_model, None), cache)


@pytest.mark.parametrize("fields", [{"append_eos": False}, {"max_length": 40}], ids=["no end token", "shorter"])
def test_other_tokens_are_refused(tmp_path: Path, tiny_model: Path, fields: Any) -> None:
    cache = scored(tmp_path, tiny_model, None, **fields)
    with pytest.raises(UserError) as caught:
        with_cached_reference(trainer(tmp_path, tiny_model, None), cache)
    assert caught.value.code == "reference-tokens"
    assert "has this prompt and another" in str(caught.value)


def test_trl_takes_no_columns_of_a_data_set(tmp_path: Path, tiny_model: Path) -> None:
    """Why there is a function: TRL 1.16 ignores such columns, or computes them again and stops."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list([{"prompt": f"Q{i}:", "chosen": " yes", "rejected": " no", "ref_chosen_logps": -7.0,
                               "ref_rejected_logps": -700.0} for i in range(4)])  # fmt: skip

    def made(**settings: Any) -> Any:
        config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1,
                           save_strategy="no", logging_steps=1, disable_tqdm=True, **settings)  # fmt: skip
        policy = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        return DPOTrainer(model=policy, args=config, train_dataset=rows,
                          processing_class=AutoTokenizer.from_pretrained(tiny_model))  # fmt: skip

    ignored = made()
    ignored.train()
    assert ignored.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # not that of a margin of -693
    with pytest.raises(ValueError, match="duplicate"):
        made(precompute_ref_log_probs=True)

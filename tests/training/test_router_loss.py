"""The balancing loss of a mixture of experts: that of transformers, its gradient, and where it cannot be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpoeng.bench.studies.tiny_models import save_tiny, tiny_config, tiny_model
from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.models.experts.balance import balance_of, trains_routers
from dpoeng.engine.models.model import CausalLM, enable_gradient_checkpointing
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.forward import predict_groups
from dpoeng.engine.scoring.layout import Branch, PromptGroup

COEFFICIENT = 0.5


def tiny(model_type: str, layout: Any) -> CausalLM:
    model = tiny_model(tiny_config(model_type))
    device = torch.device("cpu")
    lm = CausalLM(model, model, None, device, torch.float32, "none", model.config._attn_implementation)
    use_layout(lm, layout)
    return lm


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_loss_and_its_gradient_are_those_of_transformers(model_type: str, checkpointing: bool) -> None:
    """Texts of two lengths, padded: transformers leaves the padding out, and so does what is added here."""
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 320, (length,), generator=random).numpy() for length in (9, 14)]
    results = []
    for own in (True, False):
        lm = tiny(model_type, "separate")
        if own:
            if checkpointing:
                enable_gradient_checkpointing(lm)
            balance = balance_of(lm, COEFFICIENT)
            assert balance is not None
            with balance.watching() as seen:
                predict_groups(lm, [PromptGroup(text[:2], (Branch(text[2:]),)) for text in texts])
            loss = COEFFICIENT * seen.loss()
        else:
            ids, mask = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.long)
            for row, text in enumerate(texts):
                ids[row, : len(text)], mask[row, : len(text)] = torch.from_numpy(text), 1
            out = lm.base(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
            loss = COEFFICIENT * out.aux_loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in lm.base.named_parameters() if p.grad is not None}))
    (ours, gradients), (theirs, plain) = results
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert gradients.keys() == plain.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-4, msg=name)


def run(work: Path, **settings: Any) -> tuple[Any, list[dict[str, Any]]]:
    rows = [
        {"prompt": f"Tides, {i}?", "chosen": f" The moon, {i}.", "rejected": " No idea" * (1 + i)} for i in range(4)
    ]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first = {"pairs": [work / "pairs.jsonl"], "model": str(work / "model"), "cache": work / "cache", "device": "cpu"}
    precompute_reference(PrecomputeConfig.model_validate(first | {"dtype": "float32"}))
    fields = {
        "cache": work / "cache",
        "output_dir": work / "run",
        "device": "cpu",
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "eval_share": 0.0,
        "logging_steps": 1,
    }
    summary = train(TrainConfig.model_validate(fields | settings))
    lines = (work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return summary, [json.loads(line) for line in lines]


def test_a_run_adds_it_and_tells_it(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path / "model")
    _, lines = run(tmp_path, router_aux_loss_coef=1.0)
    with_it = [line for line in lines if "loss" in line]
    assert all(line["aux_loss"] >= 1.0 for line in with_it)  # 1 where all experts get as many tokens
    _, lines = run(tmp_path, resume=False)
    without = [line for line in lines if "loss" in line]
    assert "aux_loss" not in without[0]
    assert with_it[0]["loss"] == without[0]["loss"]
    assert with_it[0]["grad_norm"] != without[0]["grad_norm"]


def test_what_has_no_such_loss_is_refused(tmp_path: Path) -> None:
    for lm, more in ((tiny("llama", "separate"), {}), (tiny("qwen3_moe", "separate"), {"whole_batch": True})):
        with pytest.raises(UserError) as caught:
            balance_of(lm, 0.1, **more)
        assert caught.value.code == "config-value"
    lm = tiny("qwen3_moe", "separate")
    assert balance_of(lm, 0.0) is None
    assert trains_routers(lm)
    lm.base.requires_grad_(False)
    assert not trains_routers(lm)
    with pytest.raises(ValueError, match="layer_offloading"):
        TrainConfig(cache="x", router_aux_loss_coef=0.1, layer_offloading="on")

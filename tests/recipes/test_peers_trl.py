"""dpoeng against TRL 1.16 on the same token ids: reference log-probs, and the first ten steps of training.

Not in the default suite: `make test-peers` installs TRL beside dpoeng in a separate environment and runs this file.
The model is SmolLM2-135M-Instruct and the pairs are the demo's, or what PEER_MODEL and PEER_PAIRS name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.training.order import plan_schedule

pytestmark = [pytest.mark.peers, pytest.mark.timeout(3600)]

PAIRS = 64
SPARE = 2  # real data have a row now and then that cannot be used
STEPS = 10
BATCH = 4


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Path:
    named = os.environ.get("PEER_MODEL")
    return Path(named) if named else request.getfixturevalue("demo_model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def first_adapter(folder: Path, model: Path) -> Path:
    """A LoRA at its start, B = 0: for both programs the same first policy, equal to the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def view(folder: Path, model: Path, first_adapter: Path) -> View:
    from importlib.resources import files

    named = os.environ.get("PEER_PAIRS")
    source = Path(named) if named else Path(str(files("dpoeng.cli") / "demo_pairs.jsonl"))
    lines = source.read_text(encoding="utf-8").splitlines()[: PAIRS + SPARE]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    precompute_reference(
        PrecomputeConfig(
            pairs=(folder / "pairs.jsonl",),
            model=str(model),
            adapter=str(first_adapter),
            cache=folder / "cache",
            max_length=512,
        )
    )
    opened = View.open(folder / "cache")
    assert len(opened) >= PAIRS
    return opened


def dataset(view: View) -> Any:
    """The cache's own token ids, as the columns into which TRL tokenises."""
    from datasets import Dataset

    columns: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for i in range(len(view)):
        ids = view[i].ids
        assert ids.chosen_start == ids.rejected_start == 0  # TRL has no unscored response tokens
        columns["prompt_ids"].append(ids.prompt_ids.tolist())
        columns["chosen_ids"].append(ids.chosen_ids.tolist())
        columns["rejected_ids"].append(ids.rejected_ids.tolist())
    return Dataset.from_dict(columns)


def trl_trainer(folder: Path, model: Path, adapter: Path | None, rows: Any, order: list[int], **settings: Any) -> Any:
    """TRL's trainer of an adapter, or without one of all weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class SameIds(DPOTrainer):  # type: ignore[misc]
        """Takes token ids as they are and in the given order."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return order

    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        policy = PeftModel.from_pretrained(policy, adapter, is_trainable=True)
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        beta=0.1,
        loss_type="sigmoid",
        max_length=512,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        **settings,
    )
    return SameIds(model=policy, args=config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(model))


def test_sums_equal_a_plain_forward_in_float64(view: View, model: Path) -> None:
    """Prompt + response, full logits, float64 log-softmax: within 1e-3 nats."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    largest = 0.0
    for i in range(len(view)):
        pair = view[i]
        for response, found in ((pair.ids.chosen_ids, pair.chosen_sum), (pair.ids.rejected_ids, pair.rejected_sum)):
            tokens = torch.from_numpy(np.concatenate([pair.ids.prompt_ids, response]).astype(np.int64))
            with torch.inference_mode():
                logps = lm(tokens[None]).logits[0].double().log_softmax(-1)
            begin = len(pair.ids.prompt_ids)
            truth = float(logps[begin - 1 : -1].gather(1, tokens[begin:, None]).sum())
            largest = max(largest, abs(found - truth))
    print(f"largest difference of {2 * len(view)} sums to a plain float64 log-softmax: {largest:.2e} nats")
    assert largest < 1e-3


def test_sums_equal_trl_precomputed(folder: Path, view: View, model: Path, first_adapter: Path) -> None:
    order = list(range(len(view)))
    rows = trl_trainer(folder, model, first_adapter, dataset(view), order, precompute_ref_log_probs=True).train_dataset
    differences = [
        abs(ours - theirs)
        for i in range(len(view))
        for ours, theirs in (
            (view[i].chosen_sum, rows[i]["ref_chosen_logps"]),
            (view[i].rejected_sum, rows[i]["ref_rejected_logps"]),
        )
    ]
    print(f"largest difference of {len(differences)} sums to TRL's: {max(differences):.2e} nats")
    assert max(differences) < 1e-3


def test_the_first_ten_steps_equal_trl(folder: Path, view: View, model: Path, first_adapter: Path) -> None:
    """Same start, order, batches and schedule: loss, margin and gradient norm agree to 1e-3 relative.

    A margin is beta times a difference of sums of hundreds of nats, of which float32 leaves some 1e-5: margins below
    0.01 are therefore compared to 1e-5.
    """
    common = {"learning_rate": 1e-4, "warmup_steps": 2, "lr_scheduler_type": "linear", "max_steps": STEPS}
    train(
        TrainConfig(
            cache=folder / "cache",
            output_dir=folder / "ours",
            eval_share=0,
            seed=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=BATCH // 2,
            **common,  # type: ignore[arg-type]
        )
    )
    schedule = plan_schedule(len(view), batch=BATCH, epochs=1, max_steps=STEPS, seed=3)
    order = [row for step in range(STEPS) for row in schedule.rows_of_step(step)]
    trainer = trl_trainer(
        folder, model, first_adapter, dataset(view), order, gradient_accumulation_steps=BATCH // 2, **common
    )
    trainer.train()
    agree(folder / "ours", trainer)


def agree(ours_in: Path, trainer: Any) -> None:
    """Loss, margin and gradient norm of each step, to 1e-3 relative."""
    theirs = [line for line in trainer.state.log_history if "grad_norm" in line]
    ours = [json.loads(line) for line in (ours_in / "metrics.jsonl").read_text().splitlines()]
    assert len(ours) == len(theirs) == STEPS
    worst = {"loss": 0.0, "rewards/margins": 0.0, "grad_norm": 0.0}
    for a, b in zip(ours, theirs, strict=True):
        print(a["step"], *(f"{name} {a[name]:.6f} / {b[name]:.6f}" for name in worst))
        for name in worst:
            scale = max(abs(b[name]), 1e-2 if name == "rewards/margins" else 0.0)
            worst[name] = max(worst[name], abs(a[name] - b[name]) / scale)
    print("largest relative differences:", worst)
    assert ours[-1]["loss"] < ours[0]["loss"]
    assert max(worst.values()) < 1e-3


def test_full_fine_tuning_equals_trl(tmp_path: Path, tiny_model: Path) -> None:
    """All weights of a tiny model, TRL with a second model as its reference: the steps, and the weights they leave."""
    from transformers import AutoModelForCausalLM

    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(16))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=tmp_path / "cache"))
    view = View.open(tmp_path / "cache")
    common: dict[str, Any] = {"learning_rate": 1e-4, "warmup_steps": 2, "lr_scheduler_type": "linear"}
    common |= {"max_steps": STEPS, "gradient_accumulation_steps": BATCH // 2}
    config = {"cache": tmp_path / "cache", "output_dir": tmp_path / "ours", "use_peft": False, "eval_share": 0}
    train(TrainConfig.model_validate({**config, **common, "per_device_train_batch_size": 2, "num_train_epochs": 3}))
    schedule = plan_schedule(len(view), batch=BATCH, epochs=3, max_steps=STEPS, seed=42)
    order = [row for step in range(STEPS) for row in schedule.rows_of_step(step)]
    trainer = trl_trainer(tmp_path, tiny_model, None, dataset(view), order, **common)
    assert trainer.ref_model is not None
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    trainer.train()
    agree(tmp_path / "ours", trainer)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "model").state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    theirs = trainer.model.state_dict()
    assert ours.keys() == theirs.keys()
    moved = sum(float((theirs[name] - start[name]).double().square().sum()) for name in start)
    apart = sum(float((theirs[name] - ours[name]).double().square().sum()) for name in start)
    print(f"weights: moved by {moved**0.5:.3e}, apart by {apart**0.5:.3e}")
    assert apart < 1e-6 * moved

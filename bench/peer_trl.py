"""TRL's side of `dpoeng bench compare`: its own DPOTrainer, with dpoeng's token ids, order and seed of the LoRA.

Import it only in a process whose Python has TRL.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from dpoeng.bench.job import (
    REFERENCE,
    TRAINING,
    Figures,
    Job,
    adapter_folder,
    lap_and_wait,
    versions,
    wait_for_turn,
)
from dpoeng.bench.measuring.measure import PeakMemory, Spent, Stopwatch, held_bytes, release_memory, touch
from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.models.adapters import linear_names, lora_arguments
from dpoeng.engine.models.model import DTYPES
from dpoeng.engine.models.quantized import quantization_config
from dpoeng.engine.training.order import plan_schedule


def run_trl(job: Job) -> Figures:
    """Runs a job with TRL in this process."""
    device = torch.device(job.device)
    view = View.open(job.cache)
    ids = [view[i].ids for i in range(len(view))]
    if any(pair.chosen_start or pair.rejected_start for pair in ids):
        raise SystemExit("these pairs have response tokens that are not scored, which TRL does not support")
    schedule = plan_schedule(len(ids), batch=job.batch_size, epochs=1, max_steps=job.steps, seed=job.seed)
    rows = _rows(ids)
    policy = _load(job)
    release_memory(device)
    meter = _Meter(job, held_bytes(device, tensors=job.tensors))
    trainer = _SameIds(
        meter=meter,
        order=[row for step in range(job.steps) for row in schedule.rows_of_step(step)],
        model=policy,
        ref_model=_load(job) if job.program == "trl second model" else None,
        args=_arguments(job),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **_lora(job, policy)),
        callbacks=[meter],
    )
    trainer.train()
    trainer.save_model(str(adapter_folder(job)))
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    meter.figures.losses = [float(line["loss"]) for line in lines]
    meter.figures.grad_norms = [float(line["grad_norm"]) for line in lines]
    return meter.figures


def _lora(job: Job, policy: Any) -> dict[str, Any]:
    """peft's arguments; if only some layers get a LoRA, with the linear layers by name, as peft requires."""
    lora = lora_arguments(TrainConfig.model_validate({"lora_r": job.lora_r}))
    if job.train_last_layers is None:
        return lora
    depth = int(policy.config.num_hidden_layers)
    chosen = list(range(depth - job.train_last_layers, depth))
    return {**lora, "target_modules": linear_names(policy), "layers_to_transform": chosen}


class _Meter(TrainerCallback):  # type: ignore[misc]
    """Times steps from end to end, with their data, and records the peak over all of them.

    `base_bytes`: memory of the process with only the policy loaded.
    """

    def __init__(self, job: Job, base_bytes: int) -> None:
        self.job, self.device = job, torch.device(job.device)
        self.figures = Figures(versions={**versions(), "trl": version("trl")})
        self._base_bytes = base_bytes

    def peak_memory(self) -> PeakMemory:
        """A fresh measurement of the peak above the loaded policy."""
        return PeakMemory(self.device, self._base_bytes, tensors=self.job.tensors)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        wait_for_turn(TRAINING, 0)
        self.memory = self.peak_memory()
        self.memory.__enter__()
        self.watch = Stopwatch(self.device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        steps = self.figures.steps
        steps.append(lap_and_wait(self.watch, TRAINING, (len(steps) + 1) * self.job.batch_size))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.memory.__exit__()
        self.figures.train_peak_bytes, self.figures.memory_method = self.memory.peak_bytes, self.memory.method


class _SameIds(DPOTrainer):  # type: ignore[misc]
    """Uses token ids unchanged and in the given order; times the reference pass without the waiting.

    The overridden methods are private ones of TRL 1.16; comparing losses with dpoeng's would show a renamed one.
    """

    def __init__(self, *, meter: _Meter, order: list[int], **arguments: Any) -> None:
        self._meter, self._order = meter, order
        self._scoring: Stopwatch | None = None  # set only during the pass over all pairs
        super().__init__(**arguments)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *_: Any) -> Any:
        return self._order

    def _precompute_ref_logps(self, dataset: Any, *arguments: Any) -> Any:
        figures = self._meter.figures
        figures.reference = Spent()
        wait_for_turn(REFERENCE, 0)
        with self._meter.peak_memory() as memory:
            self._scoring = Stopwatch(self._meter.device)
            with_logps = super()._precompute_ref_logps(dataset, *arguments)
            figures.reference.add(self._scoring.lap())
            self._scoring = None
        figures.reference_pairs, figures.reference_peak_bytes = len(dataset), memory.peak_bytes
        return with_logps

    def compute_ref_log_probs(self, *arguments: Any) -> Any:
        logps = super().compute_ref_log_probs(*arguments)
        figures = self._meter.figures
        if self._scoring is not None and figures.reference is not None:  # and not a step's own reference
            figures.reference_pairs += self._meter.job.batch_size
            figures.reference.add(lap_and_wait(self._scoring, REFERENCE, figures.reference_pairs))
        return logps


def _rows(ids: list[PairIds]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt_ids.tolist() for pair in ids],
            "chosen_ids": [pair.chosen_ids.tolist() for pair in ids],
            "rejected_ids": [pair.rejected_ids.tolist() for pair in ids],
        }
    )


def _load(job: Job) -> Any:
    """Loads a model as users of TRL do, quantised with dpoeng's settings."""
    quantized: dict[str, Any] = {}
    if job.quantization != "none":
        ours = PrecomputeConfig.model_validate({})
        quantized["quantization_config"] = quantization_config(
            job.quantization,
            DTYPES[job.dtype],
            ours.bnb_4bit_quant_type,
            ours.bnb_4bit_use_double_quant,
        )
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=DTYPES[job.dtype], device_map={"": str(torch.device(job.device))}, **quantized
    )
    touch(model)
    return model


def _arguments(job: Job) -> DPOConfig:
    return DPOConfig(
        output_dir=str(Path(job.scratch) / "trl"),
        beta=0.1,
        loss_type="sigmoid",
        max_length=job.max_length,
        precompute_ref_log_probs=job.program == "trl precomputed",
        bf16=False,
        use_cpu=torch.device(job.device).type == "cpu",
        gradient_checkpointing=False,
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=job.learning_rate,
        lr_scheduler_type=job.lr_scheduler_type,
        max_steps=job.steps,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=job.seed,
    )

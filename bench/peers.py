"""One process of `dpoeng bench compare`: one program on one job, measured; prints its figures as the last line.

    python -m dpoeng.bench.peers JOB.json

dpoeng runs through its own two phases. TRL runs through its own DPOTrainer, and is given the token ids, the order and
the seed of the LoRA, so that both compute the same losses.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from dpoeng.bench.measuring.measure import PeakMemory, Spent, Stopwatch, held_bytes, release_memory, touch
from dpoeng.engine.config.fields import Dtype, PrecomputeConfig, Quantization, TrainConfig
from dpoeng.engine.runtime.progress import Advance

Program = Literal["dpoeng reference", "dpoeng", "trl precomputed", "trl adapter off", "trl second model"]


@dataclass(frozen=True, slots=True)
class Job:
    """What every program is given.

    Attributes:
        program: which one, and how it gets the reference's numbers.
        model: a folder with safetensors.
        pairs: files of pairs.
        cache: the cache that `dpoeng reference` writes and from which all others take the token ids.
        scratch: a folder of this process's own.
        batch_size: pairs in one step; the same in the reference pass of TRL, as is its default.
        steps: optimizer steps.
        dtype: of the frozen weights; the LoRA is float32 in both programs, but for TRL's over a quantised base, which
            it makes bfloat16.
        threads: of torch.
        lr_scheduler_type: as transformers names it; without warm-up.
        quantization: of the frozen weights, the head excepted, with dpoeng's settings for both.
        max_prompt_length: most tokens of a prompt, the last ones; None for no limit of its own.
        tensors: memory is that of tensors alone, on a CPU, and the time means nothing; else that of the process.
    """

    program: Program
    model: str
    pairs: tuple[str, ...]
    cache: str
    scratch: str
    batch_size: int
    steps: int
    dtype: Dtype
    max_length: int
    lora_r: int
    learning_rate: float
    seed: int
    threads: int
    device: str
    lr_scheduler_type: str = "constant"
    quantization: Quantization = "none"
    max_prompt_length: int | None = None
    tensors: bool = False


@dataclass(slots=True)
class Figures:
    """What one process measured. Memory is the peak above the process with the policy loaded, nothing else.

    Attributes:
        steps: time of each optimizer step, data included.
        losses: of each step.
        grad_norms: of each step, before clipping.
        train_peak_bytes: over the steps.
        reference: time of the reference pass over all pairs, storing included; None if the program has none.
        reference_pairs: pairs that it scored.
    """

    steps: list[Spent] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    train_peak_bytes: int = 0
    reference: Spent | None = None
    reference_pairs: int = 0
    reference_peak_bytes: int = 0
    memory_method: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def adapter_folder(job: Job) -> Path:
    """Where the job leaves the adapter that it trained, as peft stores it."""
    return Path(job.scratch) / "out" / "adapter"


def run_job(job: Job) -> Figures:
    """Runs one job in this process."""
    torch.set_num_threads(job.threads)
    if job.program == "dpoeng reference":
        return _dpoeng_reference(job)
    if job.program == "dpoeng":
        return _dpoeng_train(job)
    return _trl(job)


REFERENCE, TRAINING = 0, 1
"""Phases, as `wait_for_turn` tells them."""

TURN = "turn"
IN_TURNS = "DPOENG_BENCH_IN_TURNS"


def wait_for_turn(phase: int, pairs: int) -> None:
    """Says how far this process is and waits for a line from its parent, where that lets processes take turns."""
    if os.environ.get(IN_TURNS):
        print(f"\n{TURN} {phase} {pairs}", flush=True)
        sys.stdin.readline()


def lap_and_wait(watch: Stopwatch, phase: int, pairs: int) -> Spent:
    """The lap that ends here; the next one begins when it is this process's turn again."""
    spent = watch.lap()
    wait_for_turn(phase, pairs)
    watch.lap()
    return spent


class _Meter:
    """A `Progress` that measures one task of the engine: memory over it, time at each advance, without the waiting."""

    def __init__(self, title: str, job: Job, phase: int, pairs_each: int = 1) -> None:
        self._title = title
        self._device = torch.device(job.device)
        self._phase, self._pairs_each = phase, pairs_each
        self.laps: list[Spent] = []
        self.memory = PeakMemory(self._device, tensors=job.tensors)

    @contextlib.contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        del total, unit
        if title != self._title:
            yield lambda amount, shown: None
            return
        wait_for_turn(self._phase, 0)
        with self.memory:
            watch = Stopwatch(self._device)
            done = 0

            def advance(amount: int, shown: str) -> None:
                nonlocal done
                del shown
                if amount:
                    done += amount * self._pairs_each
                    self.laps.append(lap_and_wait(watch, self._phase, done))

            yield advance
            self.laps.append(watch.lap())

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def total(self) -> Spent:
        total = Spent()
        for lap in self.laps:
            total.add(lap)
        return total


def _dpoeng_reference(job: Job) -> Figures:
    from dpoeng.engine.recipes.precompute import precompute_reference

    shutil.rmtree(job.cache, ignore_errors=True)  # what a stopped run left would be reused, not computed
    meter = _Meter("reference log-probs", job, REFERENCE)
    summary = precompute_reference(
        PrecomputeConfig.model_validate(
            {
                "pairs": tuple(map(Path, job.pairs)),
                "model": job.model,
                "cache": Path(job.cache),
                "name": "bench",
                "dtype": job.dtype,
                "quantization": job.quantization,
                "device": job.device,
                "max_length": job.max_length,
                "max_prompt_length": job.max_prompt_length,
            }
        ),
        meter,
    )
    return Figures(
        reference=meter.total(),
        reference_pairs=summary.computed,
        reference_peak_bytes=meter.memory.peak_bytes,
        memory_method=meter.memory.method,
        versions=_versions(),
    )


def _dpoeng_train(job: Job) -> Figures:
    from dpoeng.engine.recipes.train import train

    meter = _Meter("training", job, TRAINING, job.batch_size)
    output = adapter_folder(job).parent
    summary = train(
        TrainConfig.model_validate(
            {
                "cache": Path(job.cache),
                "output_dir": output,
                "resume": False,
                "dtype": job.dtype,
                "quantization": job.quantization,
                "device": job.device,
                "eval_share": 0,
                "parity_pairs": 1,
                "lora_r": job.lora_r,
                "learning_rate": job.learning_rate,
                "lr_scheduler_type": job.lr_scheduler_type,
                "warmup_ratio": 0,
                "max_steps": job.steps,
                "per_device_train_batch_size": job.batch_size,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": False,
                "save_steps": job.steps,
                "seed": job.seed,
            }
        ),
        meter,
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Figures(
        steps=meter.laps[: job.steps],
        losses=[line["loss"] for line in lines],
        grad_norms=[line["grad_norm"] for line in lines],
        train_peak_bytes=meter.memory.peak_bytes + 4 * summary.trainable,  # the float32 LoRA was there when it began
        memory_method=meter.memory.method,
        versions=_versions(),
    )


def _trl(job: Job) -> Figures:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from dpoeng.cache.reader import View
    from dpoeng.engine.models.adapters import lora_arguments
    from dpoeng.engine.models.model import DTYPES
    from dpoeng.engine.models.quantized import quantization_config
    from dpoeng.engine.training.order import plan_schedule

    device = torch.device(job.device)
    view = View.open(job.cache)
    ids = [view[i].ids for i in range(len(view))]
    if any(pair.chosen_start or pair.rejected_start for pair in ids):
        raise SystemExit("TRL has no response tokens that are not scored; these pairs have")
    rows = Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt_ids.tolist() for pair in ids],
            "chosen_ids": [pair.chosen_ids.tolist() for pair in ids],
            "rejected_ids": [pair.rejected_ids.tolist() for pair in ids],
        }
    )
    schedule = plan_schedule(len(ids), batch=job.batch_size, epochs=1, max_steps=job.steps, seed=job.seed)
    order = [row for step in range(job.steps) for row in schedule.rows_of_step(step)]
    figures = Figures(versions={**_versions(), "trl": version("trl")})
    held = [0]
    scoring: list[Stopwatch] = []

    class SameIds(DPOTrainer):  # type: ignore[misc]
        """Takes token ids as they are and in the given order; its reference pass is timed, without the waiting."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return order

        def _precompute_ref_logps(self, dataset: Any, *arguments: Any) -> Any:
            figures.reference = Spent()
            wait_for_turn(REFERENCE, 0)
            with PeakMemory(device, held[0], tensors=job.tensors) as memory:
                scoring.append(Stopwatch(device))
                done = super()._precompute_ref_logps(dataset, *arguments)
                figures.reference.add(scoring.pop().lap())
            figures.reference_pairs, figures.reference_peak_bytes = len(dataset), memory.peak_bytes
            return done

        def compute_ref_log_probs(self, *arguments: Any) -> Any:
            found = super().compute_ref_log_probs(*arguments)
            if scoring and figures.reference is not None:  # and not a step's own reference
                figures.reference_pairs += job.batch_size
                figures.reference.add(lap_and_wait(scoring[0], REFERENCE, figures.reference_pairs))
            return found

    class Meter(TrainerCallback):  # type: ignore[misc]
        """Times steps from end to end, the data of a step included, and takes the peak over all of them."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            wait_for_turn(TRAINING, 0)
            self.memory = PeakMemory(device, held[0], tensors=job.tensors)
            self.memory.__enter__()
            self.watch = Stopwatch(device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            figures.steps.append(lap_and_wait(self.watch, TRAINING, (len(figures.steps) + 1) * job.batch_size))

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.memory.__exit__()
            figures.train_peak_bytes, figures.memory_method = self.memory.peak_bytes, self.memory.method

    def load() -> Any:
        held: dict[str, Any] = {}
        if job.quantization != "none":
            ours = PrecomputeConfig.model_validate({})
            held["quantization_config"] = quantization_config(
                job.quantization,
                DTYPES[job.dtype],
                ours.bnb_4bit_quant_type,
                ours.bnb_4bit_use_double_quant,
            )
        model = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=DTYPES[job.dtype], device_map={"": str(device)}, **held
        )
        touch(model)
        return model

    policy = load()
    release_memory(device)
    held[0] = held_bytes(device, tensors=job.tensors)
    trainer = SameIds(
        model=policy,
        ref_model=load() if job.program == "trl second model" else None,
        args=DPOConfig(
            output_dir=str(Path(job.scratch) / "trl"),
            beta=0.1,
            loss_type="sigmoid",
            max_length=job.max_length,
            precompute_ref_log_probs=job.program == "trl precomputed",
            bf16=False,
            use_cpu=device.type == "cpu",
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
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", **lora_arguments(TrainConfig.model_validate({"lora_r": job.lora_r}))
        ),
        callbacks=[Meter()],
    )
    trainer.train()
    trainer.save_model(str(adapter_folder(job)))
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    figures.losses = [float(line["loss"]) for line in lines]
    figures.grad_norms = [float(line["grad_norm"]) for line in lines]
    return figures


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": version("transformers"), "peft": version("peft")}


def main() -> None:
    """Reads the job, runs it, prints the figures."""
    raw = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    figures = run_job(Job(**{**raw, "pairs": tuple(raw["pairs"])}))
    print("\n" + json.dumps(asdict(figures)))


if __name__ == "__main__":
    main()

"""One process of `dpoeng bench compare`: measures one program on one job and prints its figures as the last line.

    python -m dpoeng.bench.peers JOB.json

dpoeng runs its two phases. TRL runs its own DPOTrainer with dpoeng's token ids, order and seed of the LoRA, so that
both compute the same losses.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

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
from dpoeng.bench.measuring.measure import PeakMemory, Spent, Stopwatch
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.runtime.progress import Advance


def run_job(job: Job) -> Figures:
    """Runs one job in this process."""
    torch.set_num_threads(job.threads)
    if job.program == "dpoeng reference":
        return _dpoeng_reference(job)
    if job.program == "dpoeng":
        return _dpoeng_train(job)
    from dpoeng.bench.peer_trl import run_trl

    return run_trl(job)


class _Meter:
    """A `Progress` that measures one task of the engine: its memory, and each advance's time without the waiting."""

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

    shutil.rmtree(job.cache, ignore_errors=True)  # rows of a stopped run would be reused and not computed
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
                "trunk_layer": job.trunk_layer,
            }
        ),
        meter,
    )
    return Figures(
        reference=meter.total(),
        reference_pairs=summary.computed,
        reference_peak_bytes=meter.memory.peak_bytes,
        memory_method=meter.memory.method,
        versions=versions(),
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
                "train_last_layers": job.train_last_layers,
                "trunk_layer": job.trunk_layer,
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
        train_peak_bytes=meter.memory.peak_bytes + 4 * summary.trainable,  # the float32 LoRA existed before
        memory_method=meter.memory.method,
        versions=versions(),
    )


def main() -> None:
    """Reads the job, runs it, prints the figures."""
    raw = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    figures = run_job(Job(**{**raw, "pairs": tuple(raw["pairs"])}))
    print("\n" + json.dumps(asdict(figures)))


if __name__ == "__main__":
    main()

"""One job of `dpoeng bench compare`, one program's figures for it, and turns with the other program's process.

Independent of both programs.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from dpoeng.bench.measuring.measure import Spent, Stopwatch
from dpoeng.engine.config.fields import Dtype, Quantization

Program = Literal["dpoeng reference", "dpoeng", "trl precomputed", "trl adapter off", "trl second model"]


@dataclass(frozen=True, slots=True)
class Job:
    """All input of a program.

    Attributes:
        program: which program, and how it gets the reference's log-probs.
        model: a folder with safetensors.
        pairs: files of pairs.
        cache: the cache that `dpoeng reference` writes; the others take their token ids from it.
        scratch: a folder only for this process.
        batch_size: pairs per step; also in TRL's reference pass, as is its default.
        steps: optimizer steps.
        dtype: dtype of the frozen weights; the LoRA is float32 in both programs, except TRL's over a quantised base,
            which it makes bfloat16.
        threads: torch's threads.
        lr_scheduler_type: transformers' name; without warm-up.
        quantization: quantization of the frozen weights without the head, with dpoeng's settings for both.
        max_prompt_length: a longer prompt keeps only its last tokens; None for no separate limit.
        train_last_layers: only this many of the last layers get a LoRA, in both programs; None for all.
        trunk_layer: `dpoeng reference` stores this layer's input states, and `dpoeng` starts from them; 0
            for none.
        tensors: report the memory of tensors alone, on a CPU, without usable times; otherwise that of the process.
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
    train_last_layers: int | None = None
    trunk_layer: int = 0
    tensors: bool = False


@dataclass(slots=True)
class Figures:
    """Measurements of one process. Memory is the peak above the process with only the policy loaded.

    Attributes:
        steps: time of each optimizer step, with its data.
        losses: loss of each step.
        grad_norms: gradient norm of each step, before clipping.
        train_peak_bytes: peak over the steps.
        reference: time of the reference pass over all pairs, with storing; None if the program has none.
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
    """Folder of the trained adapter, in peft's format."""
    return Path(job.scratch) / "out" / "adapter"


REFERENCE, TRAINING = 0, 1
"""Phases, as `wait_for_turn` reports them."""

TURN = "turn"
IN_TURNS = "DPOENG_BENCH_IN_TURNS"


def wait_for_turn(phase: int, pairs: int) -> None:
    """Reports this process's progress and waits for a line from its parent, if that lets processes take turns."""
    if os.environ.get(IN_TURNS):
        print(f"\n{TURN} {phase} {pairs}", flush=True)
        sys.stdin.readline()


def lap_and_wait(watch: Stopwatch, phase: int, pairs: int) -> Spent:
    """Ends a lap; the next one begins at this process's next turn."""
    spent = watch.lap()
    wait_for_turn(phase, pairs)
    watch.lap()
    return spent


def versions() -> dict[str, str]:
    """Versions of the libraries that both programs use."""
    return {"torch": torch.__version__, "transformers": version("transformers"), "peft": version("peft")}

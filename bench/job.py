"""One job of `dpoeng bench compare`, what one program found at it, and taking turns with the other program's process.

Knows neither program.
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
    """Everything that a program is given.

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
        train_last_layers: only so many of the last layers get a LoRA, in both programs; None for all.
        trunk_layer: the states that enter this layer are stored by `dpoeng reference`, and begun from by `dpoeng`; 0
            for none.
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
    train_last_layers: int | None = None
    trunk_layer: int = 0
    tensors: bool = False


@dataclass(slots=True)
class Figures:
    """Measurements of one process. Memory is the peak above the process with only the policy loaded.

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
    """Folder of the trained adapter, in peft's format."""
    return Path(job.scratch) / "out" / "adapter"


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


def versions() -> dict[str, str]:
    """Versions of the libraries that both programs compute with."""
    return {"torch": torch.__version__, "transformers": version("transformers"), "peft": version("peft")}

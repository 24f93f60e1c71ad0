"""Time and memory of `dpoeng plan`, each in a separate process.

    python -m dpoeng.bench.studies.plan_time     # some minutes; appends to bench/results/plan-time-cpu.jsonl

With all options compared, for one card. CPU seconds are those of one thread, imports included; memory is the most that
was resident.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import click
import torch

from dpoeng.bench.figure_text import RESULTS
from dpoeng.bench.measuring.records import append, stamp
from dpoeng.cache.words import MIB

MODELS = (
    "Qwen/Qwen2.5-32B",
    "meta-llama/Llama-3.3-70B",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-235B-A22B",
    "openai/gpt-oss-20b",
    "openai/gpt-oss-120b",
    "google/gemma-3-27b",
    "google/gemma-4-31B",
    "google/gemma-4-E4B",
    "zai-org/GLM-4.5-Air",
    "deepseek-ai/DeepSeek-V3",
    "Qwen/Qwen3.5-9B",
    "Qwen/Qwen3.5-27B",
    "Qwen/Qwen3.5-397B-A17B",
    "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
)
SETTINGS = {"gpu": "80gb", "quantization": "4bit"}


def measure(model: str) -> dict[str, Any]:
    """One plan: its CPU seconds, seconds, and bytes."""
    options = [text for name, value in SETTINGS.items() for text in (f"--{name}", value)]
    command = [sys.executable, "-m", "dpoeng", "plan", "--model", model, *options, "--json"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"dpoeng plan --model {model} ended with exit status {os.waitstatus_to_exitcode(status)}")
    return {
        "model": model,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "seconds": seconds,
        "phase2_gib": json.loads(said)["phase2"]["peak_gib"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and appends a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS, help="names that dpoeng plan knows")
    models = parser.parse_args(arguments).models
    results = []
    for model in models:
        results.append(measure(model))
        click.echo(f"{model}: {results[-1]['cpu_s']:.1f} CPU s, {results[-1]['peak_bytes'] / MIB:,.0f} MiB")
    append({**stamp("plan-time", torch.device("cpu"), SETTINGS), "results": results}, RESULTS / "plan-time-cpu.jsonl")


if __name__ == "__main__":
    main()

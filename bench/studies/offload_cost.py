"""Measures the cost of layer offloading for a model that fits: both phases in both orders, in turn, on one thread.

    python -m dpoeng.bench.studies.offload_cost --model MODEL --pairs FILE --record bench/results/offload-cost-cpu.jsonl

Only the order of the loops differs, and the objects and adapters must have the same bytes, or there is no record.
"""

from __future__ import annotations

import contextlib
import hashlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from dpoeng.bench.measuring.records import append, stamp
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runtime.progress import Advance

WAYS = ("off", "on")
PHASES = ("reference log-probs", "training")


class _CpuSeconds:
    """CPU seconds of each piece of work, by its title."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    @contextlib.contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """See `Progress`."""
        del total, unit, done
        began = time.process_time()
        yield lambda amount, shown: None
        self.found[title] = time.process_time() - began

    def note(self, text: str) -> None:
        """See `Progress`."""


def measure(model: str, pairs: Path, folder: Path, way: str, steps: int, cache: Path | None) -> dict[str, Any]:
    """Both phases once: CPU seconds, and a hash of their output; training uses `cache`, or its own."""
    progress = _CpuSeconds()
    scored = {"pairs": (pairs,), "model": model, "cache": folder / "cache", "layer_offloading": way, "dtype": "float32"}
    precompute_reference(PrecomputeConfig.model_validate({**scored, "device": "cpu"}), progress)
    settings = {
        "cache": cache or folder / "cache",
        "output_dir": folder / "out",
        "max_steps": steps,
        "eval_share": 0.0,
        "parity_pairs": 2,
        "lora_dropout": 0.1,
        "gradient_checkpointing": True,
        "device": "cpu",
        "layer_offloading": way,
    }
    train(TrainConfig.model_validate(settings), progress)
    left = [*sorted((folder / "cache" / "objects").rglob("*.arrow")), folder / "out/adapter/adapter_model.safetensors"]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in left]
    return {"cpu_s": {phase: progress.found[phase] for phase in PHASES}, "left": digests}


def offload_cost(model: str, pairs: Path, count: int, steps: int, repeats: int) -> dict[str, Any]:
    """The record.

    Raises:
        RuntimeError: the two orders left other bytes.
    """
    settings = {"model": Path(model).name, "pairs": pairs.name, "count": count, "steps": steps, "repeats": repeats}
    record = stamp("offload-cost", torch.device("cpu"), settings)
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="dpoeng-offload-cost-") as scratch:
        some = Path(scratch, "pairs.jsonl")
        some.write_text("".join(pairs.read_text(encoding="utf-8").splitlines(True)[:count]), encoding="utf-8")
        cache = None
        for repeat in range(repeats):
            for way in WAYS if repeat % 2 == 0 else WAYS[::-1]:
                folder = Path(scratch, f"{way}-{repeat}")
                results[way].append(measure(model, some, folder, way, steps, cache))
                cache = cache or folder / "cache"
    if len({str(one["left"]) for ones in results.values() for one in ones}) > 1:
        raise RuntimeError("layer by layer the bytes are others")
    ratios = {
        phase: [on["cpu_s"][phase] / off["cpu_s"][phase] for off, on in zip(*results.values(), strict=True)]
        for phase in PHASES
    }
    return {
        **record,
        "cpu_s": {way: [one["cpu_s"] for one in ones] for way, ones in results.items()},
        "ratios": {
            phase: {"median": statistics.median(some), "low": min(some), "high": max(some)}
            for phase, some in ratios.items()
        },
    }


@click.command()
@click.option("--model", required=True)
@click.option("--pairs", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--count", default=16, show_default=True, help="Pairs that are scored.")
@click.option("--steps", default=1, show_default=True, help="Optimizer steps of 8 pairs.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--record", type=click.Path(path_type=Path))
def main(model: str, pairs: Path, count: int, steps: int, repeats: int, record: Path | None) -> None:
    """Measure and record."""
    found = offload_cost(model, pairs, count, steps, repeats)
    click.echo(found["ratios"])
    if record:
        append(found, record)


if __name__ == "__main__":
    main()

"""Runs `dpoeng plan` for four model sizes on six cards, layer by layer where needed, for docs/layer-offloading.md and
docs/small-cards.md.

    python -m dpoeng.bench.studies.small_cards      # minutes; appends to bench/results/small-cards-calculated.jsonl

Calculated, as all that plan says: nothing here is a measurement, and the file's name says so.
"""

from __future__ import annotations

from typing import Any

import click
import torch

from dpoeng.bench.figure_text import RESULTS
from dpoeng.bench.measuring.records import append, stamp
from dpoeng.engine.config.plan import PlanConfig
from dpoeng.engine.recipes.plan import as_json, make_plan

MODELS = ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-72B")
CARDS = ("8gb", "12gb", "16gb", "24gb", "48gb", "80gb")
QUANTIZATIONS = ("none", "8bit")
TRUNK = 2 / 3
"""Share of the depth below the trunk of the second table: the upper third is trained."""


def small_cards(models: tuple[str, ...] = MODELS) -> dict[str, Any]:
    """The record: for each model and precision, what each card needs, and how; then from a trunk."""
    settings: dict[str, Any] = {"gpu": list(CARDS), "max_length": 1024}
    results: list[dict[str, Any]] = []
    for model in models:
        for quantization in QUANTIZATIONS:
            request = {**settings, "model": model, "quantization": quantization, "compare": False}
            whole, above = (
                as_json(make_plan(PlanConfig.model_validate({**request, **more})))
                for more in ({}, {"trunk_layer": TRUNK})
            )
            trunk = {**above["trunk"], "cards": _kept(above)}
            results.append({"model": model, "quantization": quantization, "cards": _kept(whole), "trunk": trunk})
            click.echo(f"{model} {quantization}: {results[-1]['cards'][0]['needed_gib']}")
    settings |= {name: PlanConfig.model_fields[name].default for name in ("lora_r", "pairs")}
    return {**stamp("small-cards", torch.device("cpu"), settings), "calculated": True, "results": results}


def _kept(answer: dict[str, Any]) -> list[dict[str, Any]]:
    kept = ("name", "phase1_fits", "phase2_fits", "layer_offloading", "changes", "needed_gib")
    return [{name: card[name] for name in kept} for card in answer["cards"]]


if __name__ == "__main__":
    append(small_cards(), RESULTS / "small-cards-calculated.jsonl")

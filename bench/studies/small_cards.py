"""Runs `dpoeng plan` for four model sizes on six cards, layer by layer where needed, for docs/layer-offloading.md.

    python -m dpoeng.bench.studies.small_cards      # a minute; appends to bench/results/small-cards-calculated.jsonl

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


def small_cards(models: tuple[str, ...] = MODELS) -> dict[str, Any]:
    """The record: for each model and precision, what each card needs, and whether by layer."""
    settings = {"gpu": list(CARDS), "max_length": 1024, "lora_r": 16}
    results = []
    for model in models:
        for quantization in QUANTIZATIONS:
            request = {**settings, "model": model, "quantization": quantization, "compare": False}
            answer = as_json(make_plan(PlanConfig.model_validate(request)))
            kept = ("name", "phase1_fits", "phase2_fits", "layer_offloading", "needed_gib")
            cards = [{name: card[name] for name in kept} for card in answer["cards"]]
            results.append({"model": model, "quantization": quantization, "cards": cards})
            click.echo(f"{model} {quantization}: {cards[0]['needed_gib']}")
    return {**stamp("small-cards", torch.device("cpu"), settings), "calculated": True, "results": results}


if __name__ == "__main__":
    append(small_cards(), RESULTS / "small-cards-calculated.jsonl")

"""Runs `dpoeng plan` for four model sizes, three precisions and five cards, for docs/memory.md.

    python -m dpoeng.bench.studies.plans      # some minutes; appends to bench/results/plan-calculated.jsonl

Calculated, as all that plan says: nothing here is a measurement, and the file's name says so.
"""

from __future__ import annotations

from typing import Any

import click
import torch

from dpoeng.bench.figure_text import RESULTS
from dpoeng.bench.measuring.records import append, stamp
from dpoeng.engine.config.plan import PlanConfig
from dpoeng.engine.recipes.plan import Plan, as_json, make_plan

MODELS = ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-72B")
CARDS = ("24gb", "40gb", "48gb", "80gb", "141gb")
QUANTIZATIONS = ("8bit", "4bit", "none")
MAX_LENGTH = 2048


def plans(models: tuple[str, ...] = MODELS) -> dict[str, Any]:
    """The record: a plan for each model in each precision; what other options take in the first precision alone."""
    settings = {"gpu": list(CARDS), "max_length": MAX_LENGTH, "lora_r": 16}
    results = []
    for model in models:
        for quantization in QUANTIZATIONS:
            request = {"model": model, "quantization": quantization, "compare": quantization == QUANTIZATIONS[0]}
            plan = make_plan(PlanConfig.model_validate({**settings, **request}))
            results.append({"model": model, "quantization": quantization, **_kept(plan)})
            click.echo(f"{model} {quantization}: {results[-1]['phase2_gib']:.1f} GiB")
    return {**stamp("plan", torch.device("cpu"), settings), "calculated": True, "results": results}


def _kept(found: Plan) -> dict[str, Any]:
    answer = as_json(found)
    second = answer["phase2"]
    return {
        "parameters": found.parameters,
        "phase2_gib": second["peak_gib"],
        "phase2_needed_gib": second["needed_gib"],
        "breakdown_gib": second["breakdown_gib"],
        "options_gib": second["options_gib"],
        "two_model_gib": second["two_model_peak_gib"],
        "cards": [
            {
                "name": card.gpu.name,
                "phase1_fits": card.phase1_fits and not card.by_layer[0],
                "phase2_fits": card.phase2_fits and not card.way.changes,
                "pairs_a_forward": card.micro_batch,
            }
            for card in found.cards
        ],
    }


if __name__ == "__main__":
    append(plans(), RESULTS / "plan-calculated.jsonl")

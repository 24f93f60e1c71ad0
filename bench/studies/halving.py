"""Does successive halving find the best run of the whole grid, and with how many steps?

    python -m dpoeng.bench.studies.halving --model M --pairs FILE [--work DIR] [--record FILE]

Trains every run of a grid to its end, with an evaluation at each rung. Then it replays halving on these
evaluations, for the whole grid and for random parts of it. A case finds the best run if its
last run has the best value at the end of training; else the record says how much worse it is.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dpoeng.bench.measuring.records import named_settings, show, stamp
from dpoeng.bench.studies.quality import split_pairs
from dpoeng.bench.studies.trunk import Told, score_file
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import SweepConfig
from dpoeng.engine.models.model_config import config_of, sizes
from dpoeng.engine.models.sources import find_model, read_fields
from dpoeng.engine.recipes.sweeps.halving import Promotion, Score, Standing, next_job, promote, rung_count
from dpoeng.engine.recipes.sweeps.plan import SweepPlan, plan_sweep
from dpoeng.engine.recipes.sweeps.ranking import score_at
from dpoeng.engine.recipes.train import train
from dpoeng.engine.reference.loading import KeptBase
from dpoeng.engine.runtime.outputs import scratch_folder

RANKED = "loss"
"""The held-out loss: with few pairs accuracy has few values, and all runs of the grid share their beta."""


@dataclass(frozen=True, slots=True)
class HalvingSettings:
    """The grid: every learning rate with every LoRA rank.

    Attributes:
        pairs_count: number of pairs to use, the first ones of the files.
        held_out: share of their prompts to hold out.
        steps: steps of each run.
        share: layers trained, as a share of the depth from the top; they run from a trunk.
        seeds: grids, each with another order and other LoRA starts.
        part: runs of a random part of a grid.
        parts: number of such parts per grid.
    """

    model: str
    pairs: tuple[Path, ...]
    work: Path
    pairs_count: int = 200
    held_out: float = 0.33
    steps: int = 36
    learning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    lora_ranks: tuple[int, ...] = (4, 32)
    factor: int = 3
    share: float = 1 / 6
    seeds: int = 2
    part: int = 9
    parts: int = 100
    batch_size: int = 4
    max_length: int = 96
    max_prompt_length: int = 48


def halving_study(settings: HalvingSettings) -> dict[str, Any]:
    """Trains the grids and returns the record.

    Raises:
        UserError: the model or the pairs are missing or not usable.
    """
    work = settings.work.resolve()
    scratch_folder(work, "halving")
    record = stamp("halving", torch.device("cpu"), named_settings(settings))
    source = find_model(settings.model)
    depth = sizes(config_of(read_fields(source))).layers
    last = max(1, round(depth * settings.share))
    files = split_pairs(settings.pairs, settings.pairs_count, settings.held_out, work)
    for file, view in zip(files, ("train", "held-out"), strict=True):
        score_file(settings, work / "cache", file, view, dtype="float32", trunk_layer=depth - last)
    grids = [_grid(settings, work, last, seed) for seed in range(settings.seeds)]
    draw = random.Random(0)
    parts = [
        {name: grid[name] for name in sorted(draw.sample(sorted(grid), settings.part))}
        for grid in grids
        for _ in range(settings.parts)
    ]
    return {
        **record,
        "last_layers": last,
        "held_out_pairs": len(View.open(work / "cache", "held-out")),
        "rungs": len(next(iter(grids[0].values()))),
        "grids": [{name: [score[0] for score in scores] for name, scores in grid.items()} for grid in grids],
        "whole": [replay(grid, settings.factor) for grid in grids],
        "parts": _summary([replay(part, settings.factor) for part in parts]),
        "by_chance": _summary([_chance(part, draw) for part in parts]),
    }


def _grid(settings: HalvingSettings, work: Path, last: int, seed: int) -> dict[str, list[Score]]:
    """Every run of a grid, trained to its end: name -> its score at each rung."""
    options = {
        "cache": work / "cache",
        "view": "train",
        "eval_view": "held-out",
        "output_dir": work / f"grid-{seed}",
        "train_last_layers": last,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": settings.batch_size,
        "eval_steps": settings.steps,
        "parity_pairs": 2,
        "seed": seed,
        "device": "cpu",
    }
    vary = {"learning_rate": settings.learning_rates, "lora_r": settings.lora_ranks}
    sweep = {"vary": vary, "rank_by": RANKED, "halving_factor": settings.factor}
    plan: SweepPlan = plan_sweep(SweepConfig.model_validate(sweep), options)
    base = KeptBase()
    scores: dict[str, list[Score]] = {}
    for point in plan.points:
        for step in point.rungs:
            pause_at = step if step < point.rungs[-1] else None
            train(point.config, Told(), kept_base=base, may_extend=False, pause_at=pause_at)
        found = [score_at(point.config.output_dir, step, RANKED) for step in point.rungs]
        scores[point.name] = [score for score in found if score is not None]
    return scores


def replay(scores: Mapping[str, Sequence[Score]], factor: int) -> dict[str, Any]:
    """Successive halving over runs whose scores at every rung are known.

    Returns:
        `found`: whether the run that is trained to the end has the best value there; `regret`: its distance from the
        best; `spread`: distance of the worst from the best; `share`: steps, as a share of the steps of all runs; `run`:
        its name.
    """
    top = len(next(iter(scores.values())))
    rungs = min(top, rung_count(len(scores), factor))
    ladder = list(range(top - rungs, top))  # the rungs of a smaller sweep begin later
    reached = dict.fromkeys(scores, 0)
    promotions: list[Promotion] = []
    done: list[tuple[str, int]] = []
    while True:
        standings = [Standing(name, [own[rung] for rung in ladder[: reached[name]]]) for name, own in scores.items()]
        job = next_job(standings, promotions, rungs, done)
        if job is not None:
            reached[job[0]] = job[1] + 1
            done.append(job)
            continue
        new = promote(standings, promotions, rungs, factor)
        if not new:
            break
        promotions += new
    ends = {name: own[-1][0] for name, own in scores.items()}
    last = max((name for name in scores if reached[name] == rungs), key=lambda name: ends[name])
    steps = sum(float(factor) ** (count - rungs) for count in reached.values())
    return {"run": last, **_distance(ends, last), "share": steps / len(scores)}


def _distance(ends: Mapping[str, float], run: str) -> dict[str, Any]:
    """How far a run ends from the best one, and how far the worst does; larger values are better."""
    best = max(ends.values())
    return {"found": ends[run] == best, "regret": best - ends[run], "spread": best - min(ends.values())}


def _chance(scores: Mapping[str, Sequence[Score]], draw: random.Random) -> dict[str, Any]:
    """One random run, trained to its end: the baseline for halving."""
    ends = {name: own[-1][0] for name, own in scores.items()}
    run = draw.choice(sorted(ends))
    return {"run": run, **_distance(ends, run), "share": 1 / len(scores)}


def _summary(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "cases": len(cases),
        "found": float(np.mean([case["found"] for case in cases])),
        "regret": float(np.mean([case["regret"] for case in cases])),
        "spread": float(np.mean([case["spread"] for case in cases])),
        "share": float(np.mean([case["share"] for case in cases])),
    }


def table(record: Mapping[str, Any]) -> Any:
    """The record for a terminal."""
    from rich.table import Table

    result_table = Table(title=f"halving of grids of {len(record['grids'][0])} runs, {record['rungs']} rungs")
    for heading in ("", "cases", "the best run", "loss above the best", "worst above best", "steps of the grid"):
        result_table.add_column(heading)
    rows = [("whole grids", _summary(record["whole"])), ("parts of them", record["parts"])]
    for name, one in [*rows, ("one run by chance", record["by_chance"])]:
        distances = (f"{one[key]:.4f}" for key in ("regret", "spread"))
        result_table.add_row(name, str(one["cases"]), f"{one['found']:.0%}", *distances, f"{one['share']:.0%}")
    return result_table


@click.command()
@click.option("--model", required=True, help="A directory with safetensors or a hub id.")
@click.option("--pairs", "files", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", default="halving-study", show_default=True, type=click.Path(path_type=Path))
@click.option("--pairs-count", default=200, show_default=True, help="Number of pairs to use, the first ones.")
@click.option("--steps", default=36, show_default=True, help="Steps of each run.")
@click.option("--seeds", default=2, show_default=True, help="Grids.")
@click.option("--record", type=click.Path(path_type=Path), help="Append the record to this file.")
def main(files: tuple[Path, ...], record: Path | None, **settings: Any) -> None:
    """Trains grids whole and replays successive halving on them."""
    show(lambda: halving_study(HalvingSettings(pairs=files, **settings)), table, record)


if __name__ == "__main__":
    main()

"""Do pairs selected by the cache's log-probs train better than as many random ones?

    python -m dpoeng.bench.studies.selection --model M --pairs FILE [--work DIR] [--record FILE]

`dpoeng select` takes the same number of pairs by each rule, `dpoeng train` trains on each choice with several seeds,
and all runs are evaluated on the same held-out pairs. The two rules that papers disagree on are tried with both scores:
the reference's own margin, and the gap that a policy learnt on all pairs. A seed also draws the random
subset. Runs that are complete are skipped, so the same command continues after a stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import torch

from dpoeng.bench.measuring.records import named_settings, show, stamp
from dpoeng.bench.studies.quality import split_pairs
from dpoeng.bench.studies.trunk import METRICS, Told, over_seeds, paired_difference, score_file, seed_means
from dpoeng.cache.reader import View
from dpoeng.cache.selection.rules import Rule, Rules, choose
from dpoeng.cache.selection.views import write_rows
from dpoeng.engine.config.fields import Dtype, TrainConfig
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs.folder import ADAPTER_FOLDER
from dpoeng.engine.runs.metrics import HELD_OUT_FILE, read_lines
from dpoeng.engine.runtime.outputs import scratch_folder

RANDOM: Final = "random"
CHOICES: Final[Mapping[str, tuple[Rule, bool]]] = {
    RANDOM: ("random", False),
    "large margin": ("large", False),
    "small margin": ("small", False),
    "large gap": ("large", True),
    "small gap": ("small", True),
}
"""Name -> the rule, and whether it ranks the gap that a trained policy learnt (else the reference's margin)."""


@dataclass(frozen=True, slots=True)
class SelectionSettings:
    """Settings of selection and training.

    Attributes:
        pairs_count: number of pairs to use, the first ones of the files.
        held_out: share of their prompts to hold out.
        share: share of the training pairs that each rule selects.
        seeds: runs per rule.
        work: keeps the cache and finished runs.
    """

    model: str
    pairs: tuple[Path, ...]
    work: Path
    pairs_count: int = 450
    held_out: float = 0.3
    share: float = 0.4
    seeds: int = 3
    batch_size: int = 4
    learning_rate: float = 2e-4
    lora_r: int = 16
    dtype: Dtype = "float32"
    max_length: int = 128
    max_prompt_length: int = 64


def selection_study(settings: SelectionSettings) -> dict[str, Any]:
    """Trains on each choice and returns the record.

    Raises:
        UserError: the model or the pairs are missing or not usable.
    """
    work = settings.work.resolve()
    scratch_folder(work, "selection")
    record = stamp("selection", torch.device("cpu"), named_settings(settings))
    files = split_pairs(settings.pairs, settings.pairs_count, settings.held_out, work)
    cache = work / "cache"
    for file, view in zip(files, ("train", "held-out"), strict=True):
        score_file(settings, cache, file, view, dtype=settings.dtype)
    whole = _run(settings, cache, "train", 0, work / "runs" / "all")
    trained = str(work / "runs" / "all" / ADAPTER_FOLDER)
    score_file(settings, cache, files[0], "trained", dtype=settings.dtype, adapter=trained)
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in CHOICES}
    for seed in range(settings.seeds):  # a stopped study has complete seeds
        for name, (rule, learnt) in CHOICES.items():
            view = f"{name.replace(' ', '-')}-{seed}"
            count = _choose(cache, view, Rules(rule=rule, share=settings.share, seed=seed), learnt)
            runs[name].append(_run(settings, cache, view, seed, work / "runs" / view))
    choices = {
        name: {
            "seeds": [seed_means(run) for run in own],
            **over_seeds(own),
            "difference": paired_difference(own, runs[RANDOM]),
        }
        for name, own in runs.items()
    }
    return {
        **record,
        "pairs_chosen": count,
        "pairs_all": len(View.open(cache, "train")),
        "held_out_pairs": len(whole),
        "all": seed_means(whole),
        "choices": choices,
    }


def _choose(cache: Path, view: str, rules: Rules, learnt: bool) -> int:
    """Writes a view of the pairs that `rules` select; returns their number."""
    pairs = View.open(cache, "train")
    chosen = choose(pairs, rules, View.open(cache, "trained") if learnt else None)
    write_rows(cache, pairs, chosen.rows, view, rules.record(), force=True)
    return len(chosen.rows)


def _run(settings: SelectionSettings, cache: Path, view: str, seed: int, out: Path) -> list[dict[str, Any]]:
    """Trains one epoch over a view; returns its evaluation of each held-out pair."""
    options = {
        "cache": cache,
        "view": view,
        "eval_view": "held-out",
        "output_dir": out,
        "lora_r": settings.lora_r,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": 1,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": settings.batch_size,
        "parity_pairs": 4,
        "seed": seed,
        "device": "cpu",
    }
    train(TrainConfig.model_validate(options), Told())
    return read_lines(out / HELD_OUT_FILE)


def table(record: Mapping[str, Any]) -> Any:
    """The record for a terminal."""
    from rich.table import Table

    found = Table(
        title=f"{record['pairs_chosen']} of {record['pairs_all']} pairs, {record['held_out_pairs']} held-out pairs, "
        f"{record['settings']['seeds']} seeds"
    )
    for heading in ("pairs", "accuracy", "from random", "margin", "from random", "accuracies of the seeds"):
        found.add_column(heading)
    for name, one in record["choices"].items():
        cells = [cell for metric in METRICS for cell in (_cell(one[metric]), _cell(one["difference"][metric]))]
        if name == RANDOM:
            cells[1] = cells[3] = ""
        found.add_row(name, *cells, ", ".join(f"{seed[METRICS[0]]:.2f}" for seed in one["seeds"]))
    return found


def _cell(value: Mapping[str, Any]) -> str:
    low, high = value["interval"] or (float("nan"), float("nan"))
    return f"{value['mean']:.3f} ({low:.3f} to {high:.3f})"


@click.command()
@click.option("--model", required=True, help="A directory with safetensors or a hub id.")
@click.option("--pairs", "files", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", default="selection-study", show_default=True, type=click.Path(path_type=Path))
@click.option("--pairs-count", default=450, show_default=True, help="Number of pairs to use, the first ones.")
@click.option("--held-out", default=0.3, show_default=True, help="Share of the prompts to hold out.")
@click.option("--share", default=0.4, show_default=True, help="Share of the training pairs that each rule selects.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--learning-rate", default=2e-4, show_default=True)
@click.option("--max-length", default=128, show_default=True, help="Maximum tokens of prompt + response.")
@click.option("--max-prompt-length", default=64, show_default=True, help="Maximum tokens of a prompt.")
@click.option("--record", type=click.Path(path_type=Path), help="Append the record to this file.")
def main(files: tuple[Path, ...], record: Path | None, **settings: Any) -> None:
    """Trains on pairs chosen by each rule and compares them with as many random ones."""
    show(lambda: selection_study(SelectionSettings(pairs=files, **settings)), table, record)


if __name__ == "__main__":
    main()

"""`dpoeng train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cache.words import counted
from dpoeng.cli.options import ConfigCommand, config_options, given
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.config.files import load_config

if TYPE_CHECKING:
    from dpoeng.engine.recipes.train import TrainSummary

EPILOG = """\b
Examples:
  dpoeng train --cache refcache
  dpoeng train --cache refcache --output-dir out --beta 0.1 --learning-rate 2e-5 --num-train-epochs 3
  dpoeng train --cache refcache --adapter-mode stack --lora-r 32
  dpoeng train --cache refcache --no-use-peft --learning-rate 1e-6
  torchrun --nproc-per-node 4 --no-python dpoeng train --cache refcache
"""

MODES = {
    "new": "new adapter",
    "stack": "new adapter on the SFT adapter",
    "continue": "the SFT adapter",
    "full": "all weights",
}


@click.command("train", cls=ConfigCommand, epilog=EPILOG)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file.  [default: dpoeng.yaml]")
@config_options(TrainConfig)
def train(config_file: Path | None, **options: Any) -> None:
    """Phase two: DPO of a LoRA, or of all weights, against the cached reference. No reference model is loaded.

    Model, SFT adapter and precision are those that the cache names. Before the first step the policy is compared with
    the cache on real pairs. A run that is started again with the same output folder goes on from its newest checkpoint.
    """
    config = load_config(TrainConfig, given(options), config_file)

    from dpoeng.cli.progress import TerminalProgress
    from dpoeng.engine.recipes.train import train as run

    summary = run(config, TerminalProgress())
    if summary.reports:
        print_summary(summary)


def print_summary(summary: TrainSummary) -> None:
    """What was done, what it brought, and what to do next."""
    from rich.console import Console

    from dpoeng.cli.tables import advice_text, facts_table, group_tables, metrics_table
    from dpoeng.engine.recipes.policy import parity_text

    console = Console()
    if summary.already_complete:
        steps = counted(summary.steps, "step")
        console.print(f"This run is complete already ({steps}); nothing was done.", highlight=False)
    facts: list[tuple[str, str]] = []
    if summary.parity is not None:
        facts.append(("parity", parity_text(summary.parity)))
    facts.append(
        (
            "trained",
            f"{counted(summary.trainable, 'parameter')} ({MODES[summary.mode]}) on "
            f"{counted(summary.train_pairs, 'pair')}, {counted(summary.steps, 'step')}"
            + (f", from step {summary.resumed_from}" if summary.resumed_from else ""),
        )
    )
    if not summary.already_complete:
        several = f"{summary.processes} processes, each on " if summary.processes > 1 else ""
        facts.append(("time", f"{summary.seconds:.0f} s on {several}{summary.device}"))
        facts.append(("layout", f"{summary.layout}: {summary.layout_reason}"))
    if summary.loaded:
        facts.append(("base loaded", summary.loaded))
    if summary.peak_bytes is not None:
        predicted = ""
        if summary.predicted_bytes:
            off = summary.peak_bytes / summary.predicted_bytes - 1
            predicted = f"; predicted {summary.predicted_bytes / 2**30:.2f} GiB ({off:+.1%})"
        facts.append(("peak memory", f"{summary.peak_bytes / 2**30:.2f} GiB allocated on the device{predicted}"))
    if summary.best.step is not None:
        facts.append(("best", f"evaluation at step {summary.best.step}: {summary.best.value:.4f}"))
    if summary.planned_steps > summary.steps:
        facts.append(("stopped", f"early, at step {summary.steps} of {summary.planned_steps}"))
    console.print(facts_table(facts))
    console.print(metrics_table(summary))
    if summary.evaluation:
        low, high = summary.evaluation["intervals"].get("rewards/accuracies", (None, None))
        if low is not None:
            console.print(f"held-out accuracy, 95 % interval: {low:.3f} to {high:.3f}", highlight=False)
        for table in group_tables(summary.evaluation):
            console.print(table)
    console.print(advice_text(summary.advice), highlight=False, soft_wrap=True, end="")
    what = "checkpoint" if summary.mode == "full" else "adapter"
    said = f"The {what} is in [bold]{summary.result}[/]"
    console.print(
        f"\n{said}; run.json beside it has the lines that load it.\n"
        f"Every step's figures: {summary.output_dir / 'metrics.jsonl'}",
        highlight=False,
        soft_wrap=True,
    )

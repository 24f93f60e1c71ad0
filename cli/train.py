"""`dpoeng train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cache.words import counted, gib
from dpoeng.cli.evaluate import print_advice
from dpoeng.cli.options import ConfigCommand, config_options, given
from dpoeng.cli.tables import Marked, accuracy_line, facts_table, json_option, say, say_json
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.config.files import load_config

if TYPE_CHECKING:
    from dpoeng.engine.recipes.phase_two.summary import TrainSummary

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
@json_option
@click.option("--push-to", metavar="ORG/NAME", help="Upload the result to this private repository of the hub.")
@config_options(TrainConfig)
def train(config_file: Path | None, as_json: bool, push_to: str | None, **options: Any) -> None:
    """Phase two: DPO of a LoRA, or of all weights, against the cached reference. No reference model is loaded.

    Model, SFT adapter and precision come from the cache. Before the first step the policy is compared with the cache on
    real pairs. A run that is started again with the same output folder continues from its newest checkpoint.
    """
    config = load_config(TrainConfig, given(options), config_file)

    from dpoeng.cli.progress import TerminalProgress, importing
    from dpoeng.engine.recipes.phase_two.finished import finished_run

    if push_to is not None:
        from dpoeng.engine.recipes.push import check_target

        check_target(push_to)
    summary = finished_run(config)
    if summary is None:
        with importing():
            from dpoeng.engine.recipes.train import train as run

        summary = run(config, TerminalProgress())
    if summary.reports:
        say_json(summary) if as_json else print_summary(summary)
        if push_to is not None:
            from dpoeng.engine.recipes.push import push

            say(f"Pushed to {push(summary.result, push_to).url}", err=as_json)


def print_summary(summary: TrainSummary) -> None:
    """Prints the facts of a run, its metrics, remarks on them, and where its result is."""
    from dpoeng.cli.pages.run import group_tables, metrics_table

    if summary.already_complete:
        say(f"This run is already complete ({counted(summary.steps, 'step')}); nothing to do.")
    say(facts_table(_facts(summary)))
    heads, columns = ["step 1", f"step {summary.steps}"], [summary.first, summary.last]
    if summary.eval_after:
        heads += ["held out before", "held out after"]
        columns += [
            {name.removeprefix("eval_"): value for name, value in metrics.items()}
            for metrics in (summary.eval_before, summary.eval_after)
        ]
    say(metrics_table(heads, columns))
    if any(_equals_reference(column) for column in columns):
        say("Before training all rewards are 0: the policy equals its reference, and accuracies count ties as wrong.")
    if summary.evaluation:
        if line := accuracy_line(summary.evaluation):
            say(line)
        say(*group_tables(summary.evaluation))
    print_advice(summary.advice)
    kind = "checkpoint" if summary.mode == "full" else "adapter"
    say(f"\nThe {kind} is in ", Marked(str(summary.result), "bold"), ". Load it with:")
    for line in summary.load:
        say(f"  {line}")
    say(f"Every step's figures: {summary.output_dir / 'metrics.jsonl'}")


def _equals_reference(metrics: Mapping[str, float]) -> bool:
    """Whether nothing has been learnt yet: no pair has a reward, so none can be right."""
    return metrics.get("rewards/chosen") == metrics.get("rewards/rejected") == 0.0


def _facts(summary: TrainSummary) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    if summary.parity is not None:
        from dpoeng.engine.recipes.policy import parity_text

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
            predicted = f"; predicted {gib(summary.predicted_bytes)} ({off:+.1%})"
        facts.append(("peak memory", f"{gib(summary.peak_bytes)} allocated on the device{predicted}"))
    if summary.best.step is not None:
        facts.append(("best", f"evaluation at step {summary.best.step}: {summary.best.value:.4f}"))
    if summary.planned_steps > summary.steps:
        facts.append(("stopped", f"early, at step {summary.steps} of {summary.planned_steps}"))
    return facts

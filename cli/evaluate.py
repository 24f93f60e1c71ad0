"""`dpoeng eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dpoeng.cli.options import ConfigCommand, config_options, given
from dpoeng.cli.tables import Marked, facts_table, json_option, say, say_json
from dpoeng.engine.config.fields import LOSS_FIELDS, TrainConfig
from dpoeng.engine.config.files import load_config
from dpoeng.engine.losses.own import OwnLoss

if TYPE_CHECKING:
    from dpoeng.engine.recipes.evaluate import EvaluationSummary, Trained
    from dpoeng.engine.training.advice import Advice

EPILOG = """\b
Examples:
  dpoeng eval --cache refcache --adapter out
  dpoeng eval --cache refcache --adapter out --view test --pairs all --json
  dpoeng eval --cache refcache --adapter my-lora --eval-group-by negative_type
"""

_FIELDS = frozenset(
    "cache view eval_view eval_share seed model quantization dtype device layout per_device_eval_batch_size "
    "eval_group_by parity_pairs parity_tolerance layer_offloading offload_gib offload_folder".split()
) | frozenset(LOSS_FIELDS)


@click.command("eval", cls=ConfigCommand, epilog=EPILOG)
@click.option(
    "--adapter",
    "path",
    type=click.Path(path_type=Path),
    required=True,
    help="A run's folder, an adapter, or a fully trained checkpoint.",
)
@click.option(
    "--pairs",
    type=click.Choice(["held-out", "all"]),
    help="The pairs that the run held out, or all of the view.  [default: held-out if run.json is next to the adapter "
    "and no --view is given]",
)
@json_option
@config_options(TrainConfig, skip=frozenset(TrainConfig.model_fields) - _FIELDS)
def evaluate(path: Path, pairs: Literal["held-out", "all"] | None, as_json: bool, **options: Any) -> None:
    """Evaluate a trained model on cached pairs: rewards, accuracy with its interval, by group, warnings.

    Settings that you do not give are those of the run, if run.json is next to the adapter. First the model as it was
    before training is compared with the cache.
    """
    from dpoeng.cli.progress import TerminalProgress, importing

    with importing():
        from dpoeng.engine.recipes.evaluate import evaluate_trained, find_trained

    trained = find_trained(path)
    overrides = given(options)
    if pairs is None and "view" in overrides:
        pairs = "all"
    if pairs == "all" and "view" in overrides:  # it may be the run's evaluation view
        overrides.setdefault("eval_view", None)
    if "view" in overrides:  # evaluate only that view
        overrides |= {"mix_with": (), "mix": None}
    summary = evaluate_trained(trained, run_config(trained, overrides), pairs, TerminalProgress())
    if as_json:
        say_json(summary.record())
    else:
        print_evaluation(summary)


def run_config(trained: Trained, overrides: dict[str, Any]) -> TrainConfig:
    """The config of an adapter's run, or the defaults, with the command line's options."""
    return load_config(TrainConfig, {**run_settings(trained.run), **overrides})


def run_settings(run: Mapping[str, Any] | None) -> dict[str, Any]:
    """The non-default fields of a run's config; empty without a run."""
    defaults = TrainConfig.model_validate({}).model_dump(mode="json")
    changed = {name: value for name, value in (run or {}).items() if value != defaults.get(name, value)}
    if "loss_type" in changed:
        changed["loss_type"] = [OwnLoss(str(n), recorded=True) if ":" in str(n) else n for n in changed["loss_type"]]
    return changed


def print_evaluation(summary: EvaluationSummary) -> None:
    """Prints facts, means with intervals, groups and remarks."""
    from dpoeng.cli.pages.run import evaluation_table, group_tables

    facts = [
        ("trained", str(summary.trained)),
        ("pairs", f"{summary.evaluation.pairs} of view {summary.view!r} ({summary.which.replace('-', ' ')})"),
        ("loss", f"{' + '.join(summary.loss_type)}, beta {summary.beta:g}"),
        ("device", summary.device),
        (
            "parity",
            f"the policy before training differs from the cache by {summary.parity.mean_diff:.2g} nats per token",
        ),
    ]
    record = summary.evaluation.record()
    say(facts_table(facts), evaluation_table(record), *group_tables(record))
    print_advice(summary.advice)


def print_advice(advice: Sequence[Advice]) -> None:
    """Prints remarks, one paragraph each."""
    for remark in advice:
        say("\n", Marked(remark.code, "warning"), f": {remark.seen}\n  try: {remark.remedy}")

"""`dpoeng round`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dpoeng.cache.words import counted
from dpoeng.cli.evaluate import run_config
from dpoeng.cli.options import ConfigCommand, config_options, given
from dpoeng.cli.rounds.judge import judge_of, judge_options
from dpoeng.cli.tables import Table, json_option, say, say_json
from dpoeng.engine.config.fields import LOSS_FIELDS, TrainConfig

if TYPE_CHECKING:
    from dpoeng.engine.recipes.rounds.record import RoundSummary
    from dpoeng.engine.runtime.endpoint import Endpoint

EPILOG = """\b
Examples:
  dpoeng round out --judge http://gpu1:8000/v1 --reference first
  dpoeng round out --judge my_rule.py:score --reference last --rounds 3 --samples 8 --count 500
  dpoeng round out --judge reward-model --reference first --server http://gpu2:8000/v1
"""

# Training fields that rounds may set differently from the run they start from.
FIELDS = frozenset(
    "cache device seed optim learning_rate lr_scheduler_type warmup_ratio warmup_steps weight_decay max_grad_norm "
    "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size "
    "gradient_checkpointing activation_offloading layer_offloading offload_gib offload_folder report_to logging_steps "
    "eval_steps save_steps save_total_limit full_determinism".split()
) | frozenset(LOSS_FIELDS)

_SAMPLING = ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "stop", "batch_size")


@click.command("round", cls=ConfigCommand, epilog=EPILOG)
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@judge_options
@click.option(
    "--reference",
    type=click.Choice(["first", "last"]),
    required=True,
    help="Each round's reference: first, the run's own; or last, the policy that was sampled. Training continues from "
    "the last policy either way.",
)
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Total number of rounds.")
@click.option("--samples", type=click.IntRange(2), default=4, show_default=True, help="Answers per prompt.")
@click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path),
    help="A text file with one prompt per line, or rows with `prompt`.  [default: prompts of the run's training pairs]",
)
@click.option(
    "--count", type=click.IntRange(1), help="Prompts per round; each round takes the next ones.  [default: all]"
)
@click.option(
    "--train-on",
    type=click.Choice(["all", "new"]),
    default="all",
    show_default=True,
    help="all: the run's pairs and those of every round; new: this round's pairs only.",
)
@click.option(
    "--keep-cut",
    is_flag=True,
    help="Also use answers that --max-new-tokens cut off; training then teaches the policy to stop there.",
)
@click.option("--max-new-tokens", default=256, show_default=True, help="Maximum tokens of an answer.")
@click.option("--temperature", default=1.0, show_default=True, help="Sampling temperature; above 0.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Sample from the most likely tokens with this total probability."
)
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1: fewer repetitions.")
@click.option("--stop", multiple=True, help="A text that ends an answer; may be given several times.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Prompts answered at once; not for a server.",
)
@click.option("--server", metavar="URL", help="Sample on this vLLM or SGLang server; the URL ends in /v1.")
@click.option(
    "--server-key-env",
    default="VLLM_API_KEY",
    show_default=True,
    help="The environment variable with that server's key.",
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    default=Path("rounds"),
    show_default=True,
    help="Folder for the rounds' pairs, runs and cache.",
)
@json_option
@config_options(TrainConfig, skip=frozenset(TrainConfig.model_fields) - FIELDS)
def round_(
    path: Path,
    reference: Literal["first", "last"],
    rounds: int,
    samples: int,
    file: Path | None,
    count: int | None,
    train_on: Literal["all", "new"],
    keep_cut: bool,
    output_dir: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Sample answers from a run's policy, let a judge score them, and train on best-against-worst pairs, in rounds.

    Training settings default to those of RUN; its folder and cache stay unchanged. Run the command again after an
    interruption, and it continues. Increase --rounds to add rounds.
    """
    from dpoeng.cli.progress import TerminalProgress, importing

    with importing():
        from dpoeng.engine.recipes.evaluate import find_trained
        from dpoeng.engine.recipes.rounds.answers import Sampling
        from dpoeng.engine.recipes.rounds.begin import RoundSettings
        from dpoeng.engine.recipes.rounds.rounds import train_rounds

    progress, trained = TerminalProgress(), find_trained(path)
    sampling = {name: options.pop(name) for name in _SAMPLING}
    endpoint = _server(options)
    judge = judge_of(options, options.get("device"), progress)
    config = run_config(trained, given(options))
    settings = RoundSettings(
        reference=reference,
        rounds=rounds,
        train_on=train_on,
        prompts=file,
        count=count,
        keep_cut=keep_cut,
        sampling=Sampling(count=samples, seed=config.seed, **sampling),
        server=endpoint,
    )
    done = train_rounds(trained, config, judge, settings, output_dir, progress)
    if as_json:
        say_json(done)
    else:
        print_rounds(done)


def _server(options: dict[str, Any]) -> Endpoint | None:
    """The server of --server, with the judge's request settings; removes its options from `options`."""
    from dpoeng.engine.runtime.endpoint import Endpoint

    url, key_variable = options.pop("server"), options.pop("server_key_env")
    asking = {"timeout_s": options["timeout"], "retries": options["retries"], "concurrency": options["concurrency"]}
    return Endpoint.of(url, key_variable, "--server", **asking) if url is not None else None


def print_rounds(done: Sequence[RoundSummary]) -> None:
    """Prints a line per round, why prompts have no pair, and where the last policy is."""
    scored = any(one.mean_score is not None for one in done)
    columns = (
        "round",
        *(("mean score",) if scored else ()),
        "answers",
        "new pairs",
        "computed",
        "trained on",
        "held out",
    )
    rows = [
        (
            str(one.number),
            *((f"{one.mean_score:.4g}" if one.mean_score is not None else "",) if scored else ()),
            f"{one.answers:,}",
            f"{one.pairs:,}",
            f"{one.computed:,}",
            f"{one.train_pairs:,}",
            f"{one.evaluation['eval_rewards/accuracies']:.3f}" if one.evaluation else "",
        )
        for one in done
    ]
    notes = ["mean score: answers before the round's training. held out: rewards/accuracies after it."]
    say(Table(rows, columns, notes=notes))
    for one in done:
        why = ", ".join(f"{reason} ({number:,})" for reason, number in one.left_out.items())
        parts = [f"without a pair: {why}"] if why else []
        parts += [f"{counted(one.cut, 'answer')} cut off"] if one.cut else []
        parts += [f"{counted(one.rejected, 'row')} rejected by phase one"] if one.rejected else []
        if parts:
            say(f"round {one.number}: {'; '.join(parts)}")
    say(f"\nThe last policy is in {done[-1].result}; left_out.jsonl next to it lists the prompts without a pair.")

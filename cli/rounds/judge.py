"""`dpoeng judge`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cache.words import counted
from dpoeng.cli.compare import read_prompts
from dpoeng.cli.evaluate import run_config
from dpoeng.cli.options import Command, config_options, given
from dpoeng.cli.rounds.judgement import judgement_table
from dpoeng.cli.tables import Table, json_option, say, say_json
from dpoeng.engine.config.fields import TrainConfig

if TYPE_CHECKING:
    from dpoeng.engine.recipes.rounds.judge import Judgement
    from dpoeng.engine.recipes.rounds.judges import Judge
    from dpoeng.engine.runtime.progress import Progress

EPILOG = """\b
Examples:
  dpoeng judge out --judge http://gpu1:8000/v1
  dpoeng judge out --judge https://api.openai.com/v1 --judge-model gpt-5-mini --count 200
  dpoeng judge out --judge my_rule.py:score --prompts prompts.txt
"""

_FIELDS = frozenset("cache view model quantization dtype device".split())


def judge_options(command: Command) -> Command:
    """Adds the options for the judge and its server."""
    options = (
        click.option(
            "--judge",
            "judge_name",
            required=True,
            metavar="URL|FILE:FUNCTION|MODEL",
            help="An OpenAI-compatible server, up to /v1; a function (prompt, answer) -> number, my_rule.py:score; or "
            "a local model: a reward model (one number per answer) or one that compares.",
        ),
        click.option("--judge-model", default="", help="The model's name on the server.  [default: its only one]"),
        click.option(
            "--api-key-env",
            default="OPENAI_API_KEY",
            show_default=True,
            help="The environment variable with the server's key.",
        ),
        click.option(
            "--template",
            type=click.Path(path_type=Path),
            help="A file with the judge's prompt: a text with {prompt}, {first} and {second}, for a reply that ends "
            "with Verdict: A, B or tie.",
        ),
        click.option("--judge-max-tokens", default=512, show_default=True, help="Maximum tokens of a reply."),
        click.option("--timeout", default=300.0, show_default=True, help="Seconds before a request is sent again."),
        click.option("--retries", default=6, show_default=True, help="Number of retries, after growing pauses."),
        click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True, help="Parallel requests."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def judge_of(options: dict[str, Any], device: str | None, progress: Progress) -> Judge:
    """The judge from the values of `judge_options`, which are removed from `options`."""
    from dpoeng.engine.recipes.rounds.judges import TEMPLATE, JudgeSettings, find_judge

    template = options.pop("template")
    settings = JudgeSettings(
        server_model=options.pop("judge_model"),
        key_variable=options.pop("api_key_env"),
        template=read_template(template) if template else TEMPLATE,
        max_tokens=options.pop("judge_max_tokens"),
        timeout_s=options.pop("timeout"),
        retries=options.pop("retries"),
        concurrency=options.pop("concurrency"),
        device=device or "auto",
    )
    return find_judge(options.pop("judge_name"), settings, progress)


def read_template(file: Path) -> str:
    """The text of a template; raises UserError if it cannot be read."""
    from dpoeng.cache.errors import UserError

    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "cannot read the judge's template",
            code="judge-template",
            where=f"--template {file}",
            expected="a text file with {prompt}, {first} and {second}",
            found=str(error),
            remedy="name another file, or leave --template out",
        ) from error


@click.command("judge", epilog=EPILOG)
@click.argument("path", metavar="TRAINED", type=click.Path(path_type=Path))
@judge_options
@click.option("--prompt", "prompts", multiple=True, help="A prompt; may be given several times.")
@click.option("--prompts", "file", type=click.Path(path_type=Path), help="A text file with one prompt per line.")
@click.option("--count", type=click.IntRange(1), help="Without prompts: how many held-out prompts.  [default: all]")
@click.option(
    "--chat/--text", default=None, help="Whether given prompts are a user's messages, or texts, as in dpoeng compare."
)
@click.option("--max-new-tokens", default=256, show_default=True, help="Maximum tokens of an answer.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token; above 0 samples.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1: fewer repetitions.")
@click.option("--stop", multiple=True, help="A text that ends an answer; may be given several times.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the sampling.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Prompts answered at once.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    help="Folder for answers and verdicts.  [default: judge in the run's folder]",
)
@json_option
@config_options(TrainConfig, skip=frozenset(TrainConfig.model_fields) - _FIELDS)
def judge(
    path: Path,
    prompts: tuple[str, ...],
    file: Path | None,
    count: int | None,
    chat: bool | None,
    max_new_tokens: int,
    temperature: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    seed: int,
    batch_size: int,
    output_dir: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Let a judge compare answers before and after training, in both orders, and count wins with an interval.

    TRAINED is the folder of a run, an adapter, or a checkpoint with all weights. Without prompts, it answers those that
    the run held out. Answers and verdicts are stored by their content: run the command again after an interruption, and
    it continues; run it once more, and it asks no judge.
    """
    from dpoeng.cli.progress import TerminalProgress, importing

    with importing():
        from dpoeng.engine.recipes.evaluate import find_trained
        from dpoeng.engine.recipes.rounds.answers import Sampling
        from dpoeng.engine.recipes.rounds.judge import judge_folder, judge_trained

    progress = TerminalProgress()
    given_prompts = [*prompts, *(read_prompts(file) if file else [])]
    trained = find_trained(path)
    who = judge_of(options, options.get("device"), progress)
    overrides = given(options)
    if "view" in overrides:  # prompts of this view, not of the run's evaluation
        overrides |= {"eval_view": None, "mix_with": (), "mix": None}
    found = judge_trained(
        trained,
        run_config(trained, overrides),
        who,
        output_dir or judge_folder(trained),
        prompts=given_prompts,
        count=count,
        chat=chat,
        sampling=Sampling(
            max_new_tokens=max_new_tokens,
            stop=stop,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            seed=seed,
            batch_size=batch_size,
        ),
        progress=progress,
    )
    if as_json:
        say_json(found)
    else:
        print_judgement(found)


def print_judgement(found: Judgement) -> None:
    """Prints the win rate, its parts, and prompts without a verdict."""
    say(judgement_table(asdict(found)))
    if found.unjudged:
        rows = [(line.prompt[:200].strip(), line.why) for line in found.unjudged[:10]]
        say(
            f"\n{counted(len(found.unjudged), 'prompt')} without a verdict, not counted above:",
            Table(rows, ("prompt", "instead of a verdict"), words=2, ruled=True),
        )
    say(f"\nEvery answer and verdict: {found.folder / 'judged.jsonl'}")

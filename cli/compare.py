"""`dpoeng compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cli.evaluate import run_config
from dpoeng.cli.options import config_options, given
from dpoeng.cli.tables import Cell, Marked, Table, json_option, say, say_json
from dpoeng.engine.config.fields import TrainConfig

if TYPE_CHECKING:
    from dpoeng.engine.recipes.compare import Generation

EPILOG = """\b
Examples:
  dpoeng compare out
  dpoeng compare out --prompt "Why is the sky blue?" --prompt "Name three rivers."
  dpoeng compare out --prompts prompts.txt --max-new-tokens 200 --json
"""

_FIELDS = frozenset("cache view model quantization dtype device".split())


@click.command("compare", epilog=EPILOG)
@click.argument("path", metavar="TRAINED", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, help="A prompt; may be given several times.")
@click.option("--prompts", "file", type=click.Path(path_type=Path), help="A text file with one prompt per line.")
@click.option("--count", default=4, show_default=True, help="Number of held-out prompts, if you give no prompts.")
@click.option(
    "--chat/--text",
    default=None,
    help="Whether given prompts are a user's messages for the chat template, or texts.  [default: messages if there is "
    "a template and phase one used no prompt_format]",
)
@click.option("--max-new-tokens", default=128, show_default=True, help="Maximum tokens of an answer.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token; above 0 samples.")
@click.option(
    "--repetition-penalty", default=1.0, show_default=True, help="Above 1 keeps small models from repeating themselves."
)
@click.option("--stop", multiple=True, help="A text that ends an answer; may be given several times.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the sampling.")
@json_option
@config_options(TrainConfig, skip=frozenset(TrainConfig.model_fields) - _FIELDS)
def compare(
    path: Path,
    prompts: tuple[str, ...],
    file: Path | None,
    count: int,
    chat: bool | None,
    as_json: bool,
    max_new_tokens: int,
    temperature: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    seed: int,
    **options: Any,
) -> None:
    """Show side by side how the model answers before and after training.

    TRAINED is a run's folder, an adapter, or a fully trained checkpoint. One model is in memory at a time; with an
    adapter, "before" is the same model without it. Without prompts, some of the run's held-out prompts are used, with
    exactly their token ids.

    In a run's folder the answers are saved as samples.jsonl, replacing earlier ones; `dpoeng report` shows them.
    """
    from dpoeng.cli.progress import TerminalProgress, importing

    with importing():
        from dpoeng.engine.recipes.compare import compare_prompts, keep_samples
        from dpoeng.engine.recipes.evaluate import find_trained

    given_prompts = [*prompts, *(read_prompts(file) if file else [])]
    trained = find_trained(path)
    overrides = given(options)
    if "view" in overrides:  # prompts of this view, not of the run's evaluation view
        overrides |= {"eval_view": None, "mix_with": (), "mix": None}
    answers = compare_prompts(
        trained,
        run_config(trained, overrides),
        given_prompts,
        count=count,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
    )
    if as_json:
        say_json(answers)
    else:
        say(generations_table(answers))
    keep_samples(trained, answers, TerminalProgress())


def read_prompts(file: Path) -> list[str]:
    """One prompt per line; empty lines are skipped.

    Raises:
        UserError: the file cannot be read, or has no prompt.
    """
    from dpoeng.cache.errors import UserError

    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "cannot read the file of prompts",
            code="data-unreadable",
            where=str(file),
            expected="a text file with one prompt per line",
            found=str(error),
            remedy="name another with --prompts",
            exit_status=3,
        ) from error
    if not any(lines):
        raise UserError(
            "the file contains no prompt",
            code="data-empty",
            where=str(file),
            expected="one prompt per line",
            remedy="write one, or leave --prompts out to use held-out prompts",
            exit_status=3,
        )
    return [line for line in lines if line]


def generations_table(answers: list[Generation]) -> Table:
    """Prompt and both answers, side by side."""
    rows: list[tuple[Cell, ...]] = []
    for one in answers:
        after = Marked("(the same)", "dim") if one.after == one.before else one.after.strip()
        rows.append((one.prompt.strip(), one.before.strip(), after))
    return Table(rows, ("prompt", "before", "after"), words=3, ruled=True)

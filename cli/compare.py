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
@click.option("--prompts", "file", type=click.Path(path_type=Path), help="A text file with a prompt a line.")
@click.option("--count", default=4, show_default=True, help="Without prompts: how many held-out prompts to use.")
@click.option(
    "--chat/--text",
    default=None,
    help="Whether given prompts are a user's messages for the chat template, or texts.  [default: messages if there is "
    "a template and phase one put no prompt_format around texts]",
)
@click.option("--max-new-tokens", default=128, show_default=True, help="Most tokens of an answer.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token; above 0 samples.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1 keeps small models from circling.")
@click.option("--stop", multiple=True, help="A text at which an answer ends; may be given several times.")
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

    TRAINED is a run's folder, an adapter's, or that of a checkpoint trained whole. One model is in memory at a time;
    with an adapter, before is the same model without it. Without prompts, some of those that the run held out are used,
    with just their token ids.

    In a run's folder the answers are kept as samples.jsonl, in place of earlier ones; `dpoeng report` shows them.
    """
    from dpoeng.cli.progress import TerminalProgress, importing

    with importing():
        from dpoeng.engine.recipes.compare import compare_prompts, keep_samples
        from dpoeng.engine.recipes.evaluate import find_trained

    given_prompts = [*prompts, *(read_prompts(file) if file else [])]
    trained = find_trained(path)
    overrides = given(options)
    if "view" in overrides:  # prompts of this view, not of the one that the run was evaluated on
        overrides |= {"eval_view": None, "mix_with": (), "mix": None}
    found = compare_prompts(
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
        say_json(found)
    else:
        say(generations_table(found))
    keep_samples(trained, found, TerminalProgress())


def read_prompts(file: Path) -> list[str]:
    """A prompt a line, empty lines left out.

    Raises:
        UserError: the file cannot be read, or holds none.
    """
    from dpoeng.cache.errors import UserError

    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "cannot read the file of prompts",
            code="data-unreadable",
            where=str(file),
            expected="a text file with a prompt a line",
            found=str(error),
            remedy="name another with --prompts",
            exit_status=3,
        ) from error
    if not any(lines):
        raise UserError(
            "the file holds no prompt",
            code="data-empty",
            where=str(file),
            expected="a prompt a line",
            remedy="write one, or leave --prompts out to use held-out prompts",
            exit_status=3,
        )
    return [line for line in lines if line]


def generations_table(found: list[Generation]) -> Table:
    """Prompt and both answers, side by side."""
    rows: list[tuple[Cell, ...]] = []
    for one in found:
        after = Marked("(the same)", "dim") if one.after == one.before else one.after.strip()
        rows.append((one.prompt.strip(), one.before.strip(), after))
    return Table(rows, ("prompt", "before", "after"), words=3, ruled=True)

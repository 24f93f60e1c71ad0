"""`dpoeng migrate`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpoeng.cache.errors import UserError
from dpoeng.cli.tables import as_data, json_option, say, say_json

if TYPE_CHECKING:
    from dpoeng.engine.migration.fields import Migration

EPILOG = """\b
Examples:
  dpoeng migrate train_dpo.py
  dpoeng migrate train_dpo.py --trl-version 0.11.4
  dpoeng migrate dpo_config.json --output dpoeng.yaml
  dpoeng migrate axolotl.yml --output -
  pbpaste | dpoeng migrate -
"""


@click.command("migrate", epilog=EPILOG)
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "--output",
    type=click.Path(path_type=Path, allow_dash=True),
    default=Path("dpoeng.yaml"),
    show_default=True,
    help="The file to write; - prints to stdout.",
)
@click.option(
    "--trl-version",
    help="Release of TRL that the script was written for; provides defaults for settings that the script omits.  "
    "[default: derived from the script's imports and calls]",
)
@click.option("--force", is_flag=True, help="Overwrite the output.")
@json_option
def migrate(file: Path, output: Path, trl_version: str | None, force: bool, as_json: bool) -> None:
    """Turn another trainer's script or configuration into a dpoeng.yaml.

    FILE is a TRL script (read, never run), a DPOConfig in JSON or YAML, or a DPO configuration of Axolotl or
    LLaMA-Factory; - reads stdin. A comment marks each line whose meaning changed. Settings without an equivalent are
    listed.
    """
    from dpoeng.engine.config.template import config_text, write_config
    from dpoeng.engine.migration.fields import KINDS
    from dpoeng.engine.recipes.migrate import migrate as read

    result = read(file, _text(file), trl_version)
    header = [f"Made by `dpoeng migrate` from {KINDS[result.kind]}."]
    for title, items in (("No equivalent:", result.lost), ("Notes:", result.notes)):
        header += [title, *(f"- {item}" for item in items)] if items else []
    text = config_text(result.lines, header=header, every_field=False)
    if str(output) == "-" and as_json:
        raise click.UsageError("--json and --output - would both write to stdout; name a file with --output")
    if str(output) == "-":
        say(text.removesuffix("\n"))
        return
    write_config(output, text, inputs=[file], force=force)
    say_json({"output": output, **as_data(result)}) if as_json else print_result(result, output)


def _text(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "cannot read the script or configuration",
            code="migrate-unreadable",
            where=str(file),
            found=getattr(error, "strerror", None) or str(error),
            expected="a text file: Python, JSON or YAML",
            remedy="name the script or configuration of the other trainer",
        ) from error


def print_result(result: Migration, output: Path) -> None:
    """Prints the number of migrated fields, the settings that were lost, and the next commands."""
    from dpoeng.engine.migration.fields import KINDS

    say(f"{output}: {len(result.lines)} fields from {KINDS[result.kind]}")
    for title, items in (
        (f"Why the newest TRL and transformers refuse it ({result.fits}):", result.refused),
        ("Not migrated, because it has no equivalent or is computed at run time:", result.lost),
        ("Notes:", result.notes),
    ):
        if items:
            say(f"\n{title}")
            for item in items:
                say(f"  - {item}")
    if result.needless:
        say(f"\nNot needed here: {', '.join(dict.fromkeys(result.needless))}")
    missing = [name for name in ("model", "pairs") if name not in result.lines]
    say("\nNext:" + (f" set {' and '.join(missing)} in {output}, then" if missing else ""))
    config = "" if str(output) == "dpoeng.yaml" else f" --config {shlex.quote(str(output))}"
    say(f"  dpoeng precompute-ref{config}")
    if result.eval_pairs:
        say(f"  dpoeng precompute-ref {shlex.join(result.eval_pairs)} --name eval{config}")
    say(f"  dpoeng train{config}")

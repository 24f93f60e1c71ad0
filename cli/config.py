"""`dpoeng config show` and `dpoeng config schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dpoeng.cli.options import ConfigCommand, config_options, given
from dpoeng.cli.tables import Cell, Marked, Table, json_option, say, say_json
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.config.files import config_schema, resolve
from dpoeng.engine.config.template import plain, sections

SHOW_EPILOG = """\b
Examples:
  dpoeng config show
  dpoeng config show --config other.yaml --beta 0.2
  dpoeng config show --json
"""

SCHEMA_EPILOG = """\b
Example:
  dpoeng config schema > dpoeng.schema.json
Editors with a YAML language server then complete and check a file that begins with
  # yaml-language-server: $schema=dpoeng.schema.json
"""


@click.group("config", invoke_without_command=True)
@click.pass_context
def config(ctx: click.Context) -> None:
    """Show the configuration with the origin of each value, and its schema."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@config.command("show", cls=ConfigCommand, epilog=SHOW_EPILOG)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file.  [default: dpoeng.yaml]")
@json_option
@config_options(PrecomputeConfig)
@config_options(TrainConfig, skip=frozenset(PrecomputeConfig.model_fields))
def show(config_file: Path | None, as_json: bool, **options: Any) -> None:
    """Print every field of both phases, its value, and the value's origin.

    Takes the options of both commands, so that you can try a command line without running anything.
    """
    settings = resolve(given(options), config_file)
    if as_json:
        fields: dict[str, dict[str, Any]] = {}
        for s in settings:
            fields.setdefault(s.command, {})[s.name] = {"value": plain(s.value), "origin": s.origin}
        say_json(fields)
        return

    by_name = {(s.command, s.name): s for s in settings}
    for command in dict.fromkeys(s.command for s in settings):
        rows: list[tuple[Cell, ...]] = []
        for heading, names in sections(command):
            rows.append((Marked(heading, "bold"), "", ""))
            for setting in (by_name[command, name] for name in names):
                cells = (f"  {setting.name}", in_words(setting.value), setting.origin)
                rows.append(tuple(Marked(cell, "dim") for cell in cells) if setting.origin == "default" else cells)
        say(Table(rows, ("field", "value", "from"), f"dpoeng {command}", words=3), "")


def in_words(value: Any) -> str:
    """A value as in the file; a dash if there is none."""
    if value is None or value in ((), {}):
        return "-"
    value = plain(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@config.command("schema", epilog=SCHEMA_EPILOG)
def schema() -> None:
    """Print the JSON Schema of dpoeng.yaml, for editors."""
    say_json(config_schema())

"""`dpoeng doctor`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

EPILOG = """\b
Examples:
  dpoeng doctor
  dpoeng doctor --cache refcache --output-dir out --online
  dpoeng doctor --json
"""

_SHOWN = {"ok": "[green]ok[/]", "info": "[cyan]info[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}
EXIT_FOUND = 5


@click.command("doctor", epilog=EPILOG)
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("refcache"), help="The reference cache's folder."
)
@click.option("--output-dir", type=click.Path(path_type=Path), default=Path("out"), help="Where training will write.")
@click.option("--online", is_flag=True, help="Try to reach the hub too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for a bug report.")
@click.option("--strict", is_flag=True, help="Fail on warnings too.")
def doctor(cache: Path, output_dir: Path, online: bool, as_json: bool, strict: bool) -> None:
    """Look whether this machine is ready: versions, GPU, libraries at work, memory, disk, folders.

    bitsandbytes and Triton compute something small, each in a process of its own. No network is used without --online.
    The exit status is 5 if something would fail, with --strict also if something is only not as it should be.
    """
    from dpoeng.engine.recipes.doctor import diagnose

    found = diagnose(cache, output_dir, online=online)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        from dpoeng.cache.words import counted

        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for _ in range(3):
            table.add_column(overflow="fold")
        for check in found.checks:
            table.add_row(_SHOWN[check.status], f"[bold]{escape(check.name)}[/]", escape(check.found))
            if check.status in ("warning", "error"):
                table.add_row("", "", f"→ {escape(check.remedy)}")
        console = Console(highlight=False)
        console.print(table)
        counts = {name: sum(check.status == name for check in found.checks) for name in ("error", "warning")}
        if counts["error"] or counts["warning"]:
            console.print(f"\n{counted(counts['error'], 'error')}, {counted(counts['warning'], 'warning')}")
        else:
            console.print("\n[green]ready[/]")
    if found.worst() == "error" or (strict and found.worst() == "warning"):
        sys.exit(EXIT_FOUND)

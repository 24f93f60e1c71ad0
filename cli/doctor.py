"""`dpoeng doctor`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dpoeng.cache.words import counted
from dpoeng.cli.tables import Cell, Marked, Table, json_option, say, say_json

EPILOG = """\b
Examples:
  dpoeng doctor
  dpoeng doctor --cache refcache --output-dir out --online
  dpoeng doctor --model sft-model
  dpoeng doctor --json
"""

EXIT_FOUND = 5


@click.command("doctor", epilog=EPILOG)
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("refcache"), help="The reference cache's folder."
)
@click.option("--output-dir", type=click.Path(path_type=Path), default=Path("out"), help="Where training will write.")
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A model's folder: measure how fast its files are read.",
)
@click.option("--online", is_flag=True, help="Also try to reach the model hub.")
@json_option
@click.option("--strict", is_flag=True, help="Exit with status 3 on warnings too.")
def doctor(cache: Path, output_dir: Path, model: Path | None, online: bool, as_json: bool, strict: bool) -> None:
    """Check that this machine is ready: versions, GPU, libraries, memory, disk, folders.

    bitsandbytes and Triton compute something small, each in a separate process. The speeds of copies from host memory
    to a GPU and of reading files are measured, for `dpoeng plan`. No network is used without --online. The exit status
    is 5 if something would fail, with --strict also for a warning.
    """
    from dpoeng.engine.recipes.doctor import diagnose

    diagnosis = diagnose(cache, output_dir, model=model, online=online)
    if as_json:
        say_json(diagnosis.as_dict())
    else:
        rows: list[tuple[Cell, ...]] = []
        for check in diagnosis.checks:
            rows.append((Marked(check.status, check.status), Marked(check.name, "bold"), check.found))
            if check.status in ("warning", "error"):
                rows.append(("", "", f"→ {check.remedy}"))
        say(Table(rows, words=3))
        counts = {name: sum(check.status == name for check in diagnosis.checks) for name in ("error", "warning")}
        if counts["error"] or counts["warning"]:
            say(f"\n{counted(counts['error'], 'error')}, {counted(counts['warning'], 'warning')}")
        else:
            say("\n", Marked("ready", "ok"))
    if diagnosis.worst() == "error" or (strict and diagnosis.worst() == "warning"):
        sys.exit(EXIT_FOUND)

"""`dpoeng report`."""

from __future__ import annotations

from pathlib import Path

import click

from dpoeng.cli.options import force_option
from dpoeng.cli.tables import json_option, say, say_json

EPILOG = """\b
Examples:
  dpoeng report out
  dpoeng report out --html run-7.html
"""


@click.command("report", epilog=EPILOG)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="The page.  [default: OUT/report.html]")
@force_option
@json_option
def report(out: Path, html: Path | None, force: bool, as_json: bool) -> None:
    """Write the run in OUT, the --output-dir of `dpoeng train`, as one HTML page.

    Curves, evaluations, warnings, configuration, hashes and versions, in one file that needs no network. A run that is
    still going can be looked at too.
    """
    from dpoeng.cache.words import counted
    from dpoeng.cli.pages.html import write_page
    from dpoeng.cli.pages.run import report_page
    from dpoeng.engine.runs.reading import read_run

    run = read_run(out)
    target = html or out / "report.html"
    inputs = [Path(name) for name in run.record.get("files") or {}]
    write_page(target, report_page(run), inputs=inputs, force=force)
    if as_json:
        say_json({"page": target, "runs": [{"folder": out, "steps": run.steps(), "complete": run.complete}]})
        return
    say(f"{counted(run.steps(), 'step')}, {'complete' if run.complete else 'not complete yet'}: {target}")

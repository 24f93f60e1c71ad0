"""`dpoeng report`."""

from __future__ import annotations

from pathlib import Path

import click

from dpoeng.cli.options import force_option
from dpoeng.cli.tables import json_option, say, say_json

TOGETHER = Path("runs.html")
"""Default file for several runs, since they have no common folder."""

EPILOG = """\b
Examples:
  dpoeng report out
  dpoeng report out --html run-7.html
  dpoeng report out-a out-b --html both.html --smoothing 20
"""


@click.command("report", epilog=EPILOG)
@click.argument("folders", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The page.  [default: OUT/report.html; for several runs {TOGETHER}]",
)
@click.option(
    "--smoothing",
    type=click.IntRange(1),
    metavar="STEPS",
    help="Steps of each curve's running mean; 1 draws none.  [default: a twentieth of a run of more than 60 steps]",
)
@force_option
@json_option
def report(folders: tuple[Path, ...], html: Path | None, smoothing: int | None, force: bool, as_json: bool) -> None:
    """Write the run in OUT, the --output-dir of `dpoeng train`, as one HTML page; or several runs together.

    Curves, evaluations, warnings, configuration, hashes and versions, in one file that needs no network. A run that is
    still going works, too. Several runs share each chart, with a table of the settings that differ.
    """
    from dpoeng.cache.words import counted
    from dpoeng.cli.pages.charts import CURVES
    from dpoeng.cli.pages.html import write_page
    from dpoeng.cli.pages.run import report_page
    from dpoeng.cli.pages.runs import runs_page
    from dpoeng.engine.runs.reading import read_run

    if len(folders) > CURVES:
        raise click.UsageError(f"{len(folders)} runs do not fit in one chart: name at most {CURVES}")
    runs = [read_run(folder) for folder in folders]
    target = html or (folders[0] / "report.html" if len(runs) == 1 else TOGETHER)
    content = report_page(runs[0], smoothing) if len(runs) == 1 else runs_page(runs, smoothing)
    inputs = [Path(name) for run in runs for name in run.record.get("files") or {}]
    write_page(target, content, inputs=inputs, force=force)
    if as_json:
        reports = [{"folder": run.folder, "steps": run.steps(), "complete": run.complete} for run in runs]
        say_json({"page": target, "runs": reports})
        return
    for run in runs:
        name = "" if len(runs) == 1 else f"{run.folder}: "
        say(f"{name}{counted(run.steps(), 'step')}, {'complete' if run.complete else 'not complete yet'}: {target}")

"""`dpoeng bench diff` and `dpoeng bench checks`: has anything become worse?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cli.bench.output import example

if TYPE_CHECKING:
    from rich.table import Table

    from dpoeng.bench.diff import Comparison, Figure

WORSE = 6
"""Exit status where a figure is worse than it was, or than it may be."""


@click.command(
    "diff",
    epilog=example(
        "dpoeng bench diff 5abe856 HEAD --results bench/results",
        "dpoeng bench diff before.jsonl after.jsonl --threshold 10",
    ),
)
@click.argument("before")
@click.argument("after")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("bench/results"),
    show_default=True,
    help="Where the records of commits are.",
)
@click.option(
    "--threshold", default=5.0, show_default=True, type=click.FloatRange(0), help="Per cent that must lie between."
)
@click.option("--anyway", is_flag=True, help="Compare where machine or settings differ too.")
@click.option("--all", "everything", is_flag=True, help="Show every figure, not only those that differ.")
@click.option("--json", "for_scripts", is_flag=True, help="JSON, for scripts.")
def diff(
    before: str, after: str, results: Path, threshold: float, anyway: bool, everything: bool, for_scripts: bool
) -> None:
    """What changed between two commits, or two files of records, by more than the repeats of each differ.

    BEFORE and AFTER are commits with records in --results, or files. The newest records of the same measurement, with
    the same settings on the same machine, are compared. Ends with status 6 if a figure is worse.
    """
    from rich.console import Console

    from dpoeng.bench.diff import compare_records, find_records

    found = compare_records(
        find_records(before, results), find_records(after, results), threshold=threshold / 100, anyway=anyway
    )
    if for_scripts:
        shown = [
            {
                "kind": comparison.before["kind"],
                "commits": [comparison.before["commit"], comparison.after["commit"]],
                "unlike": comparison.unlike,
                "figures": [asdict(difference) for difference in comparison.differences],
            }
            for comparison in found.comparisons
        ]
        told = {"comparisons": shown, "alone": found.alone, "worse": [d.name for d in found.worse]}
        click.echo(json.dumps(told, indent=2))
    else:
        console = Console(highlight=False)
        for comparison in found.comparisons:
            console.print(_table(comparison, everything=everything))
            for name, (one, two) in comparison.unlike.items():
                console.print(f"not the same: {name}: {one} and {two}", markup=False, soft_wrap=True)
        if found.alone:
            console.print(f"not compared: {', '.join(found.alone)}", markup=False, soft_wrap=True)
    if found.worse:
        raise SystemExit(WORSE)


def _table(comparison: Comparison, *, everything: bool) -> Table:
    from rich.table import Table

    one, two = comparison.before, comparison.after
    counts = dict.fromkeys(("worse", "better", "same", "not judged"), 0)
    for difference in comparison.differences:
        counts[difference.verdict] += 1
    table = Table(
        title=f"{one['kind']}: {one['commit'] or 'unknown'} of {one['date'][:16]} against {two['commit'] or 'unknown'} "
        f"of {two['date'][:16]}",
        title_justify="left",
        show_edge=False,
        caption=", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
        + ". Median, and range of the repeats.",
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("before", "after", "change", ""):
        table.add_column(heading, justify="right")
    colours = {"worse": "red", "better": "green"}
    for difference in comparison.differences:
        if everything or difference.verdict in colours:
            table.add_row(
                difference.name,
                _shown(difference.before),
                _shown(difference.after),
                f"{100 * difference.change:+.1f} %",
                difference.verdict,
                style=colours.get(difference.verdict, ""),
            )
    return table


def _shown(figure: Figure) -> str:
    scale, unit = (2**20, "MiB") if figure.unit == "bytes" else (1, figure.unit)
    numbers: list[Any] = [figure.median / scale, min(figure.values) / scale, max(figure.values) / scale]
    middle, low, high = (f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}" for value in numbers)
    return f"{middle} {unit}" + (f" ({low}–{high})" if len(figure.values) > 1 else "")


@click.command("checks", epilog=example("dpoeng bench checks"))
def checks() -> None:
    """A few ratios with wide limits, as the test suite watches them: time and memory against plain PyTorch; leaks.

    Takes seconds, on a small random model and one thread. Ends with status 6 if one is above its limit.
    """
    import tempfile

    from rich.console import Console
    from rich.table import Table

    from dpoeng.bench import checks

    with tempfile.TemporaryDirectory(prefix="dpoeng-bench-") as scratch, checks.subject(Path(scratch) / "model") as on:
        found = checks.run_checks(on)
    table = Table(title="checks", title_justify="left", show_edge=False)
    for heading in ("", "found", "at most", "", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    for check in found:
        table.add_row(
            check.name, f"{check.value:.3g}", f"{check.limit:g}", check.unit, "" if check.ok else "[red]too much[/]"
        )
    Console(highlight=False).print(table)
    if not all(check.ok for check in found):
        raise SystemExit(WORSE)

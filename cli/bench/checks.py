"""`dpoeng bench checks`: has anything become much worse?"""

from __future__ import annotations

from pathlib import Path

import click

from dpoeng.cli.bench.output import example

WORSE = 6
"""Exit status where a figure is worse than it may be."""


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

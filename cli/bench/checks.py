"""`dpoeng bench checks`: has anything become much worse?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpoeng.cache.words import number
from dpoeng.cli.bench.output import example
from dpoeng.cli.tables import Cell, Marked, Table, as_data, json_option, say, say_json

if TYPE_CHECKING:
    from dpoeng.bench.checks import Check

WORSE = 6
"""Exit status if a figure is above its limit."""


@click.command("checks", epilog=example("dpoeng bench checks"))
@json_option
def checks(as_json: bool) -> None:
    """Check a few ratios against wide limits, as the test suite does: time and memory against plain PyTorch; leaks.

    Takes seconds, on a small random model and one thread. The exit status is 6 if a ratio is above its limit.
    """
    import tempfile

    from dpoeng.bench import checks

    with tempfile.TemporaryDirectory(prefix="dpoeng-bench-") as scratch, checks.subject(Path(scratch) / "model") as on:
        results = checks.run_checks(on)
    if as_json:
        say_json([{**as_data(check), "ok": check.ok} for check in results])
    else:
        _print_checks(results)
    if not all(check.ok for check in results):
        raise SystemExit(WORSE)


def _print_checks(results: Sequence[Check]) -> None:
    rows: list[tuple[Cell, ...]] = [
        (
            check.name,
            number(check.value, 3),
            f"{check.limit:g}",
            check.unit,
            "" if check.ok else Marked("too much", "error"),
        )
        for check in results
    ]
    say(Table(rows, ("", "measured", "at most", "", ""), "checks"))

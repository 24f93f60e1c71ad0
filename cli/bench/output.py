"""The end of every `dpoeng bench` command: tables, the record, and a page if requested."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from dpoeng.cli.tables import json_option, say, say_json


class Outputs(NamedTuple):
    """Where a record goes, besides the terminal or instead of its tables; None means nowhere."""

    as_json: bool = False
    record: Path | None = None
    results: Path | None = None
    html: Path | None = None


def example(*lines: str) -> str:
    """The examples at the end of a help text."""
    return "\b\n" + ("Examples" if len(lines) > 1 else "Example") + ":\n" + "".join(f"  {line}\n" for line in lines)


def output_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of `Outputs`, which the command receives as one argument, `outputs`."""

    @functools.wraps(command)
    def with_outputs(*args: Any, **options: Any) -> None:
        outputs = Outputs(*(options.pop(name) for name in Outputs._fields))
        files = options.get("pairs")  # a number in two commands
        refuse_outputs(
            outputs, files if isinstance(files, tuple) else ()
        )  # fail before a measurement that may take hours
        command(*args, outputs=outputs, **options)

    path = click.Path(path_type=Path)
    for option in (
        click.option("--html", type=path, help="Also write the figures as one HTML page."),
        click.option("--results", type=path, help="Append the record to DIR/<what>-<cpu or gpu>.jsonl."),
        click.option("--record", type=path, help="Append the record, one line of JSON, to this file."),
        json_option,
    ):
        with_outputs = option(with_outputs)
    return with_outputs


def refuse_outputs(outputs: Outputs, inputs: Iterable[Path] = ()) -> None:
    """Raises UserError if the page or the records cannot be written as requested."""
    from dpoeng.bench.measuring.records import RECORDS
    from dpoeng.engine.runtime.outputs import PAGE, refuse_output

    if outputs.html:
        refuse_output(outputs.html, replace(PAGE, forced=False), inputs=inputs)
    if outputs.record:
        refuse_output(outputs.record, RECORDS, inputs=inputs)


def finish(records: Sequence[dict[str, Any]], outputs: Outputs) -> None:
    """Prints the tables or the records, saves the records, writes the page.

    Raises:
        UserError: the page cannot be written.
    """
    from dpoeng.bench.measuring.records import append
    from dpoeng.cli.bench.tables import tables_of
    from dpoeng.cli.pages.bench import bench_page
    from dpoeng.cli.pages.html import write_page

    for record in records:
        if not outputs.as_json:
            say(*tables_of(record))
        targets = [outputs.record] if outputs.record else []
        if outputs.results:
            targets.append(outputs.results / f"{record['kind']}-{record['device_kind'].lower()}.jsonl")
        for target in targets:
            append(record, target)
            say(f"Record appended to {target}", err=outputs.as_json)
    if outputs.html:
        write_page(outputs.html, bench_page(records))
        say(f"Page written to {outputs.html}", err=outputs.as_json)
    if outputs.as_json:
        say_json(records)

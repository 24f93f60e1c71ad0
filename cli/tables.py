"""One table type, and how commands print tables and sentences.

Everything here is plain text: nothing that a user named can become markup, an emoji or a terminal's escape sequence.
`say` writes to stdout for people, `say_json` for programs; `pages/html.py` draws the same tables on pages. Independent
of the contents.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text


class Marked(NamedTuple):
    """Emphasised text: bold, dim, or in the colour of a level (ok, info, warning, error)."""

    text: str
    style: str


Cell = str | Marked

_STYLES = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "red"}

# C0 and C1 controls except tab and line feed; marks that change the writing direction; line and paragraph separators.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of plain text.

    Attributes:
        columns: the headings; none for a list of facts, whose first column is then the label.
        rows: one cell per column.
        notes: sentences below the table.
        words: number of text columns, from the left; the others are numbers and right-aligned.
        ruled: draw lines between rows, and columns of equal width; for long texts side by side.
    """

    rows: Sequence[Sequence[Cell]]
    columns: Sequence[str] = ()
    title: str = ""
    notes: Sequence[Cell] = ()
    words: int = 1
    ruled: bool = False

    def __rich__(self) -> RichTable:
        """The drawn table: rich's `print` calls this."""
        return to_rich(self)


def facts_table(facts: Sequence[tuple[str, Cell]]) -> Table:
    """Label and text, one per line."""
    return Table(facts, words=2)


def visible(text: str) -> str:
    """The text with control characters escaped, so that `\\x1b[31m` is shown and has no effect."""
    return _HIDDEN.sub(lambda match: ascii(match[0])[1:-1], text)


def plain(cell: Cell) -> str:
    """The text of a cell."""
    return cell.text if isinstance(cell, Marked) else cell


def interval(bounds: Sequence[float] | None, form: str) -> str:
    """Both bounds in a format such as `.3f`; empty without an interval."""
    return f"{bounds[0]:{form}} to {bounds[1]:{form}}" if bounds else ""


def accuracy_line(evaluation: Mapping[str, Any]) -> str:
    """The accuracy in an evaluation's record, its interval and the number of pairs; or why there is none."""
    pairs, prompts = evaluation.get("pairs", 0), evaluation.get("prompts", 0)
    counts = f"n = {pairs:,} pairs" + (f" of {prompts:,} prompts" if prompts and prompts != pairs else "")
    if evaluation.get("ties") and evaluation["ties"] == pairs:
        return f"held-out accuracy: none yet, every margin is 0: the policy equals its reference ({counts})"
    name = "rewards/accuracies"
    bounds = interval(evaluation.get("intervals", {}).get(name), ".3f")
    value = evaluation.get("metrics", {}).get(name)
    if not bounds or value is None:
        return ""
    ties = f"; {evaluation['ties']:,} of them tied, counted as wrong" if evaluation.get("ties") else ""
    return f"held-out accuracy: {value:.3f}, 95 % interval {bounds} ({counts}{ties})"


def command_line(*words: object) -> Marked:
    """A dpoeng command line, quoted for a shell."""
    return Marked(shlex.join(["dpoeng", *map(str, words)]), "bold")


def training_command(cache: Path, rows: str, view: str | None = None) -> Marked:
    """The command that trains on rows of a kind; the default loss does not fit unpaired ones."""
    named = ("--view", view) if view is not None else ()
    return command_line("train", "--cache", cache, *named, *(("--loss-type", "kto") if rows == "unpaired" else ()))


def say(*parts: Cell | Table, err: bool = False) -> None:
    """Prints sentences made of parts, and tables, on stdout or stderr."""
    for is_table, group in itertools.groupby(parts, lambda part: isinstance(part, Table)):
        line = list(group)
        if not is_table and all(isinstance(part, str) for part in line):
            click.echo(visible("".join(map(str, line))), err=err)  # without rich, whose import takes time
            continue
        from rich.console import Console

        console = Console(stderr=err)
        for item in line if is_table else [to_text(*(part for part in line if not isinstance(part, Table)))]:
            console.print(item, soft_wrap=not is_table)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON value on stdout.")
"""For every command that ends in a table: it then calls `say_json` instead of `say`."""


def say_json(value: Any) -> None:
    """Prints a command's result as one JSON value (RFC 8259)."""
    click.echo(json.dumps(as_data(value), indent=2, allow_nan=False))


def as_data(value: Any) -> Any:
    """The value in JSON form: dataclasses as objects, paths and dates as text, NaN and infinities as null.

    Raises:
        TypeError: a part has no JSON form; this is a bug in dpoeng.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): as_data(item) for name, item in value.items()}
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes):
        return [as_data(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if hasattr(value, "tolist"):  # numpy's and torch's numbers and arrays
        return as_data(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def say_live(frames: Iterable[Sequence[Cell | Table]]) -> None:
    """Draws each frame in place of the previous one; the last one stays."""
    from rich.console import Console, Group
    from rich.live import Live

    with Live(console=Console(), auto_refresh=False, vertical_overflow="crop") as live:
        for frame in frames:
            live.update(Group(*(to_rich(p) if isinstance(p, Table) else to_text(p) for p in frame)), refresh=True)


def to_text(*cells: Cell) -> Text:
    """Cells as rich's text, which is never parsed for markup."""
    from rich.text import Text

    # rich measures a cell before it expands tabs, and would break the line
    styled = [(visible(plain(cell)).replace("\t", "    "), _style(cell)) for cell in cells]
    return Text.assemble(*styled)


def to_rich(table: Table) -> RichTable:
    """The table for a terminal."""
    from rich.table import Table as RichTable

    drawn = RichTable(
        title=to_text(table.title) if table.title else None,
        title_justify="left",
        caption=to_text(*table.notes) if table.notes else None,
        caption_justify="left",
        show_edge=table.ruled,
        pad_edge=table.ruled,
        show_lines=table.ruled,
    )
    if not table.columns:
        drawn.show_header, drawn.box, drawn.padding = False, None, (0, 2, 0, 0)
    width = len(table.columns) or max(map(len, table.rows), default=0)
    for number in range(width):
        drawn.add_column(
            to_text(table.columns[number]) if table.columns else "",
            justify="left" if number < table.words else "right",
            style="bold" if not table.columns and number == 0 else None,
            overflow="fold",
            ratio=1 if table.ruled else None,
        )
    for row in table.rows:
        drawn.add_row(*map(to_text, row))
    return drawn


def _style(cell: Cell) -> str:
    return _STYLES.get(cell.style, cell.style) if isinstance(cell, Marked) else ""

"""Progress on a terminal: bars where there is one, a line now and then where there is not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dpoeng.cli.tables import Cell, Marked, to_text, visible
from dpoeng.engine.runtime.progress import Advance

LINE_EVERY_S = 15.0


class TerminalProgress:
    """Draws `dpoeng.engine.runtime.progress` on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    def note(self, text: str) -> None:
        """A sentence for the user."""
        self._say(Marked("note:", "warning"), f" {text}")

    def _say(self, *cells: Cell) -> None:
        self._console.print(to_text(*cells), soft_wrap=True)

    @contextlib.contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """A piece of work. What an earlier run did counts for the share, not for the speed."""
        draw = self._bar if self._console.is_terminal else self._lines
        with draw(title, total, unit, done) as advance:
            yield advance

    @contextlib.contextmanager
    def _bar(self, title: str, total: int, unit: str, before: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
        )
        with Progress(*columns, console=self._console, transient=False) as bar:
            task = bar.add_task(visible(title), total=total, completed=before, rate="", shown="")
            began, done = time.perf_counter(), 0

            def advance(amount: int, shown: str) -> None:
                nonlocal done
                done += amount
                seconds = time.perf_counter() - began
                bar.update(task, advance=amount, shown=visible(shown), rate=rate(done, seconds, unit))

            yield advance

    @contextlib.contextmanager
    def _lines(self, title: str, total: int, unit: str, before: int) -> Iterator[Advance]:
        # First of all: what takes a minute should be seen to have begun.
        self._say(f"{title} ...")
        began = last = time.perf_counter()
        done = 0

        def advance(amount: int, shown: str) -> None:
            nonlocal done, last
            done += amount
            now = time.perf_counter()
            if now - last >= LINE_EVERY_S and before + done < total:
                last = now
                left = (now - began) * (total - before - done) / max(done, 1)
                share = f"{100 * (before + done) // max(total, 1)} %"
                self._say(f"{title}: {share}, {rate(done, now - began, unit)}, {left:.0f} s left  {shown}")

        yield advance
        seconds = time.perf_counter() - began
        if seconds >= 1:
            self._say(f"{title}: done in {seconds:.1f} s, {rate(done, seconds, unit)}")


def rate(done: int, seconds: float, unit: str) -> str:
    """`done` units in `seconds`, in words."""
    per_second = done / max(seconds, 1e-9)
    if unit == "B":
        return f"{per_second / 1e6:.0f} MB/s"
    return f"{per_second:,.0f} {unit}/s" if per_second >= 10 else f"{per_second:.2f} {unit}/s"

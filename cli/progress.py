"""Progress on a terminal: bars where there is one, a line now and then where there is not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dpoeng.engine.runtime.progress import Advance

LINE_EVERY_S = 15.0


class TerminalProgress:
    """Draws `dpoeng.engine.runtime.progress` on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    def note(self, text: str) -> None:
        """A sentence for the user."""
        self._console.print(f"[yellow]note:[/] {escape(text)}", highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """A piece of work. What an earlier run did counts for the share, not for the speed."""
        draw = self._bar if self._console.is_terminal else self._lines
        with draw(title, total, unit, done) as advance:
            yield advance

    @contextlib.contextmanager
    def _bar(self, title: str, total: int, unit: str, before: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        with Progress(*columns, console=self._console, transient=False) as bar:
            task = bar.add_task(title, total=total, completed=before, rate="", shown="")
            began, done = time.perf_counter(), 0

            def advance(amount: int, shown: str) -> None:
                nonlocal done
                done += amount
                seconds = time.perf_counter() - began
                bar.update(task, advance=amount, shown=shown, rate=rate(done, seconds, unit))

            yield advance

    @contextlib.contextmanager
    def _lines(self, title: str, total: int, unit: str, before: int) -> Iterator[Advance]:
        # First of all: what takes a minute should be seen to have begun.
        self._console.print(f"{title} ...", highlight=False, soft_wrap=True)
        began = last = time.perf_counter()
        done = 0

        def advance(amount: int, shown: str) -> None:
            nonlocal done, last
            done += amount
            now = time.perf_counter()
            if now - last >= LINE_EVERY_S and before + done < total:
                last = now
                left = (now - began) * (total - before - done) / max(done, 1)
                self._console.print(
                    f"{title}: {100 * (before + done) // max(total, 1)} %, {rate(done, now - began, unit)}, "
                    f"{left:.0f} s left  {shown}",
                    highlight=False,
                    soft_wrap=True,
                )

        yield advance
        seconds = time.perf_counter() - began
        if seconds >= 1:
            self._console.print(
                f"{title}: done in {seconds:.1f} s, {rate(done, seconds, unit)}", highlight=False, soft_wrap=True
            )


def rate(done: int, seconds: float, unit: str) -> str:
    """`done` units in `seconds`, in words."""
    per_second = done / max(seconds, 1e-9)
    if unit == "B":
        return f"{per_second / 1e6:.0f} MB/s"
    return f"{per_second:,.0f} {unit}/s" if per_second >= 10 else f"{per_second:.2f} {unit}/s"

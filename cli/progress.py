"""Progress output: a bar on a terminal, otherwise a line from time to time.

Both show done and total, the share, time passed and left, and speed. On a terminal the work's current figures are on a
second line, so that the bar fits into 80 columns.
"""

from __future__ import annotations

import collections
import contextlib
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator

import click
from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from dpoeng.cli.tables import Cell, Marked, to_text, visible
from dpoeng.engine.runtime.progress import Advance

LINE_EVERY_S = 30.0

_WINDOW = 20  # number of reports for the remaining time: enough to be steady, few enough to follow changes
_BAR = (8, 24)  # columns, at least and at most
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@contextlib.contextmanager
def importing(after_s: float = 2.0) -> Iterator[None]:
    """Says that libraries are being loaded if the block takes longer, as torch and transformers do on a busy disk."""
    timer = threading.Timer(after_s, lambda: click.echo("loading libraries ...", err=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Pace:
    """Progress of a task: done, share, time passed and left, speed. Work of an earlier run does not count as speed."""

    def __init__(self, total: int, unit: str, before: int = 0) -> None:
        self.total, self.unit, self.before, self.done = total, unit, before, 0
        self.began = time.perf_counter()
        self._reports: collections.deque[tuple[float, int]] = collections.deque([(self.began, 0)], maxlen=_WINDOW)

    def advance(self, amount: int) -> None:
        """Adds work done. An amount of 0 only updates the figures of a long unit, and does not affect the speed."""
        if amount:
            self.done += amount
            self._reports.append((time.perf_counter(), self.done))

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began

    def left(self) -> float | None:
        """Seconds left at the recent speed, counting down between reports; None before the first report."""
        (first, done_first), (last, done_last) = self._reports[0], self._reports[-1]
        if done_last == done_first:
            return None
        rest = (self.total - self.before - self.done) * (last - first) / (done_last - done_first)
        return max(0.0, rest - (time.perf_counter() - last))

    def facts(self) -> list[str]:
        """`3/6`, `50 %`, `1:30 passed`, `1:30 left`, `30.0 s/step`."""
        whole = self.before + self.done
        left = self.left()
        return [
            _of(whole, self.total, self.unit),
            f"{100 * whole // max(self.total, 1)} %",
            f"{clock(self.elapsed())} passed",
            f"{clock(left) if left is not None else '?'} left",
            *([rate(self.done, self._reports[-1][0] - self.began, self.unit)] if self.done else []),
        ]


class TerminalProgress:
    """Draws `dpoeng.engine.runtime.progress` on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    def note(self, text: str) -> None:
        """Prints a sentence for the user."""
        sentence = f"note: {text}"
        if self._console.is_terminal:  # rich would break a path wider than the terminal; here it stays in one piece
            width = self._console.width
            sentence = textwrap.fill(sentence, width, break_long_words=False, break_on_hyphens=False)
        self._say(Marked("note:", "warning"), sentence.removeprefix("note:"))

    def _say(self, *cells: Cell) -> None:
        self._console.print(to_text(*cells), soft_wrap=True)

    @contextlib.contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Shows a task. Work of an earlier run counts for the share, not for the speed."""
        draw = self._bar if self._console.is_terminal else self._lines
        with draw(title, Pace(total, unit, done)) as advance:
            yield advance

    @contextlib.contextmanager
    def _bar(self, title: str, pace: Pace) -> Iterator[Advance]:
        with _Bar(_Line(self._console, visible(title), pace), console=self._console, transient=False) as bar:
            task = bar.add_task("", total=pace.total, shown="")

            def advance(amount: int, shown: str) -> None:
                pace.advance(amount)
                bar.update(task, completed=pace.before + pace.done, shown=visible(shown))

            yield advance

    @contextlib.contextmanager
    def _lines(self, title: str, pace: Pace) -> Iterator[Advance]:
        # Print at once, so that a long task is visible from its start.
        self._say(f"{title} ...")
        last = pace.began

        def advance(amount: int, shown: str) -> None:
            nonlocal last
            pace.advance(amount)
            now = time.perf_counter()
            if now - last >= LINE_EVERY_S and pace.before + pace.done < pace.total:
                last = now
                self._say(f"{title}: {', '.join(pace.facts())}  {shown}".rstrip())

        yield advance
        seconds = pace.elapsed()
        if seconds >= 1:
            self._say(f"{title}: done in {clock(seconds)}, {rate(pace.done, seconds, pace.unit)}")


class _Bar(Progress):
    """A bar, and below it the figures of the work, cut at the terminal's width."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """See rich."""
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields.get("shown"):
                yield Text(f"  {task.fields['shown']}", no_wrap=True, overflow="ellipsis", style="dim")


class _Line(ProgressColumn):
    def __init__(self, console: Console, title: str, pace: Pace) -> None:
        super().__init__()
        self._console, self._title, self._pace = console, title, pace

    def render(self, task: Task) -> Text:
        """See rich."""
        del task
        return Text(bar_line(self._title, self._pace, self._console.width), no_wrap=True, overflow="ellipsis")


def bar_line(title: str, pace: Pace, width: int) -> str:
    """Title, bar and facts in `width` columns; shortens the title first, then the bar."""
    facts = "  ".join(pace.facts())
    room = width - len(facts) - 4
    if len(title) > max(room - _BAR[0], 12):
        title = title[: max(room - _BAR[0], 12) - 1] + "…"
    columns = max(0, min(_BAR[1], room - len(title)))
    full = columns * (pace.before + pace.done) // max(pace.total, 1)
    bar = "━" * full + "─" * (columns - full)
    return "  ".join(part for part in (title, bar, facts) if part)


def clock(seconds: float) -> str:
    """`45 s`, `1:30` (minutes) or `2:05:00`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def rate(done: int, seconds: float, unit: str) -> str:
    """The speed in words: units per second, or seconds per unit if below one."""
    per_second = done / max(seconds, 1e-9)
    if unit == "B":
        return f"{_bytes(per_second)}/s"
    if per_second >= 10:
        return f"{per_second:,.0f} {unit}/s"
    if per_second >= 1 or not done:
        return f"{per_second:.1f} {unit}/s"
    return f"{1 / per_second:.1f} s/{unit.removesuffix('s')}"


def _of(done: int, total: int, unit: str) -> str:
    return f"{_bytes(done)}/{_bytes(total)}" if unit == "B" else f"{done:,}/{total:,}"


def _bytes(count: float) -> str:
    for size, name in _UNITS:
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:.0f} B"

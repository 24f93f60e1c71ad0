"""Progress reports of long work. The engine prints nothing: callers pass a `Progress` to see them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

Advance = Callable[[int, str], None]
"""Called with the amount of work done since the last call and a short text of current figures."""


class Progress(Protocol):
    """Interface for progress. The command line draws bars, tests collect events, a notebook may do either."""

    def task(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Advance]:
        """Begins a task of `total` units, of which an earlier run did `done`; the task ends with the context."""
        ...

    def note(self, text: str) -> None:
        """Reports one sentence that the user should read."""
        ...


class NoProgress:
    """Reports nothing."""

    def task(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Advance]:
        """See `Progress.task`."""
        del title, total, unit, done
        return contextlib.nullcontext(lambda amount, shown: None)

    def note(self, text: str) -> None:
        """See `Progress.note`."""


QUIET = NoProgress()

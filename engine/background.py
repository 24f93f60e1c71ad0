"""Work that goes on beside the training: a piece at a time, in a thread; its error is raised where it is waited for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """Does pieces of work in the order in which they are given; at once where it is not `threaded`, or was left.

    A piece waits for the one before, so that at most one is on its way. Leaving the context waits too, for whatever
    reason it is left: an exception, Ctrl-C, SIGTERM.
    """

    def __init__(self, *, threaded: bool, tell: Callable[[str], None] = lambda _: None) -> None:
        self._pool = ThreadPoolExecutor(1, "background") if threaded else None
        self._tell = tell
        self._going: Future[object] | None = None

    def do(self, work: Callable[[], object]) -> None:
        """Waits for the piece before, then begins this one. Raises what the piece before raised."""
        self.wait()
        if self._pool is None:
            work()
        else:
            self._going = self._pool.submit(work)

    def check(self) -> None:
        """Raises what a piece that has ended raised; waits for nothing."""
        if self._going is not None and self._going.done():
            self.wait()

    def wait(self) -> None:
        """Waits until nothing is on its way. Raises what it raised."""
        if self._going is not None:
            try:
                self._going.result()
            finally:
                self._going = self._going if not self._going.done() else None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as late:
            if error is None:
                raise
            self._tell(f"and in the background: {late}")  # what ends the run is the earlier error
        finally:
            if self._pool is not None:
                self._pool.shutdown()
            self._pool = None

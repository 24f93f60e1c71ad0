"""Delays signals that ask the process to end (SIGTERM, Slurm's SIGUSR1) until the work reaches a safe point.

There the work saves its state, then passes the signal to the previous handler: the command line exits with a message,
a user's program does what it would do. A second signal of the same kind is passed on at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(slots=True)
class Kept:
    """The pending signal; 0 if there is none.

    `hand_on` passes it to its previous handler, which usually does not return.
    """

    number: int = 0
    hand_on: Callable[[int], None] = lambda number: None


@contextlib.contextmanager
def keeping_signals() -> Iterator[Kept]:
    """Delays signals while the block runs; a pending one is passed on at its end.

    Ignored signals stay ignored. Only the main thread delays signals, because Python runs handlers only there.
    """
    pending = Kept()
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}

    def keep(number: int, _: object) -> None:
        if pending.number == number:
            hand_on(number)
        else:
            pending.number = pending.number or number

    def hand_on(number: int) -> None:
        pending.number = 0
        signal.signal(number, handlers.get(signal.Signals(number), signal.SIG_DFL))
        signal.raise_signal(number)
        signal.signal(number, keep)  # the handler returned, so the work continues

    pending.hand_on = hand_on
    for number in handlers:
        signal.signal(number, keep)
    try:
        yield pending
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if pending.number:
            signal.raise_signal(pending.number)

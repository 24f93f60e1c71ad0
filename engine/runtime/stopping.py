"""Signals that ask a process to end (SIGTERM, and SIGUSR1 of Slurm's `--signal`), kept until a clean point of the work.

There the work first saves what it has, then the signal is handed to whoever handled it before: the command line ends
with a message, a program of the user's with what it does itself. The same signal once more is handed on at once.
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
    """A signal that has come; 0 if none has.

    `hand_on` gives it to its former handler, which usually does not return.
    """

    number: int = 0
    hand_on: Callable[[int], None] = lambda number: None


@contextlib.contextmanager
def keeping_signals() -> Iterator[Kept]:
    """Keep the signals for as long as the block lasts; one that is left over is handed on at its end.

    A signal that is ignored stays so. In another thread than the main one nothing is kept: Python handles them there.
    """
    kept = Kept()
    if threading.current_thread() is not threading.main_thread():
        yield kept
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}

    def keep(number: int, _: object) -> None:
        if kept.number == number:
            hand_on(number)
        else:
            kept.number = kept.number or number

    def hand_on(number: int) -> None:
        kept.number = 0
        signal.signal(number, handlers.get(signal.Signals(number), signal.SIG_DFL))
        signal.raise_signal(number)
        signal.signal(number, keep)  # its handler has returned, so the work goes on

    kept.hand_on = hand_on
    for number in handlers:
        signal.signal(number, keep)
    try:
        yield kept
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if kept.number:
            signal.raise_signal(kept.number)

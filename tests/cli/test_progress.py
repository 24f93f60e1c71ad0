"""Progress where there is no terminal: lines whose share, speed and time left can be checked."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.console import Console

from dpoeng.cli import progress as module
from dpoeng.cli.progress import TerminalProgress, rate


def test_a_resumed_task_counts_its_share_but_not_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 of 20 steps were done before; two more take 20 s each: 60 % and 0.05 steps/s, so 160 s are left."""
    clock = itertools.count(0.0, 20.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    output = io.StringIO()
    with TerminalProgress(Console(file=output, width=200)).task("training", 20, "steps", 10) as advance:
        advance(1, "loss 0.69")
        advance(1, "loss 0.68")
    lines = output.getvalue().splitlines()
    assert lines[0] == "training ..."
    assert lines[1] == "training: 55 %, 0.05 steps/s, 180 s left  loss 0.69"
    assert lines[2] == "training: 60 %, 0.05 steps/s, 160 s left  loss 0.68"
    assert lines[3] == "training: done in 60.0 s, 0.03 steps/s"


def test_what_takes_long_is_seen_to_have_begun() -> None:
    output = io.StringIO()
    with TerminalProgress(Console(file=output, width=120)).task("loading the base", 8, "B"):
        assert output.getvalue() == "loading the base ...\n"


def test_a_bar_on_a_terminal_ends_full() -> None:
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=True)
    with TerminalProgress(console).task("reference log-probs", 8, "tokens", 4) as advance:
        advance(4, "3 of 3 pairs")
    assert "100%" in output.getvalue()
    assert "3 of 3 pairs" in output.getvalue()


def test_rates_in_words() -> None:
    assert rate(3_000_000, 1.5, "B") == "2 MB/s"
    assert rate(1234, 1, "tokens") == "1,234 tokens/s"
    assert rate(1, 4, "steps") == "0.25 steps/s"


def test_notes_go_to_the_same_place() -> None:
    output = io.StringIO()
    """On one line, whatever its length, and with what stands in brackets."""
    TerminalProgress(Console(file=output, width=20)).note("object [x] was damaged and set aside")
    assert output.getvalue() == "note: object [x] was damaged and set aside\n"

"""Progress where there is no terminal: lines whose share, speed and time left can be checked."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from dpoeng.cli import progress as module
from dpoeng.cli.progress import Pace, TerminalProgress, bar_line, clock, importing, rate


def test_a_resumed_task_counts_its_share_but_not_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 of 20 steps were done before; two more take 40 s each, so 8 times 40 s are left."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    output = io.StringIO()
    with TerminalProgress(Console(file=output, width=200)).task("training", 20, "steps", 10) as advance:
        for figures in ("loss 0.69", "loss 0.68"):
            now[0] += 40.0
            advance(1, figures)
    lines = output.getvalue().splitlines()
    assert lines == [
        "training ...",
        "training: 11/20, 55 %, 40 s passed, 6:00 left, 40.0 s/step  loss 0.69",
        "training: 12/20, 60 %, 1:20 passed, 5:20 left, 40.0 s/step  loss 0.68",
        "training: done in 1:20, 40.0 s/step",
    ]


def test_no_line_without_a_terminal_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a second, for 100 s: three lines, half a minute apart."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    output = io.StringIO()
    with TerminalProgress(Console(file=output, width=200)).task("training", 200, "steps") as advance:
        for _ in range(100):
            now[0] += 1.0
            advance(1, "")
    lines = [line for line in output.getvalue().splitlines() if "passed" in line]
    assert lines == [
        "training: 30/200, 15 %, 30 s passed, 2:50 left, 1.0 steps/s",
        "training: 60/200, 30 %, 1:00 passed, 2:20 left, 1.0 steps/s",
        "training: 90/200, 45 %, 1:30 passed, 1:50 left, 1.0 steps/s",
    ]


def test_a_bar_of_80_columns_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with steps of 30 s, and while one of them still runs; figures are on a separate line."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    pace = Pace(6, "steps")
    assert bar_line("training", pace, 80) == f"training  {'─' * 24}  0/6  0 %  0 s passed  ? left"
    for _ in range(3):
        now[0] += 30.0
        pace.advance(1)
    line = bar_line("training", pace, 80)
    assert line == f"training  {'━' * 11}{'─' * 11}  3/6  50 %  1:30 passed  1:30 left  30.0 s/step"
    assert len(line) <= 80
    now[0] += 20.0
    assert "1:10 left" in bar_line("training", pace, 80)
    now[0] += 200.0
    assert "0 s left" in bar_line("training", pace, 80)
    for title in ("comparing the policy with the cache", "x" * 200):
        short = bar_line(title, pace, 80)
        assert len(short) <= 80
        assert "3/6  50 %" in short
        assert "30.0 s/step" in short


def test_the_figures_stand_under_the_bar_and_notes_break_between_words() -> None:
    output = io.StringIO()
    shown = TerminalProgress(Console(file=output, width=80, force_terminal=True, color_system=None))
    with shown.task("training", 6, "steps") as advance:
        advance(3, "loss 0.6931, accuracy 0.500, margin 0.000, learning rate 1e-5, gradient norm 12.5 and more yet")
    assert any("3/6" in line and "50 %" in line and "━" in line for line in output.getvalue().splitlines())
    assert any(line.lstrip("\x1b[2K").strip().startswith("loss 0.6931") for line in output.getvalue().splitlines())
    output.truncate(0)
    output.seek(0)
    path = "/a/very/long/path" * 6
    shown.note(f"the checkpoint that was found in the folder of this run is damaged, see {path} for it")
    lines = [line.strip() for line in output.getvalue().splitlines()]
    assert lines[0].endswith(" see")
    assert any(path in line for line in lines)


def test_long_work_shows_that_it_has_begun() -> None:
    output = io.StringIO()
    with TerminalProgress(Console(file=output, width=120)).task("loading the base", 8, "B"):
        assert output.getvalue() == "loading the base ...\n"


def test_slow_imports_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with importing(60.0):
        pass
    assert capsys.readouterr().err == ""
    with importing(0.01):
        time.sleep(0.3)
    assert capsys.readouterr().err == "loading libraries ...\n"


def test_a_bar_on_a_terminal_ends_full() -> None:
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=True)
    with TerminalProgress(console).task("reference log-probs", 8, "tokens", 4) as advance:
        advance(4, "3 of 3 pairs")
    assert "8/8  100 %" in output.getvalue()
    assert "3 of 3 pairs" in output.getvalue()


def test_rates_in_words() -> None:
    assert rate(3_000_000, 1.5, "B") == "2 MB/s"
    assert rate(152_504_000_000, 1, "B") == "153 GB/s"
    assert rate(1234, 1, "tokens") == "1,234 tokens/s"
    assert rate(5, 2, "steps") == "2.5 steps/s"
    assert rate(1, 4, "steps") == "4.0 s/step"
    assert [clock(s) for s in (5, 90, 7500)] == ["5 s", "1:30", "2:05:00"]


def test_notes_go_to_the_same_place() -> None:
    output = io.StringIO()
    """On one line, whatever its length, and with what stands in brackets."""
    TerminalProgress(Console(file=output, width=20)).note("object [x] was damaged and set aside")
    assert output.getvalue() == "note: object [x] was damaged and set aside\n"

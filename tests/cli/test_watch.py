"""`dpoeng watch`: a run as it stands, until it ends, from any shell; and nothing in its folder is touched."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dpoeng_testing import pair_rows, tree, write_jsonl

from dpoeng.cli.main import main
from dpoeng.cli.pages.run import figure
from dpoeng.cli.runs import watch as module
from dpoeng.cli.runs.watch import frame, look, sparkline, standing
from dpoeng.cli.tables import Table, plain
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs.lock import LOCK_FILE, holding


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    root = tmp_path_factory.mktemp("watch")
    pairs = write_jsonl(root / "pairs.jsonl", pair_rows(16))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=root / "cache"))
    train(TrainConfig(cache=root / "cache", output_dir=root / "out", max_steps=6, learning_rate=1e-3, eval_steps=3))
    return root / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))


def cut(out: Path, steps: int) -> Callable[[], None]:
    """Takes the run back to its first steps; returns what puts the next step back."""
    logs = {}
    for name in ("metrics.jsonl", "timings.jsonl", "evaluations.jsonl"):
        lines = (out / name).read_text().splitlines(keepends=True)
        logs[name] = [line for line in lines if json.loads(line)["step"] > steps]
        (out / name).write_text("".join(line for line in lines if json.loads(line)["step"] <= steps))

    def go_on() -> None:
        step = min(json.loads(lines[0])["step"] for lines in logs.values() if lines)
        for name, lines in logs.items():
            while lines and json.loads(lines[0])["step"] <= step:
                with (out / name).open("a") as file:
                    file.write(lines.pop(0))

    return go_on


def test_it_follows_a_run_to_its_end(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look shows a step more; the run ends when its lock is gone, and then the drawing ends too."""
    go_on = cut(out, 2)
    shutil.move(out / "adapter", out.parent / "adapter")
    titles, bars = [], []
    with holding(out):
        looks = 0

        def sleep(seconds: float) -> None:
            nonlocal looks
            assert seconds == 0.5
            looks += 1
            if looks <= 4:
                go_on()
            else:
                shutil.move(out.parent / "adapter", out / "adapter")
                (out / LOCK_FILE).unlink()

        monkeypatch.setattr(module.time, "sleep", sleep)
        for parts in module._frames(out, 0.5):
            titles.append(plain(parts[0]))
            bars.append(str(parts[1]))
    assert [title.rsplit(", ", 1)[1] for title in titles] == ["running"] * 5 + ["complete"]
    assert [re.search(r"step (\d) of 6, (\d+) %", bar).groups() for bar in bars] == [  # type: ignore[union-attr]
        ("2", "33"), ("3", "50"), ("4", "66"), ("5", "83"), ("6", "100"), ("6", "100"),
    ]  # fmt: skip
    assert all(" left" in bar for bar in bars[:-1])
    assert " left" not in bars[-1]


def test_states_of_a_run(out: Path, tmp_path: Path) -> None:
    assert look(out)[0] == "complete"
    shutil.rmtree(out / "adapter")
    assert look(out)[0] == "stopped"
    with holding(out):
        assert look(out)[0] == "running"
        (out / LOCK_FILE).write_text("process 1 on another-machine\n")
        assert look(out)[0] == "running", "a process that cannot be asked counts as one that works"
        (out / LOCK_FILE).write_text(f"process 999999999 on {os.uname().nodename}\n")
        assert look(out)[0] == "stopped", "a killed run leaves its lock file behind"
    with holding(tmp_path / "new"):
        assert look(tmp_path / "new") == ("loading", None)
        assert standing(tmp_path / "new")["state"] == "loading"


def test_what_is_shown_fits_the_terminal_and_agrees_with_the_records(out: Path) -> None:
    state, run = look(out)
    assert run is not None
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    peak = max(line["peak_bytes"] for line in timings)
    assert 2**26 < peak < 2**36
    found = standing(out)
    assert (found["step"], found["total_steps"], found["seconds_left"], found["peak_bytes"]) == (6, 6, None, peak)
    assert found["last"] == json.loads((out / "metrics.jsonl").read_text().splitlines()[-2 if run.evaluations else -1])
    for width in (40, 56, 60, 80, 200):
        parts = frame(out, state, run, width=width)
        table = next(part for part in parts if isinstance(part, Table) and part.columns)
        widths = [max(len(plain(row[k])) for row in [*table.rows, table.columns]) for k in range(len(table.columns))]
        assert sum(widths) + 3 * (len(widths) - 1) + 2 <= width, "no word is broken"
        assert ("training" in table.columns) == (width > 50)
        assert len(str(parts[1])) <= width
        assert [row[0] for row in table.rows][:3] == ["loss", "rewards/margins", "rewards/accuracies"]


def test_without_a_terminal_it_tells_once_and_touches_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(out)
    with holding(out):
        inside = tree(out)
        with pytest.raises(SystemExit) as stop:
            main(["watch", str(out)])
        assert tree(out) == inside
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"{out}, running\n" in said
    assert "step 6 of 6, 100 %" in said
    assert "held-out accuracy" in said
    assert tree(out) == before


def test_a_figure_that_rounds_to_zero_has_no_sign() -> None:
    assert [figure("rewards/margins", value) for value in (-1e-5, 0.0, -0.001)] == ["0.000", "0.000", "-0.001"]


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0, 1.0], 8) == "▁▁▁"
    assert sparkline([0.0, float("nan"), 1.0], 3) == "▁ █"
    assert len(sparkline(list(range(1000)), 40)) == 40
    assert sparkline([], 10) == ""


@pytest.mark.slow  # two processes, one of which trains
def test_from_another_shell_while_it_trains(finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from dpoeng.cli.main import main; main()"]
    cache, out = finished.parent / "cache", tmp_path / "live"
    options = ["--cache", str(cache), "--output-dir", str(out), "--max-steps", "150"]
    training = subprocess.Popen([*command, "train", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (out / LOCK_FILE).is_file():
            assert training.poll() is None
            time.sleep(0.05)
        outside, inside = pty.openpty()
        watching = subprocess.Popen([*command, "watch", str(out), "--every", "0.2"], stdout=inside, stderr=inside)
        os.close(inside)
        said = b""
        while True:
            try:
                if not (read := os.read(outside, 4096)):
                    break
            except OSError:  # how Linux tells that the other end is closed
                break
            said += read
        assert watching.wait(60) == 0
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
        assert len(set(re.findall(r"step (\d+) of 150", text))) > 3, "it was drawn while the run went on"
        assert f"{out}, complete" in text.replace("\r\n", "")
        os.close(outside)
    finally:
        training.wait(120)
    assert training.returncode == 0

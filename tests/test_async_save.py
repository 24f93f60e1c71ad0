"""Checkpoints written in the background: an exact snapshot, one at a time; a kill or a full disk costs one at most."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import pair_rows, tree, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.engine import background as background_module
from dpoeng.engine import checkpoint as checkpoint_module
from dpoeng.engine import loop as loop_module
from dpoeng.engine.background import Background
from dpoeng.engine.config import PrecomputeConfig, TrainConfig
from dpoeng.engine.precompute import precompute_reference
from dpoeng.engine.train import train

SETTINGS: dict[str, Any] = {
    "max_steps": 8,
    "save_steps": 2,
    "save_total_limit": 9,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "lora_r": 2,
    "lora_dropout": 0.1,
    "loss_type": ("bco_pair",),
    "bco_reward_shift": True,  # state of the losses that changes from step to step
    "eval_share": 0.2,
    "eval_steps": 4,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("async")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(14))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def config(cache: Path, out: Path, **fields: Any) -> TrainConfig:
    return TrainConfig(cache=cache, output_dir=out, **{**SETTINGS, **fields})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, str]:
    """What the run leaves that waits for its checkpoints."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(config(cache, out))
    return left_by(out)


def left_by(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(out).items() if name not in ("timings.jsonl", "run.json")}


def test_bytes_are_those_of_the_step_however_late_they_are_written(
    tmp_path: Path, cache: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread begins only when the optimizer has gone on by a step: whatever it still read then would be wrong."""
    begun, gone_on, alone, real_step = (
        threading.Event(),
        threading.Semaphore(0),
        threading.Lock(),
        loop_module.train_step,
    )
    late = []

    class Late(ThreadPoolExecutor):
        def submit(self, work: Any) -> Any:  # type: ignore[override]
            def later() -> None:
                assert alone.acquire(blocking=False), "two checkpoints at once"
                late.append(gone_on.acquire(timeout=60))
                work()
                alone.release()

            begun.set()
            return super().submit(later)

    def step(*arguments: Any) -> Any:
        done = real_step(*arguments)
        if begun.is_set():
            begun.clear()
            gone_on.release()
        return done

    monkeypatch.setattr(background_module, "ThreadPoolExecutor", Late)
    monkeypatch.setattr(loop_module, "train_step", step)
    train(config(cache, tmp_path / "out", async_save=True))
    assert late == [True] * 3, "after steps 2, 4 and 6; the last one is waited for"
    assert left_by(tmp_path / "out") == whole


def test_an_error_of_the_writer_ends_the_run_and_costs_one_checkpoint(
    tmp_path: Path, cache: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write, real_step, failed, done = checkpoint_module.write_durably, loop_module.train_step, threading.Event(), []

    def full(path: Path, data: bytes) -> None:
        if "checkpoint-00000004" in str(path):
            failed.set()
            raise OSError(28, "No space left on device")
        real_write(path, data)

    def step(run: Any, number: int) -> Any:
        if number >= 4:
            assert failed.wait(60)
            time.sleep(0.05)  # the thread ends after it has raised
        done.append(number)
        return real_step(run, number)

    monkeypatch.setattr(checkpoint_module, "write_durably", full)
    monkeypatch.setattr(loop_module, "train_step", step)
    with pytest.raises(UserError, match="No space left on device") as caught:
        train(config(cache, tmp_path / "out", async_save=True))
    assert caught.value.code == "output-unwritable"
    assert done == [0, 1, 2, 3, 4], "it is noticed at the end of the step, not at the end of the run"
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-00000002"]
    monkeypatch.undo()
    assert train(config(cache, tmp_path / "out", async_save=True)).resumed_from == 2
    assert left_by(tmp_path / "out") == whole


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_whatever_ends_the_run_waits_for_the_checkpoint(
    tmp_path: Path, cache: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    """SIGTERM arrives as an exception too (`dpoeng.cli.main`)."""
    real_write, real_step, began = checkpoint_module.write_durably, loop_module.train_step, threading.Event()

    def slow(path: Path, data: bytes) -> None:
        if "checkpoint-00000004" in str(path):
            began.set()
            time.sleep(0.1)
        real_write(path, data)

    def step(run: Any, number: int) -> Any:
        if number == 4:
            assert began.wait(60)
            raise stop
        return real_step(run, number)

    monkeypatch.setattr(checkpoint_module, "write_durably", slow)
    monkeypatch.setattr(loop_module, "train_step", step)
    with pytest.raises(stop):
        train(config(cache, tmp_path / "out", async_save=True))
    assert tree(tmp_path / "out", "checkpoint-00000004") == {
        name: digest for name, digest in whole.items() if name.startswith("checkpoint-00000004")
    }


KILLED = """
import os, signal, sys
from dpoeng.cli.main import main
from dpoeng.engine import checkpoint
real, left = checkpoint.write_durably, int(sys.argv.pop(1))
def dying(path, data):
    global left
    if "checkpoint-" in str(path):
        left -= 1
        if left == 0:
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
    real(path, data)
checkpoint.write_durably = dying
main(sys.argv[1:])
"""


@pytest.mark.parametrize("write", [2, 6])  # in the middle of the first checkpoint, and of the second
def test_killed_while_a_checkpoint_is_written(tmp_path: Path, cache: Path, whole: dict[str, str], write: int) -> None:
    settings = {**SETTINGS, "loss_type": "bco_pair"}
    options = [
        f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
        for name, value in settings.items()
    ]
    command = ["train", "--cache", str(cache), "--output-dir", str(tmp_path / "out"), "--async-save", *options]
    ended = subprocess.run([sys.executable, "-c", KILLED, str(write), *command], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr.decode()
    written = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert written == ["checkpoint-00000002"][: write // 4]
    assert train(config(cache, tmp_path / "out", async_save=True)).resumed_from == (2 if written else 0)
    assert left_by(tmp_path / "out") == whole


def test_one_at_a_time_in_their_order() -> None:
    order: list[str] = []
    gate = threading.Event()

    def first() -> None:
        assert gate.wait(60)
        order.append("first")

    with Background(threaded=True) as background:
        background.do(first)
        background.check()  # waits for nothing
        assert order == []
        threading.Timer(0.05, gate.set).start()
        background.do(lambda: order.append("second"))
        assert "first" in order
    assert order == ["first", "second"]
    background.do(lambda: order.append("third"))
    assert order[2:] == ["third"], "once left, pieces are done at once"


def test_an_error_beside_another_is_told() -> None:
    told: list[str] = []

    def fails() -> None:
        raise ValueError("the disk is full")

    def interrupted() -> None:
        with Background(threaded=True, tell=told.append) as background:
            background.do(fails)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert told == ["and in the background: the disk is full"]
    with pytest.raises(ValueError, match="full"), Background(threaded=True, tell=told.append) as background:
        background.do(fails)

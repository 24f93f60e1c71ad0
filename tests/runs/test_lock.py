"""One run at a time in an output folder; a killed one is no hindrance, nor is a file system without locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import PrecomputeConfig, SweepConfig, TrainConfig
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.sweeps.plan import plan_sweep
from dpoeng.engine.recipes.sweeps.run import run_sweep
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs.lock import LOCK_FILE, holding


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("lock")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(12))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    return folder / "cache"


def config(cache: Path, out: Path, **fields: Any) -> TrainConfig:
    return TrainConfig(cache=cache, output_dir=out, parity_pairs=2, **{"max_steps": 3, "save_steps": 1, **fields})


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_hindrance(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refused)
    assert train(config(cache, tmp_path / "out", max_steps=1)).steps == 1


def test_a_complete_run_in_a_folder_that_may_only_be_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(cache, tmp_path / "out", max_steps=1))
    real = os.open

    def read_only(path: Any, flags: int, *more: Any, **names: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *more, **names)

    monkeypatch.setattr(os, "open", read_only)
    assert train(config(cache, tmp_path / "out", max_steps=1)).already_complete


def test_a_run_that_is_refused_leaves_no_folder(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reference cache"):
        train(config(tmp_path / "nowhere", tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()


def test_the_name_is_taken_away_between_opening_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one race of a lock whose file is removed: who then locked the old file would hold nothing."""
    real, removed = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if not removed:
            (tmp_path / LOCK_FILE).unlink()
            removed.append(descriptor)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with holding(tmp_path):
        assert removed
        with pytest.raises(UserError, match="another run"), holding(tmp_path):
            pass


def test_a_sweep_leaves_a_run_of_another_sweep_alone(cache: Path, tmp_path: Path) -> None:
    options = {"cache": cache, "output_dir": tmp_path, "max_steps": 1, "eval_share": 0.2, "parity_pairs": 2}
    plan = plan_sweep(SweepConfig(vary={"beta": [0.1, 0.2]}), options)
    taken = plan.points[0].config.output_dir
    with holding(taken):
        states = {result.name: result.state for result in run_sweep(plan)}
        assert {path.name for path in taken.iterdir()} == {LOCK_FILE}
    assert states == {"beta=0.1": "failed", "beta=0.2": "complete"}
    assert {result.state for result in run_sweep(plan)} == {"complete"}

"""Checkpoints: whole or not at all, the newest good one is found, old ones go last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.runs.checkpoint import latest_checkpoint, remove_checkpoints, save_checkpoint
from dpoeng.engine.runs.metrics import MetricsLog
from dpoeng.engine.runtime import folders


def save(root: Path, step: int, keep: int = 2) -> Path:
    generator = torch.Generator().manual_seed(step)
    return save_checkpoint(
        root,
        step,
        parameters={"w": torch.randn(5, 3, generator=generator)},
        optimizer={"w/exp_avg": torch.randn(5, 3, generator=generator), "w/step": torch.tensor(float(step))},
        state={"identity": {"seed": 1}, "complete": False},
        keep=keep,
    )


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 3)
    found, damaged = latest_checkpoint(tmp_path)
    assert damaged == []
    assert found is not None
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(found.parameters["w"], torch.randn(5, 3, generator=generator))
    assert torch.equal(found.optimizer["w/exp_avg"], torch.randn(5, 3, generator=generator))
    assert found.optimizer["w/step"].dim() == 0
    assert (found.step, found.state) == (3, {"identity": {"seed": 1}, "complete": False})


def test_nothing_saved(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) == (None, [])


def test_only_the_newest_are_kept_and_they_sort_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000010", "checkpoint-00000100"]
    found, _ = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 100


@pytest.mark.parametrize("name", ["parameters.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tmp_path: Path, name: str, how: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    found, damaged = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(damaged) == 1
    assert "checkpoint-00000002" in damaged[0]


def test_a_pickle_in_the_place_of_tensors_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    folder = save(tmp_path, 1)
    torch.save({"w": Bomb()}, folder / "parameters.safetensors")
    assert latest_checkpoint(tmp_path)[0] is None
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("operation", range(12))
def test_a_kill_or_full_disk_at_any_operation_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: int
) -> None:
    """Every file operation of a save fails once; the run must be able to continue from one of the two steps."""
    save(tmp_path, 1)
    count = 0

    def failing(real):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal count
            count += 1
            if count - 1 == operation:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(folders, "write_durably", failing(folders.write_durably))
    monkeypatch.setattr(folders, "_sync_folder", failing(folders._sync_folder))
    monkeypatch.setattr(Path, "mkdir", failing(Path.mkdir))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    caught: UserError | None = None
    try:
        save(tmp_path, 2, keep=1)
    except UserError as error:
        caught = error
    failed = caught is not None
    assert failed == (operation < count)
    assert caught is None or (caught.code == "output-unwritable" and "No space left" in str(caught))
    monkeypatch.undo()
    found, damaged = latest_checkpoint(tmp_path)
    assert damaged == []
    assert found is not None
    assert found.step in ((1, 2) if failed else (2,))
    save(tmp_path, 3)
    again, _ = latest_checkpoint(tmp_path)
    assert again is not None
    assert again.step == 3


def test_remove(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".checkpoint-00000002.tmp").mkdir()
    (tmp_path / "mine.txt").write_text("kept")
    remove_checkpoints(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_damaged_later_checkpoint_does_not_push_out_new_ones(tmp_path: Path) -> None:
    """A run that went on from an earlier one: what it writes is the newest that is whole."""
    for step in (4, 8):
        save(tmp_path, step, keep=1)
    (tmp_path / "checkpoint-00000008" / "parameters.safetensors").write_bytes(b"")
    for step in (2, 4, 6):
        save(tmp_path, step, keep=1)
    found, damaged = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, damaged) == (6, [])


def test_metrics_that_cannot_be_cut_back_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path)
    for step in range(5):
        log.write(step, 0.0, {"loss": 1.0})
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        real(self, data[:7])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            log.rewind(2)
        log.rewind(9)  # nothing to cut: nothing is written
    assert len(log.read()) == 5
    log.rewind(2)
    assert [line["step"] for line in log.read()] == [0, 1, 2]

"""A folder is durable before it has its name, and its name before the call returns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpoeng.engine.runtime.folders import sync_file, write_folder


def test_files_then_folder_then_name_are_synced_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def noted(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        content = f"={path.read_text()}" if path.is_file() else "/"
        events.append(f"{path.relative_to(tmp_path)}{content}")
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    write_folder(tmp_path / "step", {"a": b"1", "b": b"2"})
    assert events == [".step.tmp/a=1", ".step.tmp/b=2", ".step.tmp/", ".step.tmp -> step", "./"]
    events.clear()
    sync_file(tmp_path / "step" / "a")
    assert events == ["step/a=1"]

"""Allows one run at a time in an output folder, with a file that stays locked while the run's process lives."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import lock
from dpoeng.engine.runtime.folders import unwritable

LOCK_FILE = ".lock"


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Reserves `folder` for this process, and creates it if missing; leaves nothing behind.

    A killed process leaves the file behind, unlocked, and the next one takes it over. Nothing is locked if the file
    system has no locks, or the folder is read-only (a complete run is read).

    Raises:
        UserError: another process uses it, it is a file, or it cannot be created.
    """
    made = _make(folder)
    path = folder / LOCK_FILE
    descriptor = _take(path)
    try:
        yield
    finally:
        if descriptor is not None:
            # Remove the name before the lock: another process then finds both or none.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(descriptor)
        with contextlib.suppress(OSError):  # a folder with the run's files stays
            for empty in made:
                empty.rmdir()


def is_held(folder: Path) -> bool:
    """Whether a run is using `folder` now, without touching its lock; processes on other machines count."""
    try:
        holder = (folder / LOCK_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    match = re.match(r"process (\d+) on (.+)", holder)
    if match is None or match[2] != socket.gethostname():
        return True
    return Path(f"/proc/{match[1]}").exists()


def _make(folder: Path) -> list[Path]:
    """Creates a folder and its parents; returns those that were missing, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    return missing


def _take(path: Path) -> int | None:
    """The open, locked file; None if locking is impossible."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        locked = lock(descriptor)
        if locked is False:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise _in_use(path.parent, holder)
        # Between open and lock, the previous run may have ended and removed the name.
        if locked is None or _is_named(descriptor, path):
            break
        os.close(descriptor)
    with contextlib.suppress(OSError):  # the lock counts, not the file's content
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _in_use(folder: Path, holder: str) -> UserError:
    return UserError(
        "another run is using this output folder",
        code="output-in-use",
        where=str(folder),
        expected="one run at a time in each folder",
        found=holder or "another process",
        remedy="name another folder with --output-dir; or wait until that process has ended, or end it, and run the "
        "same command again: it continues from the newest checkpoint",
    )

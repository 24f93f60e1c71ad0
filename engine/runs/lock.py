"""One run at a time in an output folder: a file that the system keeps locked for as long as the run's process lives."""

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
    """Keeps `folder` to this process, and makes it if it is not there; nothing of this is left at the end.

    A killed process leaves the file behind, unlocked: the next one takes it over. Where a file system has no locks, or
    the folder may only be read (a complete run is looked at), nothing is kept.

    Raises:
        UserError: another process holds it, it is a file, or it cannot be made.
    """
    made = _make(folder)
    path = folder / LOCK_FILE
    descriptor = _take(path)
    try:
        yield
    finally:
        if descriptor is not None:
            # First the name, then the lock: who comes meanwhile finds both or none.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(descriptor)
        with contextlib.suppress(OSError):  # a folder that the run has filled stays
            for empty in made:
                empty.rmdir()


def is_held(folder: Path) -> bool:
    """Whether a run works in `folder` now, without touching its lock; a process on another machine counts as one."""
    try:
        holder = (folder / LOCK_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    found = re.match(r"process (\d+) on (.+)", holder)
    if found is None or found[2] != socket.gethostname():
        return True
    return Path(f"/proc/{found[1]}").exists()


def _make(folder: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that were missing, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    return missing


def _take(path: Path) -> int | None:
    """The open, locked file; None where there can be none."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        held = lock(descriptor)
        if held is False:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise _in_use(path.parent, holder)
        # Between opening and locking it, the run before may have ended and taken the name away.
        if held is None or _is_named(descriptor, path):
            break
        os.close(descriptor)
    with contextlib.suppress(OSError):  # the lock counts, not what the file says
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
        "same command again: it goes on from the newest checkpoint",
    )

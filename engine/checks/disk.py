"""How fast files are read from their disk: what layer offloading waits for where host memory does not hold them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

_CHUNK = 8 << 20


def read_speed(files: Sequence[Path], most_bytes: int = 1 << 28) -> float | None:
    """GB/s at which the first bytes of some files are read, one after the other, after the system forgot them.

    Args:
        files: in the order in which they are read; nothing is written.
        most_bytes: read no more than this.

    Returns:
        None where the files are empty, or the system cannot be told to forget them.

    Raises:
        OSError: a file cannot be read.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    buffer, done, seconds = bytearray(_CHUNK), 0, 0.0
    for file in files:
        with file.open("rb", buffering=0) as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while done < most_bytes and (count := opened.readinto(buffer)):
                done += count
            seconds += time.perf_counter() - began
    return done / seconds / 1e9 if done and seconds else None


def disk_speed(folder: Path, n_bytes: int = 1 << 26) -> float | None:
    """The same of a file that is written into a folder, and removed again.

    Raises:
        OSError: it cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".dpoeng-doctor-") as file:
        chunk = os.urandom(_CHUNK)  # some disks and file systems do not store zeros
        for _ in range(n_bytes // _CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())  # what is not on the disk is not forgotten
        return read_speed([Path(file.name)], n_bytes)

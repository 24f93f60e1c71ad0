"""Measures a disk's reading speed, which limits layer offloading when host memory does not contain the files."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

_CHUNK = 8 << 20


def read_speed(files: Sequence[Path], most_bytes: int = 1 << 28) -> float | None:
    """GB/s of reading the first bytes of some files, one after the other, after dropping them from the page cache.

    Args:
        files: the files, in reading order; nothing is written.
        most_bytes: read no more than this.

    Returns:
        None if the files are empty, or the page cache cannot be dropped.

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
    """The same for a temporary file in a folder.

    Raises:
        OSError: it cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".dpoeng-doctor-") as file:
        chunk = os.urandom(_CHUNK)  # some disks and file systems do not store zeros
        for _ in range(n_bytes // _CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())  # the system drops only pages that are on the disk
        return read_speed([Path(file.name)], n_bytes)

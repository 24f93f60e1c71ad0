"""Limits how much of the mapped files is resident: gives pages back to the system while reading continues.

The system takes mapped pages back by itself when it needs the memory; until then they count as this process's.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Final

RESIDENT_LIMIT: Final = 256 << 20
"""Bytes of mapped files that may become resident before all of them are given back."""

# A page brings its neighbours along: up to 2 MiB where the system keeps the file in pieces of that size. A row lies in
# five columns, so 16 rows may bring in 160 MiB.
_ROWS_BETWEEN: Final = 16
_NEVER: Final = 1 << 62


class MappedPages:
    """Some mapped files, read row by row in any order.

    Args:
        maps: the whole of each file.
    """

    def __init__(self, maps: Sequence[memoryview]) -> None:
        self._maps = maps
        self._bounded = sum(map(len, maps)) <= RESIDENT_LIMIT
        self._base = 0 if self._bounded else _resident_file_bytes()

    def look(self) -> int:
        """Gives all pages back if many became resident; returns after how many rows to look again.

        Values stay valid: a page that is used again is read again, usually from the system's page cache.
        """
        if self._bounded or (resident := _resident_file_bytes()) < 0:
            return _NEVER
        if resident - self._base > RESIDENT_LIMIT:
            for data in self._maps:
                release(data)
            resident = _resident_file_bytes()
            self._base = resident
        self._base = min(self._base, resident)
        return _ROWS_BETWEEN


def release(data: memoryview) -> None:
    """Gives the pages of a mapped file back to the system, which reads them again on access."""
    mapped = data.obj
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _resident_file_bytes() -> int:
    """Bytes of files that are resident in this process; -1 where the system does not say, as on macOS."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        return int(os.read(descriptor, 200).split()[2]) * mmap.PAGESIZE
    finally:
        os.close(descriptor)

"""Limits the resident memory of mapped files by releasing their pages while reading continues.

The system reclaims mapped pages when it needs memory. Until then they count as this process's memory, and a container's
limit or `ps` shows them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Final

RESIDENT_LIMIT: Final = 256 << 20
"""Bytes of mapped files that may become resident before all pages are released."""

# Reading one page also maps its neighbours: up to 2 MiB if the page cache uses large folios. A row has data in five
# columns, so 16 rows may map 160 MiB.
_ROWS_BETWEEN: Final = 16
_NEVER: Final = 1 << 62


class MappedPages:
    """Some mapped files, read row by row in any order.

    Args:
        maps: the complete mapping of each file.

    Attributes:
        bounded: whether even all of their pages are few enough to stay.
    """

    def __init__(self, maps: Sequence[memoryview]) -> None:
        self._maps = maps
        self.bounded = sum(map(len, maps)) <= RESIDENT_LIMIT
        self._base = 0 if self.bounded else _resident_file_bytes()

    def look(self) -> int:
        """Releases all pages if many became resident; returns the number of rows until the next call.

        Values stay valid: the system reads a released page again on access, usually from its page cache.
        """
        if self.bounded or (resident := _resident_file_bytes()) < 0:
            return _NEVER
        if resident - self._base > RESIDENT_LIMIT:
            for data in self._maps:
                release(data)
            resident = _resident_file_bytes()
            self._base = resident
        self._base = min(self._base, resident)
        return _ROWS_BETWEEN


def release(data: memoryview) -> None:
    """Releases the pages of a mapped file; the system reads them again on access."""
    mapped = data.obj
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _resident_file_bytes() -> int:
    """Resident bytes of mapped files in this process; -1 if the system does not tell, as on macOS."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        return int(os.read(descriptor, 200).split()[2]) * mmap.PAGESIZE
    finally:
        os.close(descriptor)

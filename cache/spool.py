"""Records of bytes in a temporary file: as many as there are, with 8 bytes of memory for each."""

from __future__ import annotations

import tempfile
import weakref
from array import array
from pathlib import Path
from typing import Final

from dpoeng.cache.errors import UserError

IN_MEMORY_BYTES: Final = 16 << 20
"""So much stays in memory; more goes to a file without a name in the system's temporary folder (TMPDIR)."""


class Spool:
    """Records appended one by one and read back in any order."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, prefix="dpoeng-rows-")  # noqa: SIM115 - see below
        self._close = weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])

    def append(self, record: bytes) -> None:
        """Keep one more record.

        Raises:
            UserError: the temporary folder has no room.
        """
        try:
            self._ends.append(self._file.seek(0, 2) + self._file.write(record))
        except OSError as error:
            raise _no_room(error) from error

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> bytes:
        """Record i. Raises IndexError outside."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        i %= len(self)
        begin, end = self._ends[i], self._ends[i + 1]
        self._file.seek(begin)
        return self._file.read(end - begin)


def _no_room(error: OSError) -> UserError:
    return UserError(
        "the temporary folder cannot hold the pairs' tokens",
        code="system-temporary-full",
        where=str(Path(tempfile.gettempdir())),
        expected="4 bytes free for each token, and the rows' other columns",
        found=error.strerror or str(error),
        remedy="free some space, or name a folder with more room in the environment variable TMPDIR",
        exit_status=5,
    )

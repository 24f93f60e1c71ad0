"""A list of byte records in a temporary file, with 8 bytes of memory per record."""

from __future__ import annotations

import tempfile
import weakref
from array import array
from pathlib import Path
from typing import Final

from dpoeng.cache.errors import UserError

IN_MEMORY_BYTES: Final = 16 << 20
"""Up to this size everything stays in memory; beyond, in an unnamed file in the temporary folder (TMPDIR)."""


class Spool:
    """Records appended one by one and read back in any order."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, prefix="dpoeng-rows-")  # noqa: SIM115 - see below
        self._close = weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])

    def append(self, record: bytes) -> None:
        """Appends a record.

        Raises:
            UserError: the temporary folder is full.
        """
        try:
            self._ends.append(self._file.seek(0, 2) + self._file.write(record))
        except OSError as error:
            raise _no_room(error) from error

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> bytes:
        """Returns record i; raises IndexError if there is none."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        i %= len(self)
        begin, end = self._ends[i], self._ends[i + 1]
        self._file.seek(begin)
        return self._file.read(end - begin)


def _no_room(error: OSError) -> UserError:
    return UserError(
        "the temporary folder has no room for the pairs' tokens",
        code="system-temporary-full",
        where=str(Path(tempfile.gettempdir())),
        expected="4 free bytes per token, and room for the rows' other columns",
        found=error.strerror or str(error),
        remedy="free some space, or set the environment variable TMPDIR to a folder with more",
        exit_status=5,
    )

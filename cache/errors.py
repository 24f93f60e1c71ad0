"""The one exception type for mistakes that a user can fix.

It is defined in the lowest layer because mistakes can appear there first (a damaged file, a full disk). The command
line prints it without a traceback. docs/errors.md lists every code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar


class UserError(Exception):
    """A mistake in data, configuration, cache or environment that the user can fix.

    Args:
        message: what is wrong: one sentence that starts in lower case and has no full stop.
        code: a stable short name, `area-problem`, e.g. `cache-corrupt`, for scripts and searches.
        where: file, line, field or option.
        expected: what would have been correct.
        found: what was there instead.
        remedy: what to do now; required for every mistake.
        exit_status: process exit status; 2 for usage and configuration, 3 for data, 4 for the cache, 5 for the machine;
            1 is reserved for bugs in dpoeng.

    All texts write fields as options (`--eval-view`, `--beta 0.1`), which cannot be confused with ordinary words. The
    command line prints `text()`. `str(error)`, which Python shows, replaces options by field names: `eval_view`,
    `beta=0.1`. `dpoeng/__init__.py` installs that translation, because this layer does not know the fields.
    """

    name_fields: ClassVar[Callable[[str], str]] = staticmethod(str)

    def __init__(
        self,
        message: str,
        *,
        code: str,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        remedy: str,
        exit_status: int = 2,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.where = where
        self.expected = expected
        self.found = found
        self.remedy = remedy
        self.exit_status = exit_status

    def __str__(self) -> str:
        return type(self).name_fields(self.text())

    def text(self) -> str:
        """The whole message, with options, as the command line prints it."""
        lines = [f"{self.message} [{self.code}]"]
        for label in ("where", "expected", "found", "remedy"):
            value = getattr(self, label)
            if value is not None:
                lines.append(f"  {label + ':':<10}{value}")
        return "\n".join(lines)


class CacheError(UserError):
    """A cache that cannot be used: damaged, not a cache at all, or written by a later version."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "cache-corrupt",
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        remedy: str,
        exit_status: int = 4,
    ) -> None:
        super().__init__(
            message, code=code, where=where, expected=expected, found=found, remedy=remedy, exit_status=exit_status
        )

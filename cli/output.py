"""Writing the files that a user asked for by an option, e.g. --html."""

from __future__ import annotations

from pathlib import Path

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import replacing


def write_page(path: Path, page: str) -> None:
    """Writes a page whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(
            "the page cannot be written",
            code="page-unwritable",
            where=str(path),
            found=error.strerror or str(error),
            remedy="name a file in a folder that exists and that you may write to",
            exit_status=5,
        ) from error

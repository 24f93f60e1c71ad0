"""A new folder that a command fills with a whole checkpoint: complete, or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dpoeng.cache.errors import UserError
from dpoeng.engine.checkpoint import place_folder, sync_file


def refuse_filled(into: Path) -> None:
    """Raises UserError unless `into` is free: not there, or an empty folder."""
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise UserError(
            "the folder to write into is not empty" if into.is_dir() else "this is a file, not a folder to write into",
            code="output-unwritable",
            where=str(into),
            remedy="name a new folder with --into",
            exit_status=5,
        )


def write_new(into: Path, fill: Callable[[Path], None]) -> None:
    """Makes `into` of what `fill` writes into the folder that it is given.

    Raises:
        UserError: the disk is full or may not be written; then nothing is left of it.
    """

    def fill_and_sync(temporary: Path) -> None:
        fill(temporary)
        for path in temporary.iterdir():
            sync_file(path)

    place_folder(into.resolve(), fill_and_sync, _unwritable)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        "the checkpoint cannot be written",
        code="output-unwritable",
        where=str(folder),
        found=error.strerror or str(error),
        remedy="free some space, or name a folder with room for it, and that you may write to, with --into",
        exit_status=5,
    )

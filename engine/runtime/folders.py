"""Output folders that appear complete or not at all, such as a checkpoint."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from dpoeng.cache.errors import UserError


def refuse_link(path: Path, what: str, remedy: str) -> None:
    """Raises UserError if `path`, that is `what`, is a link: it could lead out of a stranger's folder."""
    if path.is_symlink():
        raise UserError(
            f"{what} is a link",
            code="output-unwritable",
            where=str(path),
            found=f"a link to {path.readlink()}",
            remedy=remedy,
            exit_status=5,
        )


def refuse_filled(into: Path) -> None:
    """Raises UserError unless `into` is missing or an empty folder."""
    refuse_link(into, "the target folder", "name the folder itself, or a new one, with --into")
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise UserError(
            "the target folder is not empty" if into.is_dir() else "the target is a file, not a folder",
            code="output-unwritable",
            where=str(into),
            remedy="name a new folder with --into",
            exit_status=5,
        )


def write_new(into: Path, fill: Callable[[Path], None]) -> None:
    """Creates `into` with the files that `fill` writes; `fill` receives a temporary folder.

    Raises:
        UserError: the disk is full or not writable; then nothing is left behind.
    """

    def fill_and_sync(temporary: Path) -> None:
        fill(temporary)
        for path in temporary.iterdir():
            sync_file(path)

    place_folder(into.resolve(), fill_and_sync, _unwritable)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        "cannot write the checkpoint",
        code="output-unwritable",
        where=str(folder),
        found=error.strerror or str(error),
        remedy="free some space, or name another writable folder with --into",
        exit_status=5,
    )


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replaces a folder by one with these files, atomically and durably.

    Raises:
        UserError: the disk is full or not writable.
    """

    def fill(temporary: Path) -> None:
        for name, data in files.items():
            write_durably(temporary / name, data)

    place_folder(folder, fill)


def place_folder(
    folder: Path, fill: Callable[[Path], None], refused: Callable[[Path, OSError], UserError] | None = None
) -> None:
    """Like `write_folder`, for files that `fill` writes durably to the temporary folder that it receives.

    `refused` makes the error if the system refuses; the default is `unwritable`.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        fill(temporary)
        _sync_folder(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        _sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise (refused or unwritable)(folder, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def saving_tensors() -> Iterator[None]:
    """Turns safetensors' write errors into OSError, like those of other files."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for an output folder that cannot be written."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return UserError(
            "the output folder is a file",
            code="output-unwritable",
            where=str(path),
            expected="a folder, or a new name",
            found=error.strerror or str(error),
            remedy="name another folder with --output-dir, or move that file",
            exit_status=5,
        )
    return UserError(
        "cannot write to the output folder",
        code="output-unwritable",
        where=str(path),
        found=error.strerror or str(error),
        remedy="free some space or make the folder writable, then run the same command again to continue",
        exit_status=5,
    )


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Waits until a file that a library wrote is on disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The one rule for output files that a user names: what may be replaced, and how.

Files that the command reads, and files of a cache or a run, are never overwritten, not even with `--force`. Any other
file is replaced with `--force`, or if dpoeng wrote it for the same purpose; its content shows that. The new file
appears whole or not at all. Knows file names in a run's folder, not their contents.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import replacing

GENERATOR = '<meta name="generator" content="dpoeng">'
"""Marks dpoeng's pages, within their first bytes."""

RUN_FILES = frozenset(
    "run.json metrics.jsonl timings.jsonl evaluations.jsonl held_out.jsonl advice.json samples.jsonl sweep.json".split()
)
"""Files in the folder of a run or a sweep. A test compares this list with engine/runs."""

_RUN_FOLDERS = ("adapter", "model", "checkpoint-*")
_HEAD_BYTES = 4096


def _never(path: Path) -> bool:
    return False


def _unwritable(path: Path, name: str, found: str) -> UserError:
    return UserError(
        f"{name} cannot be written",
        code="output-unwritable",
        where=str(path),
        found=found,
        remedy="name a file in an existing, writable folder",
        exit_status=5,
    )


def _unwritable_page(path: Path, name: str, found: str) -> UserError:
    return UserError(
        f"{name} cannot be written",
        code="page-unwritable",
        where=str(path),
        found=found,
        remedy="name a file in an existing, writable folder",
        exit_status=5,
    )


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of output.

    Attributes:
        name: its name in messages, with an article.
        made: whether dpoeng wrote a file for this purpose; may raise ValueError for "no".
        unwritable: makes the error if the system refuses to write, from path, name and the problem.
        forced: whether the command has `--force`.
    """

    name: str
    made: Callable[[Path], bool] = _never
    unwritable: Callable[[Path, str, str], UserError] = _unwritable
    forced: bool = True


def refuse_output(path: Path, kind: Kind, *, inputs: Iterable[Path] = (), force: bool = False) -> None:
    """Raises UserError if `path` may not be written. Call it before the work begins, too.

    Args:
        path: the file to write.
        kind: the kind of output.
        inputs: files and folders that the command reads; missing ones are ignored.
        force: the user allows replacing another file.
    """
    try:
        if not path.parent.is_dir():
            raise kind.unwritable(path, kind.name, _missing(path.parent))
        if not path.exists() and not path.is_symlink():
            return
        if not path.is_file():
            raise kind.unwritable(path, kind.name, "a folder" if path.is_dir() else "not a plain file")
        for read in inputs:
            if read.exists() and (path.samefile(read) or (read.is_dir() and _inside(path, read))):
                raise _protected(path, f"{kind.name} would overwrite a file that this command reads")
        if _is_made(path, kind):
            return
        owner = _owner(path)
        if owner:
            raise _protected(path, f"{kind.name} would overwrite a file of {owner}")
    except OSError as error:
        raise kind.unwritable(path, kind.name, error.strerror or str(error)) from error
    if not force:
        raise UserError(
            f"{path} already exists",
            code="output-exists",
            where=str(path),
            expected=f"a free name, or {kind.name} of an earlier call" if kind.made is not _never else "a free name",
            found="another file",
            remedy="name another file" + (", or overwrite this one with --force" if kind.forced else ""),
        )


@contextlib.contextmanager
def writing(path: Path, kind: Kind, *, inputs: Iterable[Path] = (), force: bool = False) -> Iterator[Path]:
    """Yields a temporary name; when the block ends, that file replaces `path` atomically.

    Raises:
        UserError: as `refuse_output`, or the system refuses; then `path` is unchanged.
    """
    refuse_output(path, kind, inputs=inputs, force=force)
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise kind.unwritable(path, kind.name, error.strerror or str(error)) from error


_MARKER = ".dpoeng-study"


def scratch_folder(path: Path, study: str) -> None:
    """Creates a folder for a study's caches and runs, or accepts one that the same study made before.

    Raises:
        UserError: it contains something else, or cannot be created.
    """
    marker = path / _MARKER
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        if taken and not (marker.is_file() and marker.read_text(encoding="utf-8").strip() == study):
            raise UserError(
                f"{path} already contains something else",
                code="output-exists",
                where=str(path),
                expected=f"a free name, an empty folder, or one of an earlier {study}",
                found="other files" if path.is_dir() else "a file",
                remedy="name another folder",
            )
        path.mkdir(parents=True, exist_ok=True)
        marker.write_text(f"{study}\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, f"the folder of {study}", error.strerror or str(error)) from error


def is_page(path: Path) -> bool:
    """Whether a file is one of dpoeng's HTML pages."""
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(_HEAD_BYTES)


def has_json_lines(path: Path, fits: Callable[[dict[str, Any]], bool]) -> bool:
    """Whether a file is empty or starts with a line that is a JSON object that `fits`."""
    with path.open("rb") as file:
        line = file.readline()
    value = json.loads(line) if line else None
    return line == b"" or (isinstance(value, dict) and fits(value))


PAGE = Kind("the page", is_page, _unwritable_page)


def _is_made(path: Path, kind: Kind) -> bool:
    try:
        return kind.made(path)
    except ValueError:  # neither text nor JSON
        return False


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _owner(path: Path) -> str:
    """Describes the cache or run that a file belongs to; empty if there is none."""
    real = path.resolve()
    for folder in real.parents:
        record = folder / "FORMAT"
        if record.is_file() and record.read_bytes()[:64].startswith(b"dpoeng-refcache"):
            return f"the cache {folder}"
        if (folder / "run.json").is_file() or (folder / "sweep.json").is_file():
            below = real.relative_to(folder)
            if below.name == str(below):
                if below.name in RUN_FILES:
                    return f"the run in {folder}"
            elif any(Path(below.parts[0]).match(pattern) for pattern in _RUN_FOLDERS):
                return f"the run in {folder}"
    return ""


def _missing(folder: Path) -> str:
    """Describes the first missing parent folder."""
    missing = folder
    while not missing.parent.exists():
        missing = missing.parent
    return f"{folder} is a file" if folder.exists() else f"no folder {missing}"


def _protected(path: Path, message: str) -> UserError:
    return UserError(
        message,
        code="output-protected",
        where=str(path),
        expected="a file that belongs to nothing else",
        remedy="name another file",
    )

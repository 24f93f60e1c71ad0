"""The layout of a cache folder: the name of every file in it, and the FORMAT file that marks a folder as a cache.

Names are built only from digests and checked view names, so that nothing read from a file becomes a path.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from shlex import quote
from typing import Final

from dpoeng.cache.errors import CacheError
from dpoeng.cache.files import TMP, Disk, Files, disk_error
from dpoeng.cache.records import DIGEST, VIEW_NAME

FORMAT_NAME: Final = "FORMAT"
FORMAT_BYTES: Final = b"dpoeng-refcache 1\n"
FORMAT_WITH_GAPS: Final = b"dpoeng-refcache 2\n"
"""For a cache with rows that have gaps (unscored tokens between scored ones): version 1 readers must refuse it."""
FORMAT_WITH_TRUNK: Final = b"dpoeng-refcache 3\n"
"""For a cache with stored hidden states: version 2 readers would take them for rows of log-probs."""
FORMAT_WITH_ROWS: Final = b"dpoeng-refcache 4\n"
"""For a cache with rows other than pairs (`records.ROW_KINDS`): version 3 readers would take them for pairs."""
FORMATS: Final = (FORMAT_BYTES, FORMAT_WITH_GAPS, FORMAT_WITH_TRUNK, FORMAT_WITH_ROWS)


def spec_name(digest: str) -> str:
    return f"specs/{_digest(digest)}.json"


def object_name(name: str) -> str:
    return f"objects/{_digest(name)[:2]}/{name}.arrow"


def run_folder(spec: str) -> str:
    return f"runs/{_digest(spec)}"


def commits_folder(spec: str) -> str:
    return f"{run_folder(spec)}/commits"


def commit_name(spec: str, name: str) -> str:
    return f"{commits_folder(spec)}/{_digest(name)}.json"


def manifest_name(spec: str, generation: int) -> str:
    return f"{run_folder(spec)}/manifest-{generation:06d}.json"


def view_name(name: str) -> str:
    if not VIEW_NAME.fullmatch(name):
        raise CacheError(
            "invalid view name",
            code="cache-view-name",
            expected="1 to 200 of the characters A-Z a-z 0-9 . _ -",
            found=repr(name)[:200],
            remedy="choose another name",
            exit_status=2,
        )
    return f"views/{name}.json"


def table_name(name: str) -> str:
    return f"views/{_digest(name)}.arrow"


def _digest(text: str) -> str:
    """Allows only a digest as part of a path."""
    if not DIGEST.fullmatch(text):
        raise ValueError(f"not 32 hex digits: {text[:200]!r}")
    return text


def open_folder(files: Files, *, create: bool) -> None:
    """Checks that a folder is a cache of this version, or creates one.

    Raises:
        CacheError: no cache there, one of a later version, or (with `create`) a folder with other files in it.
    """
    if files.root.is_file():
        raise CacheError(
            "this is a file, not a cache",
            code="cache-not-plain",
            where=str(files.root),
            expected="the folder that `dpoeng precompute-ref` writes",
            remedy="name that folder with --cache",
        )
    try:
        content = files.read(FORMAT_NAME)
    except FileNotFoundError:
        if not create:
            raise CacheError(
                "no reference cache in this folder",
                code="cache-not-found",
                where=str(files.root),
                remedy="create one with `dpoeng precompute-ref PAIRS --model MODEL --cache FOLDER`",
            ) from None
        _create(files)
        content = files.read(FORMAT_NAME)
    _check_format(content, files.root / FORMAT_NAME)


def _create(files: Files) -> None:
    root = files.root
    try:
        _make_durable(root, files.disk)
        others = {path.name for path in root.iterdir()} - {TMP}  # a kill may have left tmp/ behind
    except OSError as error:
        raise disk_error(error, root) from error
    # Another process may be creating it too. It writes FORMAT first, so if other files exist, FORMAT must exist.
    if others and not (root / FORMAT_NAME).exists():
        raise CacheError(
            "this folder is not empty and not a cache",
            code="cache-not-empty",
            where=str(root),
            expected="a new or empty folder, or a cache with its FORMAT file",
            found=", ".join(sorted(others)[:5]),
            remedy="name another folder with --cache",
        )
    files.publish(FORMAT_NAME, FORMAT_BYTES)


def _check_format(found: bytes, path: Path) -> None:
    if found in FORMATS:
        return
    if re.fullmatch(rb"dpoeng-refcache [0-9]{1,9}\n", found):
        raise CacheError(
            "a later version of dpoeng wrote this cache",
            code="cache-future",
            where=str(path),
            expected=FORMATS[-1].decode().strip(),
            found=found.decode().strip(),
            remedy="update dpoeng, or name another folder with --cache",
        )
    raise CacheError(
        "the FORMAT file of this cache is damaged",
        code="cache-format",
        where=str(path),
        expected=repr(FORMAT_BYTES),
        found=repr(found[:40]),
        remedy="if dpoeng wrote this folder, put the line back: "
        f"echo {FORMAT_BYTES.decode().strip()} > {quote(str(path))}",
    )


def _make_durable(root: Path, disk: Disk) -> None:
    """Creates the root and its missing parents, and syncs each directory entry."""
    missing = [path for path in (root, *root.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            disk.mkdir(path)
    for path in missing or [root]:  # a kill may have come after mkdir and before the sync
        disk.sync_dir(path.parent)

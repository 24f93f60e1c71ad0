"""Removes files that nothing refers to. Only lists them by default."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from dpoeng.cache.errors import CacheError
from dpoeng.cache.files import QUARANTINE, TMP, lock
from dpoeng.cache.folder import commit_name, commits_folder, manifest_name, object_name, spec_name, table_name
from dpoeng.cache.records import DIGEST
from dpoeng.cache.store import Store
from dpoeng.cache.verify import object_names

KEPT_GENERATIONS: Final = 2
Kind = Literal["temporary", "orphan", "table", "manifest", "spec", "quarantine"]


@dataclass(frozen=True, slots=True)
class Garbage:
    """A file that can be removed: its name in the cache, the reason, and its size in bytes."""

    name: str
    kind: Kind
    bytes: int


def collect(
    root: Path | str,
    *,
    dry_run: bool = True,
    drop_specs: Collection[str] = (),
    quarantine: bool = False,
    grace_s: float = 3600.0,
) -> list[Garbage]:
    """Finds garbage, and removes it unless `dry_run` is set.

    Keeps everything that a commit record, a view or one of the two newest manifests of a spec names; temporary files of
    live writers; and anything younger than `grace_s`, whose record may not be written yet. Readers are not disturbed: a
    removed file stays readable until the last process that maps it ends.

    Args:
        root: the cache folder.
        dry_run: only list what would be removed.
        drop_specs: references to remove with all their rows and trunks (none may have a view), or single trunks.
        quarantine: also remove damaged files that were set aside.
        grace_s: keep files younger than this, in seconds; a modification time in the future counts as young.

    Returns:
        The files to remove, in the order of removal: records before the objects they name.

    Raises:
        CacheError: a spec to drop is in use or unknown, or a record is damaged (its objects would be unknown).
    """
    store = Store.open(root)
    garbage = list(_find(store, drop_specs, quarantine, grace_s))
    if not dry_run:
        for item in garbage:
            # A writer may have touched the file in the meantime.
            if item.kind == "spec" or _is_old(store.root / item.name, grace_s):
                with contextlib.suppress(FileNotFoundError):
                    store.files.remove(item.name)
    return garbage


def _find(store: Store, drop_specs: Collection[str], quarantine: bool, grace_s: float) -> Iterator[Garbage]:
    records = {name: store.view_record(name) for name in store.views()}
    _refuse_in_use(store, drop_specs, {record.spec: name for name, record in records.items()})
    # A trunk is useless without its reference.
    orphaned = [digest for digest, spec in store.trunks().items() if spec.fields["reference"] in drop_specs]
    drop_specs = [*dict.fromkeys([*drop_specs, *orphaned])]
    tables = {record.table.name for record in records.values()}
    referenced = {reference.name for record in records.values() for reference in record.objects}
    names: list[tuple[str, Kind]] = []
    for digest in (name for name in store.files.names("runs") if DIGEST.fullmatch(name)):
        commits = store.files.names(commits_folder(digest), ".json")
        generations = store.generations(digest)
        if digest in drop_specs:
            names += [(manifest_name(digest, generation), "spec") for generation in generations]
            names += [(commit_name(digest, name), "spec") for name in commits]
        else:
            referenced.update(commits)
            names += [(manifest_name(digest, generation), "manifest") for generation in generations[:-KEPT_GENERATIONS]]
    names += [(spec_name(digest), "spec") for digest in drop_specs]
    names += [(object_name(name), "orphan") for name in object_names(store) if name not in referenced]
    names += [(table_name(name), "table") for name in store.files.names("views", ".arrow") if name not in tables]
    names += [(f"{TMP}/{name}", "temporary") for name in store.files.names(TMP) if _is_abandoned(store, name)]
    if quarantine:
        names += [(f"{QUARANTINE}/{name}", "quarantine") for name in store.files.names(QUARANTINE)]
    for name, kind in names:
        path = store.root / name
        with contextlib.suppress(FileNotFoundError):
            if kind == "spec" or _is_old(path, grace_s):
                yield Garbage(name, kind, path.lstat().st_size)


def _refuse_in_use(store: Store, drop_specs: Collection[str], viewed: dict[str, str]) -> None:
    for digest in drop_specs:
        if digest in viewed or digest not in store.spec_digests():
            raise CacheError(
                "cannot drop this reference",
                code="cache-spec-in-use",
                where=digest,
                expected="a reference of this cache that no view uses",
                found=f"the view {viewed[digest]!r} uses it" if digest in viewed else "no such reference",
                remedy="`dpoeng cache info` shows the references"
                + ("; remove the view's file in views/ first" if digest in viewed else ""),
                exit_status=2,
            )


def _is_old(path: Path, grace_s: float) -> bool:
    return time.time() - path.lstat().st_mtime >= grace_s


def _is_abandoned(store: Store, name: str) -> bool:
    """Whether the writer of a temporary file is dead. A live one holds the file's lock."""
    try:
        descriptor = os.open(store.root / TMP / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return lock(descriptor) is True
    finally:
        os.close(descriptor)

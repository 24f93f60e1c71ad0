"""What a cache holds, in numbers. Reads records only, so it answers at once however large the cache is."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import CacheError
from dpoeng.cache.folder import commit_name, spec_name
from dpoeng.cache.records import Commit, canonical_json
from dpoeng.cache.store import Store


@dataclass(frozen=True, slots=True)
class ReferenceInfo:
    """One reference.

    Attributes:
        digest: of its spec.
        summary: the spec's fields; of a list of tensors, only how many there are.
        rows, objects, bytes: committed.
        generation: of the last finished run; 0 if none finished yet.
        changed: when its newest record was written, by the file system's clock.
        provenance: the distinct provenances of its records: versions, device, imports.
    """

    digest: str
    summary: dict[str, Any]
    rows: int
    objects: int
    bytes: int
    generation: int
    changed: datetime.datetime | None
    provenance: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class ViewInfo:
    """One view: its rows, its reference and how its pairs were made."""

    name: str
    rows: int
    spec: str
    meta: dict[str, Any]


@dataclass
class CacheInfo:
    """A cache. `problems` lists records that could not be read; `verify` looks deeper."""

    references: list[ReferenceInfo] = field(default_factory=list)
    views: list[ViewInfo] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def cache_info(root: Path | str) -> CacheInfo:
    """Reads all records of a cache. Raises CacheError if there is none."""
    store = Store.open(root)
    found = CacheInfo()
    for digest in store.spec_digests():
        try:
            found.references.append(_reference(store, digest, found.problems))
        except CacheError as error:
            found.problems.append(_said(error))
    for name in store.views():
        try:
            record = store.view_record(name)
            found.views.append(ViewInfo(name, record.table.rows, record.spec, dict(record.meta)))
        except CacheError as error:
            found.problems.append(_said(error))
    return found


def newest_spec(store: Store) -> str:
    """The spec whose file was written last, by the file system's clock. Raises CacheError if there is none."""
    digests = store.spec_digests()
    if not digests:
        raise CacheError(
            "the cache holds no reference yet",
            code="cache-no-spec",
            where=str(store.root),
            remedy="run `dpoeng precompute-ref` into it first",
            exit_status=2,
        )
    return max(digests, key=lambda digest: ((store.root / spec_name(digest)).stat().st_mtime_ns, digest))


def _reference(store: Store, digest: str, problems: list[str]) -> ReferenceInfo:
    outcomes = [outcome for _, outcome in store.read_commits(digest)]
    commits = [outcome for outcome in outcomes if isinstance(outcome, Commit)]
    problems += [_said(outcome) for outcome in outcomes if isinstance(outcome, CacheError)]
    times = [(store.root / commit_name(digest, commit.object.name)).stat().st_mtime for commit in commits]
    distinct = {canonical_json(commit.provenance): dict(commit.provenance) for commit in commits}
    return ReferenceInfo(
        digest=digest,
        summary={name: _brief(value) for name, value in store.spec(digest).fields.items()},
        rows=sum(commit.object.rows for commit in commits),
        objects=len(commits),
        bytes=sum(commit.object.bytes for commit in commits),
        generation=max(store.generations(digest), default=0),
        changed=datetime.datetime.fromtimestamp(max(times)).astimezone() if times else None,
        provenance=tuple(distinct[key] for key in sorted(distinct)),
    )


def _said(error: CacheError) -> str:
    return f"{error.where}: expected {error.expected}, found {error.found}"


def _brief(value: Any) -> Any:
    return f"{len(value)} entries" if isinstance(value, dict) and len(value) > 20 else value

"""Counts what a cache contains. Reads only records, so it is fast for any size of cache."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import CacheError
from dpoeng.cache.folder import commit_name, spec_name
from dpoeng.cache.records import Commit, canonical_json
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store


@dataclass(frozen=True, slots=True)
class ReferenceInfo:
    """One reference.

    Attributes:
        digest: of its spec.
        summary: the spec's fields, with lists of tensors reduced to their number.
        rows, objects, bytes: committed totals.
        generation: number of the last finished run; 0 if none has finished.
        changed: time of its newest record, by the file system's clock.
        provenance: the distinct provenances in its records: versions, device, imports.
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
    """One view: its rows, its reference, and how its pairs were built."""

    name: str
    rows: int
    spec: str
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TrunkInfo:
    """Stored hidden states of one layer.

    Attributes:
        digest: of the trunk's spec.
        reference: digest of the reference that computed them.
        layer: the decoder layer whose input they are, counted from 0.
        dtype: dtype of the states.
        width: numbers per token.
        texts, objects, bytes: committed totals.
        generation: number of the last finished run; 0 if none has finished.
    """

    digest: str
    reference: str
    layer: int
    dtype: str
    width: int
    texts: int
    objects: int
    bytes: int
    generation: int


@dataclass
class CacheInfo:
    """A cache. `problems` lists records that cannot be read; `verify` checks more."""

    references: list[ReferenceInfo] = field(default_factory=list)
    trunks: list[TrunkInfo] = field(default_factory=list)
    views: list[ViewInfo] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def cache_info(root: Path | str) -> CacheInfo:
    """Reads all records of a cache. Raises CacheError if there is none."""
    store = Store.open(root)
    info = CacheInfo()
    trunks = store.trunks()
    for digest, spec in trunks.items():
        info.trunks.append(_trunk(store, digest, spec, info.problems))
    for digest in store.spec_digests():
        if digest in trunks:
            continue
        try:
            info.references.append(_reference(store, digest, info.problems))
        except CacheError as error:
            info.problems.append(_said(error))
    for name in store.views():
        try:
            record = store.view_record(name)
            info.views.append(ViewInfo(name, record.table.rows, record.spec, dict(record.meta)))
        except CacheError as error:
            info.problems.append(_said(error))
    return info


def newest_spec(store: Store) -> str:
    """Digest of the spec that was written last, by the file system's clock. Raises CacheError if there is none."""
    digests = store.reference_digests()
    if not digests:
        raise CacheError(
            "the cache contains no reference yet",
            code="cache-no-spec",
            where=str(store.root),
            remedy="run `dpoeng precompute-ref` into it first",
            exit_status=2,
        )
    return max(digests, key=lambda digest: ((store.root / spec_name(digest)).stat().st_mtime_ns, digest))


def _trunk(store: Store, digest: str, spec: ReferenceSpec, problems: list[str]) -> TrunkInfo:
    outcomes = [outcome for _, outcome in store.read_commits(digest)]
    objects = [outcome.object for outcome in outcomes if isinstance(outcome, Commit)]
    problems += [_said(outcome) for outcome in outcomes if isinstance(outcome, CacheError)]
    fields = spec.fields
    return TrunkInfo(
        digest=digest,
        **{name: fields[name] for name in ("reference", "layer", "dtype", "width")},
        texts=sum(reference.rows for reference in objects),
        objects=len(objects),
        bytes=sum(reference.bytes for reference in objects),
        generation=max(store.generations(digest), default=0),
    )


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

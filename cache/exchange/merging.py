"""Merges caches: copies another cache's content without changing what exists."""

from __future__ import annotations

from functools import partial

from dpoeng.cache.errors import CacheError
from dpoeng.cache.folder import object_name, table_name, view_name
from dpoeng.cache.records import Commit
from dpoeng.cache.store import Store
from dpoeng.cache.trunk.index import open_states


def merge(target: Store, source: Store) -> tuple[int, list[str]]:
    """Copies another cache's specs, undamaged objects, trunks, records and views. Existing content does not change.

    Returns:
        (number of new objects, names of the copied views).

    Raises:
        CacheError: the target has a different view of the same name; or a record or table in the source is damaged.
            Objects that were already copied stay, and the same call continues.
    """
    copied = 0
    target.raise_format(source.format)
    views = [source.view_record(name) for name in source.views()]
    for record in views:
        if record.name in target.views() and target.view_record(record.name) != record:
            raise CacheError(
                "both caches have a view of this name",
                code="cache-view-exists",
                where=f"{target.root / view_name(record.name)} and {source.root / view_name(record.name)}",
                remedy="run `dpoeng precompute-ref` on one of the two data sets with another --name and a new --cache, "
                "then merge that one",
                exit_status=2,
            )
    for digest, spec in source.specs().items():
        target.put_spec(spec)
        before = {commit.object.name for commit in target.commits(digest, [])}
        for commit in _sound_commits(source, digest):
            if commit.object.name not in before:
                target.put_object(commit.object.name, source.map(object_name(commit.object.name), commit.object.bytes))
                target.put_commit(commit)
                copied += 1
        target.seal(digest)
    for record in views:
        target.put_view(record, source.map(table_name(record.table.name), record.table.bytes))
    return copied, [record.name for record in views]


def _sound_commits(store: Store, digest: str) -> list[Commit]:
    spec = store.spec(digest)
    opener = partial(open_states, store, spec) if spec.holds_states else store.open_shard
    opened, _ = store.sound_objects(digest, opener, sealed=False, held={})
    sound = {reference for reference, _ in opened}
    return [commit for commit in store.commits(digest, []) if commit.object in sound]

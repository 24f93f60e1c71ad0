"""Writes selected rows of a view as a new view: the table is new, the objects are shared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dpoeng.cache.errors import CacheError
from dpoeng.cache.folder import view_name
from dpoeng.cache.reader import View
from dpoeng.cache.records import ObjectRef, ViewRecord
from dpoeng.cache.selection.rules import Rows
from dpoeng.cache.store import Store
from dpoeng.cache.table import Entries, ViewEntry, encode_table
from dpoeng.cache.words import counted


def write_rows(
    root: Path, view: View, rows: Rows, name: str, about: Mapping[str, Any], *, force: bool = False
) -> ViewRecord:
    """Writes rows of `view`, in their order, as the view `name` of the same cache.

    Args:
        root: the cache.
        view: a view of it.
        rows: [n], at least one, numbers of rows of the data set; of a ranked row all responses are taken.
        name: name of the new view.
        about: how the rows were selected; stored in `meta` under `selection`.
        force: replace another view of that name. A view with the same bytes is always replaced.

    Raises:
        CacheError: the name is invalid, or another view has it.
    """
    view_name(name)
    store = Store.open(root)
    source = store.view_record(view.name)
    starts = np.append(np.asarray(view.row_starts(), np.int64), len(view))
    counts = starts[rows + 1] - starts[rows]
    chosen = np.repeat(starts[rows] - (counts.cumsum() - counts), counts) + np.arange(counts.sum())
    entries = Entries(ViewEntry(*view.source(i), view.key(i), view.extra(i)) for i in chosen.tolist())
    shards, places = view.places(chosen)
    used = np.unique(shards)
    data = encode_table(entries, np.searchsorted(used, shards).astype(np.int32), places)
    record = ViewRecord(
        name,
        source.spec,
        ObjectRef(xxhash.xxh3_128_hexdigest(data), len(entries), len(data)),
        tuple(source.objects[k] for k in used.tolist()),
        tuple(entries.files),
        {**source.meta, "selection": {"view": view.name, "table": source.table.name, **about}},
    )
    if name in store.views() and not force and store.view_record(name).encode() != record.encode():
        raise CacheError(
            "the cache has a view of this name, with other rows",
            code="select-exists",
            where=f"--output {name}",
            expected="a new name",
            found=f"view {name}, {counted(store.view_record(name).table.rows, 'row')}",
            remedy="choose another name, or add --force to replace that view",
            exit_status=2,
        )
    if name == view.name:
        raise CacheError(
            "a selection cannot replace the view that it selects from",
            code="select-exists",
            where=f"--output {name}",
            expected="a new name",
            found="the name of that view",
            remedy="choose another name, so that the whole view stays available",
            exit_status=2,
        )
    store.put_view(record, data)
    return record

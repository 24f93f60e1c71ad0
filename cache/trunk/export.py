"""The hidden states of a view's pairs as columns of a Parquet file, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from dpoeng.cache.errors import CacheError, UserError
from dpoeng.cache.files import replacing
from dpoeng.cache.reader import View
from dpoeng.cache.store import Store
from dpoeng.cache.trunk.index import TrunkIndex, trunks_of
from dpoeng.cache.trunk.objects import as_float32

_WRITTEN_AT_ONCE: Final = 64 << 20
_IDS: Final = ("prompt_ids", "chosen_ids", "rejected_ids")
_STATES: Final = ("prompt_states", "chosen_states", "rejected_states")


def export_states(view: View, layer: int, path: Path) -> int:
    """Writes token ids, states and sources, one row for each row of the source, in its order.

    States are float32, token after token, which represents the other dtypes exactly. The file's metadata `dpoeng.trunk`
    gives the layer, the dtype in which they were computed, and the width of a token.

    Args:
        view: of the pairs.
        layer: the layer whose input the states are.
        path: ends in `.parquet`. The file appears once it is complete.

    Returns:
        The number of rows.

    Raises:
        UserError: another ending, no such trunk, or the trunk lacks pairs of the view.
    """
    if path.suffix != ".parquet":
        raise UserError(
            "unknown file ending",
            code="export-format",
            where=str(path),
            expected=".parquet, for hidden states",
            found=path.suffix or "no ending",
            remedy="rename the file to one of these endings",
        )
    index = _open(view, layer)
    from pyarrow import parquet

    trunk = {name: index.spec.fields[name] for name in ("layer", "dtype", "width")}
    fields = [pa.field(name, pa.list_(pa.int32())) for name in _IDS]
    fields += [pa.field(name, pa.large_list(pa.float32())) for name in _STATES]
    fields += [pa.field("source_file", pa.string()), pa.field("source_row", pa.int64())]
    schema = pa.schema(fields, metadata={f"dpoeng.trunk.{name}": str(value) for name, value in trunk.items()})
    with replacing(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        rows: list[dict[str, Any]] = []
        size = 0
        for i in range(len(view)):
            rows.append(_columns(view, index, i))
            size += sum(rows[-1][name].nbytes for name in _STATES)
            if size >= _WRITTEN_AT_ONCE or i == len(view) - 1:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
                rows, size = [], 0
    return len(view)


def _open(view: View, layer: int) -> TrunkIndex:
    store = Store.open(view.root)
    trunks = trunks_of(store, view.spec.digest)
    if layer not in trunks:
        raise CacheError(
            "the cache has no hidden states of this layer",
            code="cache-no-trunk",
            where=f"{view.root}, --trunk-layer {layer}",
            found=f"trunks at layers {', '.join(map(str, trunks))}" if trunks else "no trunk",
            remedy=f"run the same `dpoeng precompute-ref` again with --trunk-layer {layer}",
            exit_status=2,
        )
    index = TrunkIndex.open(store, trunks[layer].digest)
    if all(index.holds(view[i].ids) for i in range(len(view))):
        index.check(view[i].ids for i in range(len(view)))
    return index


def _columns(view: View, index: TrunkIndex, i: int) -> dict[str, Any]:
    ids = view[i].ids
    source_file, source_row = view.source(i)
    chosen, rejected = (index.states(ids.prompt_ids, response) for response in (ids.chosen_ids, ids.rejected_ids))
    states = (index.states(ids.prompt_ids) if len(ids.prompt_ids) else chosen[:0], chosen, rejected)
    return {
        **{name: getattr(ids, name).tolist() for name in _IDS},
        **{name: as_float32(part, index.dtype).reshape(-1) for name, part in zip(_STATES, states, strict=True)},
        "source_file": source_file,
        "source_row": source_row,
    }

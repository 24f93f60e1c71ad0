"""Imports reference log-probs that another program computed into a cache, ready to train against."""

from __future__ import annotations

from pathlib import Path

from dpoeng.cache.exchange.importing import Imported, file_holds_sums, import_rows
from dpoeng.cache.store import Store
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.models.loading import pick_device, with_stored_quantization
from dpoeng.engine.models.sources import find_adapter, find_model
from dpoeng.engine.recipes.precompute import default_batch_tokens, default_view_name, required_model
from dpoeng.engine.reference.identity import spec_in_cache
from dpoeng.engine.reference.view import reference_record
from dpoeng.engine.runtime.progress import QUIET, Progress


def import_reference(config: PrecomputeConfig, path: Path, progress: Progress = QUIET) -> tuple[Imported, bool]:
    """Imports the rows of a file into `config.cache`, as numbers of the reference that `config` describes.

    Args:
        config: model, adapter and precision with which the numbers were computed; `name` for the view.
        path: `.jsonl`, `.parquet` or `.arrow` with the columns that `dpoeng cache export` writes, or with TRL's.
        progress: receives reports.

    Returns:
        the result of the import, and whether it has only sums: these work for every loss that does not weigh tokens.

    Raises:
        UserError: no such model, or rows that cannot be correct.
    """
    source = find_model(required_model(config))
    config = with_stored_quantization(config, source)
    adapter = find_adapter(config.adapter) if config.adapter else None
    config = config.model_copy(
        update={"batch_tokens": config.batch_tokens or default_batch_tokens(pick_device(config.device))}
    )
    sums = file_holds_sums(path)
    store = Store.open(config.cache, create=True)
    spec = spec_in_cache(store, config, source, adapter, progress)
    meta = {"reference": reference_record(config, source, adapter, spec)}
    name = config.name or default_view_name(path)
    before = store.view_record(name).table if name in store.views() else None
    done = import_rows(store, spec.of_sums() if sums else spec, path, name, meta)
    if before is not None and before.name != store.view_record(name).table.name:
        rows = counted(before.rows, "row")
        progress.note(
            f"view {name!r} contained {rows} of another import or file; it now contains these (--name keeps both)"
        )
    return done, sums

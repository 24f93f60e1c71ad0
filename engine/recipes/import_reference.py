"""Reference log-probs that another program has computed, taken into a cache and ready to train against."""

from __future__ import annotations

from pathlib import Path

from dpoeng.cache.exchange import Imported, file_holds_sums, import_rows
from dpoeng.cache.store import Store
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.models.loading import pick_device, with_stored_quantization
from dpoeng.engine.models.sources import find_adapter, find_model
from dpoeng.engine.recipes.precompute import default_batch_tokens, default_view_name, required_model
from dpoeng.engine.reference.identity import reference_spec
from dpoeng.engine.reference.view import reference_record
from dpoeng.engine.runtime.progress import QUIET, Progress


def import_reference(config: PrecomputeConfig, path: Path, progress: Progress = QUIET) -> tuple[Imported, bool]:
    """Takes the rows of a file into `config.cache`, as numbers of the reference that `config` names.

    Args:
        config: model, adapter and precision of whoever computed the numbers; `name` for the view.
        path: `.jsonl`, `.parquet` or `.arrow` with the columns that `dpoeng cache export` writes, or with TRL's.
        progress: where to report.

    Returns:
        what was imported, and whether it was sums only: these serve every loss but those that weigh tokens.

    Raises:
        UserError: no such model, or rows that cannot be right.
    """
    source = find_model(required_model(config))
    config = with_stored_quantization(config, source)
    adapter = find_adapter(config.adapter) if config.adapter else None
    config = config.model_copy(
        update={"batch_tokens": config.batch_tokens or default_batch_tokens(pick_device(config.device))}
    )
    sums = file_holds_sums(path)
    spec = reference_spec(config, source, adapter, progress)
    meta = {"reference": reference_record(config, source, adapter, spec)}
    store = Store.open(config.cache, create=True)
    name = config.name or default_view_name(path)
    return import_rows(store, spec.of_sums() if sums else spec, path, name, meta), sums

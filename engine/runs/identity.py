"""Settings that a resumed run must share with its beginning."""

from __future__ import annotations

import json
from typing import Any

import xxhash

from dpoeng.cache.files import hash_file
from dpoeng.cache.reader import View
from dpoeng.cache.selection.mixed import AnyView, MixedView
from dpoeng.cache.selection.scores import row_scores
from dpoeng.engine.config.fields import Mode, TrainConfig
from dpoeng.engine.losses.own import OwnLoss

# Fields that may differ between a run and its continuation: none of them affects a weight.
FREE_TO_CHANGE = frozenset(
    "cache output_dir resume model adapter init_adapter device logging_steps eval_steps save_steps save_total_limit "
    "fsdp per_device_eval_batch_size parity_pairs parity_tolerance eval_group_by report_to run_name "
    "activation_offloading layer_offloading offload_gib offload_folder mix_with report_samples".split()
)


def run_identity(
    config: TrainConfig, view: AnyView, eval_view: View | None, mode: Mode, trunk_layer: int | None = None
) -> dict[str, Any]:
    """Everything that determines the result of a run, which a continuation must share with its beginning.

    `trunk_layer`: of the stored states that it actually begins from; they were rounded in other batches.
    """
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in FREE_TO_CHANGE}
    settings["adapter_mode"] = mode
    del settings["trunk_layer"]
    if trunk_layer is not None:
        settings["trunk_layer"] = trunk_layer
    if config.order == "random":  # keep the identity of runs from before other orders existed
        del settings["order"], settings["order_by"]
    if config.watches_a_metric:
        settings["eval_steps"] = config.eval_steps
    identity: dict[str, Any] = {
        "settings": settings,
        "reference": view.spec.digest,
        "pairs": rows_digest(view),
        "eval_pairs": rows_digest(eval_view) if eval_view is not None else None,
    }
    if config.init_adapter is not None:
        from dpoeng.engine.models.sources import find_adapter

        identity["init_adapter"] = hash_file(find_adapter(config.init_adapter).weight_files[0])
    if view.rows != "pairs":
        identity["scores"] = scores_digest(view)
        identity["eval_scores"] = scores_digest(eval_view) if eval_view is not None else None
    if isinstance(view, MixedView):
        identity["mixed"] = [len(part) for part in view.parts]
    if config.order != "random":
        identity["order_scores"] = xxhash.xxh3_128_hexdigest(row_scores(view, config.order_by).tobytes())
    if user_losses := [name for name in config.loss_type if isinstance(name, OwnLoss)]:
        identity["own_loss"] = {str(name): name.digest for name in user_losses}
    if config.pair_weight_column is not None:
        identity["weights"] = _column_digest(view, config.pair_weight_column)
    return identity


def rows_digest(view: AnyView) -> str:
    """One hash over the pair keys of a view, in order."""
    digest = xxhash.xxh3_128()
    for row in range(len(view)):
        digest.update(view.key(row))
    return digest.hexdigest()


def scores_digest(view: AnyView) -> str:
    """One hash over the data set's scores or labels of each row's responses."""
    digest = xxhash.xxh3_128()
    for row in range(len(view)):
        digest.update(json.dumps(view.scores(row)).encode() + b"\n")
    return digest.hexdigest()


def _column_digest(view: AnyView, column: str) -> str:
    """One hash over a user's column, in the order of the rows."""
    digest = xxhash.xxh3_128()
    for row in range(len(view)):
        digest.update(json.dumps(view.extra(row).get(column)).encode() + b"\n")
    return digest.hexdigest()


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Differences between two identities: (name, old, new). A field newer than the run had its default."""
    defaults = TrainConfig.model_validate({}).model_dump(mode="json")
    newer = {name: defaults[name] for name in new["settings"] if name in defaults}
    flat_old = {**newer, **old["settings"], **{k: v for k, v in old.items() if k != "settings"}}
    flat_new = {**new["settings"], **{k: v for k, v in new.items() if k != "settings"}}
    return [
        (name, flat_old.get(name), flat_new.get(name))
        for name in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(name) != flat_new.get(name)
    ]

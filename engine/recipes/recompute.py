"""A cache's numbers against its reference: some pairs scored again, layer by layer where the base does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds
from dpoeng.engine.config.fields import LayerOffloading, PrecomputeConfig
from dpoeng.engine.memory.offloading import decide_scoring
from dpoeng.engine.models.sources import ModelSource
from dpoeng.engine.reference.parity import ParityReport, recompute
from dpoeng.engine.runtime.progress import QUIET, Progress


def recompute_pairs(
    view: View,
    count: int,
    *,
    model: str | None = None,
    adapter: str | None = None,
    device: str = "auto",
    layer_offloading: LayerOffloading = "auto",
    progress: Progress = QUIET,
) -> ParityReport:
    """Scores some rows of a view again with its reference, and compares; see `recompute`.

    Args:
        view: an open view.
        count: rows to score, spread over the view.
        model: where the base is now; default: where it was.
        adapter: where the SFT adapter is now; default: where it was.
        device: as in `PrecomputeConfig`.
        layer_offloading: as in `PrecomputeConfig`.
        progress: told where layers are loaded one at a time.

    Raises:
        UserError: the model cannot be found or loaded.
    """

    def by_layer(config: PrecomputeConfig, source: ModelSource, pairs: Sequence[PairIds], device: torch.device) -> bool:
        config = config.model_copy(update={"layer_offloading": layer_offloading})
        return decide_scoring(config, source, pairs, device, progress.note)

    return recompute(view, count, model=model, adapter=adapter, device=device, by_layer=by_layer)

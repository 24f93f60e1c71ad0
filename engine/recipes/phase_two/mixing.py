"""Which views a run trains on, how often and in which order it meets their rows: settings to an `Arrangement`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.records import ROW_KINDS
from dpoeng.cache.selection.mixed import AnyView, MixedView
from dpoeng.cache.selection.rules import pair_scores
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.training.arrangement import Arrangement


def with_others(config: TrainConfig, view: View, open_view: Callable[..., View]) -> AnyView:
    """The training view, joined with those of `mix_with`.

    Raises:
        CacheError: one of them is not there, or has another reference.
    """
    others = []
    for name in config.mix_with:
        folder, colon, of_folder = name.rpartition(":")
        place = (Path(folder), of_folder or None) if colon else (config.cache, name)
        others.append(open_view(*place, rows=ROW_KINDS))
    return MixedView([view, *others]) if others else view


def arrangement_of(config: TrainConfig, view: AnyView, rows: Sequence[int]) -> Arrangement | None:
    """How `mix` and `order` arrange the training rows of a view; None where each comes once, by chance.

    Args:
        config: of the run.
        view: the training view.
        rows: of it, ascending.

    Raises:
        UserError: a source has no row left to train on; or its rows cannot be ordered so.
    """
    if config.mix is None and config.order == "random":
        return None
    starts = view.starts if isinstance(view, MixedView) else [0, len(view)]
    sizes = np.diff(np.searchsorted(np.asarray(rows), starts)).tolist()
    if config.mix is not None and isinstance(view, MixedView) and 0 in sizes:
        raise UserError(
            "a view to be mixed has no row to train on",
            code="mix-empty",
            where=f"view {view.parts[sizes.index(0)].name}",
            expected="one row or more that is not held out",
            found=f"{len(view.parts[sizes.index(0)])} rows, all held out",
            remedy="lower --eval-share, hold out other pairs with --eval-view, or leave the view out",
        )
    shares = None if config.mix is None else tuple(weight / sum(config.mix) for weight in config.mix)
    return Arrangement(tuple(sizes), shares, None if config.order == "random" else _ranks(config, view)[list(rows)])


def _ranks(config: TrainConfig, view: AnyView) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A number for every row of the view, smaller where it comes earlier."""
    if view.rows != "pairs":
        raise UserError(
            "only pairs have a margin to be ordered by",
            code="config-value",
            where=f"--order {config.order}",
            expected="a view of pairs",
            found=f"view {view.name}, {view.rows} rows",
            remedy="leave --order out",
        )
    scores = pair_scores(view, config.order_by)
    return -scores if config.order == "easy_first" else scores

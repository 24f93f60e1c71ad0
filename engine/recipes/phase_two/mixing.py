"""Turns `mix` and `order` into an `Arrangement`: which views a run trains on, how often, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.records import ROW_KINDS
from dpoeng.cache.selection.mixed import AnyView, MixedView
from dpoeng.cache.selection.scores import row_scores
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.training.arrangement import Arrangement


def with_others(config: TrainConfig, view: View, open_view: Callable[..., View]) -> AnyView:
    """The training view, joined with the views in `mix_with`.

    Raises:
        CacheError: one of them does not exist, or has another reference.
    """
    others = []
    for name in config.mix_with:
        folder, colon, view_name = name.rpartition(":")
        place = (Path(folder), view_name or None) if colon else (config.cache, name)
        others.append(open_view(*place, rows=ROW_KINDS))
    return MixedView([view, *others]) if others else view


def arrangement_of(config: TrainConfig, view: AnyView, rows: Sequence[int]) -> Arrangement | None:
    """How `mix` and `order` arrange a view's training rows; None if each comes once, in random order.

    Args:
        config: config of the run.
        view: the training view.
        rows: its training rows, ascending.

    Raises:
        UserError: a source has no training row left, or its rows cannot be ordered this way.
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
            expected="at least one row that is not held out",
            found=f"{len(view.parts[sizes.index(0)])} rows, all held out",
            remedy="lower --eval-share, hold out other pairs with --eval-view, or leave the view out",
        )
    shares = None if config.mix is None else tuple(weight / sum(config.mix) for weight in config.mix)
    return Arrangement(tuple(sizes), shares, None if config.order == "random" else _ranks(config, view, rows))


def _ranks(config: TrainConfig, view: AnyView, rows: Sequence[int]) -> npt.NDArray[np.float64]:
    """A number for each of some rows, given by their places; smaller numbers come earlier."""
    scores = row_scores(view, config.order_by)[np.searchsorted(np.asarray(view.row_starts()), rows)]
    return -scores if config.order == "easy_first" else scores

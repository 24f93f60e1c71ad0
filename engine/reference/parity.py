"""Compares a loaded model with the cache: scores the same pairs live and measures the differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dpoeng.cache.reader import View
from dpoeng.cache.schema import PairIds, ScoredPair
from dpoeng.cache.selection.mixed import AnyView
from dpoeng.cache.store import Store
from dpoeng.cache.trunk.index import TrunkIndex, trunks_of
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.models.loading import pick_device
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.sources import ModelSource, find_adapter, find_model
from dpoeng.engine.models.trunk.stand_ins import rehearsing
from dpoeng.engine.reference.loading import load_reference
from dpoeng.engine.reference.trunk_choice import stored_states
from dpoeng.engine.scoring.layout import batches_of_pairs
from dpoeng.engine.scoring.passes import Batches, score_batches


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Policy compared with cache on the same tokens. Differences are per token, absolute, in nats.

    Attributes:
        pairs: pairs compared.
        tokens: tokens compared.
        mean_diff: mean |difference|.
        max_diff: largest |difference|.
        reward_noise: root mean square of beta times the difference of a pair's margin: the spurious reward margin at
            the start of training.
        tolerance: largest accepted `mean_diff`.
        noise: mean |difference| between these pairs alone and packed, by the loaded model; None if not measured.
        trunks: from `recompute`, by layer: the same pairs run from the stored hidden states.
    """

    pairs: int
    tokens: int
    mean_diff: float
    max_diff: float
    reward_noise: float
    tolerance: float
    noise: float | None = None
    trunks: Mapping[int, ParityReport] = field(default_factory=dict)

    def record(self) -> dict[str, float]:
        """The report for run.json."""
        names = ("pairs", "mean_diff", "max_diff", "reward_noise", "tolerance")
        noise = {"noise": self.noise} if self.noise is not None else {}
        return {**{name: getattr(self, name) for name in names}, **noise}

    @property
    def ok(self) -> bool:
        """Whether the cached values are this model's (False for NaN)."""
        return self.mean_diff <= self.tolerance and all(trunk_report.ok for trunk_report in self.trunks.values())


def parity_tolerance(lm: CausalLM, reference_quantization: str, reference_dtype: str) -> float:
    """The mean |difference| per token, in nats, that rounding can cause; a wrong model is far above it.

    The same scoring code on the same machine usually repeats exactly; this allows for another batch shape (bfloat16: up
    to 0.03 measured) or another device. If policy and reference were requested in different precisions, the gap between
    them is expected, and reported.
    """
    dtype = str(lm.dtype).removeprefix("torch.")
    return tolerated(lm.quantization, dtype, reference_quantization, reference_dtype)


def tolerated(quantization: str, dtype: str, reference_quantization: str, reference_dtype: str) -> float:
    """`parity_tolerance` of a model that is given by its precision."""
    if quantization != reference_quantization:
        return 1.0 if {"4bit", "stored"} & {quantization, reference_quantization} else 0.3
    if dtype != reference_dtype:
        return 0.1
    return {"float32": 2e-3, "bfloat16": 6e-2, "float16": 2e-2}[dtype]


_TIMES_NOISE, _TIMES_TABLE = 3.0, 2.5
"""A tolerance follows the measured noise up to these multiples: of the noise, and of the table's value as a ceiling."""


def noisy_tolerance(tolerance: float, noise: float) -> float:
    """The tolerance on a machine whose numbers depend on the batch by `noise`, mean nats per token.

    At least the table's `tolerance`, and at most 2.5 times that, so that no noise lets a wrong model pass.
    """
    return min(max(tolerance, _TIMES_NOISE * noise), _TIMES_TABLE * tolerance)


def same_precision(lm: CausalLM, reference_quantization: str, reference_dtype: str) -> bool:
    """Whether model and reference should agree up to noise, with no gap of precision between them."""
    return (lm.quantization, str(lm.dtype)) == (reference_quantization, f"torch.{reference_dtype}")


def spread(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of these rows, evenly spread."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def compare_with_cache(
    lm: CausalLM,
    view: AnyView | Sequence[ScoredPair],
    rows: Sequence[int],
    *,
    beta: float,
    batch_tokens: int,
    tolerance: float,
    measures_noise: bool = False,
) -> ParityReport:
    """Scores rows of a view with the loaded model and compares them with the cached values.

    If the view has only sums, a response's difference is spread evenly over its tokens. With `measures_noise` a
    difference just above the tolerance is set against noise: the same pairs are scored again, each in a forward of its
    own, and the tolerance becomes `noisy_tolerance`.
    """
    sums = isinstance(view, AnyView) and view.spec.holds_sums
    cached = [view[row] for row in rows]
    live = _scored(lm, cached, batch_tokens)
    every, margins = _differences(live, cached, sums)
    report = ParityReport(
        pairs=len(cached),
        tokens=len(every),
        mean_diff=float(every.mean()),
        max_diff=float(every.max()),
        reward_noise=beta * math.sqrt(float(np.mean(np.square(margins)))),
        tolerance=tolerance,
    )
    if measures_noise and tolerance < report.mean_diff <= _TIMES_TABLE * tolerance:
        noise = float(_differences(_scored(lm, cached, 1), live, sums)[0].mean())
        report = replace(report, noise=noise, tolerance=noisy_tolerance(tolerance, noise))
    return report


def _scored(lm: CausalLM, pairs: Sequence[ScoredPair], batch_tokens: int) -> list[ScoredPair]:
    """The same pairs with the loaded model's values, in forwards of at most so many tokens; a pair at least."""
    ids = [pair.ids for pair in pairs]
    batches = [(ids, batch) for batch, _ in batches_of_pairs(ids, batch_tokens)]
    return [row for batch in score_batches(lm, Batches(batches)) for row in batch]


def _differences(
    live: Sequence[ScoredPair], cached: Sequence[ScoredPair], sums: bool
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], list[float]]:
    """Of all tokens |difference|, and of each pair the difference of its margin, in nats."""
    diffs: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    margins: list[float] = []
    for now, before in zip(live, cached, strict=True):
        chosen = now.chosen_logps.astype(np.float64) - before.chosen_logps
        rejected = now.rejected_logps.astype(np.float64) - before.rejected_logps
        if sums:
            chosen, rejected = (np.full(len(side), side.mean()) for side in (chosen, rejected))
        diffs += [np.abs(chosen), np.abs(rejected)]
        margins.append(float(chosen.sum() - rejected.sum()))
    return np.concatenate(diffs), margins


Decide = Callable[[PrecomputeConfig, ModelSource, Sequence[PairIds], torch.device], bool]
"""Whether some pairs are scored layer by layer, with a reference on a device."""


def recompute(
    view: View,
    count: int,
    *,
    model: str | None = None,
    adapter: str | None = None,
    device: str = "auto",
    by_layer: Decide = lambda *_: False,
) -> ParityReport:
    """The fourth depth of verification: scores rows of a view again with its reference and compares.

    If the view has trunks, rows with stored states are also run from those states.

    Args:
        view: an open view.
        count: rows to score, spread over the view.
        model: the base's new location; by default the recorded one.
        adapter: the SFT adapter's new location; by default the recorded one.
        device: as in `PrecomputeConfig`.
        by_layer: decides whether the base's layers are left in its files.

    Raises:
        UserError: the model cannot be found or loaded.
    """
    reference = view.meta["reference"]
    config = PrecomputeConfig(
        **{
            **{name: value for name, value in reference.items() if name in PrecomputeConfig.model_fields},
            "model": model or reference["model"],
            "adapter": adapter or reference["adapter"],
            "device": device,
        }
    )
    assert config.model is not None
    source = find_model(config.model, revision=reference["revision"])
    rows = spread(range(len(view)), count)
    here = pick_device(config.device)
    decided = by_layer(config, source, [view[row].ids for row in rows], here)
    sft = find_adapter(config.adapter) if config.adapter else None
    lm = load_reference(config, source, sft, here, by_layer=decided, ranked=view.rows == "ranked")
    tolerance = parity_tolerance(lm, reference["quantization"], reference["dtype"])
    compare = partial(
        compare_with_cache,
        beta=0.1,
        batch_tokens=reference["batch_tokens"],
        tolerance=tolerance,
        measures_noise=same_precision(lm, reference["quantization"], reference["dtype"]),
    )
    return replace(compare(lm, view, rows), trunks=_from_trunks(lm, view, rows, compare))


def _from_trunks(
    lm: CausalLM, view: View, rows: Sequence[int], compare: Callable[..., ParityReport]
) -> dict[int, ParityReport]:
    """By layer: rows of a view run from the states of each of its trunks, with a whole model."""
    store, reports = Store.open(view.root), {}
    for layer, spec in trunks_of(store, view.spec.digest).items():
        index = TrunkIndex.open(store, spec.digest)
        covered = [row for row in rows if index.holds(view[row].ids)]
        if covered:
            lm.states = stored_states(index, lm)
            with rehearsing(lm, layer):
                reports[layer] = compare(lm, view, covered)
    return reports

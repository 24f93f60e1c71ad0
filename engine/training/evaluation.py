"""Evaluates held-out pairs: means with intervals, length-controlled accuracy, and the same by group.

Pure functions of a `PreferenceLoss` and labels; needs no model and no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash

from dpoeng.cache.analytics import correlation
from dpoeng.engine.losses.batch import PreferenceLoss
from dpoeng.engine.losses.metrics import pair_values, with_margin
from dpoeng.engine.training.intervals import (
    ACCURACY,
    CONFIDENCE,
    CONTROLLED,
    RESAMPLES,
    Floats,
    intervals,
    length_controlled_accuracy,
)

_OF_GROUPS = ("loss", "rewards/accuracies", "rewards/margins")


@dataclass(frozen=True, slots=True)
class Group:
    """The pairs with one value of a column: their number, their means, and each mean's interval."""

    pairs: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of one evaluation.

    Attributes:
        pairs: held-out pairs.
        prompts: number of distinct prompts.
        ties: pairs with a margin of exactly 0, as for a policy equal to its reference; accuracies count them as wrong.
        metrics: name -> value over all pairs.
        intervals: name -> interval of `CONFIDENCE`, see intervals.py.
        groups: column -> value -> its pairs.
    """

    pairs: int
    prompts: int
    ties: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    groups: dict[str, dict[str, Group]]

    def record(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {**asdict(self), "confidence": CONFIDENCE, "resamples": RESAMPLES}


def summarise(
    losses: PreferenceLoss,
    prompts: Sequence[bytes],
    labels: Mapping[str, Sequence[str]],
    *,
    seed: int = 0,
    per_pair_loss: bool = True,
) -> Evaluation:
    """Means, intervals and groups of held-out pairs.

    Args:
        losses: their losses, as one batch.
        prompts: anything that identifies each pair's prompt: pairs with the same prompt are not independent.
        labels: column -> the value of each pair.
        seed: seed of the bootstrap.
        per_pair_loss: whether the i-th loss belongs to the i-th pair; not if pairs are sorted, and then groups have no
            loss.
    """
    values = {name: tensor.cpu().numpy() for name, tensor in pair_values(losses).items()}
    if losses.threshold is not None:
        return _summarise_unpaired(values, prompts, labels, seed=seed)
    of_pairs, longer = _of_pairs(losses, values)
    metrics = {name: float(value.mean()) for name, value in values.items()}
    controlled = length_controlled_accuracy(of_pairs[ACCURACY], longer)
    length_correlation = correlation(of_pairs["rewards/margins"], longer)
    if controlled is not None:
        metrics[CONTROLLED] = controlled
    if length_correlation is not None:
        metrics["rewards/margins_length_correlation"] = length_correlation
    rows = losses.sums.ranked
    if rows is not None:  # lengths are of pairs, everything else of rows
        of_prompt = [prompt for prompt, size in zip(prompts, rows.pairs.tolist(), strict=True) for _ in range(size)]
        by_pair = intervals(of_pairs, longer, of_prompt, seed=seed)
        longer = np.zeros(len(prompts))
        bounds = intervals(values, longer, prompts, seed=seed)
        bounds |= {name: by_pair[name] for name in (CONTROLLED,) if name in by_pair}
    else:
        bounds = intervals(values, longer, prompts, seed=seed)
    groups: dict[str, dict[str, Group]] = {}
    names = [name for name in _OF_GROUPS if per_pair_loss or name != "loss"]
    for column, column_labels in labels.items():
        groups[column] = {}
        for label in sorted(set(column_labels)):
            places = [row for row, found_label in enumerate(column_labels) if found_label == label]
            part = {name: values[name][places] for name in names}
            groups[column][label] = Group(
                len(places),
                {name: float(value.mean()) for name, value in part.items()},
                intervals(part, longer[places], [prompts[row] for row in places], seed=seed),
            )
    ties = int((values["rewards/margins"] == 0).sum())
    return Evaluation(len(prompts), len(set(prompts)), ties, metrics, bounds, groups)


def _of_pairs(found: PreferenceLoss, values: Mapping[str, Floats]) -> tuple[dict[str, Floats], Floats]:
    """Accuracy and margin of each pair, of ranked rows those made of them; and the tokens by which chosen is longer."""
    longer: Floats = (found.sums.chosen_tokens - found.sums.rejected_tokens).cpu().numpy()
    if found.pair_margins is None:
        return {name: values[name] for name in (ACCURACY, "rewards/margins")}, longer
    margins: Floats = found.pair_margins.cpu().numpy()
    return {ACCURACY: (margins > 0).astype(np.float64), "rewards/margins": margins}, longer


def _summarise_unpaired(
    values: Mapping[str, Floats], prompts: Sequence[bytes], labels: Mapping[str, Sequence[str]], *, seed: int
) -> Evaluation:
    """The same for unpaired rows: each mean covers the rows that have the value, such as rewards of desirable ones."""

    def of(rows: Sequence[int], names: Sequence[str]) -> Group:
        part = {name: values[name][list(rows)] for name in names}
        means = {name: float(np.nanmean(value)) for name, value in part.items() if not np.isnan(value).all()}
        bounds: dict[str, tuple[float, float]] = {}
        for name in means:
            present = np.flatnonzero(~np.isnan(part[name]))
            within = [prompts[rows[place]] for place in present.tolist()]
            bounds |= intervals({name: part[name][present]}, np.zeros(len(present)), within, seed=seed)
        return Group(len(rows), with_margin(means), bounds)

    whole = of(range(len(prompts)), list(values))
    groups = {
        column: {
            label: of([row for row, other in enumerate(row_labels) if other == label], ("loss", "rewards/accuracies"))
            for label in sorted(set(row_labels))
        }
        for column, row_labels in labels.items()
    }
    rewards = np.where(np.isnan(values["rewards/chosen"]), values["rewards/rejected"], values["rewards/chosen"])
    ties = int((rewards == values["rewards/threshold"]).sum())
    return Evaluation(len(prompts), len(set(prompts)), ties, whole.metrics, whole.intervals, groups)


def pair_lines(
    losses: PreferenceLoss, prompts: Sequence[bytes], sources: Sequence[str], *, per_pair_loss: bool = True
) -> list[dict[str, Any]]:
    """Yields a JSON object per held-out pair: its source, prompt hash, tokens, and every metric."""
    values = {name: value.cpu().tolist() for name, value in pair_values(losses).items()}
    if not per_pair_loss:
        del values["loss"]
    if losses.accuracies is None:
        values["chosen_tokens"] = [int(count) for count in losses.sums.chosen_tokens.tolist()]
    if losses.threshold is None and losses.accuracies is None:
        values["rejected_tokens"] = [int(count) for count in losses.sums.rejected_tokens.tolist()]
    return [
        {
            "source": source,
            "prompt": xxhash.xxh3_128_hexdigest(prompt),
            **{name: value[pair] for name, value in values.items() if not math.isnan(value[pair])},
        }
        for pair, (source, prompt) in enumerate(zip(sources, prompts, strict=True))
    ]

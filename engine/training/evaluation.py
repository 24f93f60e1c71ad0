"""Evaluates held-out pairs: means with intervals, length-controlled accuracy, and the same by group.

Pure functions of a `PreferenceLoss` and of labels; knows no model and no file.
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
from dpoeng.engine.training.intervals import CONFIDENCE, RESAMPLES, Floats, intervals, length_controlled_accuracy

_OF_GROUPS = ("loss", "rewards/accuracies", "rewards/margins")


@dataclass(frozen=True, slots=True)
class Group:
    """The pairs with one value of a column: how many, their means, and the interval of each."""

    pairs: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of one evaluation.

    Attributes:
        pairs: held-out pairs.
        prompts: how many prompts they have.
        ties: pairs whose margin is exactly 0, as of a policy that equals its reference; accuracies count them as wrong.
        metrics: name -> value over all of them.
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
        """As JSON can hold it."""
        return {**asdict(self), "confidence": CONFIDENCE, "resamples": RESAMPLES}


def summarise(
    found: PreferenceLoss,
    prompts: Sequence[bytes],
    labels: Mapping[str, Sequence[str]],
    *,
    seed: int = 0,
    per_pair_loss: bool = True,
) -> Evaluation:
    """Means, intervals and groups of held-out pairs.

    Args:
        found: their losses, as one batch.
        prompts: of each pair, whatever tells prompts apart: pairs of one prompt are not independent of each other.
        labels: column -> the value of each pair.
        seed: of the bootstrap.
        per_pair_loss: whether the i-th loss belongs to the i-th pair; where pairs are sorted it does not, and groups
            have no loss.
    """
    values = {name: tensor.cpu().numpy() for name, tensor in pair_values(found).items()}
    if found.threshold is not None:
        return _summarise_unpaired(values, prompts, labels, seed=seed)
    longer = (found.sums.chosen_tokens - found.sums.rejected_tokens).cpu().numpy()
    metrics = {name: float(value.mean()) for name, value in values.items()}
    controlled = length_controlled_accuracy(values["rewards/accuracies"], longer)
    length_correlation = correlation(values["rewards/margins"], longer)
    if controlled is not None:
        metrics["rewards/accuracies_length_controlled"] = controlled
    if length_correlation is not None:
        metrics["rewards/margins_length_correlation"] = length_correlation
    bounds = intervals(values, longer, prompts, seed=seed)
    groups: dict[str, dict[str, Group]] = {}
    names = [name for name in _OF_GROUPS if per_pair_loss or name != "loss"]
    for column, column_labels in labels.items():
        groups[column] = {}
        for label in sorted(set(column_labels)):
            rows = [row for row, found_label in enumerate(column_labels) if found_label == label]
            part = {name: values[name][rows] for name in names}
            groups[column][label] = Group(
                len(rows),
                {name: float(value.mean()) for name, value in part.items()},
                intervals(part, longer[rows], [prompts[row] for row in rows], seed=seed),
            )
    ties = int((values["rewards/margins"] == 0).sum())
    return Evaluation(len(prompts), len(set(prompts)), ties, metrics, bounds, groups)


def _summarise_unpaired(
    values: Mapping[str, Floats], prompts: Sequence[bytes], labels: Mapping[str, Sequence[str]], *, seed: int
) -> Evaluation:
    """The same of unpaired rows: each mean is over the rows that have the value, as rewards of desirable ones."""

    def of(rows: Sequence[int], names: Sequence[str]) -> Group:
        part = {name: values[name][list(rows)] for name in names}
        means = {name: float(np.nanmean(value)) for name, value in part.items() if not np.isnan(value).all()}
        bounds: dict[str, tuple[float, float]] = {}
        for name in means:
            known = np.flatnonzero(~np.isnan(part[name]))
            within = [prompts[rows[place]] for place in known.tolist()]
            bounds |= intervals({name: part[name][known]}, np.zeros(len(known)), within, seed=seed)
        return Group(len(rows), with_margin(means), bounds)

    whole = of(range(len(prompts)), list(values))
    groups = {
        column: {
            label: of([row for row, other in enumerate(of_rows) if other == label], ("loss", "rewards/accuracies"))
            for label in sorted(set(of_rows))
        }
        for column, of_rows in labels.items()
    }
    rewards = np.where(np.isnan(values["rewards/chosen"]), values["rewards/rejected"], values["rewards/chosen"])
    ties = int((rewards == values["rewards/threshold"]).sum())
    return Evaluation(len(prompts), len(set(prompts)), ties, whole.metrics, whole.intervals, groups)


def pair_lines(
    found: PreferenceLoss, prompts: Sequence[bytes], sources: Sequence[str], *, per_pair_loss: bool = True
) -> list[dict[str, Any]]:
    """Yield a JSON object a held-out pair: its source, prompt hash, tokens, and every metric."""
    values = {name: value.cpu().tolist() for name, value in pair_values(found).items()}
    if not per_pair_loss:
        del values["loss"]
    values["chosen_tokens"] = [int(count) for count in found.sums.chosen_tokens.tolist()]
    if found.threshold is None:
        values["rejected_tokens"] = [int(count) for count in found.sums.rejected_tokens.tolist()]
    return [
        {
            "source": source,
            "prompt": xxhash.xxh3_128_hexdigest(prompt),
            **{name: value[pair] for name, value in values.items() if not math.isnan(value[pair])},
        }
        for pair, (source, prompt) in enumerate(zip(sources, prompts, strict=True))
    ]

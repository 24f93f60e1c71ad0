"""What held-out pairs tell: means with bootstrap intervals, accuracy freed of length, and the same by group.

Pure functions of a `PreferenceLoss` and of labels; knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from dpoeng.cache.analytics import correlation
from dpoeng.engine.losses.batch import PreferenceLoss
from dpoeng.engine.runs.metrics import pair_values

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95

RESAMPLES = 1000

_OF_GROUPS = ("loss", "rewards/accuracies", "rewards/margins")


@dataclass(frozen=True, slots=True)
class Group:
    """The pairs with one value of a column: how many, their means, and the interval of each."""

    pairs: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        pairs: held-out pairs.
        metrics: name -> value over all of them.
        intervals: name -> bootstrap interval of `CONFIDENCE`; prompts are drawn anew, with all pairs of each.
        groups: column -> value -> its pairs.
    """

    pairs: int
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
    longer = (found.sums.chosen_tokens - found.sums.rejected_tokens).cpu().numpy()
    metrics = {name: float(value.mean()) for name, value in values.items()}
    controlled = length_controlled_accuracy(values["rewards/accuracies"], longer)
    length_correlation = correlation(values["rewards/margins"], longer)
    if controlled is not None:
        metrics["rewards/accuracies_length_controlled"] = controlled
    if length_correlation is not None:
        metrics["rewards/margins_length_correlation"] = length_correlation
    intervals = bootstrap(values, longer, prompts, seed=seed)
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
                bootstrap(part, longer[rows], [prompts[row] for row in rows], seed=seed),
            )
    return Evaluation(len(prompts), metrics, intervals, groups)


def pair_lines(
    found: PreferenceLoss, prompts: Sequence[bytes], sources: Sequence[str], *, per_pair_loss: bool = True
) -> list[dict[str, Any]]:
    """One JSON object a held-out pair: where it stands, its prompt's hash, its tokens, its value of every metric."""
    values = {name: value.cpu().tolist() for name, value in pair_values(found).items()}
    if not per_pair_loss:
        del values["loss"]
    values["chosen_tokens"] = [int(count) for count in found.sums.chosen_tokens.tolist()]
    values["rejected_tokens"] = [int(count) for count in found.sums.rejected_tokens.tolist()]
    return [
        {
            "source": source,
            "prompt": xxhash.xxh3_128_hexdigest(prompt),
            **{name: value[pair] for name, value in values.items()},
        }
        for pair, (source, prompt) in enumerate(zip(sources, prompts, strict=True))
    ]


def length_controlled_accuracy(right: Floats, longer: Floats) -> float | None:
    """The mean of two accuracies: of the pairs whose chosen response has more tokens, and of those where it has fewer.

    A policy that has only learnt to like length (or to dislike it) gets 0.5, however the data are. Pairs of equal
    length are left out. None where there is no pair of either kind.
    """
    if not ((longer > 0).any() and (longer < 0).any()):
        return None
    return float((right[longer > 0].mean() + right[longer < 0].mean()) / 2)


def bootstrap(
    values: Mapping[str, Floats], longer: Floats, prompts: Sequence[bytes], *, seed: int
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the means, and of the length-controlled accuracy where the accuracy is among them.

    Prompts are drawn with replacement, each with all of its pairs (a cluster bootstrap). One prompt alone has no
    interval.
    """
    _, cluster = np.unique(np.array([prompt.hex() for prompt in prompts]), return_inverse=True)
    clusters = int(cluster.max()) + 1 if len(prompts) else 0
    if clusters < 2:
        return {}

    def per_cluster(column: Floats) -> Floats:
        return np.bincount(cluster, weights=column, minlength=clusters).astype(np.float64)

    count = per_cluster(np.ones(len(prompts)))
    sums = {name: per_cluster(value) for name, value in values.items()}
    sides: list[tuple[Floats, Floats]] = []
    if "rewards/accuracies" in values:
        for side in (longer > 0, longer < 0):
            chosen = side.astype(np.float64)
            sides.append((per_cluster(values["rewards/accuracies"] * chosen), per_cluster(chosen)))
    drawn: dict[str, list[float]] = {name: [] for name in values}
    controlled: list[float] = []
    random = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        times = np.bincount(random.integers(0, clusters, clusters), minlength=clusters)
        pairs = float(times @ count)
        for name, total in sums.items():
            drawn[name].append(float(times @ total) / pairs)
        counts = [float(times @ n) for _, n in sides]
        if sides and all(counts):
            controlled.append(sum(float(times @ right) / n for (right, _), n in zip(sides, counts, strict=True)) / 2)
    intervals = {name: _interval(found) for name, found in drawn.items()}
    if len(controlled) > RESAMPLES // 2:
        intervals["rewards/accuracies_length_controlled"] = _interval(controlled)
    return intervals


def _interval(found: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)

"""Intervals of held-out means and shares, and of paired differences of either.

Pairs with the same prompt are not independent, so prompts are the units (clusters). A bootstrap alone gives "1.000 to
1.000" if all pairs are right, and is too narrow for few prompts. So shares have score intervals, and means over few
prompts at least Student's t. Works on numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bounds = tuple[float, float]

CONFIDENCE = 0.95

RESAMPLES = 1000

FEW = 30
"""Fewer held-out pairs than this say little: an accuracy of 0.7 has an interval of at least 0.35."""

ACCURACY = "rewards/accuracies"
CONTROLLED = "rewards/accuracies_length_controlled"
TOP = "rewards/top_accuracies"

_Z = 1.959964  # normal distribution, two-sided for CONFIDENCE
# Student's t for 1 to 28 degrees of freedom, two-sided for CONFIDENCE.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
)  # fmt: skip
_DRAWN_AT_ONCE = 2**21  # prompts; limits a block of resamples to 32 MiB


def length_controlled_accuracy(right: Floats, longer: Floats) -> float | None:
    """The mean of two accuracies: for pairs whose chosen response has more tokens, and for pairs where it has fewer.

    A policy that only learnt to prefer length (or brevity) gets 0.5, whatever the data. Pairs of equal length are left
    out. None if one of the two kinds has no pair.
    """
    if not ((longer > 0).any() and (longer < 0).any()):
        return None
    return float((right[longer > 0].mean() + right[longer < 0].mean()) / 2)


def intervals(
    values: Mapping[str, Floats], longer: Floats, prompts: Sequence[bytes], *, seed: int, paired: bool = False
) -> dict[str, Bounds]:
    """Intervals of the means, and of the length-controlled accuracy if the accuracy is among them.

    Args:
        values: name -> value of each pair, [N].
        longer: chosen minus rejected tokens of each pair, [N].
        prompts: [N], anything that identifies each pair's prompt.
        seed: seed of the bootstrap.
        paired: the values are differences between two policies on the same pairs.

    Returns:
        name -> bounds; empty with only one prompt, and without the accuracies if every margin is 0: a policy equal to
        its reference is neither right nor wrong.
    """
    cluster = _clusters(prompts)
    found = bootstrap(values, longer, prompts, seed=seed)
    if not found:
        return {}
    prompts_count = int(cluster.max()) + 1
    if prompts_count < FEW:
        found = {
            name: _hull(bounds, _student(values[name], cluster)) if name in values else bounds
            for name, bounds in found.items()
        }
    if not paired and "rewards/margins" in values and not values["rewards/margins"].any():
        return {name: bounds for name, bounds in found.items() if name not in (ACCURACY, TOP, CONTROLLED)}
    share_interval = _difference_of_shares if paired else _share
    found |= {name: share_interval(values[name], cluster) for name in (ACCURACY, TOP) if name in values}
    if ACCURACY not in values:
        return found
    controlled = _controlled(values[ACCURACY], longer, cluster, share_interval)
    if controlled is not None:
        found[CONTROLLED] = _hull(controlled, found.get(CONTROLLED, controlled))
    return found


def bootstrap(
    values: Mapping[str, Floats], longer: Floats, prompts: Sequence[bytes], *, seed: int
) -> dict[str, Bounds]:
    """Percentile intervals of the means, and of the length-controlled accuracy if the accuracy is among them.

    Prompts are drawn with replacement, each with all its pairs (a cluster bootstrap). A single prompt has no interval.
    Arguments as in `intervals`.
    """
    cluster = _clusters(prompts)
    clusters = int(cluster.max()) + 1 if len(prompts) else 0
    if clusters < 2:
        return {}
    columns = [np.ones(len(prompts)), *values.values()]
    sides = ACCURACY in values
    if sides:
        for side in (longer > 0, longer < 0):
            columns += [values[ACCURACY] * side, side.astype(np.float64)]
    sums = np.stack([np.bincount(cluster, weights=column, minlength=clusters) for column in columns], axis=1)
    drawn = _resampled(sums.astype(np.float64), seed)  # [RESAMPLES, columns]
    bounds = {name: _percentiles(drawn[:, 1 + place] / drawn[:, 0]) for place, name in enumerate(values)}
    if sides:
        right_longer, longer_pairs, right_shorter, shorter_pairs = drawn[:, -4:].T
        both = (longer_pairs > 0) & (shorter_pairs > 0)
        if both.sum() > RESAMPLES // 2:
            shares = right_longer[both] / longer_pairs[both] + right_shorter[both] / shorter_pairs[both]
            bounds[CONTROLLED] = _percentiles(shares / 2)
    return bounds


def wilson(share: float, n: float) -> Bounds:
    """Wilson's score interval for a share of `n` independent trials, in [0, 1]. Wilson 1927, JASA 22, 209-212."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def effective_pairs(values: Floats, cluster: Ints) -> float:
    """The effective number of independent pairs: all of them, or fewer (down to the prompts) if a prompt's pairs agree.

    The number of pairs divided by the design effect (Kish 1965); if all values are equal it is unknown, and the number
    of prompts is used. Between 1 and N.
    """
    n, clusters = len(values), len(np.unique(cluster))
    if clusters == n:
        return float(n)
    residuals = np.bincount(cluster, weights=values - values.mean())
    clustered = clusters / max(clusters - 1, 1) * float(residuals @ residuals) / n**2
    if clustered == 0 or values.var() == 0:
        return float(clusters)
    return min(max(float(values.var()) / clustered, 1.0), float(n))


def _share(right: Floats, cluster: Ints) -> Bounds:
    return wilson(float(right.mean()), effective_pairs(right, cluster))


def _difference_of_shares(differences: Floats, cluster: Ints) -> Bounds:
    """Interval of a difference of paired shares, from -1, 0 or 1 for each pair.

    Agresti and Min 2005, Statistics in Medicine 24, 729-740. Of ranked rows a difference of two shares of a row's pairs
    counts as such a part of a pair, which is never too narrow: values between vary less than those at the ends.
    """
    n = effective_pairs(differences, cluster)
    better, worse = (float(np.maximum(sign * differences, 0).mean()) * n + 0.5 for sign in (1, -1))
    mean = (better - worse) / (n + 2)
    half = _Z * math.sqrt(max(better + worse - (better - worse) ** 2 / (n + 2), 0.0)) / (n + 2)
    return max(-1.0, mean - half), min(1.0, mean + half)


def _controlled(
    right: Floats, longer: Floats, cluster: Ints, share_interval: Callable[[Floats, Ints], Bounds]
) -> Bounds | None:
    """Interval of the mean of two shares, from each one's interval.

    Newcombe 1998, Statistics in Medicine 17, 873-890.
    """
    mean = length_controlled_accuracy(right, longer)
    if mean is None:
        return None
    below = above = 0.0
    for side in (longer > 0, longer < 0):
        low, high = share_interval(right[side], cluster[side])
        below += (float(right[side].mean()) - low) ** 2
        above += (high - float(right[side].mean())) ** 2
    return mean - math.sqrt(below) / 2, mean + math.sqrt(above) / 2


def _student(values: Floats, cluster: Ints) -> Bounds:
    """Interval of a mean by Student's t over prompts, if there are fewer than `FEW`."""
    clusters = int(cluster.max()) + 1
    residuals = np.bincount(cluster, weights=values - values.mean(), minlength=clusters)
    error = math.sqrt(clusters / (clusters - 1) * float(residuals @ residuals)) / len(values)
    half = _T[clusters - 2] * error
    return float(values.mean()) - half, float(values.mean()) + half


def _resampled(sums: Floats, seed: int) -> Floats:
    """Sums over prompts drawn with replacement: [clusters, columns] -> [RESAMPLES, columns]."""
    clusters, random = len(sums), np.random.default_rng(seed)
    block = max(1, _DRAWN_AT_ONCE // clusters)
    parts = []
    for begin in range(0, RESAMPLES, block):
        count = min(block, RESAMPLES - begin)
        places = random.integers(0, clusters, (count, clusters)) + clusters * np.arange(count)[:, None]
        times = np.bincount(places.ravel(), minlength=count * clusters).reshape(count, clusters)
        parts.append(times.astype(np.float64) @ sums)
    return np.concatenate(parts)


def _clusters(prompts: Sequence[bytes]) -> Ints:
    """The number of each pair's prompt, [N]."""
    _, cluster = np.unique(np.array([prompt.hex() for prompt in prompts]), return_inverse=True)
    return cluster.astype(np.int64)


def _percentiles(samples: Floats) -> Bounds:
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _hull(first: Bounds, other: Bounds) -> Bounds:
    return min(first[0], other[0]), max(first[1], other[1])

"""The rows of an epoch and their order, if it is not every row once in random order. Depends only on the seed."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """How to arrange R training rows, sorted by source.

    Attributes:
        sizes: rows of each source; R in total.
        shares: share of each source in an epoch, with sum 1; None: each row once.
        ranks: [R], smaller ranks come first in each epoch, ties in random order; None: all in random order.
    """

    sizes: tuple[int, ...]
    shares: tuple[float, ...] | None = None
    ranks: npt.NDArray[np.float64] | None = None


@functools.lru_cache(maxsize=1)  # every step needs its rows; Arrangements are compared by identity
def arranged_order(arrangement: Arrangement, seed: int, epoch: int) -> Rows:
    """The rows of one epoch in their order, [R]; read-only.

    With shares, a source gives R times its share, rounded. It goes through its rows in shuffled passes that continue
    from epoch to epoch, so that no row repeats before all have come; the position is computed, not stored.
    """
    count = sum(arrangement.sizes)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    if arrangement.shares is not None:
        taken, start = [], 0
        for source, (size, quota) in enumerate(zip(arrangement.sizes, _quotas(arrangement, count), strict=True)):
            taken.append(start + _next_rows(size, epoch * quota, quota, [seed, source + 1]))
            start += size
        order = np.concatenate(taken)[order]
    if arrangement.ranks is not None:
        order = order[np.argsort(arrangement.ranks[order], kind="stable")]
    order.flags.writeable = False
    return order


def _quotas(arrangement: Arrangement, count: int) -> list[int]:
    """Rows of each source in an epoch; remainders go to the largest fractions, earlier sources first."""
    exact = [share * count for share in arrangement.shares or ()]
    quota = [int(value + 1e-9) for value in exact]
    order = sorted(range(len(exact)), key=lambda k: quota[k] - exact[k])
    for k in order[: count - sum(quota)]:
        quota[k] += 1
    return quota


def _next_rows(size: int, begin: int, count: int, seed: list[int]) -> Rows:
    """Items `begin` to `begin + count` of an endless walk through `size` rows, shuffled again in each pass."""
    places = np.arange(begin, begin + count)
    passes, within = np.divmod(places, size)
    rows = np.empty(count, np.int64)
    for number in np.unique(passes).tolist():
        # Add 1 to the pass: a seed with a trailing 0 equals the seed without it.
        shuffled = np.random.default_rng([*seed, number + 1]).permutation(size)
        rows[passes == number] = shuffled[within[passes == number]]
    return rows

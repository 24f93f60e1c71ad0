"""Which rows an epoch has, in which order, where that is not each row once by chance. Functions of the seed alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """Of R training rows that lie source by source.

    Attributes:
        sizes: rows of each source; R in all.
        shares: share of each source in an epoch, in all 1; None: each row once.
        ranks: [R] rows with a smaller one come first in each epoch, of equal ones by chance; None: by chance.
    """

    sizes: tuple[int, ...]
    shares: tuple[float, ...] | None = None
    ranks: npt.NDArray[np.float64] | None = None


@functools.lru_cache(maxsize=1)  # every step asks for its rows; an Arrangement is the same by identity
def arranged_order(arrangement: Arrangement, seed: int, epoch: int) -> Rows:
    """The rows of one epoch in their order, [R]; read-only.

    With shares a source gives R times its share, rounded. It goes through its rows in shuffled passes that run on from
    epoch to epoch, so that none comes again before all have come; from where it left off, by arithmetic alone.
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
    """Rows of each source in an epoch; what rounding leaves goes to the largest fractions, earlier sources first."""
    exact = [share * count for share in arrangement.shares or ()]
    found = [int(value + 1e-9) for value in exact]
    order = sorted(range(len(exact)), key=lambda k: found[k] - exact[k])
    for k in order[: count - sum(found)]:
        found[k] += 1
    return found


def _next_rows(size: int, begin: int, count: int, seed: list[int]) -> Rows:
    """Places `begin` to `begin + count` of an endless walk through `size` rows, shuffled anew in each pass."""
    places = np.arange(begin, begin + count)
    passes, within = np.divmod(places, size)
    rows = np.empty(count, np.int64)
    for number in np.unique(passes).tolist():
        # 1 more than the pass: a generator's seed with a 0 at its end is that without it.
        shuffled = np.random.default_rng([*seed, number + 1]).permutation(size)
        rows[passes == number] = shuffled[within[passes == number]]
    return rows

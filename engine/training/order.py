"""Chooses the held-out pairs and the order of the others; depends only on the seed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from dpoeng.cache.schema import as_keys, whole_keys
from dpoeng.engine.training.arrangement import Arrangement, arranged_order


def hold_out(prompts: Iterable[bytes], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits rows into (training, held out) by prompt, so that no prompt is on both sides.

    Prompts are taken in the order of a seeded hash of their tokens until `share` of the rows is reached. The split does
    not depend on the order of the rows, and adding rows moves few of the others.

    Args:
        prompts: the prompt's bytes (its token ids) for every row; read once and not kept.
        share: in [0, 1); if above 0, at least one prompt is held out, provided there are two.
        seed: another seed gives another split.
    """
    digests = as_keys(xxhash.xxh3_128_digest(prompt, seed=seed) for prompt in prompts)
    if share <= 0 or not len(digests):
        return list(range(len(digests))), []
    # Sort rows by the digest of their prompt; rows with the same prompt stay in file order.
    _, group, sizes = np.unique(whole_keys(digests), return_inverse=True, return_counts=True)
    wanted, held_out, groups = share * len(digests), 0, 0
    for size in sizes[:-1].tolist():
        if groups and held_out + size / 2 > wanted:
            break
        held_out, groups = held_out + size, groups + 1
    out = group < groups
    return np.flatnonzero(~out).tolist(), np.flatnonzero(out).tolist()


@dataclass(frozen=True, slots=True)
class Schedule:
    """The optimizer steps of a run over `rows` rows, `batch` pairs per step; an epoch's last step may be smaller."""

    rows: int
    batch: int
    total_steps: int
    seed: int
    arrangement: Arrangement | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""
        return math.ceil(self.rows / self.batch)

    def epoch(self, step: int) -> float:
        """Passes completed after `step` steps."""
        return step / self.steps_per_epoch

    def rows_of_step(self, step: int) -> list[int]:
        """Indices in [0, rows) of the pairs of optimizer step `step` (from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self.arrangement is None:
            order = epoch_order(self.seed, epoch, self.rows)
        else:
            order = arranged_order(self.arrangement, self.seed, epoch)
        return [int(row) for row in order[within * self.batch : (within + 1) * self.batch]]


@functools.lru_cache(maxsize=1)  # every step needs its rows, and a permutation costs O(rows)
def epoch_order(seed: int, epoch: int, rows: int) -> npt.NDArray[np.int64]:
    """The order of all rows in one epoch, [rows]; read-only. The latest epoch's order is cached."""
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    order.flags.writeable = False
    return order


def plan_schedule(
    rows: int, *, batch: int, epochs: float, max_steps: int, seed: int, arrangement: Arrangement | None = None
) -> Schedule:
    """The schedule for `epochs` passes, or for `max_steps` steps if that is above 0."""
    per_epoch = math.ceil(rows / batch)
    total = max_steps if max_steps > 0 else max(1, math.ceil(epochs * per_epoch))
    return Schedule(rows=rows, batch=batch, total_steps=total, seed=seed, arrangement=arrangement)

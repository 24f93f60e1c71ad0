"""Decides which pairs are stored together and which process computes them. Pure: needs no model and no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds
from dpoeng.engine.scoring.layout import batches_by_tokens

T = TypeVar("T")


def plan_shards(
    fresh: Sequence[PairIds], keys: npt.NDArray[np.uint8], shard_tokens: int
) -> list[npt.NDArray[np.int64]]:
    """Groups the pairs that are new since the last finished run; a pure function of their set.

    It ignores what an unfinished run has committed already. So a run that is killed and restarted, or done by several
    processes, writes the same files as an undisturbed one. The longest pairs come first: pairs that do not fit into
    memory fail at once, and batches have pairs of similar length. Pairs with the same prompt are adjacent, so that the
    prompt is computed once for all of them.

    Args:
        fresh: N pairs without duplicates; read once.
        keys: [N, 16] key of each.
        shard_tokens: maximum tokens in a shard; a longer pair gets its own shard.

    Returns:
        for each shard the indices of its pairs in `fresh`.
    """
    if not len(fresh):
        return []
    tokens = np.empty(len(fresh), np.int64)
    prompts = np.empty((len(fresh), 16), np.uint8)
    for i, ids in enumerate(fresh):
        tokens[i] = ids.total_tokens
        prompts[i] = np.frombuffer(xxhash.xxh3_128_digest(ids.prompt_ids.tobytes()), np.uint8)
    halves = np.ascontiguousarray(keys).view(">u8")  # big-endian, so that keys sort by their bytes
    rank = np.empty(len(fresh), np.int64)
    rank[np.lexsort((halves[:, 1], halves[:, 0], -tokens))] = np.arange(len(fresh))
    groups = np.unique(prompts.view("V16").ravel(), return_inverse=True)[1]
    first = np.full(len(fresh), len(fresh))  # for each prompt, the rank of its first pair
    np.minimum.at(first, groups, rank)
    order = np.lexsort((rank, first[groups]))
    return [order[shard.start : shard.stop] for shard in batches_by_tokens(tokens[order].tolist(), shard_tokens)]


@dataclass(frozen=True, slots=True)
class Part:
    """The share of one of several processes: number `index` (from 1) of `count`."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """`2/4` -> the second of four.

        Raises:
            UserError: another form.
        """
        index, _, count = text.partition("/")
        if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return cls(int(index), int(count))
        raise UserError(
            "--shard needs a part of the work",
            code="config-value",
            where="--shard",
            expected="I/N with I from 1 to N, e.g. --shard 1/4 to --shard 4/4",
            found=text,
            remedy="count from 1; in a Slurm array: --array=1-4 and --shard $SLURM_ARRAY_TASK_ID/4",
        )

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Every `count`-th item of a list sorted by size, so that parts have similar sizes."""
        return items[self.index - 1 :: self.count]

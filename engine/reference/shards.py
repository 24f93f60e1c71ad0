"""Which pairs are stored together, and which process computes which. Pure: knows no model and no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds
from dpoeng.engine.scoring.layout import batches_by_tokens

T = TypeVar("T")


def plan_shards(fresh: Mapping[bytes, PairIds], shard_tokens: int) -> list[list[PairIds]]:
    """Which pairs are stored together: a pure function of the set of pairs that are new since the last finished run.

    It does not look at what an unfinished run has committed already. So a run that is killed and started again, or
    that is done by several processes, writes the same files as one that was left alone. The longest pairs come first:
    what will not fit into memory fails at once, and batches hold pairs of like length. Pairs of one prompt stand
    together, so that it is run once for all of them.

    Args:
        fresh: pair key -> pair.
        shard_tokens: most tokens in a shard; a longer pair has one of its own.
    """
    by_prompt: dict[bytes, list[tuple[int, bytes]]] = {}
    for key, ids in fresh.items():
        by_prompt.setdefault(ids.prompt_ids.tobytes(), []).append((-ids.total_tokens, key))
    together = sorted(sorted(members) for members in by_prompt.values())
    ordered = [fresh[key] for members in together for _, key in members]
    return [[ordered[i] for i in shard] for shard in batches_by_tokens([p.total_tokens for p in ordered], shard_tokens)]


@dataclass(frozen=True, slots=True)
class Part:
    """The share of one of several processes: number `index` (from 1) of `count`."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """`2/4` -> the second of four.

        Raises:
            UserError: not of this form.
        """
        index, _, count = text.partition("/")
        if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return cls(int(index), int(count))
        raise UserError(
            "this does not say which part of the work to do",
            code="config-value",
            where="--shard",
            expected="I/N with I from 1 to N, e.g. --shard 1/4 to --shard 4/4",
            found=text,
            remedy="count from 1; in a Slurm array: --array=1-4 and --shard $SLURM_ARRAY_TASK_ID/4",
        )

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """This part of some items that are sorted by size: every `count`-th, so that the parts are of like size."""
        return items[self.index - 1 :: self.count]

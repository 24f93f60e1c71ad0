"""Chooses the default size of a forward on a GPU: first the largest useful one, then smaller ones until one fits.

A forward reads every weight once, and widens those in 8 or 4 bits, however few tokens it has. With a few thousand
tokens that costs little compared with the products; more tokens gain nothing and make layers be recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpoeng.cache.schema import PairIds, ScoredRow, lengths_of
from dpoeng.engine.config.fields import TrainConfig

ENOUGH_TOKENS = 4096
"""Tokens of a training forward at which widening 8 bits takes a tenth of the products' time (docs/kernels.md)."""

_FEWEST_TOKENS = 1024


def pairs_to_try(
    config: TrainConfig,
    pairs: Sequence[PairIds | ScoredRow],
    device_type: str,
    *,
    processes: int = 1,
    begun_with: int | None = None,
) -> list[int]:
    """Candidates for the pairs per forward of phase two, the best first.

    Args:
        config: config of the run. A number set there is the only candidate; also the default with dropout: random
            masks belong to a forward.
        pairs: the run's pairs.
        device_type: on a CPU nothing is chosen.
        processes: the number of processes that share a step's forwards.
        begun_with: pairs per forward of the run to resume, so that its numbers equal those of an uninterrupted run.
    """
    configured = config.per_device_train_batch_size
    if device_type != "cuda":
        return [configured]
    if "per_device_train_batch_size" in config.model_fields_set or config.lora_dropout > 0:
        return [begun_with or configured]
    batch = configured * config.gradient_accumulation_steps
    mean = sum(sum(lengths_of(row)) for row in pairs) / len(pairs)
    forwards = max(processes, math.ceil(batch * mean / ENOUGH_TOKENS))
    return _halved(begun_with or max(configured, math.ceil(batch / forwards)), 1)


def batches_to_try(batch_tokens: int) -> list[int]:
    """Smaller values for phase one's `batch_tokens`, the largest first."""
    return _halved(batch_tokens, _FEWEST_TOKENS)[1:]


def _halved(most: int, least: int) -> list[int]:
    sizes = [most]
    while sizes[-1] > least:
        sizes.append(max(least, (sizes[-1] + 1) // 2))
    return sizes

"""How much to put into one forward on a GPU, where nobody said so: what is worth it first, and less until it fits.

A forward reads every weight once, and widens those in 8 or 4 bits, however few tokens it has. With some thousand tokens
that is little beside the products; with more of them nothing is gained, and layers have to be recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpoeng.cache.schema import PairIds
from dpoeng.engine.config.fields import TrainConfig

ENOUGH_TOKENS = 4096
"""Tokens of a training forward: widening 8 bits takes a tenth of the products' time then (docs/kernels.md)."""

_FEWEST_TOKENS = 1024


def pairs_to_try(
    config: TrainConfig,
    pairs: Sequence[PairIds],
    device_type: str,
    *,
    processes: int = 1,
    begun_with: int | None = None,
) -> list[int]:
    """Pairs in one forward of phase two, the best number first.

    Args:
        config: of the run. A number that it names is taken, and so is the default with dropout, whose draws are those
            of a forward.
        pairs: those of the run.
        device_type: on a CPU nothing is chosen.
        processes: that share the forwards of a step.
        begun_with: pairs in a forward of the run that is gone on with: its numbers stay those of one left alone.
    """
    configured = config.per_device_train_batch_size
    if device_type != "cuda":
        return [configured]
    if "per_device_train_batch_size" in config.model_fields_set or config.lora_dropout > 0:
        return [begun_with or configured]
    batch = configured * config.gradient_accumulation_steps
    mean = sum(ids.total_tokens for ids in pairs) / len(pairs)
    forwards = max(processes, math.ceil(batch * mean / ENOUGH_TOKENS))
    return _halved(begun_with or max(configured, math.ceil(batch / forwards)), 1)


def batches_to_try(batch_tokens: int) -> list[int]:
    """Smaller `batch_tokens` of phase one, the largest first."""
    return _halved(batch_tokens, _FEWEST_TOKENS)[1:]


def _halved(most: int, least: int) -> list[int]:
    sizes = [most]
    while sizes[-1] > least:
        sizes.append(max(least, (sizes[-1] + 1) // 2))
    return sizes

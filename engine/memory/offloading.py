"""How a phase is run in the memory that is there: how much in one forward, and whether layer by layer.

As asked for; else as much in a forward as is worth it and fits, and layer by layer where the base does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds
from dpoeng.engine.config.fields import PrecomputeConfig, Quantization, TrainConfig
from dpoeng.engine.memory.fit import Note, StepForecast, check_forward, check_step
from dpoeng.engine.memory.forwards import batches_to_try, pairs_to_try
from dpoeng.engine.models.layers.setting_up import check_adapter_by_layer
from dpoeng.engine.models.sources import ModelSource

Shards = Sequence[Sequence[PairIds]]
"""Pairs that are stored together; read from a file whenever they are asked for."""


def decide_forward(
    config: PrecomputeConfig,
    source: ModelSource,
    shards: Shards,
    device: torch.device,
    note: Note,
    *,
    everything: Sequence[PairIds] | None = None,
) -> tuple[bool, int | None, int | None]:
    """Phase one: whether it is run layer by layer, the predicted peak of tensors where there is one, `batch_tokens`.

    Args:
        config: of phase one, with `batch_tokens`.
        source: the base.
        shards: the pairs that are to be scored.
        device: where.
        note: told of what was decided.
        everything: all pairs, where nobody asked for these `batch_tokens`: they are lowered if they do not fit. For all
            pairs, so that a run that goes on with the last of them cuts its batches as it began.

    Raises:
        UserError: it does not fit, and would not with a pair in a forward; layer offloading is off, or cannot be had.
    """

    def by_layer() -> tuple[bool, int | None, int | None]:
        peak = check_forward(config, source, chain.from_iterable(shards), device, by_layer=True, note=note)
        return True, peak, config.batch_tokens

    if config.layer_offloading == "on":
        return by_layer()
    pairs: Iterable[PairIds] = chain.from_iterable(shards) if everything is None else everything
    try:
        return False, check_forward(config, source, pairs, device, note=note), config.batch_tokens
    except UserError as error:
        if error.code != "memory-short":
            raise
        for tokens in batches_to_try(config.batch_tokens or 1) if everything is not None else ():
            fewer = config.model_copy(update={"batch_tokens": tokens})
            if (peak := _peak(fewer, source, pairs, device)) is not None:
                note(f"{tokens} tokens in one forward, since more do not fit (--batch-tokens)")
                return False, peak, tokens
        if config.layer_offloading == "off" or source.gguf or config.quantization == "stored":
            raise
        one = config.model_copy(update={"batch_tokens": 1})
        if _peak(one, source, chain.from_iterable(shards), device) is not None:
            raise  # the base fits: what does not is the batch
        note(_turned_on(error))
    return by_layer()


def decide_step(
    config: TrainConfig,
    source: ModelSource,
    adapter: ModelSource | None,
    pairs: Sequence[PairIds],
    device: torch.device,
    *,
    quantization: Quantization,
    dtype: str,
    shards: int,
    held_bytes: int,
    trunk_layer: int,
    processes: int = 1,
    begun_with: int | None = None,
    note: Note,
) -> tuple[bool, StepForecast | None]:
    """Phase two: whether it is run layer by layer, and the forecast of a step where there is one.

    Arguments as of `check_step` and `pairs_to_try`; `adapter` is the SFT adapter, or None. Of a run that begins from a
    trunk, the layers above it are loaded one at a time.

    Raises:
        UserError: as there.
    """

    def check(some: TrainConfig, **how: Any) -> StepForecast | None:
        settings: Any = {"quantization": quantization, "dtype": dtype, "shards": shards, "held_bytes": held_bytes}
        return check_step(some, source, pairs, device, trunk_layer=trunk_layer, **settings, **how)

    if config.layer_offloading == "on":
        check_adapter_by_layer(adapter)
        return True, check(config, note=note, by_layer=True)

    sizes = pairs_to_try(config, pairs, device.type, processes=processes, begun_with=begun_with)
    try:
        return False, _first_that_fits(config, sizes, partial(check, note=note))
    except UserError as error:
        able = config.use_peft and not (config.fsdp or config.use_dora or source.gguf)
        able = able and quantization != "stored"
        if error.code != "memory-short" or config.layer_offloading == "off" or not able:
            raise
        # A pair in a forward, and layers recomputed: what does not fit then is the base.
        least = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
        try:
            check(config.model_copy(update=least))
        except UserError:
            check_adapter_by_layer(adapter)
            note(_turned_on(error))
            return True, check(config, note=note, by_layer=True)
        raise


def _first_that_fits(
    config: TrainConfig, sizes: Sequence[int], check: Callable[..., StepForecast | None]
) -> StepForecast | None:
    """The forecast with the first number of pairs in a forward that fits.

    Raises:
        UserError: none does.
    """
    for pairs in sizes[:-1]:
        try:
            found = check(_with_pairs(config, pairs), advises=False)
        except UserError as error:
            if error.code != "memory-short":
                raise
        else:
            return found and replace(found, pairs=pairs)
    found = check(_with_pairs(config, sizes[-1]))
    return found and replace(found, pairs=sizes[-1])


def _with_pairs(config: TrainConfig, pairs: int) -> TrainConfig:
    return config.model_copy(update={"per_device_train_batch_size": pairs})


def _peak(config: PrecomputeConfig, source: ModelSource, pairs: Iterable[PairIds], device: torch.device) -> int | None:
    """The predicted peak of tensors, 0 where it is plainly small; None where it does not fit."""
    try:
        return check_forward(config, source, pairs, device) or 0
    except UserError:
        return None


def _turned_on(error: UserError) -> str:
    return (
        f"the base does not fit ({error.expected}, {error.found} there): its layers stay in the files and are loaded "
        "one at a time (layer_offloading auto); the numbers are the same"
    )

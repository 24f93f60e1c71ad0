"""Decides how a phase uses the available memory: the size of a forward, and whether to run layer by layer.

As configured; otherwise the largest useful forward that fits, and layer by layer if the base does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds, ScoredRow
from dpoeng.engine.config.fields import PrecomputeConfig, Quantization, TrainConfig
from dpoeng.engine.memory.fit import Note, StepForecast, check_forward, check_step
from dpoeng.engine.memory.forwards import batches_to_try, pairs_to_try
from dpoeng.engine.models.layers.setting_up import check_adapter_by_layer
from dpoeng.engine.models.sources import ModelSource

Shards = Sequence[Sequence[PairIds]]
"""Pairs that are stored together; read from a file on access."""


def decide_forward(
    config: PrecomputeConfig,
    source: ModelSource,
    shards: Shards,
    device: torch.device,
    note: Note,
    *,
    everything: Sequence[PairIds] | None = None,
) -> tuple[bool, int | None, int | None]:
    """Phase one: whether to run layer by layer, the predicted peak of tensors (or None), and `batch_tokens`.

    Args:
        config: phase one's settings, with `batch_tokens`.
        source: the base.
        shards: the pairs to score.
        device: the device to score on.
        note: receives a message about the decision.
        everything: all pairs, if the user set no `batch_tokens`: then it is lowered until they fit. All of them, not
            only the ones still to score, so that a resumed run batches as it began.

    Raises:
        UserError: it does not fit even with one pair per forward, and layer offloading is off or impossible.
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
            raise  # the base fits, only the batch does not
        note(_turned_on(error))
    return by_layer()


def decide_scoring(
    config: PrecomputeConfig, source: ModelSource, pairs: Iterable[PairIds], device: torch.device, note: Note
) -> bool:
    """Whether to score pairs layer by layer outside both phases: if configured, or if one pair alone does not fit.

    Larger forwards are halved if memory runs out. Reads the fields of `config` that memory depends on.
    """
    if config.layer_offloading != "auto" or source.gguf or config.quantization == "stored":
        return config.layer_offloading == "on"
    try:
        check_forward(config.model_copy(update={"batch_tokens": 1}), source, pairs, device, note=note)
    except UserError as error:
        if error.code != "memory-short":
            raise
        note(_turned_on(error))
        return True
    return False


def decide_step(
    config: TrainConfig,
    source: ModelSource,
    adapter: ModelSource | None,
    pairs: Sequence[PairIds | ScoredRow],
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
    """Phase two: whether to run layer by layer, and the forecast of a step if there is one.

    Arguments as in `check_step` and `pairs_to_try`; `adapter` is the SFT adapter, or None. If the run begins from a
    trunk, the layers above it are loaded one at a time.

    Raises:
        UserError: as in `check_step`.
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
        # With one pair per forward and all layers recomputed, only the base can be too large.
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
    """The forecast for the first number of pairs per forward that fits.

    Raises:
        UserError: none fits.
    """
    for pairs in sizes[:-1]:
        try:
            forecast = check(_with_pairs(config, pairs), advises=False)
        except UserError as error:
            if error.code != "memory-short":
                raise
        else:
            return forecast and replace(forecast, pairs=pairs)
    forecast = check(_with_pairs(config, sizes[-1]))
    return forecast and replace(forecast, pairs=sizes[-1])


def _with_pairs(config: TrainConfig, pairs: int) -> TrainConfig:
    return config.model_copy(update={"per_device_train_batch_size": pairs})


def _peak(config: PrecomputeConfig, source: ModelSource, pairs: Iterable[PairIds], device: torch.device) -> int | None:
    """The predicted peak of tensors, 0 if it is obviously small; None if it does not fit."""
    try:
        return check_forward(config, source, pairs, device) or 0
    except UserError:
        return None


def _turned_on(error: UserError) -> str:
    return (
        f"the base does not fit ({error.expected}, {error.found} available): its layers stay in the files and are "
        "loaded one at a time (layer_offloading auto); the numbers are the same"
    )

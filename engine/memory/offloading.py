"""Whether a phase is run layer by layer: as asked for, or where the base does not fit otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.schema import PairIds
from dpoeng.engine.config.fields import PrecomputeConfig, Quantization, TrainConfig
from dpoeng.engine.memory.fit import Note, StepForecast, check_forward, check_step, ignore
from dpoeng.engine.models.layers.setting_up import check_adapter_by_layer
from dpoeng.engine.models.sources import ModelSource

Shards = Sequence[Sequence[PairIds]]
"""Pairs that are stored together; read from a file whenever they are asked for."""


def decide_forward(
    config: PrecomputeConfig, source: ModelSource, shards: Shards, device: torch.device, note: Note
) -> tuple[bool, int | None]:
    """Phase one: whether it is run layer by layer, and the predicted peak of tensors where there is one.

    Raises:
        UserError: it does not fit, and would not with a pair in a forward; layer offloading is off, or cannot be had.
    """

    def by_layer() -> tuple[bool, int | None]:
        return True, check_forward(config, source, chain.from_iterable(shards), device, by_layer=True, note=note)

    if config.layer_offloading == "on":
        return by_layer()
    try:
        return False, check_forward(config, source, chain.from_iterable(shards), device, note=note)
    except UserError as error:
        if error.code != "memory-short" or config.layer_offloading == "off" or source.gguf:
            raise
        one = config.model_copy(update={"batch_tokens": 1})
        if _fits(one, source, shards, device):
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
    note: Note,
) -> tuple[bool, StepForecast | None]:
    """Phase two: whether it is run layer by layer, and the forecast of a step where there is one.

    Arguments as of `check_step`; `adapter` is the SFT adapter, or None. Of a run that begins from a trunk, the layers
    above it are loaded one at a time.

    Raises:
        UserError: as there.
    """

    def check(some: TrainConfig, note: Note = ignore, *, by_layer: bool = False) -> StepForecast | None:
        settings: Any = {"quantization": quantization, "dtype": dtype, "shards": shards, "held_bytes": held_bytes}
        return check_step(
            some, source, pairs, device, by_layer=by_layer, note=note, trunk_layer=trunk_layer, **settings
        )

    if config.layer_offloading == "on":
        check_adapter_by_layer(adapter)
        return True, check(config, note, by_layer=True)

    try:
        return False, check(config, note)
    except UserError as error:
        able = config.use_peft and not (config.fsdp or config.use_dora or source.gguf)
        if error.code != "memory-short" or config.layer_offloading == "off" or not able:
            raise
        # A pair in a forward, and layers recomputed: what does not fit then is the base.
        least = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
        try:
            check(config.model_copy(update=least))
        except UserError:
            check_adapter_by_layer(adapter)
            note(_turned_on(error))
            return True, check(config, note, by_layer=True)
        raise


def _fits(config: PrecomputeConfig, source: ModelSource, shards: Shards, device: torch.device) -> bool:
    try:
        check_forward(config, source, chain.from_iterable(shards), device)
    except UserError:
        return False
    return True


def _turned_on(error: UserError) -> str:
    return (
        f"the base does not fit ({error.expected}, {error.found} there): its layers stay in the files and are loaded "
        "one at a time (layer_offloading auto); the numbers are the same"
    )

"""Loads the reference, or the policy's base; keeps a base in memory between runs. Each run gets new modules over it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.models.adapters import load_reference_adapter
from dpoeng.engine.models.layers.setting_up import check_adapter_by_layer
from dpoeng.engine.models.layers.waiting import room_to_wait
from dpoeng.engine.models.loading import load_model, resolve_dtype
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.models.quantized import quantized_tensors, same_weights
from dpoeng.engine.models.sources import ModelSource, find_model
from dpoeng.engine.models.tokenizer import load_chosen, recorded_tokenizer
from dpoeng.engine.models.trunk.stand_ins import entry_of
from dpoeng.engine.scoring.passes import choose_how_to_score


class KeptBase:
    """Loads a base once, and again only when a run needs another one.

    A run's changes to its modules (adapters, hooks, modes, layouts) disappear with them, so the next run finds the base
    as it was loaded. A base that will be sharded over processes, or whose weights are trained, is not kept.
    """

    def __init__(self) -> None:
        self._wanted: tuple[Any, ...] = ()
        self._lm: CausalLM | None = None

    def load(
        self,
        config: TrainConfig,
        reference: Mapping[str, Any],
        device: torch.device,
        *,
        on_host: bool = False,
        trunk_layer: int | None = None,
        **how: Any,
    ) -> CausalLM:
        """Like `load_policy_base`, which it calls if necessary."""
        if config.fsdp or not config.use_peft or how.get("by_layer"):
            self.release()
            return load_policy_base(config, reference, device, on_host=on_host, trunk_layer=trunk_layer, **how)
        named = (config.model, config.quantization, config.dtype, str(device), trunk_layer)
        wanted = (*named, sorted(reference.items()))
        if self._lm is None or self._wanted != wanted:
            self.release()  # there may be no room for two
            self._lm = load_policy_base(config, reference, device, trunk_layer=trunk_layer)
            self._wanted = wanted
        base = over_same_weights(self._lm.base)
        return replace(self._lm, model=base, base=base, entry=entry_of(base))

    @property
    def n_bytes(self) -> int:
        """Bytes of the kept base."""
        if self._lm is None:
            return 0
        tensors = [*self._lm.base.parameters(), *quantized_tensors(self._lm.base)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    def release(self) -> None:
        """Releases the base."""
        self._lm = None


def over_same_weights(base: nn.Module) -> nn.Module:
    """A copy of a frozen model that shares its parameters' storage."""
    # deepcopy looks into its memo first. Tied parameters stay tied, since each is a single object.
    memo: dict[int, Any] = {id(parameter): same_weights(parameter) for parameter in base.parameters()}
    return copy.deepcopy(base, memo)


def load_policy_base(
    config: TrainConfig,
    reference: Mapping[str, Any],
    device: torch.device,
    *,
    on_host: bool = False,
    tokenizer: bool = False,
    shard: Callable[[Any], None] | None = None,
    by_layer: bool = False,
    layers_later: bool = False,
    trunk_layer: int | None = None,
) -> CausalLM:
    """The base of the policy: the one in a view's `reference` record, unless config overrides it.

    With `on_host` it stays in host memory, in the dtype that it would have on `device`. With `shard` this process reads
    its share of it, with `by_layer` or `layers_later` the layers stay in the files, and with `trunk_layer` nothing
    below that layer is read; see `load_model`.
    """
    source = find_model(config.model or reference["model"], revision=reference.get("revision"))
    dtype = resolve_dtype(source, config.dtype or reference["dtype"], device)
    lm = load_model(
        source,
        quantization=config.quantization or reference["quantization"],
        dtype=str(dtype).removeprefix("torch."),
        device=torch.device("cpu") if on_host else device,
        quant_type=reference["bnb_4bit_quant_type"],
        double_quant=reference["bnb_4bit_use_double_quant"],
        tokenizer=False,
        shard=shard,
        by_layer=by_layer,
        layers_later=layers_later,
        trunk_layer=trunk_layer,
    )
    limit_waiting(lm, config)
    if tokenizer:
        lm.tokenizer = load_chosen(recorded_tokenizer(source, reference))
    return lm


def load_reference(
    config: PrecomputeConfig,
    source: ModelSource,
    adapter: ModelSource | None,
    device: torch.device,
    longest: int | None = None,
    *,
    by_layer: bool = False,
    ranked: bool = False,
) -> CausalLM:
    """The frozen reference exactly as configured, in the mode and layout in which both phases score.

    Args:
        config: config of phase one.
        source: the base.
        adapter: the SFT adapter, or None.
        device: the device to load to.
        longest: tokens of the longest text to score, if known; see `choose_layout`.
        by_layer: leave the base's layers in its files; see `models/layers`.
        ranked: whether rows are ranked; see `choose_how_to_score`.
    """
    lm = load_model(
        source,
        quantization=config.quantization,
        dtype=config.dtype,
        device=device,
        quant_type=config.bnb_4bit_quant_type,
        double_quant=config.bnb_4bit_use_double_quant,
        tokenizer=False,
        by_layer=by_layer,
    )
    if adapter is not None:
        if by_layer:
            check_adapter_by_layer(adapter)
        lm = load_reference_adapter(lm, adapter)
    set_mode(lm, training=False)
    limit_waiting(lm, config)
    choose_how_to_score(lm, config.layout, config.attention, longest, ranked=ranked)
    return lm


def limit_waiting(lm: CausalLM, config: PrecomputeConfig | TrainConfig) -> None:
    """Sets where a model that runs by layer stores hidden states, and the limit in bytes.

    Raises:
        UserError: the folder cannot be used.
    """
    if lm.by_layer is not None:
        lm.by_layer.folder = config.offload_folder
        lm.by_layer.limit_bytes = room_to_wait(config.offload_folder, config.offload_gib)

"""A base that stays in memory from run to run. Each run gets modules of its own over the same frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dpoeng.engine.config import TrainConfig
from dpoeng.engine.model import CausalLM
from dpoeng.engine.quantized import quantized_tensors, same_weights
from dpoeng.engine.reference import load_policy_base


class KeptBase:
    """Loads a base once, and anew where a run asks for another one than the run before it.

    Whatever a run does to its modules (adapters, hooks, modes, layouts) is gone with them, so that the next one finds
    the base as it was loaded. A base that will be divided over processes, or whose weights are trained, is not kept.
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
        tokenizer: bool = False,
        shard: Callable[[Any], None] | None = None,
    ) -> CausalLM:
        """As `load_policy_base`, which it calls where it has to."""
        if config.fsdp or not config.use_peft:
            self.release()
            return load_policy_base(config, reference, device, on_host=on_host, tokenizer=tokenizer, shard=shard)
        wanted = (config.model, config.quantization, config.dtype, str(device), tokenizer, sorted(reference.items()))
        if self._lm is None or self._wanted != wanted:
            self.release()  # there need not be room for two
            self._lm, self._wanted = load_policy_base(config, reference, device, tokenizer=tokenizer), wanted
        base = over_same_weights(self._lm.base)
        return replace(self._lm, model=base, base=base)

    @property
    def n_bytes(self) -> int:
        """What the kept base takes."""
        if self._lm is None:
            return 0
        tensors = [*self._lm.base.parameters(), *quantized_tensors(self._lm.base)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    def release(self) -> None:
        """Lets go of the base."""
        self._lm = None


def over_same_weights(base: nn.Module) -> nn.Module:
    """A copy of a frozen model in everything but the storage of its parameters, which both share."""
    # deepcopy looks into its memo first; what is tied stays tied, since a tied parameter is one object.
    memo: dict[int, Any] = {id(parameter): same_weights(parameter) for parameter in base.parameters()}
    return copy.deepcopy(base, memo)

"""Decides which stored hidden states a run of phase two begins from, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpoeng.cache.errors import CacheError, UserError
from dpoeng.cache.schema import IdArray, PairIds
from dpoeng.cache.spec import ReferenceSpec
from dpoeng.cache.store import Store
from dpoeng.cache.trunk.index import TrunkIndex, trunks_of
from dpoeng.cache.trunk.objects import ITEM_BYTES
from dpoeng.cache.trunk.texts import distinct_tokens
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import Mode, TrainConfig
from dpoeng.engine.models.model import DTYPES, CausalLM, StatesOf
from dpoeng.engine.models.model_config import config_of, sizes
from dpoeng.engine.models.sources import ModelSource, read_fields
from dpoeng.engine.models.trunk.layers import chosen_layers, layers_of_adapter, names_layers, trunk_layer


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run needs from a trunk.

    Attributes:
        config: config of the run.
        source: the base.
        mode: what is trained.
        adapter: the SFT adapter, or None.
        reference: how phase one loaded the reference.
        pairs: pairs of training and evaluation.
    """

    config: TrainConfig
    source: ModelSource
    mode: Mode
    adapter: ModelSource | None
    reference: Mapping[str, Any]
    pairs: Sequence[PairIds]


def choose_trunk(wanted: Wanted, spec: ReferenceSpec, note: Callable[[str], None]) -> TrunkIndex | None:
    """The trunk that a run begins from, with its bytes checked; None if the run computes all layers.

    Args:
        wanted: what is trained on what.
        spec: the reference's spec.
        note: receives a message if a trunk is not used, or would help.

    Raises:
        UserError: `trunk_layer` requests a trunk that this run cannot begin from, or the cache is damaged.
    """
    config = wanted.config
    if config.trunk_layer == 0:
        return None
    requested = config.trunk_layer is not None
    trunks: Mapping[int, ReferenceSpec] = {}
    store = Store.open(config.cache)
    if not wanted.source.gguf:
        trunks = trunks_of(store, spec.digest)
    if not trunks and not requested and not names_layers(config):
        return None
    if wanted.source.gguf:
        _refuse_or_note(wanted, "a GGUF file is decoded whole", note, always=requested)
        return None
    depth = sizes(config_of(read_fields(wanted.source))).layers
    lowest = lowest_trained(wanted, depth)
    if requested:
        layer = trunk_layer(float(config.trunk_layer or 0), depth)
        _refuse_trained_below(layer, lowest)
        if layer not in trunks:
            raise _no_trunk(wanted, layer, trunks)
        candidates = [layer]
    else:
        candidates = sorted((layer for layer in trunks if layer <= lowest), reverse=True)
        if not candidates:
            _note_saving(wanted, depth, lowest, trunks, note)
            return None
    if why := _differs(wanted, max(candidates)):
        _refuse_or_note(wanted, why, note, always=requested)
        return None
    for layer in candidates:
        index = TrunkIndex.open(store, trunks[layer].digest)
        lacking = sum(not index.holds(ids) for ids in wanted.pairs)
        if not lacking:
            index.check(wanted.pairs)
            return index
        if requested:
            raise _incomplete(wanted, layer, lacking)
        note(
            f"the cache's trunk at layer {layer} lacks {counted(lacking, 'pair')} of this run, and is not used: "
            f"`dpoeng precompute-ref` with --trunk-layer {layer} stores them"
        )
    return None


def lowest_trained(wanted: Wanted, depth: int) -> int:
    """The lowest layer that a run trains; 0 if it trains something outside the layers."""
    if wanted.mode == "full":
        return 0
    if wanted.mode == "continue":
        assert wanted.adapter is not None
        return min(layers_of_adapter(wanted.adapter) or (0,))
    return min(chosen_layers(wanted.config, depth) or (0,))


def stored_states(index: TrunkIndex, lm: CausalLM) -> StatesOf:
    """A function that returns stored states for a model that begins at a trunk: tensors [tokens, H] on the host.

    Raises:
        UserError: the model computes in another dtype than the reference did.
    """
    dtype = DTYPES[index.dtype]
    if lm.dtype != dtype:
        raise UserError(
            "this run cannot begin from stored hidden states",
            code="trunk-unsupported",
            where="--dtype",
            expected=f"{index.dtype}, in which they were stored",
            found=str(lm.dtype).removeprefix("torch."),
            remedy="leave --dtype out, or use --trunk-layer 0 to run all layers",
        )

    def states(prompt_ids: IdArray, response_ids: IdArray | None) -> torch.Tensor:
        # Copy, since tensors on a read-only map are not allowed; each forward copies its rows anyway.
        return torch.from_numpy(index.states(prompt_ids, response_ids).copy()).view(dtype)

    return states


def _differs(wanted: Wanted, layer: int) -> str:
    """Why the stored states do not fit this policy's lower layers, in words; empty if they do."""
    config, reference = wanted.config, wanted.reference
    for name in ("quantization", "dtype"):
        value = getattr(config, name)
        if value not in (None, "auto", reference[name]):
            return f"--{name} {value} is not the reference's ({reference[name]})"
    if config.fsdp:
        return "--fsdp shards the whole base over the processes"
    if wanted.adapter is not None:
        adapter_layers = layers_of_adapter(wanted.adapter)
        if not adapter_layers:
            return "the SFT adapter has weights outside the layers"
        if max(adapter_layers) < layer:
            return "the SFT adapter has weights only in layers below the trunk"
    return ""


def _refuse_or_note(wanted: Wanted, why: str, note: Callable[[str], None], *, always: bool) -> None:
    if always:
        raise UserError(
            "this run cannot begin from stored hidden states",
            code="trunk-unsupported",
            where=f"--trunk-layer {wanted.config.trunk_layer:g}",
            expected="the reference's own precision, a checkpoint in safetensors, and no --fsdp",
            found=why,
            remedy="leave that out, or use --trunk-layer 0 to run all layers",
        )
    note(f"stored hidden states are not used: {why}")


def _refuse_trained_below(layer: int, lowest: int) -> None:
    if lowest < layer:
        raise UserError(
            "layers below the trunk are trained, so the trunk's input would change",
            code="trunk-below",
            where=f"--trunk-layer {layer}",
            expected=f"training only in layers {layer} and above",
            found=f"layer {lowest} is the lowest trained layer",
            remedy=f"use --train-last-layers or --layers-to-transform (with an SFT adapter: --adapter-mode stack); or "
            f"store a trunk at layer {lowest} or below" if lowest else
            "use --train-last-layers or --layers-to-transform (with an SFT adapter: --adapter-mode stack too); or use "
            "--trunk-layer 0 to run all layers",
        )  # fmt: skip


def _no_trunk(wanted: Wanted, layer: int, trunks: Mapping[int, ReferenceSpec]) -> CacheError:
    return CacheError(
        "the cache has no hidden states of this layer",
        code="cache-no-trunk",
        where=f"{wanted.config.cache}, --trunk-layer {layer}",
        expected="a trunk that `dpoeng precompute-ref` has stored for this reference",
        found=f"trunks at layers {', '.join(map(str, trunks))}" if trunks else "no trunk",
        remedy=f"run the same `dpoeng precompute-ref` again with --trunk-layer {layer}: the log-probs are reused",
        exit_status=2,
    )


def _incomplete(wanted: Wanted, layer: int, lacking: int) -> CacheError:
    return CacheError(
        "the trunk lacks pairs of this run",
        code="cache-incomplete",
        where=f"{wanted.config.cache}, layer {layer}",
        expected=counted(len(wanted.pairs), "pair"),
        found=f"{lacking} of them missing",
        remedy=f"run the same `dpoeng precompute-ref` again with --trunk-layer {layer}, for evaluation pairs too",
    )


def _note_saving(
    wanted: Wanted, depth: int, lowest: int, trunks: Mapping[int, ReferenceSpec], note: Callable[[str], None]
) -> None:
    """Adds a note that a stored trunk is not used, or what one would save."""
    if trunks:
        note(
            f"the cache's trunk at layer {', '.join(map(str, trunks))} is not used: layer {lowest} is trained too, so "
            "all layers run"
        )
        return
    if lowest == 0:
        return
    width, dtype = sizes(config_of(read_fields(wanted.source))).hidden, str(wanted.reference["dtype"])
    n_bytes = distinct_tokens(wanted.pairs) * width * ITEM_BYTES[dtype]
    note(
        f"every step runs the layers below {lowest}, although none of them is trained: `dpoeng precompute-ref` "
        f"with --trunk-layer {lowest} stores their output ({n_bytes / 1e6:.0f} MB), after which a step runs and "
        f"loads {depth - lowest} of {depth} layers"
    )

"""Prepares a model that was loaded without its layers for running layer by layer."""

from __future__ import annotations

from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.layers.by_layer import ByLayer
from dpoeng.engine.models.layers.files import LayerFiles, template_of
from dpoeng.engine.models.layers.gates import Gates
from dpoeng.engine.models.layers.store import LayerStore
from dpoeng.engine.models.layers.trial import check_apart
from dpoeng.engine.models.lora_fields import start_changes_base
from dpoeng.engine.models.model import CausalLM, decoder_layers, decoder_of
from dpoeng.engine.models.sources import ModelSource, read_adapter_fields


def layer_store(base: Any, files: LayerFiles, device: torch.device) -> LayerStore:
    """The store for a model's layers, which have no values yet. Create it before adapters wrap their parts.

    Raises:
        UserError: layers share weights.
    """
    files.template = template_of(base)
    layers = decoder_layers(decoder_of(base))
    check_apart(layers)
    return LayerStore(files, layers, device)


def run_by_layer(lm: CausalLM, store: LayerStore) -> ByLayer:
    """Adds gates to the layers of a loaded model, and moves its input embedding to host memory unless it is the head.

    Each layer's weights are loaded whenever it runs, in any order.
    """
    words, head = lm.base.get_input_embeddings(), lm.base.get_output_embeddings()
    if lm.device.type == "cuda" and head is not None and head.weight is not words.weight:
        words.to("cpu")
    gates = Gates(decoder_layers(lm.backbone), words, lm.device, store.need)
    return ByLayer(gates, store.standing_in, lambda: store.files.bytes_read)


def gguf_by_layer(source: ModelSource) -> UserError:
    """The error for layer offloading with a GGUF file."""
    return UserError(
        "a GGUF file is decoded whole: its layers cannot be read one at a time",
        code="layer-offloading-unsupported",
        where="--layer-offloading on",
        expected="a checkpoint in safetensors",
        found=source.name,
        remedy="convert it to safetensors (`dpoeng demo` shows how), or use --layer-offloading off",
        exit_status=5,
    )


def check_adapter_by_layer(adapter: ModelSource | None) -> None:
    """Refuses an SFT adapter that is more than a LoRA next to the layers' weights, since these come and go.

    Raises:
        UserError: it trained biases or whole modules, is a DoRA, or changes the base at its start.
    """
    fields = read_adapter_fields(adapter) if adapter is not None else {}
    unsupported = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices") if fields.get(name)]
    unsupported += ["bias"] if fields.get("bias", "none") != "none" else []
    unsupported += ["init_lora_weights"] if start_changes_base(fields) else []
    if adapter is not None and unsupported:
        raise UserError(
            "layer offloading does not support this SFT adapter",
            code="layer-offloading-unsupported",
            where=str(adapter.folder / "adapter_config.json"),
            expected="a plain LoRA",
            found=", ".join(f"{name} {fields[name]}" for name in unsupported),
            remedy="merge it into the base (`dpoeng merge`), or use --layer-offloading off",
            exit_status=5,
        )

"""Reads a checkpoint in shares: each process reads only the rows that it keeps. Imports transformers.

For a tensor that FSDP has sharded, transformers reads only this process's rows, with safetensors' slices, and converts
only these. Therefore the layers are sharded while the model has no weights yet, after its creation and before loading.
Buffers, tied weights and names are then the same as in any other load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpoeng.engine.models.model import decoder_layers, decoder_of
from dpoeng.engine.models.model_config import auto_class, of_class, without_quantization
from dpoeng.engine.models.multimodal.towers import leave_out, towers_of
from dpoeng.engine.models.sources import ModelSource


def whole_because(source: ModelSource, processes: int) -> str:
    """Why a checkpoint cannot be read in shares by this many processes, in words; empty if it can.

    If transformers builds one tensor from several, it uses the rows that each process has read. That is correct only if
    rows stay rows: for experts that are stacked or concatenated.
    """
    if source.gguf:
        return "a GGUF file is decoded whole"
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    try:
        _, model = empty_model_of(source)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError):
        return ""  # the load that follows reports the error
    converters = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightConverter)]
    if not all(_keeps_rows(converter) for converter in converters):
        return f"transformers changes tensors of a {model.config.model_type} checkpoint while it loads them"
    stacked = [parameter.shape[0] for parameter in model.parameters() if parameter.dim() > 2] if converters else []
    if any(-(-rows // processes) * (processes - 1) >= rows for rows in stacked):
        return f"{min(stacked)} experts leave one of {processes} processes none"
    return ""


def layers_share_weights(source: ModelSource) -> bool:
    """Whether decoder layers have tensors in common, so that none can be read without the others."""
    try:
        _, model = empty_model_of(source)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError):
        return False  # the load that follows says what is wrong
    layers = [{id(parameter) for parameter in layer.parameters()} for layer in decoder_layers(decoder_of(model))]
    return sum(map(len, layers)) > len(set().union(*layers))


def empty_model_of(source: ModelSource, kind: Any = None) -> tuple[Any, Any]:
    """A checkpoint's config, and its model without weights: of class `kind`, or of the class that is loaded."""
    from transformers import AutoConfig

    config = without_quantization(AutoConfig.from_pretrained(source.folder))
    with torch.device("meta"):
        return config, auto_class(config).from_config(config) if kind is None else kind(config)


def _keeps_rows(converter: Any) -> bool:
    from transformers.core_model_loading import Concatenate, MergeModulelist

    return all(
        (isinstance(step, MergeModulelist) and step.dim == 0) or (isinstance(step, Concatenate) and step.dim > 0)
        for step in converter.operations
    )


def prepared_class(source: ModelSource, prepare: Callable[[Any], Any] | None = None) -> tuple[Any, Any]:
    """A checkpoint's model class that leaves out towers, and calls `prepare` with each model; and its config.

    Both happen before loading. transformers has no hook there. The subclass uses its parent's name, by which
    conversions are looked up. The config says how bitsandbytes quantised the files.
    """
    from transformers import AutoConfig

    _, model = empty_model_of(source)
    parent, towers = type(model), towers_of(model)

    def make(self: Any, *arguments: Any, **settings: Any) -> None:
        parent.__init__(self, *arguments, **settings)
        leave_out(self, towers)
        if prepare is not None:
            prepare(self)

    fields = {"__init__": make, "__module__": parent.__module__}
    loaded = type(parent.__name__, (parent,), fields) if towers or prepare is not None else parent
    return loaded, of_class(AutoConfig.from_pretrained(source.folder), parent)

"""Loads a whole checkpoint with transformers, in float32 on the CPU, with its peft adapters: for merging.

Independent of caches, training and output files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.model_config import auto_class_of
from dpoeng.engine.models.sources import ModelSource


def load_whole(folder: Path) -> Any:
    """The model of a folder in float32, in evaluation mode."""
    model: Any = auto_class_of(folder).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that a folder's config.json names."""
    from transformers import AutoConfig

    dtype: torch.dtype | None = getattr(AutoConfig.from_pretrained(folder), "dtype", None)
    return dtype


def load_with_adapters(base: ModelSource, adapters: Sequence[ModelSource]) -> Any:
    """The base with all adapters active, as peft's model, in evaluation mode.

    Raises:
        UserError: an adapter does not fit the base.
    """
    from peft import PeftModel

    model: Any = load_whole(base.folder)
    current = model
    try:
        for number, adapter in enumerate(adapters):
            if number == 0:
                model = PeftModel.from_pretrained(current, str(adapter.folder), adapter_name="0")
            else:
                model.load_adapter(str(adapter.folder), adapter_name=str(number))
        model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            "the adapter does not fit this base model",
            code="adapter-mismatch",
            where=adapters[-1].name,
            found=str(error).splitlines()[0],
            remedy="use the base that the adapter was trained on",
        ) from error
    return model.eval()


def as_stored(merged: Any) -> dict[str, torch.Tensor]:
    """The merged model's weights under the names, and in the pieces, of the checkpoint's files."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(merged, merged.state_dict()))

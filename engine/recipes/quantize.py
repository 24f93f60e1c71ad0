"""Writes a quantised checkpoint once; loading it then reads half or a quarter of the bytes.

Layers and numbers are the same as with quantisation on loading. Merging needs the full-precision original.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import Quantization
from dpoeng.engine.models.experts.stacks import held_tensors
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.sources import ModelSource, copy_beside, stored_quantization
from dpoeng.engine.runtime.folders import refuse_filled, saving_tensors, write_new
from dpoeng.engine.runtime.progress import QUIET, Progress


@dataclass(frozen=True, slots=True)
class QuantizeSummary:
    """Result of quantising; sizes in bytes."""

    folder: Path
    quantization: Quantization
    before: int
    after: int


def quantize(
    source: ModelSource,
    into: Path,
    *,
    quantization: Quantization,
    dtype: str = "auto",
    device: torch.device | None = None,
    quant_type: str = "nf4",
    double_quant: bool = True,
    progress: Progress = QUIET,
) -> QuantizeSummary:
    """Writes a model in bitsandbytes' 8 or 4 bits, in the format that transformers saves and loads.

    Args:
        source: the full-precision checkpoint.
        into: folder for the new checkpoint; must be missing or empty.
        quantization: 8bit or 4bit.
        dtype: dtype of unquantised weights (head, embedding, norms); `auto` is the checkpoint's own.
        device: device that quantises.
        quant_type: 4bit: the number format.
        double_quant: 4bit: whether the scales are quantised too.
        progress: receives the two halves of the work.

    Raises:
        UserError: the model is quantised already or cannot be loaded, or the folder cannot be written.
    """
    refuse_filled(into)
    if source.gguf or stored_quantization(source) is not None:
        raise UserError(
            f"{source.name} is already quantised",
            code="quantization-stored",
            where=str(source.folder),
            expected="a full-precision safetensors checkpoint",
            remedy="name the original",
        )
    with progress.task("quantising", 2, "steps") as advance:
        lm = load_model(
            source,
            quantization=quantization,
            dtype=dtype,
            device=device or torch.device("cpu"),
            quant_type=quant_type,
            double_quant=double_quant,
            tokenizer=False,
            whole=True,
        )
        _refuse_stacks(source, lm)
        advance(1, "loaded")

        def fill(folder: Path) -> None:
            with saving_tensors():
                lm.base.save_pretrained(folder)
            copy_beside(source, folder)

        write_new(into, fill)
        advance(1, "written")
    after = sum(file.stat().st_size for file in into.glob("*.safetensors"))
    return QuantizeSummary(into, quantization, sum(file.stat().st_size for file in source.weight_files), after)


def _refuse_stacks(source: ModelSource, lm: CausalLM) -> None:
    """Raises UserError for a mixture of experts."""
    if held_tensors(lm.base):
        raise UserError(
            f"{source.name} is a mixture of experts, and its quantised experts cannot be written",
            code="quantization-stored",
            where=str(source.folder),
            expected="a model without stacked experts: transformers has no format for quantised ones",
            remedy=f"name the full-precision checkpoint with --quantization {lm.quantization}: it is quantised tensor "
            "by tensor while it loads",
        )

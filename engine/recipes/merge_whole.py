"""Lets peft merge adapters into a whole base, and writes the result under the names of the base's files.

This handles adapters that are more than LoRA or DoRA on a separate weight: experts that are stacked on loading,
embeddings, starts that change the base. It needs memory for the base in float32. The result is loaded again and must
give the same answers as base and adapters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.model import DTYPES
from dpoeng.engine.models.sources import ModelSource, copy_beside, write_config
from dpoeng.engine.models.tokenizer import TokenizerChoice, copy_tokenizer
from dpoeng.engine.models.whole import as_stored, load_whole, load_with_adapters, stored_dtype
from dpoeng.engine.runtime.folders import saving_tensors, write_new
from dpoeng.engine.runtime.progress import Progress

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Allowed mean difference of log-probs, in nats, between merged and unmerged: rounding only."""


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """Result of a merge."""

    folder: Path
    base: str
    adapters: list[str]
    merged: int
    tensors: int
    dtype: str


def merge_whole(
    base: ModelSource,
    adapters: Sequence[ModelSource],
    into: Path,
    *,
    dtype: str,
    tokenizer: TokenizerChoice,
    progress: Progress,
) -> MergeSummary:
    """Writes base + adapters as a checkpoint that plain transformers loads.

    Args:
        base: the full-precision base.
        adapters: the frozen one first if there are two; with the loaded model's names.
        into: a new folder.
        dtype: dtype of the merged weights; `auto` keeps each weight's own.
        tokenizer: copied to the result if it is not the base's.
        progress: receives a note that the whole base is loaded, and each file's progress.

    Raises:
        UserError: the merged checkpoint does not answer like base and adapters, or cannot be written.
    """
    n_bytes = sum(file.stat().st_size for file in base.weight_files)
    progress.note(
        "peft merges this adapter into the whole base in float32 "
        f"({2 * n_bytes / 1e9:.1f} GB of memory if its files are in 16 bits)"
    )
    adapted = load_with_adapters(base, adapters)
    expected = _log_probs(adapted)
    merged = adapted.merge_and_unload(adapter_names=list(adapted.peft_config))
    weights = as_stored(merged)
    changed = 0
    tensors = 0

    def fill(folder: Path) -> None:
        nonlocal changed, tensors
        changed, tensors = _write(base, folder, weights, dtype, progress)
        copy_tokenizer(tokenizer, folder)
        _compare(base, folder, expected, dtype)

    write_new(into, fill)
    return MergeSummary(into, base.name, [adapter.name for adapter in adapters], changed, tensors, dtype)


@torch.no_grad()
def _log_probs(model: Any) -> torch.Tensor:
    """Log-probs of a few tokens, float32."""
    ids = torch.arange(2, 34)[None] % model.get_input_embeddings().weight.shape[0]
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits.log_softmax(-1)


def _write(
    base: ModelSource, folder: Path, weights: dict[str, torch.Tensor], dtype: str, progress: Progress
) -> tuple[int, int]:
    """Writes every file of the base with its changes; returns the numbers of changed tensors and of all tensors."""
    wanted = None if dtype == "auto" else DTYPES[dtype]
    changed = tensors = total_bytes = 0
    with progress.task("merging", len(base.weight_files), "files") as advance:
        for file in base.weight_files:
            written: dict[str, torch.Tensor] = {}
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  (a safetensors file is no dictionary)
                    old = stored.get_tensor(name)
                    new = weights.get(name)
                    if new is None or torch.equal(new.to(old.dtype), old):
                        new = old
                    else:
                        changed += 1
                    target = old.dtype if wanted is None or not old.is_floating_point() else wanted
                    written[name] = new.to(target).contiguous()
            with saving_tensors():
                save_file(written, folder / file.name, metadata={"format": "pt"})
            tensors += len(written)
            total_bytes += sum(tensor.nbytes for tensor in written.values())
            advance(1, file.name)
    copy_rest(base, folder, dtype, total_bytes)
    return changed, tensors


def _compare(base: ModelSource, folder: Path, expected: torch.Tensor, dtype: str) -> None:
    """Loads the written checkpoint, and checks that it answers like base and adapters."""
    log_probs = _log_probs(load_whole(folder))
    difference = float((log_probs - expected).abs().mean())
    narrow = DTYPES.get(dtype) or stored_dtype(base.folder) or torch.float32
    if not difference <= _TOLERANCE[narrow]:
        raise UserError(
            "the merged checkpoint does not reproduce base and adapter",
            code="adapter-mismatch",
            where=base.name,
            expected=f"log-probs within {_TOLERANCE[narrow]:g} nats of the unmerged model's, on average",
            found=f"{difference:.3g} nats: the adapter changes a tensor that the base's files share, such as a "
            "head tied to the embedding",
            remedy="use base and adapter unmerged, or untie the base's weights before you train",
        )


def copy_rest(base: ModelSource, into: Path, dtype: str, total_bytes: int) -> None:
    """Copies everything besides the weights: configuration, tokenizer, the index of shards."""
    write_config(base, into, dtype)
    copy_beside(base, into)
    index = base.folder / "model.safetensors.index.json"
    if index.is_file() and base.weight_files[0].name != "model.safetensors":
        record = json.loads(index.read_text(encoding="utf-8"))
        record["metadata"] = {**record.get("metadata", {}), "total_size": total_bytes}
        (into / index.name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

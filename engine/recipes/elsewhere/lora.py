"""The adapters of a run as one plain LoRA: what vLLM and llama.cpp load beside the base."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.checkpoint_names import PREFIX, as_peft_reads, named_class, stored_names
from dpoeng.engine.models.sources import ModelSource, read_adapter_fields
from dpoeng.engine.recipes.merge import Update, read_updates
from dpoeng.engine.runtime.folders import saving_tensors

Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By the name of a weight: A [r, in] and B [out, r]; the update is B A."""

# Fields of adapter_config.json by which an adapter is more than `b @ a`, in the words of a message.
_MORE: Final = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapted parameters of experts",
    "lora_bias": "biases in its LoRA",
    "layer_replication": "repeated layers",
}
VLLM_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes."""


def one_lora(base: ModelSource, adapters: Sequence[ModelSource], runtime: str) -> Matrices:
    """One LoRA that does what the adapters do together, its scale in B.

    Two adapters of ranks r and s on one weight are one of rank r + s: their matrices side by side.

    Args:
        base: of both.
        adapters: one, or the frozen SFT adapter and the trained one.
        runtime: that is to load it, for messages.

    Raises:
        UserError: an adapter is more than a plain LoRA, named by its setting.
    """
    for adapter in adapters:
        _refuse_more(adapter, runtime)
    if base.gguf:
        raise _refused(runtime, base.name, "a base in a GGUF file, whose layers have no names of their own")
    names = stored_names(base)
    if named_class(base, names.model) is not None:
        raise _refused(runtime, base.name, "the text part of a multimodal model, which it loads under other names")
    with contextlib.ExitStack() as stack:
        own = [stack.enter_context(as_peft_reads(adapter, names.model)) for adapter in adapters]
        plain, updates, replaced = read_updates(own)
    if not plain or replaced or any(".experts." in name for name in updates):
        told = "LoRA on embeddings, biases, experts, or a start that changes the base (PiSSA, OLoRA)"
        raise _refused(runtime, adapters[-1].name, told)
    return {name: _joined(parts) for name, parts in sorted(updates.items())}


def _joined(parts: Sequence[Update]) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.cat([part.a.float() for part in parts])
    b = torch.cat([part.scale * part.b.float() for part in parts], dim=1)
    return a, b


def _refuse_more(adapter: ModelSource, runtime: str) -> None:
    fields = read_adapter_fields(adapter)
    found = [word for field, word in _MORE.items() if fields.get(field)]
    found += ["trained biases"] if fields.get("bias", "none") != "none" else []
    if found:
        raise _refused(runtime, adapter.name, ", ".join(found))


def _refused(runtime: str, where: str, found: str) -> UserError:
    return UserError(
        f"{runtime} does not load this adapter",
        code="export-adapter",
        where=where,
        expected="a plain LoRA on linear layers",
        found=found,
        remedy="`dpoeng export OUT --to merged --into merged` writes a whole checkpoint, which every runtime loads",
    )


def save_peft(folder: Path, matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]], base: str) -> int:
    """Writes one LoRA as peft and vLLM read it; returns its rank.

    vLLM scales all modules by one alpha / r, and reads no rank_pattern: every module gets the largest rank, filled with
    zeros, and alpha equals it, since the scale is in B.
    """
    rank = max(len(a) for a, _ in matrices.values())
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in matrices.items():
        module = f"{PREFIX}{name.removesuffix('.weight')}"
        more = rank - len(a)
        tensors[f"{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, more)).contiguous()
        tensors[f"{module}.lora_B.weight"] = torch.nn.functional.pad(b, (0, more)).contiguous()
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in matrices}),
    }
    with saving_tensors():
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return rank


def max_lora_rank(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM that holds this rank.

    Raises:
        UserError: none does.
    """
    for allowed in VLLM_RANKS:
        if rank <= allowed:
            return allowed
    raise _refused("vLLM", "--max-lora-rank", f"rank {rank}, and vLLM's largest is {VLLM_RANKS[-1]}")

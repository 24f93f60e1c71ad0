"""Combines a run's adapters into one plain LoRA, which vLLM and llama.cpp can load."""

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
"""A [r, in] and B [out, r] by weight name; the weight's update is B A."""

# Fields of adapter_config.json that make an adapter more than B A, with their names in messages.
_MORE: Final = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapted parameters of experts",
    "lora_bias": "biases in its LoRA",
    "layer_replication": "repeated layers",
}
VLLM_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank accepts."""


def one_lora(base: ModelSource, adapters: Sequence[ModelSource], runtime: str) -> Matrices:
    """Combines adapters into one LoRA with the scale in B.

    Two adapters of ranks r and s on the same weight become one of rank r + s by concatenation of their matrices.

    Args:
        base: the adapters' base model.
        adapters: one adapter, or the frozen SFT adapter and the trained one.
        runtime: the program that will load it, for messages.

    Raises:
        UserError: an adapter is not a plain LoRA; the message names the setting.
    """
    for adapter in adapters:
        _refuse_more(adapter, runtime)
    if base.gguf:
        raise _refused(runtime, base.name, "a base in a GGUF file, which has no peft names for its layers")
    names = stored_names(base)
    if named_class(base, names.model) is not None:
        raise _refused(runtime, base.name, "the text part of a multimodal model, whose layers have other names there")
    with contextlib.ExitStack() as stack:
        own = [stack.enter_context(as_peft_reads(adapter, names.model, whole=True)) for adapter in adapters]
        plain, updates, replaced = read_updates(own)
    if not plain or replaced or any(".experts." in name for name in updates):
        unsupported = "LoRA on embeddings, biases, experts, or a start that changes the base (PiSSA, OLoRA)"
        raise _refused(runtime, adapters[-1].name, unsupported)
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
        f"{runtime} cannot load this adapter",
        code="export-adapter",
        where=where,
        expected="a plain LoRA on linear layers",
        found=found,
        remedy="`dpoeng export OUT --to merged --into merged` writes a merged checkpoint, which needs no adapter",
    )


def save_peft(folder: Path, matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]], base: str) -> int:
    """Writes a LoRA in peft's format and returns its rank.

    vLLM has one alpha / r for all modules and ignores rank_pattern. Therefore smaller modules are padded with zeros to
    the largest rank. alpha equals that rank, because B already contains the scale.
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
    """The smallest value of vLLM's --max-lora-rank for this rank.

    Raises:
        UserError: the rank is too large for vLLM.
    """
    for allowed in VLLM_RANKS:
        if rank <= allowed:
            return allowed
    raise _refused("vLLM", "--max-lora-rank", f"rank {rank}; vLLM supports at most {VLLM_RANKS[-1]}")

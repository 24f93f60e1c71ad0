"""Merges adapters into their base: `W + scale * B A`, from the full-precision checkpoint, never from quantised weights.

It works tensor by tensor from the base's files to new ones, so that at most one of these files is in memory. Sums are
computed in float32 over all adapters and rounded once. Adapters that are neither LoRA nor DoRA on separately stored
weights (stacked experts, trained embeddings, DoRA on another adapter) are merged by peft in a whole model and written
under the names of the base's files: see `merge_whole`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.checkpoint_names import PREFIX, as_peft_reads, in_towers, stored_names
from dpoeng.engine.models.loading import stored_dtype
from dpoeng.engine.models.lora_fields import start_changes_base
from dpoeng.engine.models.model import DTYPES
from dpoeng.engine.models.sources import (
    ModelSource,
    find_adapter,
    find_model,
    read_adapter_fields,
    read_fields,
    stored_format,
    stored_quantization,
)
from dpoeng.engine.models.stored.widening import write_widened
from dpoeng.engine.models.tokenizer import choose_tokenizer, copy_tokenizer
from dpoeng.engine.recipes.merge_whole import MergeSummary, copy_rest, merge_whole
from dpoeng.engine.runs.folder import ADAPTER_FOLDER, MODEL_FOLDER, RUN_FILE
from dpoeng.engine.runs.reading import read_json
from dpoeng.engine.runtime.folders import refuse_filled, saving_tensors, write_new
from dpoeng.engine.runtime.progress import QUIET, Progress


@dataclass(frozen=True, slots=True)
class Update:
    """An adapter's update of one weight: `scale * b @ a`, transposed for layers that store [in, out].

    For a convolution a is [r, in, ...], b is [out, r, 1, ...], and their product has the weight's shape.

    With a `magnitude` [out] the sum's rows are then given these norms (DoRA, Liu et al. 2024,
    https://arxiv.org/abs/2402.09353, equation 5).
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool
    magnitude: torch.Tensor | None = None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [out, in], or [in, out], with the update, in float32."""
        delta = self.scale * (self.b.float().flatten(1) @ self.a.float().flatten(1))
        weight = weight + (delta.T if self.transposed else delta.view_as(weight))
        if self.magnitude is None:
            return weight
        rows = 1 if self.transposed else 0
        factor = self.magnitude.float() / torch.linalg.norm(weight, dim=1 - rows)
        scaled: torch.Tensor = weight * factor.unsqueeze(1 - rows)
        return scaled


def merge_run(
    output_dir: Path, into: Path, *, dtype: str = "auto", model: str | None = None, progress: Progress = QUIET
) -> MergeSummary:
    """Merges the result of a run: its adapter, and the frozen SFT adapter below it if there is one.

    Args:
        output_dir: the run's folder.
        into: folder for the checkpoint; must be missing or empty.
        dtype: dtype of the merged weights; `auto` keeps each weight's own.
        model: the base, if it has moved since the run.
        progress: receives each file's progress.

    Raises:
        UserError: there is no finished run, `into` is not empty, or an adapter is not plain LoRA.
    """
    return merge(*parts_of_run(output_dir, model), into, dtype=dtype, progress=progress)


def parts_of_run(output_dir: Path, model: str | None = None) -> tuple[ModelSource, list[ModelSource]]:
    """The base of a finished run and its adapters, the frozen SFT adapter first where there is one.

    Args:
        output_dir: the run's folder.
        model: the base, where it is no longer where the run found it.

    Raises:
        UserError: there is no finished run, it trained all weights, or a part of it cannot be found.
    """
    record_file = output_dir / RUN_FILE
    if (output_dir / MODEL_FOLDER).is_dir():
        raise UserError(
            "this run trained all weights and has no adapter to merge",
            code="full-finetuning",
            where=str(output_dir),
            found=f"{MODEL_FOLDER}/, a checkpoint that plain transformers loads",
            remedy=f"use {output_dir / MODEL_FOLDER} as it is",
        )
    if not record_file.is_file() or not (output_dir / ADAPTER_FOLDER).is_dir():
        raise UserError(
            "no finished run to merge",
            code="run-not-found",
            where=str(output_dir),
            expected=f"{RUN_FILE} and {ADAPTER_FOLDER}/, which dpoeng train writes",
            remedy="name the --output-dir of the training run",
        )
    record: dict[str, Any] = read_json(record_file, dict, ("reference", "model", "adapter_mode"))
    revision = record["reference"].get("revision") if model is None else None
    base = find_model(model or record["model"], revision=revision)
    adapters = [find_adapter(str(output_dir / ADAPTER_FOLDER))]
    if record["adapter_mode"] == "stack":
        record = read_json(record_file, dict, ("sft_adapter",))
        adapters.insert(0, find_adapter(record["sft_adapter"]))
    return base, adapters


def merge(
    base: ModelSource, adapters: Sequence[ModelSource], into: Path, *, dtype: str = "auto", progress: Progress = QUIET
) -> MergeSummary:
    """Writes base + adapters as a checkpoint that plain transformers loads.

    Raises:
        UserError: `into` is not empty or not writable, the base is a GGUF file or quantised, or an adapter cannot be
            merged.
    """
    refuse_filled(into)
    if not base.gguf and stored_quantization(base) == {"quantization": "stored"}:
        return _merge_widened(base, adapters, into, dtype=dtype, progress=progress)
    config = {} if base.gguf else json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    if base.gguf or config.get("quantization_config"):
        raise UserError(
            "the base is not a full-precision checkpoint",
            code="model-unloadable",
            where=base.name,
            remedy="name the original with --model",
        )
    names = stored_names(base)
    tokenizer = choose_tokenizer(base, str(adapters[-1].folder), None)  # the tokenizer of the last adapter's training
    with contextlib.ExitStack() as stack:
        # Use the loaded model's names: the adapter may have been trained on another class of the same model.
        renamed_adapters = [
            stack.enter_context(as_peft_reads(adapter, names.model, whole=True)) for adapter in adapters
        ]
        plain, updates, replaced = read_updates(renamed_adapters)
        adapted = {*updates, *replaced}
        tied = {name for name in adapted - {*names.in_memory.values()} if name in names.model.state_dict()}
        if not plain or names.converted & adapted or tied:
            for adapter in adapters:
                _refuse_towers(adapter, names.model)
            return merge_whole(base, renamed_adapters, into, dtype=dtype, tokenizer=tokenizer, progress=progress)
    on_disk = names.on_disk()
    updates = {on_disk.get(name, name): one for name, one in updates.items()}
    replaced = {on_disk.get(name, name): one for name, one in replaced.items()}
    _check_replaced(base, replaced)

    tensors = 0

    def fill(folder: Path) -> None:
        nonlocal tensors
        tensors = _write_merged(base, folder, dtype, updates, replaced, progress)
        copy_tokenizer(tokenizer, folder)

    write_new(into, fill)
    return MergeSummary(into, base.name, [adapter.name for adapter in adapters], len(updates), tensors, dtype)


def _merge_widened(
    base: ModelSource, adapters: Sequence[ModelSource], into: Path, *, dtype: str, progress: Progress
) -> MergeSummary:
    """The same over a base whose files are quantised: its codes are widened first, into a folder that goes again."""
    held = stored_dtype(read_fields(base))
    wide = DTYPES.get(str(held) if dtype == "auto" else dtype, torch.bfloat16)
    named = str(wide).removeprefix("torch.")
    progress.note(
        f"the base's codes ({stored_format(base).words}) are widened to {named}: the result is a {named} checkpoint, "
        f"and as much room again is needed while it is made"
    )
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{into.name}-", dir=into.parent) as folder:
        plain = write_widened(base, Path(folder), wide, progress)
        return merge(plain, adapters, into, dtype=dtype, progress=progress)


def _write_merged(
    base: ModelSource,
    folder: Path,
    dtype: str,
    updates: Mapping[str, Sequence[Update]],
    replaced: Mapping[str, torch.Tensor],
    progress: Progress,
) -> int:
    """Writes every file of the checkpoint; returns its number of tensors."""
    wanted = None if dtype == "auto" else DTYPES[dtype]
    open_updates, tensors, total_bytes = set(updates), 0, 0
    with progress.task("merging", len(base.weight_files), "files") as advance:
        for file in base.weight_files:
            merged: dict[str, torch.Tensor] = {}
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118  (a safetensors file is no dictionary)
                    weight = replaced.get(name)
                    weight = weights.get_tensor(name) if weight is None else weight
                    target = weight.dtype if wanted is None or not weight.is_floating_point() else wanted
                    if name in updates:
                        weight = weight.float()
                        for update in updates[name]:
                            weight = update.apply(weight)
                        open_updates.discard(name)
                    merged[name] = weight.to(target).contiguous()
            with saving_tensors():
                save_file(merged, folder / file.name, metadata={"format": "pt"})
            tensors += len(merged)
            total_bytes += sum(tensor.nbytes for tensor in merged.values())
            advance(1, file.name)
    if open_updates:
        raise UserError(
            f"the base has no weight for {len(open_updates)} of the adapter's layers, e.g. {min(open_updates)}",
            code="adapter-mismatch",
            where=base.name,
            remedy="name the base that the adapter was trained on with --model",
        )
    copy_rest(base, folder, dtype, total_bytes)
    return tensors


def _refuse_towers(adapter: ModelSource, model: Any) -> None:
    """Raises UserError if the adapter has weights in a tower that the loaded class does not have."""
    if lost := in_towers(adapter, model):
        raise UserError(
            "this adapter cannot be merged: peft would have to load the whole model with its part for images or sound",
            code="adapter-mismatch",
            where=f"{adapter.name}, {min(lost)}",
            expected="LoRA on linear layers with separate weights, or an adapter of the language model alone",
            found=f"{len(lost)} tensors in such parts, beside experts, embeddings or trained tokens",
            remedy="load the class that config.json names, then the adapter with peft, and call merge_and_unload()",
        )


def _refuse_more_layers(adapter: ModelSource) -> None:
    if read_adapter_fields(adapter).get("layer_replication"):
        raise UserError(
            "an adapter that repeats layers cannot be merged",
            code="adapter-mismatch",
            where=f"{adapter.name}, layer_replication",
            remedy="use it as an adapter, or train one without layer_replication",
        )


def read_updates(adapters: Sequence[ModelSource]) -> tuple[bool, dict[str, list[Update]], dict[str, torch.Tensor]]:
    """What adapters change, by the names that weights have in memory.

    Returns:
        whether all are LoRA or DoRA alone, else the rest is not complete; the updates of each weight; tensors that
        take the place of the base's.
    """
    updates: dict[str, list[Update]] = {}
    replaced: dict[str, torch.Tensor] = {}
    plain = True
    for adapter in adapters:
        _refuse_more_layers(adapter)
        plain = plain and _read_adapter(adapter, updates, replaced, alone=len(adapters) == 1)
    return plain, updates, replaced


_MORE_THAN_LORA = ("target_parameters", "lora_bias", "trainable_token_indices")


def _read_adapter(
    adapter: ModelSource, updates: dict[str, list[Update]], replaced: dict[str, torch.Tensor], *, alone: bool
) -> bool:
    """Adds an adapter's updates under its weights' names in memory; False if it is more than LoRA or DoRA.

    DoRA's norms are those of the base's weights, so such an adapter must be `alone`.
    """
    config = read_adapter_fields(adapter)
    tensors = load_file(adapter.weight_files[0])
    if start_changes_base(config) or any(config.get(name) for name in _MORE_THAN_LORA):
        return False
    if any(".lora_embedding_" in name for name in tensors) or (config.get("use_dora") and not alone):
        return False
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX)
        if ".lora_B." in bare or ".lora_magnitude_vector" in bare:
            continue
        if ".lora_A." not in bare:
            replaced[bare.replace(".base_layer.", ".")] = tensor
            continue
        module = bare.split(".lora_A.")[0]
        rank = _of_pattern(config.get("rank_pattern"), module, config["r"])
        alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        vector = f"{PREFIX}{module}.lora_magnitude_vector"
        magnitude = tensors.get(vector, tensors.get(f"{vector}.weight"))  # as older releases of peft name it
        if config.get("use_dora") and magnitude is None:
            return False
        update = Update(tensor, b, scale, bool(config.get("fan_in_fan_out")), magnitude)
        updates.setdefault(f"{module}.weight", []).append(update)
    return True


def _check_replaced(base: ModelSource, replaced: Mapping[str, torch.Tensor]) -> None:
    """Checks that the adapter's other tensors replace weights of the base; others cannot be merged."""
    base_names: set[str] = set()
    shared: list[str] = []
    for file in base.weight_files:
        with safe_open(file, framework="pt") as weights:
            names = set(weights.keys())
            base_names |= names
            shared += [n for n in names & set(replaced) if not torch.equal(weights.get_tensor(n), replaced[n])]
    embeddings = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
    tied = not any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in base_names)
    lost = sorted(set(replaced) - base_names) + [name for name in sorted(shared) if tied and name.endswith(embeddings)]
    if lost:
        raise UserError(
            f"{len(lost)} of the adapter's tensors have no separate counterpart in the base, e.g. {lost[0]}",
            code="adapter-mismatch",
            where=base.name,
            expected="plain LoRA, and whole modules or biases with separate tensors in the base",
            found="LoRA on an embedding, trained tokens, or a head and an embedding that are one tensor in the base",
            remedy="load the full-precision base with peft (run.json has the lines) and call merge_and_unload()",
        )


def _of_pattern(pattern: dict[str, float] | None, module: str, default: float) -> float:
    """Looks up peft's rank_pattern or alpha_pattern: the first key that matches the end of a module's name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default

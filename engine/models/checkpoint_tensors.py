"""Checks that a checkpoint's files have exactly the model's tensors, in the same shapes and number types.

transformers only warns about differences, and then computes other numbers: missing weights are random, and an unknown
bias or scale is dropped. Knows names, shapes and number types; not what they compute.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import counted
from dpoeng.engine.models.multimodal.towers import left_out
from dpoeng.engine.models.sources import ModelSource, has_stored_quantization

_SCALES = re.compile(
    r"(^|[._])(weight_scale(_inv|_2)?|input_scale|activation_scale|weight_packed|weight_shape|qweight|qzeros|g_idx|SCB"
    r"|absmax|quant_map|k_scale|v_scale|weight_zero_point)$"
)
"""Names under which quantised checkpoints store the scales of their weights."""

_NARROW = re.compile(r"F[468]_|F4$|[IU](8|16|32)$")
"""safetensors' names of number types that are meaningless without scales."""

_LAYER = re.compile(r"(^|\.)(layers|layer|h|blocks|block)\.(\d+)\.")

_OTHER_PARTS = re.compile(
    r"(^|\.)(vision\w*|visual|image\w*|patch\w*|audio\w*|speech\w*|video\w*|encoder|\w*projector|mm_\w+|mtp\w*|nextn\w*|eagle\w*"
    r"|medusa\w*|draft\w*|talker|code2wav|embed_vision|embed_audio)(\.|$)"
)
"""Parts of a checkpoint that text does not use: other modalities, and heads that draft tokens ahead."""

_HARMLESS = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias|position_ids)$"
)
"""Buffers that older releases saved and newer ones compute: rotary frequencies, causal masks, positions."""


def refuse_unrecorded_quantization(source: ModelSource) -> None:
    """Refuses files whose numbers need scales if config.json does not explain them: they would be used unscaled.

    Raises:
        UserError: a weight is float8 or integer, and no quantization_config says how to scale it.
    """
    from safetensors import SafetensorError, safe_open

    if source.gguf or has_stored_quantization(source):
        return
    narrow: dict[str, str] = {}
    for file in source.weight_files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (a safetensors file is no dictionary)
                    kind = str(tensors.get_slice(name).get_dtype())
                    if _NARROW.match(kind) and not _HARMLESS.search(name):
                        narrow[name] = kind
        except (OSError, SafetensorError):
            return  # loading reports the damaged file
    wide = ("weight", "packed")  # other integers are counters
    weights = [f"{name} ({kind})" for name, kind in narrow.items() if kind.startswith("F") or name.endswith(wide)]
    if weights:
        raise _quantized(source, weights)


def check_loaded(model: Any, loaded: Mapping[str, Any], source: ModelSource) -> tuple[str, ...]:
    """Compares what transformers found in the files with the model's tensors.

    Args:
        model: the loaded model.
        loaded: transformers' loading info: `missing_keys`, `mismatched_keys`, `unexpected_keys`.
        source: the checkpoint.

    Returns:
        remarks on parts that were left out on purpose, such as the vision tower of a checkpoint trained on text.

    Raises:
        UserError: weights are missing or have other shapes, or the files have tensors of the language model that are
            not in the model.
    """
    refuse_missing(loaded["missing_keys"], source)
    refuse_mismatched(loaded["mismatched_keys"], source)
    unexpected = sorted(name for name in loaded["unexpected_keys"] if not _HARMLESS.search(name))
    scales = [name for name in unexpected if _SCALES.search(name)]
    if scales and not has_stored_quantization(source):
        raise _quantized(source, scales)
    towers = tuple(left_out(model))
    wrong = [name for name in unexpected if not _tower(name, towers) and _is_of_language_model(name, model)]
    if wrong:
        raise UserError(
            f"the checkpoint contains {counted(len(wrong), 'tensor')} that its config.json does not describe",
            code="model-unexpected-tensors",
            where=str(source.folder),
            expected="only tensors of this model: leaving others out would change its outputs",
            found=_some(wrong),
            remedy="use the config.json that belongs to these weights (it may disable a bias or layers); if the model "
            "is right without these tensors, load it with transformers and save_pretrained() it into a new folder",
        )
    parts = Counter(_tower(name, towers) or _part(name) for name in unexpected)
    if not parts:
        return ()
    named = ", ".join(f"{part} ({counted(count, 'tensor')})" for part, count in parts.most_common(5))
    return (f"parts of {source.name} that text does not use are not loaded: {named}",)


def _is_of_language_model(name: str, model: Any) -> bool:
    """Whether a surplus tensor belongs to the language model's computation, judged by its name."""
    if _OTHER_PARTS.search(name):
        return False
    text = model.config.get_text_config(decoder=True)
    layer = _LAYER.search(name)
    if layer:  # extra layers draft tokens ahead in DeepSeek's checkpoints; elsewhere they are an error
        depth = int(getattr(text, "num_hidden_layers", 0) or 0)
        return not depth <= int(layer.group(3)) < depth + int(getattr(text, "num_nextn_predict_layers", 0) or 0)
    holder = name.rpartition(".")[0]
    modules = dict(model.named_modules())
    return holder in modules and not any(modules[holder].children())


def _tower(name: str, towers: Collection[str]) -> str:
    """Last name of the left-out tower that a tensor belongs to; empty if to none."""
    return next((tower.rpartition(".")[2] for tower in towers if name.startswith(f"{tower}.")), "")


def _part(name: str) -> str:
    """The part of a checkpoint that a tensor belongs to, in one or two words."""
    match = _OTHER_PARTS.search(name)
    return match.group(2) if match else name.rpartition(".")[0] or name


def _some(names: Collection[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _quantized(source: ModelSource, names: Collection[str]) -> UserError:
    recorded = (source.folder / "hf_quant_config.json").is_file()
    return UserError(
        f"the weights of {source.name} are quantised, but its config.json does not say how",
        code="quantization-stored",
        where=str(source.folder) + (", hf_quant_config.json (ModelOpt)" if recorded else ""),
        expected="full precision, or a quantization_config in config.json that dpoeng runs (bitsandbytes)",
        found=_some(names),
        remedy="name the full-precision checkpoint; --quantization 8bit or 4bit quantises it while it is loaded",
    )


def refuse_missing(names: Collection[str], source: ModelSource) -> None:
    """Raises if weights are missing: they would be random numbers, and transformers only warns."""
    if names:
        raise UserError(
            "the checkpoint lacks weights of its model",
            code="model-incomplete",
            where=str(source.folder),
            expected=_some(names),
            remedy="download or save the checkpoint again; config.json must be that of these weights",
        )


def refuse_mismatched(weights: Collection[tuple[str, Any, Any]], source: ModelSource) -> None:
    """Raises if shapes differ from config.json: such weights would be random numbers, too."""
    for name, stored, wanted in sorted(weights, key=lambda one: one[0]):
        raise UserError(
            "the checkpoint's shapes contradict its config.json",
            code="model-unloadable",
            where=f"{source.folder}, {name}",
            expected=str(tuple(wanted)),
            found=str(tuple(stored)),
            remedy="use the config.json that belongs to these weights",
        )

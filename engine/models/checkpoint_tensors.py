"""Whether a checkpoint's files hold the tensors that the model has: no more, no fewer, in the same shapes and kinds.

transformers only warns of differences, and a model that is loaded in spite of them computes other numbers: weights that
the files lack are random, and a bias or a scale that the model has no place for is left out. Knows names, shapes and
kinds of numbers; not what they compute.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import counted
from dpoeng.engine.models.sources import ModelSource, has_stored_quantization

_SCALES = re.compile(
    r"(^|[._])(weight_scale(_inv|_2)?|input_scale|activation_scale|weight_packed|weight_shape|qweight|qzeros|g_idx|SCB"
    r"|absmax|quant_map|k_scale|v_scale|weight_zero_point)$"
)
"""Names under which quantised checkpoints keep what their weights have to be multiplied by."""

_NARROW = re.compile(r"F[468]_|F4$|[IU](8|16|32)$")
"""safetensors' names of numbers that stand for weights only together with scales."""

_LAYER = re.compile(r"(^|\.)(layers|layer|h|blocks|block)\.(\d+)\.")

_OTHER_PARTS = re.compile(
    r"(^|\.)(vision\w*|visual|image\w*|patch\w*|audio\w*|speech\w*|video\w*|encoder|\w*projector|mm_\w+|mtp\w*|nextn\w*|eagle\w*"
    r"|medusa\w*|draft\w*|talker|code2wav|embed_vision|embed_audio)(\.|$)"
)
"""Parts of a checkpoint that text alone does not pass through: other senses, and heads that draft tokens ahead."""

_HARMLESS = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias|position_ids)$"
)
"""Buffers that older releases saved and newer ones compute: rotary frequencies, causal masks, counted positions."""


def refuse_unrecorded_quantization(source: ModelSource) -> None:
    """Refuses files whose numbers need scales where config.json does not say how: they would be taken as they are.

    Raises:
        UserError: a weight is in float8 or in whole numbers, and no quantization_config says what it stands for.
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
            return  # loading says what is wrong with the file
    wide = ("weight", "packed")  # other whole numbers are counters
    weights = [f"{name} ({kind})" for name, kind in narrow.items() if kind.startswith("F") or name.endswith(wide)]
    if weights:
        raise _quantized(source, weights)


def check_loaded(model: Any, loaded: Mapping[str, Any], source: ModelSource) -> tuple[str, ...]:
    """Compares what transformers found in the files with what the model has.

    Args:
        model: the loaded model.
        loaded: transformers' loading info: `missing_keys`, `mismatched_keys`, `unexpected_keys`.
        source: the checkpoint.

    Returns:
        remarks on parts that were left out rightly: the vision tower of a checkpoint that is trained on text.

    Raises:
        UserError: weights are missing or have other shapes; or the files hold tensors of the language model that it
            has no place for.
    """
    refuse_missing(loaded["missing_keys"], source)
    refuse_mismatched(loaded["mismatched_keys"], source)
    unexpected = sorted(name for name in loaded["unexpected_keys"] if not _HARMLESS.search(name))
    scales = [name for name in unexpected if _SCALES.search(name)]
    if scales and not has_stored_quantization(source):
        raise _quantized(source, scales)
    wrong = [name for name in unexpected if _is_of_language_model(name, model)]
    if wrong:
        raise UserError(
            f"the checkpoint holds {counted(len(wrong), 'tensor')} that its config.json does not describe",
            code="model-unexpected-tensors",
            where=str(source.folder),
            expected="only tensors of this model: leaving others out would change its outputs",
            found=_some(wrong),
            remedy="use the config.json that belongs to these weights (it may deny a bias or layers); if the model is "
            "right without these tensors, load it with transformers and save_pretrained() it into a new folder",
        )
    parts = Counter(_part(name) for name in unexpected)
    if not parts:
        return ()
    named = ", ".join(f"{part} ({counted(count, 'tensor')})" for part, count in parts.most_common(5))
    return (f"parts of {source.name} that text does not pass through are not loaded: {named}",)


def _is_of_language_model(name: str, model: Any) -> bool:
    """Whether a tensor that has no place is part of what the model computes, as far as its name tells."""
    if _OTHER_PARTS.search(name):
        return False
    text = model.config.get_text_config(decoder=True)
    layer = _LAYER.search(name)
    if layer:  # layers beyond the last draft tokens ahead in DeepSeek's kind of checkpoint, and else are too many
        depth = int(getattr(text, "num_hidden_layers", 0) or 0)
        return not depth <= int(layer.group(3)) < depth + int(getattr(text, "num_nextn_predict_layers", 0) or 0)
    holder = name.rpartition(".")[0]
    modules = dict(model.named_modules())
    return holder in modules and not any(modules[holder].children())


def _part(name: str) -> str:
    """The part of a checkpoint that a tensor belongs to, in one or two words."""
    found = _OTHER_PARTS.search(name)
    return found.group(2) if found else name.rpartition(".")[0] or name


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
    """Weights that the files lack would be random numbers: transformers only warns of them."""
    if names:
        raise UserError(
            "the checkpoint lacks weights of its model",
            code="model-incomplete",
            where=str(source.folder),
            expected=_some(names),
            remedy="download or save the checkpoint again; config.json must be that of these weights",
        )


def refuse_mismatched(weights: Collection[tuple[str, Any, Any]], source: ModelSource) -> None:
    """Weights of another shape than config.json says would be random numbers too."""
    for name, held, wanted in sorted(weights, key=lambda one: one[0]):
        raise UserError(
            "the checkpoint's shapes contradict its config.json",
            code="model-unloadable",
            where=f"{source.folder}, {name}",
            expected=str(tuple(wanted)),
            found=str(tuple(held)),
            remedy="use the config.json that belongs to these weights",
        )

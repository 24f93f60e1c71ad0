"""Reads a config.json through transformers: the text part, the sizes, another number of layers.

Architectures use different names for the same thing (`n_layer`, `num_layers`, a nested `text_config`), and a number or
a list with one entry per layer. This module asks transformers' config classes; nothing else reads raw keys.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a decoder. If layers differ, those of the largest.

    Attributes:
        layers: decoder layers.
        hidden: width between the layers.
        inner: width inside the MLP.
        attention: number of heads times head width; 0 without attention.
        vocabulary: rows of the head.
    """

    layers: int
    hidden: int
    inner: int
    attention: int
    vocabulary: int


def config_of(fields: Mapping[str, Any]) -> Any:
    """transformers' config for the contents of a config.json.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: transformers does not know the model type, or the fields
            contradict each other.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # The quantisation of a stored checkpoint is passed separately, as for any other.
    plain = {name: _decoded(value) for name, value in fields.items() if name != "quantization_config"}
    try:
        return CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
    except StrictDataclassError as error:  # no ValueError, though the validator in it raised one
        raise ValueError(" ".join(str(error).split())) from error


def _decoded(value: Any) -> Any:
    """Decodes numbers that JSON does not have, which transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {name: _decoded(held) for name, held in value.items()}
    return [_decoded(held) for held in value] if isinstance(value, list) else value


def auto_class(config: Any) -> Any:
    """transformers' auto class for a config: the causal one, or the one for images and text.

    Some types only have the latter (Mistral 3, Qwen2.5-VL); their decoder also reads text alone.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    only_whole = (
        type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    )
    return AutoModelForImageTextToText if only_whole else AutoModelForCausalLM


def auto_class_of(folder: Path) -> Any:
    """The same for a checkpoint's folder.

    Raises:
        ValueError, KeyError, OSError: its config.json cannot be read, or names a type that transformers does not know.
    """
    from transformers import AutoConfig

    return auto_class(AutoConfig.from_pretrained(folder))


def has_text_part(folder: Path) -> bool:
    """Whether a checkpoint's config describes a text decoder as one of several parts.

    Raises:
        ValueError, KeyError, OSError: as `auto_class_of`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return text_config(config) is not config


def of_class(config: Any, model_class: Any) -> Any:
    """A stored config as the model's class takes it: a class for text alone takes the text part.

    transformers' auto classes do the same.
    """
    if model_class.config_class is not config.sub_configs.get("text_config"):
        return config
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    return text


def without_quantization(config: Any) -> Any:
    """A config, itself changed, that does not tell transformers how the files are quantised: dpoeng reads that."""
    for part in (config, text_config(config)):
        part.__dict__.pop("quantization_config", None)
    return config


def text_config(config: Any) -> Any:
    """The part of a config that describes the text decoder; the config itself if it has only one part."""
    return config.get_text_config(decoder=True)


def sizes(config: Any) -> Sizes:
    """The sizes of a config's decoder.

    Raises:
        AttributeError: the number of layers or a width is missing.
    """
    text = text_config(config)
    # Gemma 4's full attention has wider heads, and transformers tells a width that differs only for one layer.
    layers = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]
    return Sizes(
        _largest(text.num_hidden_layers),
        max(_largest(layer.hidden_size) for layer in layers),
        max(_largest(getattr(layer, "intermediate_size", None) or 4 * _largest(layer.hidden_size)) for layer in layers),
        max(map(_attention_width, layers)),
        _largest(text.vocab_size),
    )


def _attention_width(layer: Any) -> int:
    heads = _largest(getattr(layer, "num_attention_heads", None) or 0)
    return heads * _largest(getattr(layer, "head_dim", None) or (_largest(layer.hidden_size) // heads if heads else 0))


def _largest(size: Any) -> int:
    return int(max(size) if isinstance(size, (list, tuple)) else size)


def with_layers(config: Any, chosen: Sequence[int]) -> Any:
    """A copy of a config with only these of its layers; lists with one entry per layer keep those entries.

    Layers whose kind a config tells otherwise, for example by the number of dense ones, may be of another kind then.
    """
    cut = copy.deepcopy(config)
    text = text_config(cut)
    depth = int(text.num_hidden_layers)
    by_number: Mapping[str, Any] | None = None
    if getattr(text, "is_heterogeneous", False):  # transformers' word for sizes by a layer's number
        by_number = text.to_dict()["per_layer_config"]
        text.per_layer_config = None
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth and depth > 1:
            setattr(text, name, [value[layer] for layer in chosen])
    text.num_hidden_layers = len(chosen)
    if by_number is not None:
        own = {int(layer): values for layer, values in by_number.items()}
        text.per_layer_config = {new: own[old] for new, old in enumerate(chosen) if old in own} or None
    return cut


_WINDOWS = re.compile(r"sliding_window|window_size|attention_chunk_size|local_attention|index_topk|block_size")
_OF_A_ROW = re.compile(r"compress_rate")


def windows(config: Any, longest: int | None = None) -> list[int]:
    """How many tokens back some layers look: sliding windows, chunks, and the number of tokens that indexers choose.

    Args:
        config: of the model.
        longest: tokens of the longest text; windows that it does not reach are left out. Layers that compress what they
            look back on do so by positions in a whole row, which may contain many texts: theirs are always included.
    """
    window_sizes: set[int] = set()
    for name, value in vars(text_config(config)).items():
        sizes_ = {size for size in _each(value) if isinstance(size, int) and not isinstance(size, bool) and size > 0}
        if _OF_A_ROW.search(name):
            window_sizes |= sizes_
        elif _WINDOWS.search(name):
            window_sizes |= {size for size in sizes_ if longest is None or size < longest}
    return sorted(window_sizes)


def chooses_tokens(config: Any) -> bool:
    """Whether some layers attend to tokens that an indexer chooses, which depends on padding in the row."""
    return any("index_topk" in name and value for name, value in vars(text_config(config)).items())


def _each(size: Any) -> list[Any]:
    if isinstance(size, Mapping):
        return list(size.values())
    return list(size) if isinstance(size, (list, tuple)) else [size]


def rotary_limit(config: Any) -> int | None:
    """The length up to which a text's rotary frequencies do not depend on other texts; None without a limit.

    LongRoPE and dynamic NTK choose them by the largest position of a forward (transformers' `dynamic_rope_update`), so
    a longer text would change the numbers of all others in it.
    """
    text = text_config(config)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    limits = [int(kind["original_max_position_embeddings"]) for kind in kinds if kind.get("rope_type") == "longrope"]
    limits += [int(text.max_position_embeddings) for kind in kinds if "dynamic" in str(kind.get("rope_type"))]
    return min(limits, default=None)


def layer_lists(config: Any) -> list[tuple[Any, ...]]:
    """For each layer, its entries in all lists of the config that have one entry per layer, other than its number."""
    text = text_config(config)
    depth = int(text.num_hidden_layers)
    lists = [v for v in vars(text).values() if isinstance(v, (list, tuple)) and len(v) == depth and depth > 1]
    lists = [values for values in lists if list(values) != list(range(depth))]
    return [tuple(repr(values[layer]) for values in lists) for layer in range(depth)]

"""A config.json as transformers understands it: the text part, the sizes, another number of layers.

Architectures write the same thing under different names (`n_layer`, `num_layers`, a nested `text_config`), as a number
or as a list with one entry a layer. transformers' config classes are asked for all of this here, and raw keys nowhere.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a decoder. Where layers differ, those of the largest.

    Attributes:
        layers: decoder layers.
        hidden: width between the layers.
        inner: width inside the MLP.
        attention: heads times the width of a head; 0 where there is no attention.
        vocabulary: rows of the head.
    """

    layers: int
    hidden: int
    inner: int
    attention: int
    vocabulary: int


def config_of(fields: Mapping[str, Any]) -> Any:
    """transformers' config of what a config.json holds.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: transformers does not know the model type, or the fields do not
            go together.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # How a stored checkpoint is quantised is told beside, as for any other.
    plain = {name: _decoded(value) for name, value in fields.items() if name != "quantization_config"}
    return CONFIG_MAPPING[plain["model_type"]].from_dict(plain)


def _decoded(value: Any) -> Any:
    """transformers writes numbers that JSON does not have as `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {name: _decoded(held) for name, held in value.items()}
    return [_decoded(held) for held in value] if isinstance(value, list) else value


def auto_class(config: Any) -> Any:
    """The class of transformers that makes a config's model: the causal one, or the one for images and text.

    Some types have the latter alone (Mistral 3, Qwen2.5-VL); their decoder reads text by itself.
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
        ValueError, KeyError, OSError: its config.json cannot be read, or names no type that transformers knows.
    """
    from transformers import AutoConfig

    return auto_class(AutoConfig.from_pretrained(folder))


def without_quantization(config: Any) -> Any:
    """A config, itself changed, that does not tell transformers how the files are quantised: dpoeng reads that."""
    for part in (config, text_config(config)):
        part.__dict__.pop("quantization_config", None)
    return config


def text_config(config: Any) -> Any:
    """The part of a config that describes the decoder of text; the config itself where there is but one part."""
    return config.get_text_config(decoder=True)


def sizes(config: Any) -> Sizes:
    """The sizes of a config's decoder.

    Raises:
        AttributeError: it names no number of layers, or no width.
    """
    text = text_config(config)
    hidden, heads = _largest(text.hidden_size), _largest(getattr(text, "num_attention_heads", None) or 0)
    head = _largest(getattr(text, "head_dim", None) or (hidden // heads if heads else 0))
    inner = _largest(getattr(text, "intermediate_size", None) or 4 * hidden)
    return Sizes(_largest(text.num_hidden_layers), hidden, inner, heads * head, _largest(text.vocab_size))


def _largest(size: Any) -> int:
    return int(max(size) if isinstance(size, (list, tuple)) else size)


def with_layers(config: Any, count: int) -> Any:
    """A copy of a config with its first `count` layers; lists with one entry a layer are cut."""
    cut = copy.deepcopy(config)
    text = text_config(cut)
    depth = int(text.num_hidden_layers)
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth and depth > 1:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return cut


_WINDOWS = re.compile(r"sliding_window|window_size|attention_chunk_size|local_attention|index_topk|block_size")
_OF_A_ROW = re.compile(r"compress_rate")


def windows(config: Any, longest: int | None = None) -> list[int]:
    """How many tokens back some layers look: sliding windows, chunks, and how many tokens indexers choose.

    Args:
        config: of the model.
        longest: tokens of the longest text; windows that it does not reach are left out. Layers that compress what they
            look back on do so by the positions of a whole row, which may hold many texts: theirs are always there.
    """
    found: set[int] = set()
    for name, value in vars(text_config(config)).items():
        sizes_ = {size for size in _each(value) if isinstance(size, int) and not isinstance(size, bool) and size > 0}
        if _OF_A_ROW.search(name):
            found |= sizes_
        elif _WINDOWS.search(name):
            found |= {size for size in sizes_ if longest is None or size < longest}
    return sorted(found)


def chooses_tokens(config: Any) -> bool:
    """Whether some layers attend to tokens that an indexer chooses: what it chooses depends on the padding beside."""
    return any("index_topk" in name and value for name, value in vars(text_config(config)).items())


def _each(size: Any) -> list[Any]:
    if isinstance(size, Mapping):
        return list(size.values())
    return list(size) if isinstance(size, (list, tuple)) else [size]


def rotary_limit(config: Any) -> int | None:
    """The length up to which a text's rotary frequencies are its own; None where there is no limit.

    LongRoPE and dynamic NTK choose them by the largest position of a forward (`dynamic_rope_update` of transformers),
    so that a longer text would change the numbers of all others in it.
    """
    text = text_config(config)
    held = getattr(text, "rope_parameters", None) or {}
    kinds = [held] if "rope_type" in held else [kind for kind in held.values() if isinstance(kind, dict)]
    limits = [int(kind["original_max_position_embeddings"]) for kind in kinds if kind.get("rope_type") == "longrope"]
    limits += [int(text.max_position_embeddings) for kind in kinds if "dynamic" in str(kind.get("rope_type"))]
    return min(limits, default=None)


def layer_lists(config: Any) -> list[tuple[Any, ...]]:
    """For each layer, its entry in every list of the config that has one entry a layer."""
    text = text_config(config)
    depth = int(text.num_hidden_layers)
    lists = [v for v in vars(text).values() if isinstance(v, (list, tuple)) and len(v) == depth and depth > 1]
    return [tuple(repr(values[layer]) for values in lists) for layer in range(depth)]

"""What llama.cpp calls a model's settings and weights, and in which order it keeps the rows of some.

The names come from the `gguf` package; the keys are those of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpoeng.cache.errors import UserError

_NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model_type -> the architecture of llama.cpp: plain decoders, which both read by the keys below."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model as llama.cpp knows it.

    Attributes:
        name: llama.cpp's.
        config: of config.json.
        heads: attention heads, and those of keys and values.
    """

    name: str
    config: dict[str, Any]
    heads: tuple[int, int]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding, and has no separate tensor."""
        return bool(self.config.get("tie_word_embeddings"))

    def keys(self) -> dict[str, int | float]:
        """The settings, by llama.cpp's keys."""
        config, (heads, kv_heads) = self.config, self.heads
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        found: dict[str, int | float] = {
            "context_length": config["max_position_embeddings"],
            "embedding_length": config["hidden_size"],
            "block_count": config["num_hidden_layers"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": heads,
            "attention.head_count_kv": kv_heads,
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "rope.dimension_count": head_dim,
            "rope.freq_base": float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10_000.0),
            "vocab_size": config["vocab_size"],
        }
        return {f"{self.name}.{key}": value for key, value in found.items()}

    def tensor_name(self, name: str) -> str | None:
        """llama.cpp's name of a weight; None for what is not stored, as a tied head.

        Raises:
            UserError: it has none.
        """
        import gguf

        if (self.tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq"):
            return None  # the embedding itself; what every reader computes
        arch = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}[self.name]
        names = gguf.get_tensor_name_map(arch, int(self.config["num_hidden_layers"]))
        found: str | None = names.get_name(name, (".weight", ".bias"))
        if found is None:
            raise unwritable(f"{self.name}, {name}", "a weight that this architecture does not have")
        return found

    def rows(self, name: str, weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The rows [out, ...] of a weight in llama.cpp's order: in `llama`, the halves of each head interleave."""
        if self.name != "llama" or not name.rsplit(".", 1)[0].endswith(("q_proj", "k_proj")):
            return weight
        heads = self.heads[0] if "q_proj" in name else self.heads[1]
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))

    def rows_back(self, name: str, weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Undoes `rows`."""
        order = self.rows(name, np.arange(weight.shape[0]))
        back = np.empty_like(weight)
        back[order] = weight
        return back


def architecture_of(folder: Path) -> Architecture:
    """The architecture of a checkpoint's folder.

    Raises:
        UserError: llama.cpp's keys for it are not known here, or a setting cannot be expressed by them.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = str(config.get("model_type"))
    if kind not in _NAMES:
        raise unwritable(f"{folder}/config.json, model_type", kind)
    rope = _rope(config).get("rope_type", _rope(config).get("type", "default"))
    window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window") else None
    for field, value, fine in (
        ("rope_type", rope, rope == "default"),
        ("sliding_window", window, not window),
        ("hidden_act", config.get("hidden_act"), config.get("hidden_act", "silu") == "silu"),
        ("mlp_bias", config.get("mlp_bias"), not config.get("mlp_bias")),
    ):
        if not fine:
            raise unwritable(f"{folder}/config.json, {field}", str(value))
    heads = int(config["num_attention_heads"])
    return Architecture(_NAMES[kind], config, (heads, int(config.get("num_key_value_heads") or heads)))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def unwritable(where: str, found: str) -> UserError:
    """The error for a model that is left to llama.cpp's own converter."""
    return UserError(
        "dpoeng does not write this model as GGUF",
        code="gguf-unwritable",
        where=where,
        expected=f"{', '.join(_NAMES)}, with plain rotary positions and a byte-level BPE tokenizer of a known kind",
        found=found,
        remedy="`dpoeng export OUT --to merged --into merged`, then llama.cpp's convert_hf_to_gguf.py on that folder",
    )

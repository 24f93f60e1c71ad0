"""Fields of a config.json for the meta device."""

from __future__ import annotations

from typing import Any


def fields(name: str, **changes: Any) -> dict[str, Any]:
    """config.json of a small model of a family; wide enough that activations and not bookkeeping decide."""
    small: dict[str, Any] = {
        "model_type": name,
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    return {**small, **changes}

"""A tiny random model of every architecture for text that transformers registers, with a tokenizer: saved in a folder.

It uses names and meanings of config fields; independent of the use of the models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 320

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "rotary_dim": 4,
    "n_inner": 48,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    # recurrence
    "state_size": 8,
    "expand": 2,
    "n_groups": 1,
    "time_step_rank": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "ssm_state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "lru_width": 32,
    "conv_dim": 32,
    "attention_window_size": 32,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "is_decoder": True,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""A size wherever a config has a field of this name. Windows are shorter than the pairs, so that they matter."""

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

_GEMMA = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}

_EXTRA: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "mistral4": {"head_dim": 16},  # of which half is rotated
    "dots1": {"moe_intermediate_size": 16, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "fuyu": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "patch_size": 4},
    "siglip_vision_model": _VISION,
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 4,
        **_GEMMA,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": {**_GEMMA, "global_head_dim": 16},
    "gemma4_unified_text": {**_GEMMA, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2, "num_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "roc_bert": {
        "pronunciation_vocab_size": 8,
        "shape_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    **{
        f"{name}_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "glm4v", "glm_ocr", "paddleocr_vl")
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [0, 1, 1],
            "partial_rotary_factor": 0.5,
        }
    },
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
    },
    "gemma4": {"vision_config": {"model_type": "gemma4_vision", "head_dim": 8, "num_key_value_heads": 2, **_VISION}},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "phi4_multimodal_vision": _VISION,
}
"""Additional config fields by model type, also of a part."""


def tiny_config(model_type: str) -> Any:
    """The config of a model type with everything made small, its text part where it has several.

    Raises:
        ValueError, TypeError, AttributeError, KeyError: the sizes do not go together for this type.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    default = kind()
    held: dict[str, Any] = {name: getattr(default, name, None) for name in kind.sub_configs or {}}
    parts = {
        name: {**_sizes(type(part)), **_EXTRA.get(part.model_type, {}), "model_type": part.model_type}
        for name, part in held.items()
        if hasattr(part, "hidden_size")
    }
    return kind(**{**_sizes(kind), **parts, **_EXTRA.get(model_type, {})})


def _sizes(kind: Any) -> dict[str, Any]:
    """The sizes that this class of configs has a field for, under its own names."""
    default = kind()
    known = set(vars(default)) | set(kind.attribute_map)
    names = {name: kind.attribute_map.get(name, name) for name in _SIZES}
    sizes = {names[name]: size for name, size in _SIZES.items() if name in known or names[name] in known}
    if "kv_lora_rank" in known and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # latent attention has as many of both
    layers = list(dict.fromkeys(vars(default).get("layer_types") or ()))
    if set(layers) in ({"linear_attention", "full_attention"}, {"conv", "full_attention"}):
        sizes["layer_types"] = layers  # a hybrid's first layers are often all of one kind
    if "text_config" in (kind.sub_configs or {}):
        sizes = {name: size for name, size in sizes.items() if name.endswith("token_id")}
    return sizes


def tiny_model(config: Any) -> Any:
    """The random model of a config, its log-probs far from uniform."""
    import torch

    from dpoeng.engine.models.model_config import auto_class

    torch.manual_seed(0)
    model = auto_class(config).from_config(config).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer with an end token: every text has ids below `VOCABULARY`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


def save_tiny(model_type: str, folder: Path) -> Path:
    """Saves the tiny model of a type, with a tokenizer and its whole config."""
    config = tiny_config(model_type)
    tiny_model(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def model_types() -> list[str]:
    """The model types of every causal class that this transformers registers, and of those for images and text."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    return list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]))

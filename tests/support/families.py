"""Tiny random models of many architectures, and their own log-probs by a plain forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.layout import Branch, PromptGroup, separate

VOCAB = 97


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


# Config class -> what it needs besides SMALL. Windows of 6 are shorter than the rows, so that they matter.
SHARED_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Qwen2Config": {},
    "Qwen3Config": {"head_dim": 8},
    "Qwen3MoeConfig": {"head_dim": 8, **MOE},
    "MistralConfig": {"sliding_window": 6},
    "Gemma2Config": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "Gemma3TextConfig": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "Phi3Config": {},
    "GraniteConfig": {"logits_scaling": 4.0},
    "SmolLM3Config": {},
    "Olmo2Config": {},
    "GptOssConfig": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "CohereConfig": {"logit_scale": 0.25},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoXConfig": {},
}


def make(name: str, extra: dict[str, Any], dtype: torch.dtype = torch.float32) -> CausalLM:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SMALL, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.requires_grad_(False)
    lm = CausalLM(model, model, None, torch.device("cpu"), dtype, "none", model.config._attn_implementation)
    set_mode(lm, training=False)
    return lm


def some_groups(seed: int = 1) -> list[PromptGroup]:
    rng = np.random.default_rng(seed)

    def draw(n: int) -> Any:
        return rng.integers(0, VOCAB, n, dtype=np.int32)

    return [
        PromptGroup(draw(12), (Branch(draw(9)), Branch(draw(14), start=2))),
        PromptGroup(draw(1), (Branch(draw(5)), Branch(draw(3)), Branch(draw(7)))),
        PromptGroup(draw(8), (Branch(draw(1)), Branch(draw(2)))),
    ]


def own_logps(lm: CausalLM, groups: list[PromptGroup]) -> torch.Tensor:
    """Each branch by itself through the model's own forward with its own attention, float64 log-softmax."""
    use_layout(lm, "separate")
    if "Gemma2" in type(lm.base).__name__:
        lm.base.set_attn_implementation("eager")  # transformers 5.0's default here leaves the soft cap out
    parts = []
    for group in groups:
        for single in separate(group):
            (branch,) = single.branches
            tokens = torch.from_numpy(branch.ids.astype(np.int64))
            logits = lm.base(input_ids=tokens[None], use_cache=False).logits[0, branch.start - 1 : -1]
            logps = torch.log_softmax(logits.double(), -1)
            parts.append(logps.gather(1, tokens[branch.start :, None]).squeeze(1))
    return torch.cat(parts)

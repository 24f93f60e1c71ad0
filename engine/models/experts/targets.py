"""LoRA's targets in a mixture of experts: attention and the layers that every token uses, unless stacks are named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dpoeng.cache.words import counted
from dpoeng.engine.models.model_config import config_of, text_config
from dpoeng.engine.models.sources import ModelSource, read_fields


def routed_experts(config: Any) -> int:
    """Number of experts that a layer's router chooses from, by transformers' config; 0 without routing."""
    text = text_config(config)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = [getattr(text, name, None) for name in names]
    return max((count for count in counts if isinstance(count, int)), default=0)


def has_routed_experts(source: ModelSource) -> bool:
    """Whether a checkpoint's config names routed experts; False if transformers cannot read it."""
    if source.gguf:
        return False
    try:
        return routed_experts(config_of(read_fields(source))) > 0
    except (KeyError, ValueError, TypeError, AttributeError):
        return False


def beside_experts(base: nn.Module, names: Sequence[str]) -> tuple[list[str], str]:
    """The linear layers that `all-linear` means in a mixture of experts, by last name, and a remark for the user.

    Routers are left out: a trained router sends tokens to other experts than the reference did. So are names that peft
    applies to all routed experts (`gate_proj` in Qwen3-MoE, DeepSeek-V3).

    Args:
        base: the model.
        names: last names of its linear layers.

    Returns:
        the names, in order, and the remark; both empty without routing.
    """
    stacks = [name for name, parameter in base.named_parameters() if parameter.dim() == 3 and "expert" in name]
    count = routed_experts(getattr(base, "config", None)) if stacks else 0
    if not count:
        return [], ""
    routers = _routers(base, stacks, count)
    renamed = _read_as_experts(base.config)
    chosen = [name for name in names if name not in routers | renamed]
    shared = sorted(renamed & set(names))
    remark = (
        f"a mixture of {counted(count, 'expert')}: LoRA on {', '.join(chosen)}; routers and routed experts stay as "
        "they are (--lora-target-parameters adapts experts)"
    )
    return chosen, remark + (f"; so do {', '.join(shared)}, which peft applies to the routed experts" if shared else "")


def _routers(base: nn.Module, stacks: Sequence[str], count: int) -> set[str]:
    """Last names of linear layers next to the experts with one output, or one per expert: routers and gates."""
    blocks = {name.rsplit(".", 2)[0] for name in stacks}
    routers = set()
    for name, module in base.named_modules():
        block, _, last = name.rpartition(".")
        beside = any(block == one or block.startswith(f"{one}.") for one in blocks)
        if isinstance(module, nn.Linear) and beside and module.out_features in (1, count):
            routers.add(last)
    return routers


def _read_as_experts(config: Any) -> set[str]:
    """Names that peft takes for experts' in models of this type, from checkpoints without stacks."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return set()
    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(getattr(config, "model_type", None))
    return set(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ())) if pattern else set()

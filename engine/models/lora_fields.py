"""peft's LoRA settings, one by one: those that dpoeng computes as peft does, and those that it refuses by name.

Knows the fields of adapter_config.json; loads no weights and no library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpoeng.cache.errors import UserError

NAMES = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config
    megatron_core qalora_group_size""".split()
)
"""Fields that name things, or say how to use another field: they do not change a number by themselves."""

COMPUTED = frozenset(
    """r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save
    init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern trainable_token_indices eva_config
    use_dora layer_replication lora_bias target_parameters ensure_weight_tying""".split()
)
"""Fields that peft's own layers apply in both phases."""

_MERGE = "merge it into the base with peft (merge_and_unload) and give the result as --model"
_CONVERT = (
    "convert it to a plain LoRA: peft's save_pretrained(folder, path_initial_model_for_weight_conversion=...), or "
    "merge it into the base with peft and give the result as --model"
)

REFUSED: dict[str, tuple[str, str]] = {
    "alora_invocation_tokens": (
        "an activated LoRA (aLoRA) acts only after its invocation tokens, which dpoeng does not support",
        "train a plain LoRA, or one of the adapters that act on the whole text",
    ),
    "use_qalora": ("a QA-LoRA pools its input over groups of a GPTQ base", _MERGE),
    "use_bdlora": ("a BD-LoRA has block-diagonal matrices", _MERGE),
    "arrow_config": ("Arrow chooses among several adapters token by token", "give one adapter, a plain LoRA"),
    "kasa_config": ("KaSA takes the smallest singular values out of the base", _MERGE),
    "velora_config": ("VeLoRA's backward pass is not LoRA's", "remove velora_config: its weights are a plain LoRA's"),
    "monteclora_config": ("a Monte Carlo LoRA draws new weights in every forward", _MERGE),
    "megatron_config": ("Megatron's parallel layers are not transformers' layers", _MERGE),
    "loftq_config": ("LoftQ changes the base while the adapter is loaded", _CONVERT),
    "corda_config": ("CorDA changes the base by data that is not in the adapter", _CONVERT),
    "lora_ga_config": ("LoRA-GA changes the base by gradients that are not in the adapter", _CONVERT),
}
"""Fields whose effect the two phases do not reproduce: the reason, and what to do instead."""

_STARTS = ("gaussian", "orthogonal", "eva", "pissa", "olora")
"""Initialisations by name that leave the base unchanged, or change it in the same way at every load."""

_CHANGING_STARTS = ("pissa", "olora")


def check_lora_fields(name: str, where: str, fields: Mapping[str, Any]) -> None:
    """Refuses an adapter whose numbers dpoeng would not compute as peft does.

    Args:
        name: the adapter as the user named it.
        where: its adapter_config.json.
        fields: its contents.

    Raises:
        UserError: names the field, and what to do instead.
    """
    set_fields = {field: value for field, value in fields.items() if value not in (None, False, [], {}, "")}
    for field, (why, remedy) in REFUSED.items():
        if field in set_fields:
            raise _refused(name, f"{where}, {field}", why, str(set_fields[field])[:80], remedy)
    unknown = sorted(set(set_fields) - NAMES - COMPUTED)
    if unknown:
        raise _refused(
            name, f"{where}, {unknown[0]}", "it has a setting that this version of dpoeng does not know",
            f"{unknown[0]}: {str(set_fields[unknown[0]])[:60]}", _MERGE,
        )  # fmt: skip
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _STARTS:
        why = "its initialisation cannot be reproduced from the adapter alone"
        raise _refused(name, f"{where}, init_lora_weights", why, start, _CONVERT)


def start_changes_base(fields: Mapping[str, Any]) -> bool:
    """Whether loading subtracts the adapter's start from the base (PiSSA, OLoRA), so no second adapter fits."""
    return str(fields.get("init_lora_weights")).lower() in _CHANGING_STARTS


def _refused(name: str, where: str, why: str, found: str, remedy: str) -> UserError:
    return UserError(
        f"{name} is not an adapter that dpoeng can run: {why}",
        code="adapter-mismatch",
        where=where,
        expected="a LoRA whose settings dpoeng knows",
        found=found,
        remedy=remedy,
    )

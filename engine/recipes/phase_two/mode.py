"""Decides what a run trains, only from its settings and its reference. Imports no torch."""

from __future__ import annotations

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import Mode, TrainConfig


def resolve_mode(config: TrainConfig, *, has_adapter: bool) -> Mode:
    """`full` without peft; `auto` becomes `continue` if the reference has an SFT adapter, else `new`.

    Raises:
        UserError: the mode does not fit the reference.
    """
    if not config.use_peft:
        return "full"
    if config.adapter_mode == "auto":
        named = config.lora_shape_given()
        if has_adapter and named:
            raise UserError(
                "ambiguous LoRA settings: the reference has an SFT adapter",
                code="adapter-mode",
                where=", ".join("--" + name.replace("_", "-") for name in named),
                expected="adapter_mode stack: a new LoRA of this shape on top of the frozen SFT adapter; or "
                "adapter_mode continue: the SFT adapter itself, in its own shape",
                remedy="add --adapter-mode stack, or remove the LoRA settings",
            )
        return "continue" if has_adapter else "new"
    if (config.adapter_mode == "new") == has_adapter:
        raise UserError(
            f"adapter_mode {config.adapter_mode} does not fit this reference",
            code="adapter-mode",
            where="--adapter-mode",
            expected="continue or stack, since the reference has an SFT adapter"
            if has_adapter
            else "new, since the reference has no SFT adapter",
            found=config.adapter_mode,
            remedy="leave it out: auto chooses the right one",
        )
    return config.adapter_mode

"""Python lines that load a run's result with transformers and peft alone."""

from __future__ import annotations

from dpoeng.engine.config.fields import Mode
from dpoeng.engine.runs.folder import ADAPTER_FOLDER, MODEL_FOLDER


def loading_recipe(mode: Mode, model: str, adapter: str | None, loader: str = "AutoModelForCausalLM") -> list[str]:
    """Python lines that load the result with transformers and peft alone; run in the output folder.

    `loader`: the class of transformers that the saved names are those of.
    """
    if mode == "full":
        return [
            f"from transformers import {loader}",
            f"model = {loader}.from_pretrained({MODEL_FOLDER!r})",
        ]
    lines = [
        "from peft import PeftModel",
        f"from transformers import {loader}",
        f"model = {loader}.from_pretrained({model!r})",
    ]
    if mode == "stack":
        lines += [
            f"model = PeftModel.from_pretrained(model, {adapter!r}, adapter_name='reference')",
            f"model.load_adapter({ADAPTER_FOLDER!r}, adapter_name='default')",
            "model.base_model.set_adapter(['reference', 'default'])",
        ]
    else:
        lines.append(f"model = PeftModel.from_pretrained(model, {ADAPTER_FOLDER!r})")
    return lines

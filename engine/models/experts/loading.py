"""Quantises stacks of experts while transformers loads them, one at a time, in the quantiser for the other layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dpoeng.engine.config.fields import Quantization
from dpoeng.engine.models.experts.stacks import experts_modules, fits, placeholder, quantize_stack, stack_names


def quantize_experts(model: nn.Module, settings: Any) -> None:
    """Quantises the stacks of a loaded model, as loading with these bitsandbytes settings does."""
    for _, module in experts_modules(model):
        for name in (one for one in stack_names(module) if _quantizable(module, one, settings)):
            setattr(module, name, _quantized(module, getattr(module, name), settings))


def _quantizable(module: Any, name: str, settings: Any) -> bool:
    return name in stack_names(module) and fits(getattr(module, name), bits=8 if settings.load_in_8bit else 4)


def _quantized(module: Any, weight: torch.Tensor, settings: Any) -> nn.Parameter:
    quantization: Quantization = "8bit" if settings.load_in_8bit else "4bit"
    stack = quantize_stack(
        weight.detach(),
        quantization,
        transposed=bool(module.is_transposed),
        quant_type=settings.bnb_4bit_quant_type,
        double_quant=settings.bnb_4bit_use_double_quant,
    )
    return placeholder(stack, weight)


@contextlib.contextmanager
def quantizing_experts(settings: Any) -> Iterator[None]:
    """Within the block, transformers also quantises the stacks of models that it loads with these settings.

    `settings`: a BitsAndBytesConfig; None changes nothing. transformers looks its quantiser up in a table; within the
    block that table has one that handles stacks.
    """
    if settings is None:
        yield
        return
    import transformers.core_model_loading
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizers_utils import get_module_from_name

    key = "bitsandbytes_8bit" if settings.load_in_8bit else "bitsandbytes_4bit"
    parent: Any = AUTO_QUANTIZER_MAPPING[key]

    def is_stack(model: Any, name: str) -> bool:
        module, last = get_module_from_name(model, name)
        return _quantizable(module, last, settings)

    operation: Any = transformers.core_model_loading.ConversionOps

    class Quantize(operation):  # type: ignore[misc]
        """The quantiser's own operation, with ours for stacks."""

        def __init__(self, other: Any) -> None:
            self.other = other

        def convert(self, input_dict: dict[str, Any], model: Any = None, **named: Any) -> dict[str, Any]:
            """Name -> what replaces the parameter."""
            converted: dict[str, Any] = {}
            for name, value in input_dict.items():
                if is_stack(model, name):
                    module, _ = get_module_from_name(model, name)
                    converted[name] = _quantized(module, value[0] if isinstance(value, list) else value, settings)
                else:
                    converted |= self.other.convert({name: value}, model=model, **named)
            return converted

    def needs(self: Any, model: Any, param_name: str, **named: Any) -> bool:
        return is_stack(model, param_name) or parent.param_needs_quantization(self, model, param_name, **named)

    def operations(self: Any) -> Any:
        return Quantize(parent.get_quantize_ops(self))

    AUTO_QUANTIZER_MAPPING[key] = type(
        parent.__name__, (parent,), {"param_needs_quantization": needs, "get_quantize_ops": operations}
    )
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[key] = parent

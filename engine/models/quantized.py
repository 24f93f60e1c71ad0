"""bitsandbytes: its settings, its layers without weights, and their products. The only module that imports it.

Independent of pairs, phases and adapters.
"""

from __future__ import annotations

import copy
import logging
import types
from typing import Any, cast

import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import Quantization
from dpoeng.engine.models.experts.stacks import held_by, held_tensors, placeholder
from dpoeng.kernels.int8_linear import int8_linear


def require_bitsandbytes(quantization: Quantization) -> None:
    """Imports bitsandbytes if it will be needed, so that a broken install is reported before any long work.

    Raises:
        UserError: it cannot be imported.
    """
    if quantization in ("8bit", "4bit"):
        import_bitsandbytes(f"--quantization {quantization}", "use --quantization none")


def import_bitsandbytes(where: str, instead: str) -> Any:
    """The library; the error says what needed it and what to use instead.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        import bitsandbytes
    except Exception as error:
        raise UserError(
            "bitsandbytes does not work here",
            code="bitsandbytes-unusable",
            where=where,
            found=f"{type(error).__name__}: {error}",
            remedy=f"pip install 'bitsandbytes>=0.50', or {instead}",
            exit_status=5,
        ) from error
    return bitsandbytes


def quantization_config(quantization: Quantization, compute: torch.dtype, quant_type: str, double_quant: bool) -> Any:
    """transformers' BitsAndBytesConfig; the head stays unquantised, because log-probs are computed from it."""
    require_bitsandbytes(quantization)
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["lm_head"],
    )


def quantize_empty(model: Any, config: Any) -> None:
    """Gives a model on the `meta` device the layers and tensors that loading with `config` would give it.

    Layers and shapes are bitsandbytes' own: its quantisers run on the meta device.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    # bitsandbytes creates its 8-bit code on the first tensor's device and keeps it: on meta it would have no values.
    functional = import_bitsandbytes("dpoeng plan", "plan without quantization").functional
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    dtype = model.dtype
    replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=config)
    for module in quantized_layers(model):
        weight: Any = module.weight
        module.weight = weight._quantize(torch.device("meta"))
        if module.bias is not None:  # made in float32, and loaded in the model's dtype
            module.bias.data = cast("torch.Tensor", module.bias.data).to(dtype)
    if config.load_in_8bit:
        model.is_loaded_in_8bit = True  # peft reads this attribute
    else:
        model.is_loaded_in_4bit = True
    model.is_quantized = True


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """A model's bitsandbytes layers, without importing bitsandbytes if there are none."""
    return [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.nn")]


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes 4-bit layers of a stored checkpoint multiply in this dtype instead of the one that was stored."""
    layers: list[Any] = [layer for layer in quantized_layers(model) if hasattr(layer, "compute_dtype")]
    for layer in layers:
        layer.compute_dtype, layer.compute_type_is_set = dtype, True


def multiply_exactly(model: nn.Module) -> None:
    """Makes 8-bit layers multiply with `int8_linear`, with unrounded activations, on every device."""
    for module in quantized_layers(model):
        if holds_8_bits(module):
            module.forward = types.MethodType(_exact_forward, module)


def multiply_as_bitsandbytes(model: nn.Module) -> None:
    """Restores bitsandbytes' own product in 8-bit layers, for comparisons."""
    import_bitsandbytes("8-bit layers", "compare without quantization")
    # Hide its message at every product of a bfloat16 model about casts to float16: thousands of lines a step.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in quantized_layers(model):
        module.__dict__.pop("forward", None)


def holds_8_bits(module: nn.Module) -> bool:
    """Whether this is bitsandbytes' 8-bit layer."""
    return type(module).__name__ == "Linear8bitLt"


def int8_scales_of(module: Any) -> torch.Tensor | None:
    """The scales [O] of an 8-bit layer that multiplies with `int8_linear`; None for bitsandbytes' own product."""
    if "forward" not in module.__dict__:
        return None
    # bitsandbytes' own forward would move the scales from the weight to the layer's state. A weight sharded by FSDP2 is
    # a plain tensor without scales.
    own = getattr(module.weight, "SCB", None)
    scales: torch.Tensor = own if own is not None else module.state.SCB
    return scales


def _exact_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    scales = int8_scales_of(self)
    assert scales is not None
    return int8_linear(x, self.weight.data, scales, self.bias)


def quantized_tensors(model: nn.Module) -> list[torch.Tensor]:
    """The layers' tensors that are not parameters: scales, code books and stacks of experts."""
    tensors: list[Any] = [*held_tensors(model)]
    for module in quantized_layers(model):
        state: Any = getattr(module, "state", None)
        tensors += [getattr(state, name, None) for name in ("CB", "SCB")]
        tensors += scales_of(module.weight)
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]


def scales_of(weight: Any) -> list[torch.Tensor]:
    """The tensors of a quantised weight besides its codes, and those codes under bitsandbytes' other names."""
    tensors = [getattr(weight, name, None) for name in ("CB", "SCB")]
    state = getattr(weight, "quant_state", None)
    for level in (state, getattr(state, "state2", None)):
        tensors += [getattr(level, name, None) for name in ("absmax", "code", "offset")]
    held = held_by(weight)
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)] + (held.tensors() if held else [])


def same_weights(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter on the same storage, including bitsandbytes' scales and code books."""
    weight: Any = parameter
    if type(parameter).__name__ == "Int8Params":
        kind: Any = type(parameter)
        made: nn.Parameter = kind(
            weight.data, requires_grad=False, has_fp16_weights=weight.has_fp16_weights, CB=weight.CB, SCB=weight.SCB
        )
        return made
    if type(parameter).__name__ == "Params4bit":
        return copy.copy(parameter)
    stack = held_by(parameter)
    return nn.Parameter(parameter.data, requires_grad=False) if stack is None else placeholder(stack, parameter)

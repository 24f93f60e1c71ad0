"""bitsandbytes: its settings, its layers without weights, and the mend of what they keep. The importer of it.

Knows nothing of pairs, phases or adapters.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.engine.config import Quantization


def require_bitsandbytes(quantization: Quantization) -> None:
    """Loads bitsandbytes if it will be needed, so that a broken install is named before any long work.

    Raises:
        UserError: it cannot be imported.
    """
    if quantization != "none":
        import_bitsandbytes(f"--quantization {quantization}", "use --quantization none")


def import_bitsandbytes(where: str, instead: str) -> Any:
    """The library, or a message that says what asked for it and what to use instead.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        import bitsandbytes
    except Exception as error:
        raise UserError(
            "bitsandbytes cannot be used",
            code="bitsandbytes-unusable",
            where=where,
            found=f"{type(error).__name__}: {error}",
            remedy=f"pip install 'bitsandbytes>=0.48', or {instead}",
            exit_status=5,
        ) from error
    # It says at every product of a bfloat16 model that inputs are cast to float16: thousands of lines a step.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes


def quantization_config(
    quantization: Quantization, compute: torch.dtype, int8_threshold: float, quant_type: str, double_quant: bool
) -> Any:
    """transformers' BitsAndBytesConfig; the head stays as it is, since log-probs are read from it."""
    require_bitsandbytes(quantization)
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=float(int8_threshold), llm_int8_skip_modules=["lm_head"]
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["lm_head"],
    )


def quantize_empty(model: Any, config: Any) -> None:
    """Gives a model on the `meta` device the layers and tensors that loading with `config` would give it.

    The layers are bitsandbytes' own and so are the shapes: its quantisers run on the meta device.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    # Its 8-bit code is made on the device of the first tensor that asks and then kept: without values, if that is ours.
    functional = import_bitsandbytes("dpoeng plan", "plan without quantization").functional
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=config)
    for module in quantized_layers(model):
        weight: Any = module.weight
        module.weight = weight._quantize(torch.device("meta"))
    if config.load_in_8bit:
        model.is_loaded_in_8bit = True  # what peft looks at
    else:
        model.is_loaded_in_4bit = True
    model.is_quantized = True


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """Its bitsandbytes layers, without importing bitsandbytes where there are none."""
    return [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.nn")]


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes 4-bit layers of a stored checkpoint multiply in this dtype, and not in the one that it was stored with."""
    layers: list[Any] = [layer for layer in quantized_layers(model) if hasattr(layer, "compute_dtype")]
    for layer in layers:
        layer.compute_dtype, layer.compute_type_is_set = dtype, True


def keep_no_inputs(model: nn.Module) -> None:
    """Makes LLM.int8() layers let go of their inputs, which their backward never reads.

    bitsandbytes keeps a layer's input as an attribute of its autograd node and not among the saved tensors. A frozen
    weight needs it for nothing, but it stays alive until the backward; and checkpointing without re-entrance, which
    acts on saved tensors alone, cannot free it. On a 32B model that is 21 GiB at 4,096 tokens (docs/memory.md).
    """
    for module in quantized_layers(model):
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_hook(_drop_input)


def _drop_input(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    node: Any = output.grad_fn
    while node is not None and not type(node).__name__.startswith("MatMul8bit"):
        # A reshape may stand between the product and the layer's output.
        node = node.next_functions[0][0] if node.next_functions else None
    if node is None:
        return
    if hasattr(node, "tensors"):  # MatMul8bitLt: (the input quantised by column, its outlier columns, the input)
        node.tensors = (None, None, None)
    if hasattr(node, "A"):  # MatMul8bitFp, on CPUs
        node.A = None


def quantized_tensors(model: nn.Module) -> list[torch.Tensor]:
    """What the layers hold beside their parameters: scales and code books."""
    found: list[Any] = []
    for module in quantized_layers(model):
        weight: Any = module.weight
        state: Any = getattr(module, "state", None)
        found += [
            getattr(holder, name, None) for holder in (weight, state) if holder is not None for name in ("CB", "SCB")
        ]
        quant_state = getattr(weight, "quant_state", None)
        for level in (quant_state, getattr(quant_state, "state2", None)):
            found += [getattr(level, name, None) for name in ("absmax", "code", "offset")]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def same_weights(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter over the same storage, bitsandbytes' scales and code books included."""
    held: Any = parameter
    if type(parameter).__name__ == "Int8Params":
        kind: Any = type(parameter)
        made: nn.Parameter = kind(
            held.data, requires_grad=False, has_fp16_weights=held.has_fp16_weights, CB=held.CB, SCB=held.SCB
        )
        return made
    if type(parameter).__name__ == "Params4bit":
        return copy.copy(parameter)
    return nn.Parameter(parameter.data, requires_grad=False)


def outliers_over_batch(model: nn.Module) -> bool:
    """Whether LLM.int8() layers choose outlier columns over all that is in a batch, so that its cut moves numbers."""
    states = [getattr(module, "state", None) for module in quantized_layers(model)]
    return any(getattr(state, "threshold", 0.0) > 0 for state in states)


@contextlib.contextmanager
def cpu_products() -> Iterator[None]:
    """On the meta device, LLM.int8() layers that multiply as they do on a CPU."""
    try:
        import bitsandbytes
        from bitsandbytes.autograd._functions import MatMul8bitFp
    except Exception:  # without bitsandbytes there is no such layer
        yield
        return
    original = bitsandbytes.matmul

    def matmul(A: Any, B: Any, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None) -> Any:
        return MatMul8bitFp.apply(A, B, out, bias, state)

    bitsandbytes.matmul = matmul
    try:
        yield
    finally:
        bitsandbytes.matmul = original

"""The weights of all experts of a layer as one stack: found in a model, quantised, widened a few experts at a time.

transformers stores the experts' matrices as parameters `[E, O, I]` (or `[E, I, O]`), which bitsandbytes' layers do not
cover: in Qwen3-30B-A3B they are 97 % of the weights. A quantised stack is an attribute of its parameter, which becomes
a placeholder of the same shape, dtype and device: a single NaN in memory, so that code that still reads it is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from dpoeng.engine.config.fields import Quantization
from dpoeng.kernels.int8_linear import widened

BLOCK = 64
"""Weights per scale in 4 bits, bitsandbytes' default."""

_HELD = "dpoeng_stack"


@dataclass(frozen=True, slots=True, eq=False)
class PlainStack:
    """An unquantised stack: `weight` [E, O, I], or [E, I, O] with `transposed`."""

    weight: torch.Tensor
    transposed: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, O, I)."""
        return _shape(tuple(self.weight.shape), self.transposed)

    def widened(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """The matrices [n, O, I] of consecutive experts."""
        return _turned(self.weight[first:last].to(dtype), self.transposed)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors in memory besides the model's parameters."""
        return []


@dataclass(frozen=True, slots=True, eq=False)
class Stack8bit:
    """8 bits with one scale per output and expert: `codes` [E, O, I] int8, `scales` [E, O] float32."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, O, I)."""
        experts, outputs, inputs = self.codes.shape
        return experts, outputs, inputs

    def widened(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """The matrices [n, O, I] of consecutive experts."""
        codes = self.codes[first:last]
        return widened(codes.flatten(0, 1), self.scales[first:last].flatten(), dtype).view(codes.shape)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors in memory besides the model's parameters."""
        return [self.codes, self.scales]

    def __deepcopy__(self, memo: Any) -> Stack8bit:
        """Returns itself: copies of a model share frozen weights."""
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Stack4bit:
    """bitsandbytes' 4 bits (NF4 or FP4) for a whole stack; no block spans two experts.

    Attributes:
        codes: two weights per byte, in the parameter's order.
        state: bitsandbytes' QuantState of the whole stack, as rows of one block: on a CPU it would treat rows of other
            shapes as whole blocks.
        stored: the parameter's shape.
        transposed: whether that is [E, I, O].
    """

    codes: torch.Tensor
    state: Any
    stored: tuple[int, int, int]
    transposed: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, O, I)."""
        return _shape(self.stored, self.transposed)

    def widened(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """The matrices [n, O, I] of consecutive experts."""
        from bitsandbytes import functional

        _, rows, columns = self.stored
        each = rows * columns
        scales = self.state.absmax
        if self.state.nested:
            scales = functional.dequantize_blockwise(scales, self.state.state2).add_(self.state.offset).float()
        part = functional.QuantState(
            absmax=scales.view(-1)[first * each // BLOCK : last * each // BLOCK],
            shape=torch.Size(((last - first) * each // BLOCK, BLOCK)),
            code=self.state.code,
            blocksize=BLOCK,
            quant_type=self.state.quant_type,
            dtype=dtype,
        )
        codes = self.codes.view(-1, 1)[first * each // 2 : last * each // 2]
        return _turned(functional.dequantize_4bit(codes, part).view(-1, rows, columns), self.transposed)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors in memory besides the model's parameters."""
        levels = [level for level in (self.state, self.state.state2) if level is not None]
        tensors = [self.codes, *(getattr(level, name) for level in levels for name in ("absmax", "code", "offset"))]
        return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]

    def __deepcopy__(self, memo: Any) -> Stack4bit:
        """Returns itself: copies of a model share frozen weights."""
        return self


class Stack(Protocol):
    """The matrices of a layer's experts, in any storage."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, O, I)."""

    def widened(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """The matrices [n, O, I] of some experts that follow each other."""

    def tensors(self) -> list[torch.Tensor]:
        """The tensors besides the model's parameters."""


class Held(Protocol):
    """The weights behind a placeholder: a quantised stack, or one matrix as stored."""

    def tensors(self) -> list[torch.Tensor]:
        """The tensors besides the model's parameters."""


def _shape(stored: tuple[int, ...], transposed: bool) -> tuple[int, int, int]:
    experts, rows, columns = stored
    return (experts, columns, rows) if transposed else (experts, rows, columns)


def _turned(weights: torch.Tensor, transposed: bool) -> torch.Tensor:
    return weights.transpose(1, 2) if transposed else weights


# --------------------------------------------------------------------------- in a model


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of an experts module that are stacks; none for other modules, or one that multiplies by itself.

    transformers marks its experts modules with the attributes that their exchangeable forward needs
    (`use_experts_implementation`).
    """
    if not (hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    parameters = dict(module.named_parameters(recurse=False))
    return names if all(name in parameters and parameters[name].dim() == 3 for name in names) else ()


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts modules of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if stack_names(module))


def unreached_stacks(model: nn.Module) -> list[str]:
    """Names of three-dimensional weights that stay unquantised when the rest is quantised."""
    kernels = {id(p) for module in model.modules() if isinstance(module, nn.Conv1d) for p in module.parameters()}
    return [n for n, p in model.named_parameters() if p.dim() == 3 and id(p) not in kernels and held_by(p) is None]


def fits(weight: torch.Tensor, *, bits: int) -> bool:
    """Whether a stack can be quantised: in 4 bits, no block may span two experts."""
    return bits == 8 or weight[0].numel() % BLOCK == 0


def stack_of(module: Any, name: str) -> Stack:
    """A stack of an experts module, as it is stored."""
    weight = getattr(module, name)
    held: Any = held_by(weight)
    return held or PlainStack(weight, bool(module.is_transposed))


def held_by(parameter: torch.Tensor) -> Held | None:
    """The quantised stack or stored matrix behind a placeholder."""
    found: Held | None = getattr(parameter, _HELD, None)
    return found


def placeholder(held: Held, like: torch.Tensor) -> nn.Parameter:
    """A placeholder parameter for quantised weights, with a tensor's shape, dtype and device."""
    nothing = torch.full((1,) * like.dim(), float("nan"), dtype=like.dtype, device=like.device)
    parameter = nn.Parameter(nothing.expand(like.shape), requires_grad=False)
    setattr(parameter, _HELD, held)
    return parameter


def held_tensors(model: nn.Module) -> list[torch.Tensor]:
    """All tensors behind placeholders."""
    found = [held for parameter in model.parameters() if (held := held_by(parameter)) is not None]
    return [tensor for held in found for tensor in held.tensors()]


@torch.no_grad()
def quantize_stack(
    weight: torch.Tensor, quantization: Quantization, *, transposed: bool, quant_type: str, double_quant: bool
) -> Stack8bit | Stack4bit:
    """Quantises a stack that `fits` to 8 or 4 bits."""
    if quantization == "8bit":
        turned = _turned(weight, transposed)
        scales = turned.abs().amax(dim=2).float()  # [E, O]
        steps = 127.0 / torch.where(scales == 0, 1.0, scales)
        codes = torch.empty(turned.shape, dtype=torch.int8, device=weight.device)
        for expert in range(
            0 if weight.is_meta else len(codes)
        ):  # one at a time: a whole stack in float32 takes twice its size
            codes[expert] = (turned[expert].float() * steps[expert, :, None]).round_().to(torch.int8)
        return Stack8bit(codes, scales)
    assert fits(weight, bits=4)
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.reshape(-1, BLOCK), blocksize=BLOCK, compress_statistics=double_quant, quant_type=quant_type
    )
    experts, rows, columns = weight.shape
    return Stack4bit(codes, state, (experts, rows, columns), transposed)

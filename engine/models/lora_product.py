"""The LoRA product: peft's arithmetic in a fraction of its memory.

Over a half-precision base, peft converts the layer's input to float32 and saves that for the backward, and computes the
update in float32 twice, before and after scaling: at 4,096 tokens of a 32B model, 0.9 GiB saved per layer and 0.8 GiB
of temporaries. Here the input is saved as it is (sharing the base layer's storage), and float32 parts exist only for
some rows at a time. The result is the same: A and B in float32, one rounding to the base's dtype at the end. With
dropout, the remaining input is scaled in the base's dtype; peft scales it in float32.

On a GPU with a bfloat16 base, chunks of float32 products 16 columns wide would cost as much as the rest of the layer.
There `dpoeng.kernels.low_rank` multiplies each float32 factor as two bfloat16 parts: 16 of float32's 24 bits, and one
rounding less than in chunks.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from dpoeng.engine.models.experts.forward import use_peft_stack_product, use_stack_product
from dpoeng.engine.models.quantized import holds_8_bits, int8_scales_of
from dpoeng.kernels import low_rank
from dpoeng.kernels.cpu_linear import linear, owned_linear
from dpoeng.kernels.int8_linear import widened

CHUNK_BYTES = 64 * 2**20


class LoraLinear(torch.autograd.Function):
    """`x W^T + bias + scale * (x A^T) B^T`, a frozen linear layer with its update, for x [..., I] -> [..., O].

    One function for both, so that the gradient of x is computed once: with two functions autograd would add two
    gradients, a pass over three tensors of x's size in every layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        int8_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Saves x for the gradient of A, and x A^T for that of B. With `int8_scales` [O], `weight` is codes."""
        out = owned_linear(x, _dense(weight, int8_scales, x.dtype), bias)
        low = _add_update(out, out, x, a, b, scale)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        wants_a, wants_b = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(x if wants_a else None, weight, int8_scales, a, b, low if wants_b else None)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B, as needed."""
        x, weight, int8_scales, a, b, low = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, *_ = ctx.needs_input_grad
        x_grad = None
        if wants_x:
            x_grad = linear(upstream[0], _dense(weight, int8_scales, ctx.dtype).T).view(-1, a.shape[1])
        a_grad, b_grad = _gradients(upstream[0], x, a, b, low, ctx.scale, x_grad, add=True, wants=(wants_a, wants_b))
        return (x_grad.view(ctx.shape) if x_grad is not None else None), None, None, a_grad, b_grad, None, None


class LoraProduct(torch.autograd.Function):
    """`out + scale * (x A^T) B^T` for x [..., I], A [r, I], B [O, r], out [..., O]; in place in `out` if possible.

    x and out have the base's dtype, A and B their own. For a quantised base, a second adapter, or dropout.
    """

    @staticmethod
    def forward(
        ctx: Any, out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, in_place: bool
    ) -> torch.Tensor:
        """Saves x for the gradient of A, and x A^T for that of B."""
        result = out if in_place else torch.empty_like(out)
        low = _add_update(out, result, x, a, b, scale)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a, b, low if ctx.needs_input_grad[3] else None)
        if in_place:
            ctx.mark_dirty(out)
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of out, x, A and B, as needed."""
        x, a, b, low = ctx.saved_tensors
        _, wants_x, wants_a, wants_b, *_ = ctx.needs_input_grad
        rows = upstream[0].numel() // b.shape[0]
        x_grad = upstream[0].new_empty((rows, a.shape[1]), dtype=ctx.dtype) if wants_x else None
        a_grad, b_grad = _gradients(upstream[0], x, a, b, low, ctx.scale, x_grad, add=False, wants=(wants_a, wants_b))
        return upstream[0], (x_grad.view(ctx.shape) if x_grad is not None else None), a_grad, b_grad, None, None


def _dense(weight: torch.Tensor, int8_scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return weight if int8_scales is None else widened(weight, int8_scales, dtype)


def _add_update(
    out: torch.Tensor, result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """Writes `out + scale * (x A^T) B^T` to `result`; returns x A^T, [T, r] in the dtype of A."""
    if low_rank.splits(x, a):
        if result is not out:
            result.copy_(out)
        return low_rank.add_update(result.view(-1, b.shape[0]), x.reshape(-1, a.shape[1]), a, b, scale)
    rows, before, after = x.reshape(-1, x.shape[-1]), out.view(-1, b.shape[0]), result.view(-1, b.shape[0])
    low = rows.new_empty((rows.shape[0], a.shape[0]), dtype=a.dtype)
    # In chunks, so that the float32 copies of x and of the update exist for a few rows only.
    for part in _chunks(rows, max(a.shape[1], b.shape[0]), a.element_size()):
        low[part] = rows[part].to(a.dtype) @ a.T
        if out.dtype == b.dtype:
            torch.addmm(before[part], low[part], b.T, alpha=scale, out=after[part])
        else:
            torch.add(before[part], ((low[part] * scale) @ b.T).to(out.dtype), out=after[part])
    return low


def _gradients(
    upstream: torch.Tensor,
    x: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    low: torch.Tensor | None,
    scale: float,
    x_grad: torch.Tensor | None,
    *,
    add: bool,
    wants: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of A and B as needed; writes the gradient of x to `x_grad` [T, I], or adds it.

    Only tensors with r columns are scaled.
    """
    grads = upstream.reshape(-1, b.shape[0])
    if low_rank.splits(grads, a):
        rows = x.reshape(-1, a.shape[1]) if wants[0] and x is not None else None
        return low_rank.gradients(grads, rows, a, b, low if wants[1] else None, scale, x_grad, add=add)
    a_grad = torch.zeros_like(a) if wants[0] else None
    b_grad = torch.zeros_like(b) if wants[1] else None
    for part in _chunks(grads, max(a.shape[1], b.shape[0]), a.element_size()):
        grad = grads[part].to(b.dtype)
        if b_grad is not None:
            assert low is not None
            b_grad.addmm_(grad.T, low[part], alpha=scale)
        low_grad = (grad @ b).mul_(scale)
        if a_grad is not None:
            assert x is not None
            a_grad.addmm_(low_grad.T, x.reshape(-1, a.shape[1])[part].to(a.dtype))
        if x_grad is None:
            continue
        if x_grad.dtype == a.dtype:
            torch.addmm(x_grad[part], low_grad, a, beta=int(add), out=x_grad[part])
        elif add:
            x_grad[part] += (low_grad @ a).to(x_grad.dtype)
        else:
            x_grad[part] = low_grad @ a
    return a_grad, b_grad


def _chunks(rows: torch.Tensor, width: int, item_bytes: int) -> list[slice]:
    """Chunks of rows; without values (`dpoeng plan`) only the first two, since more take no more memory."""
    step = max(256, CHUNK_BYTES // (width * item_bytes))
    chunks = [slice(begin, begin + step) for begin in range(0, rows.shape[0], step)]
    return chunks[:2] if rows.is_meta else chunks


def use_lora_product(model: nn.Module) -> None:
    """Makes every plain LoRA layer of a peft model compute its update with `LoraProduct`; DoRA and others keep peft's.

    `experts/product` computes LoRA on stacks of experts.
    """
    use_stack_product(model)
    for module in model.modules():
        if hasattr(module, "lora_A") and _is_plain(module) and "forward" not in module.__dict__:
            module.forward = types.MethodType(_forward, module)


def use_peft_product(model: nn.Module) -> None:
    """Restores peft's own product in every LoRA layer, except on quantised experts, for which peft has none."""
    use_peft_stack_product(model)
    for module in model.modules():
        if hasattr(module, "lora_A") and not hasattr(module, "parameter_name"):
            module.__dict__.pop("forward", None)


def _is_plain(layer: Any) -> bool:
    base = layer.get_base_layer()
    linear = isinstance(base, nn.Linear) or type(base).__name__ in ("Linear8bitLt", "Linear4bit")
    return linear and all(
        isinstance(part, nn.Linear) and part.bias is None for d in (layer.lora_A, layer.lora_B) for part in d.values()
    )


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    active = [name for name in self.active_adapters if name in self.lora_A]
    if self.disable_adapters or self.merged or kwargs or args or any(name in self.lora_variant for name in active):
        result: torch.Tensor = type(self).forward(self, x, *args, **kwargs)
        return result
    base, names = self.get_base_layer(), active
    linear = type(base) is nn.Linear
    scales = int8_scales_of(base) if holds_8_bits(base) else None
    # On a CPU an 8-bit base keeps its own function, whose numbers existing caches and adapters have.
    one_function = linear or (scales is not None and names and low_rank.splits(x, self.lora_A[names[0]].weight))
    if one_function and names and _is_bare(base) and _passes_on(self.lora_dropout[names[0]]):
        first, *names = names
        weight = base.weight if linear else base.weight.data
        a, b, factor = self.lora_A[first].weight, self.lora_B[first].weight, self.scaling[first]
        result = LoraLinear.apply(x, weight, base.bias, a, b, factor, scales)  # type: ignore[no-untyped-call]
    else:
        result = self.base_layer(x)
    for name in names:
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        in_place = linear or not result._is_view()  # autograd forbids in-place changes of a view from a function
        result = LoraProduct.apply(result, self.lora_dropout[name](x), a, b, self.scaling[name], in_place)  # type: ignore[no-untyped-call]
    return result


def _is_bare(base: nn.Module) -> bool:
    """Whether calling the layer does nothing but its product: frozen, and without hooks."""
    frozen = not any(parameter.requires_grad for parameter in base.parameters(recurse=False))
    return frozen and not base._forward_hooks and not base._forward_pre_hooks


def _passes_on(dropout: nn.Module) -> bool:
    """Whether a dropout currently leaves its input unchanged."""
    return isinstance(dropout, nn.Identity) or not dropout.training

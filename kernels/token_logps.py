"""log p(target) of selected tokens from hidden states and a head, without the logits.

    logits = hidden @ weight.T                                       # [N, V], never built here
    token_logps = log_softmax(logits.float(), -1).gather(-1, targets)

There is one public function. With a frozen head, its forward stores the *unit gradient* `G_t = d log p(y_t) / d
hidden_t` (`[N, H]`, in place of the hidden states that autograd would save), and its backward is `upstream_t * G_t`.
This is exact for every loss that is a function of the log-probs, because scaling a row commutes with a product that
acts on rows. It costs two matrix products where recomputation costs three; it needs a frozen head and no double
backward. If the head is trained, the backward recomputes the logits (kernels/head_gradient.py).

Never allocated: `[N, V]` logits or probabilities, and for a frozen head `[V, H]` gradients.

Independent of DPO, models and batches.
"""

from typing import Any

import torch
from torch import Tensor

from dpoeng.kernels.head import Head, check, sum_dtype
from dpoeng.kernels.head_gradient import chunked_gradients, tiled_gradients
from dpoeng.kernels.tiled_logps import tiled_logps


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    narrow_logits: bool = False,
) -> Tensor:
    """log p(target) per row, differentiable by `hidden`, `weight` and `bias`.

    Args:
        hidden: `[N, H]` hidden states after the final norm; bfloat16, float16, float32 or float64.
        weight: `[V, H]` head of the same dtype. A sharded one (DTensor) is gathered once per call.
        targets: `[N]` int64 in `[0, V)` or `ignore_index`.
        bias: `[V]`.
        softcap: `cap * tanh(x / cap)` on the scaled logits (Gemma).
        scale: Factor on the logits before the softcap (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        temperature: Divisor after the softcap.
        ignore_index: Rows with this target get 0.0 and no gradient.
        narrow_logits: With a frozen head, GPU training keeps its chunk of logits in float32; True keeps it in the
            inputs' 16 bits. That halves the chunk (0.6 to 0.3 GB at V = 152k) and costs 7e-3 nats per log-prob in
            bfloat16 instead of 5e-7.

    Returns:
        `[N]` log-probs in nats, float32 (float64 for float64 inputs), at most 0.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
        IndexError: A target is outside the vocabulary, on a CPU. On a GPU, where a check would stall the device, that
            row is NaN.
        NotImplementedError: A quantised head, or a second backward.
    """
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    if bias is not None and hasattr(bias, "full_tensor"):
        bias = bias.full_tensor()
    head = Head(weight, bias, softcap, scale, temperature)
    check(hidden, head, targets)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    logps: Tensor
    if torch.is_grad_enabled() and trained:
        logps = _head_op(hidden, weight, targets, bias, softcap, scale, temperature, ignore_index)[0]
    elif torch.is_grad_enabled() and hidden.requires_grad:
        logps = _train_op(hidden, weight, targets, bias, softcap, scale, temperature, ignore_index, narrow_logits)[0]
    else:
        logps = _score_op(hidden, weight, targets, bias, softcap, scale, temperature, ignore_index)
    return logps


def plain_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """The same in plain PyTorch, with `[N, V]` logits: the readable specification. Differentiable in everything."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z.to(sum_dtype(hidden.dtype)) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    scored = targets != ignore_index
    picked = torch.log_softmax(z / temperature, -1).gather(1, torch.where(scored, targets, 0).unsqueeze(1)).squeeze(1)
    return torch.where(scored, picked, 0.0)


# --- the backends ---


def _has_kernels(hidden: Tensor) -> bool:
    """Whether the Triton kernels handle these hidden states; PyTorch tiles handle all others."""
    return hidden.is_cuda and hidden.dtype != torch.float64


def _kernel_logps(hidden: Tensor, head: Head, targets: Tensor, ignore_index: int) -> Tensor:
    """Log-probs without gradient on a GPU: the fused kernel, or cuBLAS and row passes before Ampere (no tile)."""
    from dpoeng.kernels.tiles import has_linear_tile

    if not has_linear_tile(hidden.device, hidden.dtype):
        from dpoeng.kernels.unit_gradient import chunked_logps

        return chunked_logps(hidden, head, targets, ignore_index, None)
    from dpoeng.kernels.linear_logps import fused_logps

    return fused_logps(hidden, head, targets, ignore_index)


def _tiled(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    ignore_index: int,
    unit_gradient: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """PyTorch tiles over the scored rows; the others get 0.0 and a zero gradient."""
    scored = targets != ignore_index
    wrong = scored & ((targets < 0) | (targets >= head.vocabulary))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(f"target {int(targets[row])} in row {row} is outside the vocabulary of {head.vocabulary}")
    if scored.all():
        return tiled_logps(hidden, head, targets, unit_gradient, sums)
    rows = scored.nonzero().squeeze(1)
    gradient = None if unit_gradient is None else unit_gradient.new_empty((rows.numel(), hidden.shape[1]))
    some_sums = None if sums is None else sums.new_empty((3, rows.numel()))
    logps = hidden.new_zeros(hidden.shape[0], dtype=sum_dtype(hidden.dtype))
    logps[rows] = tiled_logps(hidden[rows], head, targets[rows], gradient, some_sums)
    if unit_gradient is not None and gradient is not None:
        unit_gradient.zero_()[rows] = gradient
    if sums is not None and some_sums is not None:
        sums.zero_()[:, rows] = some_sums
    return logps


# Custom ops accept only tensors and plain numbers, so a Head is passed in parts.


@torch.library.custom_op("dpoeng::token_logps_score", mutates_args=())
def _score_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    head = Head(weight, bias, softcap, scale, temperature)
    if _has_kernels(hidden):
        return _kernel_logps(hidden, head, targets, ignore_index)
    return _tiled(hidden, head, targets, ignore_index)


@torch.library.custom_op("dpoeng::token_logps_train", mutates_args=())
def _train_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
    narrow_logits: bool,
) -> tuple[Tensor, Tensor]:
    head = Head(weight, bias, softcap, scale, temperature)
    unit_gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if _has_kernels(hidden):
        from dpoeng.kernels.unit_gradient import chunked_logps

        logps = chunked_logps(hidden, head, targets, ignore_index, unit_gradient, narrow=narrow_logits)
    else:
        logps = _tiled(hidden, head, targets, ignore_index, unit_gradient)
    return logps, unit_gradient


@torch.library.custom_op("dpoeng::scale_rows", mutates_args=())
def _scale_rows(unit_gradient: Tensor, upstream: Tensor) -> Tensor:
    out = torch.empty_like(unit_gradient)
    return torch.mul(unit_gradient, upstream.unsqueeze(1), out=out)  # multiplied in float32, rounded once


@_score_op.register_fake
def _(hidden: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=sum_dtype(hidden.dtype))


@_train_op.register_fake
def _(hidden: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    logps = hidden.new_empty(hidden.shape[0], dtype=sum_dtype(hidden.dtype))
    return logps, torch.empty_like(hidden, memory_format=torch.contiguous_format)


@_scale_rows.register_fake
def _(unit_gradient: Tensor, upstream: Tensor) -> Tensor:
    return torch.empty_like(unit_gradient)


def _keep_unit_gradient(ctx: Any, inputs: object, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True; the result would look constant, its second derivative zero
        raise NotImplementedError(
            "token_logps has no second derivative: its forward stores the first one as a constant. Use "
            "plain_token_logps where a double backward (create_graph=True) is needed."
        )
    (unit_gradient,) = ctx.saved_tensors
    return (_scale_rows(unit_gradient, upstream), *[None] * 8)


_train_op.register_autograd(_backward, setup_context=_keep_unit_gradient)


# --- a head that is trained ---


@torch.library.custom_op("dpoeng::token_logps_head", mutates_args=())
def _head_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Log-probs `[N]`, and what the backward needs per row besides its inputs: `[3, N]`, on a GPU nothing."""
    head = Head(weight, bias, softcap, scale, temperature)
    if _has_kernels(hidden):
        return _kernel_logps(hidden, head, targets, ignore_index), hidden.new_empty((3, 0), dtype=torch.float32)
    sums = hidden.new_empty((3, hidden.shape[0]), dtype=sum_dtype(hidden.dtype))
    return _tiled(hidden, head, targets, ignore_index, sums=sums), sums


@torch.library.custom_op("dpoeng::token_logps_head_backward", mutates_args=())
def _head_backward_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    temperature: float,
    ignore_index: int,
    sums: Tensor,
    upstream: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by hidden states, weight and bias."""
    head = Head(weight, bias, softcap, scale, temperature)
    if _has_kernels(hidden):
        return chunked_gradients(hidden, head, targets, ignore_index, upstream)
    scored = targets != ignore_index
    if scored.all():
        return tiled_gradients(hidden, head, targets, sums, upstream)
    rows = scored.nonzero().squeeze(1)
    some, by_weight, by_bias = tiled_gradients(hidden[rows], head, targets[rows], sums[:, rows], upstream[rows])
    by_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    by_hidden[rows] = some
    return by_hidden, by_weight, by_bias


@_head_op.register_fake
def _(hidden: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    logps = hidden.new_empty(hidden.shape[0], dtype=sum_dtype(hidden.dtype))
    saved_rows = 0 if _has_kernels(hidden) else hidden.shape[0]
    return logps, logps.new_empty((3, saved_rows))


@_head_backward_op.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *_: object) -> tuple[Tensor, ...]:
    by_bias = torch.empty_like(bias) if bias is not None else hidden.new_empty(0)
    return torch.empty_like(hidden, memory_format=torch.contiguous_format), torch.empty_like(weight), by_bias


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, targets, bias, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, targets, bias, output[1])


def _head_backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "token_logps has no second derivative. Use plain_token_logps where a double backward (create_graph=True) "
            "is needed."
        )
    hidden, weight, targets, bias, sums = ctx.saved_tensors
    by_hidden, by_weight, by_bias = _head_backward_op(hidden, weight, targets, bias, *ctx.settings, sums, upstream)
    wants_hidden, wants_weight, _, wants_bias = ctx.needs_input_grad[:4]
    return (
        by_hidden if wants_hidden else None,
        by_weight if wants_weight else None,
        None,
        by_bias if wants_bias else None,
        *[None] * 4,
    )


_head_op.register_autograd(_head_backward, setup_context=_keep_inputs)

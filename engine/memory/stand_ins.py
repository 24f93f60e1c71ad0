"""Replaces a device's kernels while a step runs on the meta device: same shapes, and the memory they allocate."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dpoeng.engine.memory.tracker import MemoryTracker
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.scoring import forward as scoring
from dpoeng.engine.training import batch_loss as batch
from dpoeng.kernels.cpu_linear import as_on_cpu
from dpoeng.kernels.head import Head, sum_dtype
from dpoeng.kernels.head_gradient import tiled_gradients
from dpoeng.kernels.tiled_logps import tiled_logps

# --------------------------------------------------------------------------- replacements for a device


def _attention(
    device_type: str,
    original: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The attention kernel that torch chooses on the device; for meta tensors it would choose one with all scores."""
    attended: torch.Tensor
    if not query.is_meta:
        attended = original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return attended
    aten = torch.ops.aten
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as torch's `convert_boolean_attn_mask` does
        hidden, attn_mask = attn_mask.logical_not(), torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask.masked_fill_(hidden, float("-inf"))
        del hidden
    narrow_values = query.shape[-1] != value.shape[-1]  # latent attention, which FlashAttention does not support
    if device_type == "cpu" and narrow_values:
        attended = original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return attended
    if device_type == "cpu":
        out = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    elif attn_mask is None and query.dtype != torch.float32 and query.shape[-1] <= 256 and not narrow_values:
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)
    else:
        if enable_gqa:  # dpoeng.engine.scoring.attention repeats keys and values on a GPU
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        wants_gradient = torch.is_grad_enabled() and query.requires_grad
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, wants_gradient, dropout_p, is_causal, scale=scale
        )
    attended = out[0]
    return attended


@contextlib.contextmanager
def kernels_of(device_type: str) -> Iterator[None]:
    original, autocast = F.scaled_dot_product_attention, torch.autocast

    def cast(device_type: str, *arguments: Any, **settings: Any) -> Any:
        # peft and some models switch autocast off in places; the meta device has no autocast.
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *arguments, **settings)

    F.scaled_dot_product_attention = functools.partial(_attention, device_type, original)
    torch.autocast = cast  # type: ignore[assignment, misc]
    try:
        with as_on_cpu() if device_type == "cpu" else contextlib.nullcontext():
            yield
    finally:
        F.scaled_dot_product_attention, torch.autocast = original, autocast  # type: ignore[misc]


@contextlib.contextmanager
def head_of(*, full_logits: bool) -> Iterator[None]:
    """With `full_logits`, computes log-probs as plain PyTorch does, on any device."""
    ours = scoring.head_logps
    if full_logits:
        batch.head_logps = scoring.head_logps = _full_logits  # type: ignore[attr-defined]
    try:
        yield
    finally:
        batch.head_logps = scoring.head_logps = ours  # type: ignore[attr-defined]


def _full_logits(lm: CausalLM, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logps = torch.log_softmax(lm.head(hidden).float(), dim=-1)
    return logps.gather(1, targets[:, None]).squeeze(1)


# Each takes (tracker, operation, args, kwargs), adds the operation's internal memory, and returns its result.


def _gpu_train_logps(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from dpoeng.kernels.tiles import chunk_shape

    hidden, weight, narrow = args[0], args[1], len(args) > 8 and args[8]  # scoring has no such argument
    rows, columns = chunk_shape(hidden.shape[0], weight.shape[0])
    tracker.scratch(rows * columns * (hidden.element_size() if narrow else 4))
    return func(*args, **kwargs)


def _gpu_score_logps(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from dpoeng.kernels.tiles import LINEAR_16, LINEAR_32

    hidden, weight = args[0], args[1]
    columns = LINEAR_32.cols if hidden.dtype == torch.float32 else min(tile.cols for tile in LINEAR_16.values())
    tiles = -(-weight.shape[0] // columns)
    tracker.scratch((2 * tiles + 1) * hidden.shape[0] * 4)
    return func(*args, **kwargs)


def _gpu_head_gradients(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from dpoeng.kernels.head_gradient import SLICE
    from dpoeng.kernels.tiles import chunk_shape

    weight = args[1]
    rows, columns = chunk_shape(args[0].shape[0], weight.shape[0])
    result = func(*args, **kwargs)
    # Besides the results: the chunk, the float32 sum if it is not the result, and the part added to it.
    total = 0 if weight.dtype == torch.float32 else 4 * weight.numel()
    part = 4 * min(SLICE, weight.shape[0]) * weight.shape[1]
    tracker.scratch(4 * rows * columns, total, part, *(tensor.nbytes for tensor in result))
    return result


def _product_4bit(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # The weight is dequantised to the input's dtype, its scales before it.
    shape = args[2]
    result = func(*args, **kwargs)
    elements = int(np.prod(shape))
    tracker.scratch(elements * args[0].element_size(), elements // int(args[4]) * 8, result.nbytes)
    return result


def _cpu_logps(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden, weight, targets, bias, softcap, scale, temperature = args[:7]
    gradient = torch.empty_like(hidden) if "train" in str(func) else None
    with tracker:
        logps = tiled_logps(hidden, Head(weight, bias, softcap, scale, temperature), targets, gradient)
    return logps if gradient is None else (logps, gradient)


def _cpu_head_logps(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden, weight, targets, bias, softcap, scale, temperature = args[:7]
    with tracker:
        sums = hidden.new_empty((3, hidden.shape[0]), dtype=sum_dtype(hidden.dtype))
        return tiled_logps(hidden, Head(weight, bias, softcap, scale, temperature), targets, sums=sums), sums


def _bincount(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # The length depends on values; dpoeng always passes a sufficient minimum length.
    return args[0].new_empty(args[2] if len(args) > 2 else kwargs["minlength"], dtype=torch.int64)


def _cpu_head_gradients(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden, weight, targets, bias, softcap, scale, temperature, _, sums, upstream = args
    with tracker:
        return tiled_gradients(hidden, Head(weight, bias, softcap, scale, temperature), targets, sums, upstream)


# FlashAttention 2 as torch calls it: `mha_bwd` and `mha_varlen_bwd` in ATen's cuda/flash_attn/flash_api.cpp.
# The gradient of queries is summed in float32, in rows of whole tiles. With grouped heads, the gradients of keys and
# values exist for every query head first.
_TILE = 128
_MOST_MULTIPROCESSORS = 160  # a B200 has 148


def _flash_backward(query: torch.Tensor, key: torch.Tensor, rows: int, texts: int, splits: bool) -> int:
    """Bytes inside FlashAttention's backward for queries [..., Hq, D] in so many rows, and keys [..., Hkv, D]."""
    heads, size = query.shape[-2:]
    step = 32 if size <= _TILE else 64
    wide = -(-size // step) * step
    # With deterministic algorithms each share of the multiprocessors has its own sum.
    sums = -(-_MOST_MULTIPROCESSORS // (texts * heads)) if splits else 1
    grouped = 2 * key.numel() // key.shape[-2] * heads * key.element_size() if key.shape[-2] != heads else 0
    return 4 * rows * heads * (sums * wide + 1) + grouped


def _varlen_backward(
    tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, splits: bool = False
) -> Any:
    query, key, query_offsets = args[1], args[2], args[6]
    result = func(*args, **kwargs)
    texts = len(query_offsets) - 1
    inside = _flash_backward(query, key, query.shape[0] + _TILE * texts, texts, splits)
    tracker.scratch(inside, *(tensor.nbytes for tensor in result))
    return result


def _dense_flash_backward(
    tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, splits: bool = False
) -> Any:
    query, key = (states.transpose(1, 2) for states in args[1:3])  # [B, T, H, D]
    result = func(*args, **kwargs)
    batch, tokens = query.shape[:2]
    inside = _flash_backward(query, key, batch * -(-tokens // _TILE) * _TILE, batch, splits)
    tracker.scratch(inside, *(tensor.nbytes for tensor in result))
    return result


def _efficient_backward(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # xFormers' kernel, with a mask: the gradient of queries is summed in float32, and 16-bit ones of keys and values
    # too if a head is wider than a tile; and one number for each query.
    query, key, value = args[1:4]
    result = func(*args, **kwargs)
    more = query.shape[-1] > _TILE and query.dtype != torch.float32
    sums = query.numel() + (key.numel() + value.numel() if more else 0)
    delta = query.numel() // query.shape[-1]
    written = [tensor.nbytes for tensor in result if isinstance(tensor, torch.Tensor)]
    tracker.scratch(4 * (sums + delta), *written)
    return result


def _efficient_forward(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(*args, **kwargs)
    query = args[0]
    if query.dtype != torch.float32 and query.shape[-1] > _TILE:  # the output does not stay in registers
        tracker.scratch(4 * query.numel(), result[0].nbytes)
    return result


def _cpu_add(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # A CPU first copies the addend to the sum's dtype; a GPU widens it while adding.
    result = func(*args, **kwargs)
    if isinstance(args[1], torch.Tensor) and args[1].dtype != args[0].dtype:
        tracker.scratch(args[1].numel() * args[0].element_size())
    return result


_INSIDE: dict[str, dict[str, Any]] = {
    "cuda": {
        "aten::bincount": _bincount,
        "aten::_scaled_dot_product_flash_attention_backward": _dense_flash_backward,
        "aten::_scaled_dot_product_efficient_attention": _efficient_forward,
        "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
        "torch_attn::_varlen_attn_backward": _varlen_backward,
        "dpoeng::token_logps_train": _gpu_train_logps,
        "dpoeng::token_logps_score": _gpu_score_logps,
        "dpoeng::token_logps_head": _gpu_score_logps,
        "dpoeng::token_logps_head_backward": _gpu_head_gradients,
        "bitsandbytes::gemm_4bit": _product_4bit,
    },
    "cpu": {
        "aten::bincount": _bincount,
        "aten::add_.Tensor": _cpu_add,
        "dpoeng::token_logps_train": _cpu_logps,
        "dpoeng::token_logps_score": _cpu_logps,
        "dpoeng::token_logps_head": _cpu_head_logps,
        "dpoeng::token_logps_head_backward": _cpu_head_gradients,
        "bitsandbytes::gemm_4bit": _product_4bit,
    },
}


def handlers(device_type: str, *, deterministic: bool = False, fused_head: bool = True) -> dict[Any, Any]:
    """Operation -> handler, for the libraries that are loaded."""
    handler_of = {}
    with contextlib.suppress(ImportError):  # not in the oldest torch that is accepted
        from torch.nn.attention import varlen  # noqa: F401  (registers its operations)
    for name, handler in _INSIDE[device_type].items():
        if deterministic and handler in (_varlen_backward, _dense_flash_backward):
            handler = functools.partial(handler, splits=True)
        if handler is _gpu_score_logps and not fused_head:
            handler = _gpu_train_logps
        library, operation = name.split("::")
        operation, _, overload = operation.partition(".")
        with contextlib.suppress(AttributeError):
            handler_of[getattr(getattr(getattr(torch.ops, library), operation), overload or "default")] = handler
    return handler_of

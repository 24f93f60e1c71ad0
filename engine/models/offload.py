"""Moves what checkpointing keeps, each layer's input, to host memory between forward and backward.

A copy out and a copy in, so the numbers do not change. Everything else of a layer is recomputed in the backward anyway,
and stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Packed = tuple[torch.device, torch.Tensor | torch.Size, torch.dtype]


def checkpoint_on_host(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
    """`torch.utils.checkpoint` without re-entrance, whose inputs wait in host memory.

    Inside it, checkpointing's own hooks hold; only what it saves itself, the inputs, meets these.
    """
    with torch.autograd.graph.saved_tensors_hooks(to_host, from_host):
        return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False, **kwargs)


def to_host(tensor: torch.Tensor) -> Packed:
    """A copy in (pinned) host memory; of a tensor without values, its shape."""
    if tensor.is_meta:
        return tensor.device, tensor.shape, tensor.dtype
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    host.copy_(tensor, non_blocking=tensor.is_cuda)  # read again in the same stream only, so that nothing waits for it
    return tensor.device, host, tensor.dtype


def from_host(packed: Packed) -> torch.Tensor:
    """The tensor again, where it was."""
    device, kept, dtype = packed
    if not isinstance(kept, torch.Tensor):
        return torch.empty(kept, dtype=dtype, device=device)
    return kept.to(device, non_blocking=True)

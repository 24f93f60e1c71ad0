"""Keeps each layer's checkpointed input in host memory between forward and backward.

The input is copied out and back, so numbers do not change. The rest of a layer is recomputed in the backward anyway.

On a GPU the copies run in a separate stream during the computation. An input is copied out while its layer runs. In the
backward, the next layer's input is copied in while a layer is recomputed, so the device then has one input more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True, weakref_slot=True, eq=False)
class Kept:
    """A tensor that waits on the host.

    Attributes:
        device: where it was.
        shape: of the tensor.
        dtype: of the tensor.
        host: the copy; None of a tensor without values.
        before: the tensor that left just before it, which the backward wants just after it.
        fetched: the tensor on its device again, after its copy started, with the event that ends the copy.
    """

    device: torch.device
    shape: torch.Size
    dtype: torch.dtype
    host: torch.Tensor | None
    before: weakref.ref[Kept] | None
    fetched: tuple[torch.Tensor, Any] | None = None


class HostInputs:
    """Inputs of layers that wait on the host, in the order in which they left."""

    def __init__(self) -> None:
        self._last: weakref.ref[Kept] | None = None
        self._beside: dict[torch.device, Beside] = {}

    def checkpoint(self, function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
        """`torch.utils.checkpoint` without re-entrance, whose inputs wait in host memory.

        Inside it, checkpointing's own hooks hold; only what it saves itself, the inputs, meets these.
        """
        with torch.autograd.graph.saved_tensors_hooks(self.to_host, self.from_host):
            return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False, **kwargs)

    def to_host(self, tensor: torch.Tensor) -> Kept:
        """A copy in (pinned) host memory; of a tensor without values, its shape."""
        beside, host = self._copies_of(tensor.device), None
        if not tensor.is_meta:
            # Only copies from and to pinned memory run beside the computation.
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            if beside is not None:
                beside.copy(host, tensor, on_device=tensor)
            else:
                host.copy_(tensor)
        kept = Kept(tensor.device, tensor.shape, tensor.dtype, host, self._last)
        self._last = weakref.ref(kept)  # weak, so that a forward without a backward leaves nothing behind
        return kept

    def from_host(self, kept: Kept) -> torch.Tensor:
        """The tensor again, where it was; the one that is wanted next is on its way then."""
        tensor, arrived = kept.fetched or self._fetch(kept)
        kept.fetched = None
        beside = self._copies_of(kept.device)
        if beside is not None:
            beside.wait(arrived)
        before = kept.before() if kept.before is not None else None
        if before is not None and before.fetched is None and (beside is not None or before.host is None):
            before.fetched = self._fetch(before)
        return tensor

    def _fetch(self, kept: Kept) -> tuple[torch.Tensor, Any]:
        beside = self._copies_of(kept.device)
        if kept.host is None:
            return torch.empty(kept.shape, dtype=kept.dtype, device=kept.device), None
        tensor = torch.empty_like(kept.host, device=kept.device)
        if beside is None:
            return tensor.copy_(kept.host), None
        return tensor, beside.copy(tensor, kept.host, on_device=tensor)

    def _copies_of(self, device: torch.device) -> Beside | None:
        """The stream for copies of a GPU, created at first use; None for other devices."""
        if not has_streams(device):
            return None
        if device not in self._beside:
            self._beside[device] = Beside(device)
        return self._beside[device]


def has_streams(device: torch.device) -> bool:
    """Whether work on a device is queued in streams."""
    return device.type == "cuda"


class Beside:
    """Copies between a GPU and pinned host memory, in order, while the GPU computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, on_device: torch.Tensor) -> Any:
        """Queues a copy after all work queued so far; returns the event that ends it.

        `on_device` is the one of both that is on the GPU: its memory belongs to the computing stream, and is not
        reused before the copy is done.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = self._stream.record_event()
        on_device.record_stream(self._stream)
        return event

    def wait(self, event: Any) -> None:
        """Makes work queued from now on wait for a copy."""
        torch.cuda.current_stream(self._device).wait_event(event)

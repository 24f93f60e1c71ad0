"""Copies between host and device without waiting for the device's queued work."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

_ON_HOST = "dpoeng_on_host"


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device; `on_host` finds its values again."""
    tensor = torch.from_numpy(array)
    sent = send(tensor, device)
    if device.type == "cuda":
        setattr(sent, _ON_HOST, tensor)
    return sent


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device.

    A copy from the host to a GPU is asynchronous only from pinned memory. PyTorch keeps that memory alive until the
    copy is done, then reuses it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values on the host: of one that `to_device` made, those it was made of, so that nothing waits."""
    kept: torch.Tensor | None = getattr(tensor, _ON_HOST, None)
    return tensor.cpu() if kept is None else kept

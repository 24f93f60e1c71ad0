"""Copies arrays from the host to a device without waiting for the device's queued work."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device.

    A copy to a GPU is asynchronous only from pinned memory. PyTorch keeps that memory alive until the copy is done,
    then reuses it.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

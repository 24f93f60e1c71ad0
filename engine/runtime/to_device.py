"""Arrays of the host to a device, without waiting for what the device still has to do."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device.

    A copy to a GPU is asynchronous from pinned memory alone. PyTorch keeps that memory until the copy is done, and uses
    it again for the next.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

"""The GPU that a Triton kernel is launched on.

Triton launches on torch's current GPU, wherever the tensors are. With tensors on another GPU it fails or reads foreign
memory. Independent of the kernels.
"""

import contextlib

import torch
from torch import Tensor


def launching_on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one for a launch. Does nothing for other devices (the interpreter's)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

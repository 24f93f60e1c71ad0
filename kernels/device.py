"""The GPU that a Triton kernel is launched on.

Triton launches on torch's current GPU, wherever the tensors are: with tensors on another one it fails, or reads memory
that is not theirs. Knows nothing of the kernels.
"""

import contextlib

import torch
from torch import Tensor


def launching_on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one for a launch. Does nothing for a tensor elsewhere (the interpreter's)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

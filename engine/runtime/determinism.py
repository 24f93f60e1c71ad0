"""Fixed summation order on a GPU, so that a repeated or resumed run gives the same bytes.

CPUs do this by default. On a GPU, the backward pass of fused attention and sums by index (a shared prompt's keys, the
log-probs of a response) add up in the order in which blocks finish, unless PyTorch is set to be deterministic. Its
FlashAttention reads the same switch.
(https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_determinism(wanted: bool) -> Iterator[None]:
    """Uses PyTorch's deterministic algorithms in the block, if wanted. Operations without one raise RuntimeError."""
    if not wanted:
        yield
        return
    # cuBLAS may use its default buffers in any order; this must be set before its first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling new tensors would only detect reads of unwritten memory, and costs a pass over every one.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled

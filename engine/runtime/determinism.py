"""Sums in a fixed order on a GPU, so that a run that is repeated or gone on with leaves the same bytes.

A CPU does so by itself. On a GPU the backward pass of fused attention and sums by index (a shared prompt's keys, the
log-probs of a response) add up in the order in which blocks happen to end, unless PyTorch is told not to. Its
FlashAttention reads the same switch. (https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_determinism(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms within the block, if wanted. An operation without one raises RuntimeError."""
    if not wanted:
        yield
        return
    # Two buffers of cuBLAS's own choice may be used in either order; this has to stand before its first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling what `empty` returns finds reads of unwritten memory; it would cost a pass over every new tensor.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled

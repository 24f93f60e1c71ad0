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

from dpoeng.cache.errors import UserError
from dpoeng.engine.runtime.out_of_memory import is_out_of_memory


def fix_workspaces() -> None:
    """Lets cuBLAS use its buffers in a fixed order, unless the environment has chosen. Call it before any product.

    PyTorch looks at this once, at the first product of a process on a GPU, and refuses deterministic algorithms later
    if it was not set then: as where phase one and phase two run in one process.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def full_determinism(wanted: bool) -> Iterator[None]:
    """Uses PyTorch's deterministic algorithms in the block, if wanted. Operations without one raise RuntimeError."""
    if not wanted:
        yield
        return
    fix_workspaces()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling new tensors would only detect reads of unwritten memory, and costs a pass over every one.
    memory.fill_uninitialized_memory = False
    try:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            _try_product()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def _try_product() -> None:
    """A product on the GPU, in a process that may have computed others before dpoeng could set up cuBLAS.

    Raises:
        UserError: PyTorch refuses it.
    """
    try:
        one = torch.ones(1, 1, device="cuda")
        torch.mm(one, one)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            "products on this GPU cannot be made deterministic any more in this process",
            code="config-value",
            where="--full-determinism",
            expected="CUBLAS_WORKSPACE_CONFIG in the environment before the first product on a GPU",
            found=str(error).splitlines()[0],
            remedy="start Python with CUBLAS_WORKSPACE_CONFIG=:4096:8",
        ) from error

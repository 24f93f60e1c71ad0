"""Tests whether Triton works here: compiles and launches the smallest kernel."""

# Triton parses these signatures itself, and its decorator has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl

from dpoeng.kernels.device import launching_on


@triton.jit
def write_one(out):
    tl.store(out, 1.0)


def try_triton(device: torch.device) -> None:
    """Launches a kernel, which exercises the imports and the C compiler that Triton always needs.

    Raises:
        Exception: any error of Triton: no C compiler, no Python headers, an old driver, an unknown GPU.
    """
    out = torch.zeros(1, device=device)
    with launching_on(out):
        write_one[(1,)](out)
    if float(out) != 1.0:
        raise RuntimeError("a kernel that should write 1 did not")

"""Whether Triton works here: the smallest kernel, compiled and launched."""

# Triton reads these signatures itself and its decorator carries no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl

from dpoeng.kernels.device import launching_on


@triton.jit
def write_one(out):
    tl.store(out, 1.0)


def try_triton(device: torch.device) -> None:
    """Launch a kernel, with the imports and the C compiler that Triton needs for any.

    Raises:
        Exception: whatever Triton says: no C compiler, no Python headers, a driver that is too old, an unknown GPU.
    """
    out = torch.zeros(1, device=device)
    with launching_on(out):
        write_one[(1,)](out)
    if float(out) != 1.0:
        raise RuntimeError("a kernel that writes 1 did not")

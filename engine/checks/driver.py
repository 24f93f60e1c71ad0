"""Which NVIDIA driver a build of torch needs. Knows the numbers; asks nobody."""

from __future__ import annotations

import re

# CUDA's major version -> the oldest Linux driver that runs its programs, whatever the minor version:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST = {13: 580, 12: 525}

TESTED_CUDA = "13.0"
"""What the tested torch, 2.13.0, is built for on the package index."""

OLDER = "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"
"""For older drivers: the same torch, built for CUDA 12.6."""


def oldest_driver(cuda: str) -> int | None:
    """The oldest driver for a build such as `13.0`; None where it is not known."""
    return OLDEST.get(int(cuda.partition(".")[0]))


def too_old(driver: str, cuda: str) -> bool:
    """Whether a driver such as `570.124.06` is older than a build for this CUDA needs."""
    found, needed = re.match(r"\d+", driver), oldest_driver(cuda)
    return found is not None and needed is not None and int(found[0]) < needed


def driver_note() -> str:
    """What whoever rents a GPU should ask for."""
    return f"torch's build for CUDA {TESTED_CUDA} needs NVIDIA driver {oldest_driver(TESTED_CUDA)} or newer"

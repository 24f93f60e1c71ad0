"""The NVIDIA driver that a build of torch needs. Pure arithmetic on version numbers."""

from __future__ import annotations

import re

# Major version of CUDA -> the oldest Linux driver that runs its programs, for every minor version:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST = {13: 580, 12: 525}

TESTED_CUDA = "13.0"
"""The CUDA version of the tested torch, 2.13.0, on the package index."""

OLDER = "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"
"""For older drivers: the same torch, built for CUDA 12.6."""


def oldest_driver(cuda: str) -> int | None:
    """The oldest driver for a build such as `13.0`; None if unknown."""
    return OLDEST.get(int(cuda.partition(".")[0]))


def too_old(driver: str, cuda: str) -> bool:
    """Whether a driver such as `570.124.06` is too old for a build for this CUDA version."""
    version, needed = re.match(r"\d+", driver), oldest_driver(cuda)
    return version is not None and needed is not None and int(version[0]) < needed


def driver_note() -> str:
    """The driver to ask for when renting a GPU."""
    return f"torch's build for CUDA {TESTED_CUDA} needs NVIDIA driver {oldest_driver(TESTED_CUDA)} or newer"

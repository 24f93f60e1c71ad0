"""Reports this machine's resources. Imports nothing heavy, so that a command can ask before loading anything."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path


def available_memory() -> int | None:
    """Bytes left for this process: by the kernel, and by the limit of its container; None where nothing tells."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines())
    left = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return left
    return left if limit == "max" else min(left, int(limit) - used)


def peak_resident() -> int:
    """The most bytes of memory that this process has held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def group_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes the environment names: 1 without a launcher."""
    return int(environment.get("WORLD_SIZE", "1"))

"""Reports this machine's resources. Imports nothing heavy, so that commands can ask before they load anything."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path


def available_memory() -> int | None:
    """Bytes available to this process, by the kernel and its container's limit; None if neither is known."""
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
    """The peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def group_size(environment: Mapping[str, str] = os.environ) -> int:
    """Number of processes in the environment; 1 without a launcher."""
    return int(environment.get("WORLD_SIZE", "1"))

"""Records the machine, library versions and commit behind each measurement, and writes it as a line of JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console, RenderableType

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.model import device_name, library_versions
from dpoeng.engine.runtime.outputs import Kind, has_json_lines, refuse_output

RECORD_VERSION = 1


def stamp(kind: str, device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """The start of a record: everything but the figures."""
    return {
        "record": RECORD_VERSION,
        "kind": kind,
        "device_kind": "GPU" if device.type == "cuda" else "CPU",
        "device": device_name(device),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **library_versions()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": settings,
    }


def named_settings(settings: Any) -> dict[str, Any]:
    """Settings (a dataclass) for a record, with file names instead of this machine's paths."""
    fields = asdict(settings)
    fields |= dict.fromkeys({"peer_python", "work"} & fields.keys())
    if fields.get("model"):
        fields["model"] = Path(fields["model"]).name
    return {name: _named(value) for name, value in fields.items()}


def _named(value: Any) -> Any:
    return [path.name for path in value] if value and isinstance(value, tuple) and isinstance(value[0], Path) else value


def machine() -> dict[str, Any]:
    """The machine, without its name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threading": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_", "MKL_"))},
    }


def commit() -> str | None:
    """The commit of the checkout that this code runs from, with `+` if files differ from it; None if installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(
            root, "status", "--porcelain", "--untracked-files=no", "--", "engine", "kernels", "cache", "bench"
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def is_records(path: Path) -> bool:
    """Whether a file contains records, so that lines can be added. Raises ValueError if it is not JSON."""
    return has_json_lines(path, lambda record: {"kind", "device", "versions", "settings"} <= record.keys())


RECORDS = Kind("the file of records", is_records, forced=False)


def append(record: dict[str, Any], path: Path) -> None:
    """Adds a line to a file of records.

    Raises:
        UserError: the file contains something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_output(path, RECORDS)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def show(
    measure: Callable[[], dict[str, Any]], table: Callable[[dict[str, Any]], RenderableType], path: Path | None
) -> None:
    """Measures, prints the table and appends the record, for modules that are commands by themselves.

    Raises:
        click.ClickException: instead of a UserError.
    """
    try:
        record = measure()
    except UserError as error:
        raise click.ClickException(str(error)) from error
    Console().print(table(record), highlight=False)
    if path:
        append(record, path)


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()

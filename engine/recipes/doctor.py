"""`dpoeng doctor`: is this machine ready? Checks versions, devices, libraries, disk, memory, folders and the hub.

Every finding that is not fine has a remedy. It installs nothing, uses no network unless asked, and removes what its
probes write.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dpoeng.cache.words import GIB, counted
from dpoeng.engine.checks.disk import disk_speed, read_speed
from dpoeng.engine.checks.driver import OLDER, oldest_driver, too_old
from dpoeng.engine.runtime.host import available_memory

Status = Literal["ok", "info", "warning", "error"]
STATUSES: tuple[Status, ...] = ("ok", "info", "warning", "error")

PROBE_LIMIT_S = 120.0
_SLOW_S = 30.0  # importing a library takes 3 to 10 s on an idle machine
_FREE_DISK = 2 * GIB  # a cache of 100,000 pairs and the checkpoints of a LoRA
_FREE_MEMORY = 4 * GIB
_HUB = "https://huggingface.co"

# What a user can do if a probe fails.
_PROBE_REMEDIES = {
    "torch": "install torch again, in the build for this machine: https://pytorch.org/get-started/locally",
    "transformers": "install the tested versions: pip install -c "
    f"{shlex.quote(str(Path(__file__).with_name('constraints.txt')))} transformers peft accelerate",
    "bitsandbytes": "pip install --force-reinstall bitsandbytes, or continue with --quantization none",
    "triton": "install the triton version that torch requires: pip install --force-reinstall torch",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One check; has a `remedy` if it is not fine."""

    name: str
    status: Status
    found: str
    remedy: str = ""


@dataclass(slots=True)
class Diagnosis:
    """All checks, in order."""

    checks: list[Check] = field(default_factory=list)

    def worst(self) -> Status:
        """The most severe status."""
        return max((check.status for check in self.checks), key=STATUSES.index, default="ok")

    def as_dict(self) -> dict[str, Any]:
        """For a bug report: leaves out the name of the home folder."""
        home = str(Path.home())
        checks = [
            {name: getattr(check, name).replace(home, "~") for name in Check.__slots__ if getattr(check, name)}
            for check in self.checks
        ]
        return {"dpoeng": _version("dpoeng"), "status": self.worst(), "checks": checks}


Probe = Callable[[str], dict[str, Any]]


def diagnose(
    cache: Path, output_dir: Path, *, model: Path | None = None, online: bool = False, probe: Probe | None = None
) -> Diagnosis:
    """Runs all checks.

    Args:
        cache: the reference cache's folder, which need not exist.
        output_dir: the folder for training's results.
        model: a model's folder, to measure how fast its files are read; by default a file next to the cache.
        online: whether to try to reach the hub.
        probe: runs one of `probes.PROBES` by name; by default in a separate process.
    """
    probe = probe or run_probe
    checks = [*_python(), *_versions(tested_versions())]
    others = ("transformers", "bitsandbytes", "triton")
    with ThreadPoolExecutor(1 + len(others)) as pool:
        torch_probe = pool.submit(probe, "torch")
        if shutil.which("nvidia-smi") is not None:
            torch_probe.result()  # first and alone: it reads the GPU's free memory, which the others would use
        rest = list(pool.map(probe, others))
    torch_found = torch_probe.result()
    checks += [*_torch(torch_found), *_processor(bool(torch_found.get("gpus")), cpu_flags())]
    checks += map(_library, others, rest)
    checks += [*_environment(os.environ), *_memory(), *_folders(cache, output_dir), _disk(cache, model)]
    checks += _hub(os.environ, online)
    return Diagnosis(checks)


def tested_versions() -> dict[str, str]:
    """Package -> the version that the test suite ran with, from constraints.txt, which is installed with dpoeng."""
    text = Path(__file__).with_name("constraints.txt").read_text(encoding="utf-8")
    lines = (line.split("==") for line in text.splitlines() if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in lines}


def run_probe(name: str, limit_s: float = PROBE_LIMIT_S) -> dict[str, Any]:
    """Runs one probe in a separate process; returns `ok`, `seconds`, and its findings or a `problem`."""
    began = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-m", "dpoeng.engine.checks.probes", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"ok": False, "problem": f"no answer within {limit_s:.0f} s", "seconds": limit_s, "unanswered": True}
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        answer: dict[str, Any] = json.loads(lines[-1])
        return {**answer, "seconds": time.perf_counter() - began}
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    return {"ok": False, "problem": f"the process ended with {how}: {last[:300]}"}


def cpu_flags() -> frozenset[str] | None:
    """The CPU's instruction sets as Linux lists them; None if it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(words.split())
    return None


def _python() -> Iterator[Check]:
    system = f"Python {platform.python_version()}, {platform.system()} {platform.release()} {platform.machine()}"
    if platform.system() == "Linux":
        yield Check("python", "ok", system)
    else:
        yield Check("python", "warning", system, "dpoeng is tested on Linux only; use a container or WSL 2")


def _versions(tested: Mapping[str, str]) -> Iterator[Check]:
    for text in metadata.requires("dpoeng") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(requirement.name)
        installed, pin = _version(requirement.name), tested.get(name, "")
        wanted = f"dpoeng needs {requirement.specifier}, tested with {pin}"
        remedy = f"pip install '{requirement.name}=={pin}'"
        if installed is None:
            yield Check(name, "error", f"not installed; {wanted}", remedy)
        elif not requirement.specifier.contains(installed, prereleases=True):
            yield Check(name, "error", f"{installed}; {wanted}", remedy)
        elif Version(installed).public != pin:
            yield Check(name, "info", f"{installed}; {wanted}", f"nothing, unless something is odd: then {remedy}")
        else:
            yield Check(name, "ok", f"{installed}, as tested")


def _torch(report: Mapping[str, Any]) -> Iterator[Check]:
    yield _library("torch", report)
    if not report["ok"]:
        return
    for index, gpu in enumerate(report["gpus"]):
        free, total = gpu["free_bytes"] / GIB, gpu["total_bytes"] / GIB
        words = f"{gpu['name']}, compute capability {gpu['capability']}, {free:.1f} of {total:.1f} GiB free"
        if "bus_gb_per_s" in gpu:
            words += f", {gpu['bus_gb_per_s']:.1f} GB/s from host memory (plan --load-gb-per-s)"
        if free < 0.9 * total:
            yield Check(
                f"gpu {index}", "warning", words, "run nvidia-smi to see which process holds the memory, and end it"
            )
        elif not gpu["bfloat16"]:
            yield Check(f"gpu {index}", "warning", f"{words}; no bfloat16", "use --dtype float16")
        else:
            yield Check(f"gpu {index}", "ok", words)
    if not report["gpus"]:
        driver, version = _nvidia_driver()
        cuda = report["cuda_build"]
        if driver is None:
            yield Check("gpu", "info", "none; everything runs on the CPU", "fine for small models")
        elif cuda is None:
            remedy = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
            yield Check("gpu", "error", f"{driver}, but torch {report['version']} is a CPU build", remedy)
        elif too_old(version, cuda):
            words = f"{driver}: torch's build for CUDA {cuda} needs driver {oldest_driver(cuda)} or newer"
            yield Check("gpu", "error", words, f"update the NVIDIA driver, or install the older build: {OLDER}")
        else:
            remedy = "update the NVIDIA driver, or install the torch build for the CUDA version that nvidia-smi shows"
            yield Check("gpu", "error", f"{driver}, but torch cannot use it (CUDA {cuda})", remedy)


def _nvidia_driver() -> tuple[str | None, str]:
    """GPU and driver as nvidia-smi names them, or None; and the driver's version, if known."""
    if shutil.which("nvidia-smi") is None:
        return None, ""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not answer", ""
    lines = done.stdout.strip().splitlines()
    if not lines:
        return done.stderr.strip() or "nvidia-smi shows nothing", ""
    return "; ".join(lines), lines[0].rpartition(", ")[2]


def _library(name: str, report: Mapping[str, Any]) -> Check:
    busy = "end programs that keep the machine or its disk busy, and try again; if it is idle: "
    if report.get("unanswered"):
        return Check(f"{name} at work", "warning", report["problem"], busy + _PROBE_REMEDIES[name])
    if not report["ok"]:
        return Check(f"{name} at work", "error", report["problem"], _PROBE_REMEDIES[name])
    if name == "triton" and not report["used"]:
        return Check("triton at work", "info", "not tried: no GPU", "nothing: it is not used on a CPU")
    right, seconds = "a small computation gives the right numbers", report.get("seconds", 0.0)
    if seconds > _SLOW_S:
        slow = "every command starts this slowly; put the environment on a local disk"
        return Check(f"{name} at work", "warning", f"{right}, after {seconds:.0f} s", busy + slow)
    return Check(f"{name} at work", "ok", right)


def _processor(has_gpu: bool, flags: frozenset[str] | None) -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if has_gpu or flags is None or flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        yield Check("processor", "ok", counted(cores, "core"))
        return
    finding = f"{counted(cores, 'core')} without bfloat16 instructions: bfloat16 takes 6 to 7 times as long as float32"
    yield Check("processor", "warning", finding, "use --dtype float32 in both phases")


def _environment(variables: Mapping[str, str]) -> Iterator[Check]:
    if variables.get("TRITON_INTERPRET") == "1":
        yield Check("TRITON_INTERPRET", "warning", "1: kernels are interpreted, thousands of times slower", "unset it")
    if variables.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        yield Check("CUDA_VISIBLE_DEVICES", "warning", "empty: GPUs are hidden", "unset it, or name the GPUs to use")
    spec = importlib.util.find_spec("kernels")
    here = Path(__file__).resolve().parents[2] / "kernels"
    if spec is not None and here in map(Path, spec.submodule_search_locations or ()):
        remedy = "do not put dpoeng's repository on PYTHONPATH; transformers needs the package index's `kernels`"
        if spec.origin is not None:
            yield Check("PYTHONPATH", "error", f"dpoeng's own folder {here} hides the package `kernels`", remedy)


def _memory() -> Iterator[Check]:
    available = available_memory()
    if available is None:
        yield Check("memory", "info", "unknown: /proc/meminfo is not there", "nothing")
    elif available < _FREE_MEMORY:
        yield Check(
            "memory", "warning", f"{available / GIB:.1f} GiB available", "end other programs, or use a smaller model"
        )
    else:
        yield Check("memory", "ok", f"{available / GIB:.1f} GiB available")


def _folders(cache: Path, output_dir: Path) -> Iterator[Check]:
    from dpoeng.engine.reference.identity import digest_memo

    for name, folder in (
        ("reference cache", cache),
        ("output folder", output_dir),
        ("remembered digests", digest_memo()),
        ("temporary files", Path(tempfile.gettempdir())),
    ):
        yield _folder(name, folder)


def _folder(name: str, folder: Path) -> Check:
    """Writes a test file to the folder, or to its nearest existing parent."""
    existing = _existing(folder)
    text = f"{folder}" + ("" if existing == folder else f" (to be created in {existing.resolve()})")
    if not existing.is_dir():
        return Check(name, "error", f"{existing} is a file", "name another folder")
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".dpoeng-doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        read_only = name == "reference cache" and folder.is_dir()
        reason = error.strerror or str(error)
        remedy = "a complete cache may be read-only; else make it writable" if read_only else "make it writable"
        return Check(
            name, "warning" if read_only else "error", f"{text}: {reason}", f"{remedy}, or name another folder"
        )
    free = shutil.disk_usage(existing).free
    words = f"{text}: writable, {free / GIB:.1f} GiB free"
    if free < _FREE_DISK:
        return Check(name, "warning", words, "free some space, or name a folder on another disk")
    return Check(name, "ok", words)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(there for there in (folder, *folder.resolve().parents) if there.exists())


def _disk(cache: Path, model: Path | None) -> Check:
    """How fast files are read: the model's, or one that is written where the cache is."""
    if model is not None:
        return _model_files(model)
    there = _existing(cache)
    try:
        speed = disk_speed(there) if shutil.disk_usage(there).free > _FREE_DISK else None
    except OSError as error:
        return Check("disk", "info", f"not measured: {error.strerror or error}", "see the reference cache's folder")
    if speed is None:
        return Check("disk", "info", "not measured", "name a model's folder with --model, to read its files")
    return Check("disk", "ok", f"files beside the cache are read at {speed:.1f} GB/s (plan --disk-gb-per-s)")


def _model_files(model: Path) -> Check:
    files = sorted(model.glob("*.safetensors"))
    if not files:
        return Check("disk", "warning", f"no *.safetensors in {model}", "name a folder with a model's files")
    try:
        speed = read_speed(files)
    except OSError as error:
        return Check("disk", "error", f"{model}: {error.strerror or error}", "make its files readable")
    size, memory = sum(file.stat().st_size for file in files), available_memory()
    words = f"{model}: {size / GIB:.1f} GiB of files"
    words += f", read at {speed:.1f} GB/s (plan --disk-gb-per-s)" if speed is not None else ""
    if memory is not None and size > memory:
        words += "; host memory does not hold them, so layer offloading reads them from the disk in each pass"
        return Check("disk", "info", words, f"give plan --host-gib {memory / GIB:.0f}; --trunk-layer reads fewer")
    return Check("disk", "ok", words)


def _hub(variables: Mapping[str, str], online: bool) -> Iterator[Check]:
    switches = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(variables.get(name))]
    if switches:
        yield Check(
            "hub", "info", f"offline by {', '.join(switches)}", "name models by folder, or unset it to download"
        )
    elif not online:
        yield Check("hub", "info", "not tried", "--online tries it; models in folders need no hub")
    else:
        address = variables.get("HF_ENDPOINT", _HUB)
        try:
            request = urllib.request.Request(address, method="HEAD")
            with urllib.request.urlopen(request, timeout=10):
                yield Check("hub", "ok", f"{address} answers")
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            remedy = "check network and proxy, set HF_ENDPOINT to a mirror, or download the model elsewhere"
            yield Check("hub", "warning", f"{address}: {reason}", f"{remedy} and name its folder")


def _is_on(value: str | None) -> bool:
    return (value or "").strip().upper() in ("1", "ON", "YES", "TRUE")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

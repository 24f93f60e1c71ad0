"""More measurements of a GPU: data-sheet limits, energy by NVML, use of the memory pool.

Kept small, so that stand-ins for torch.cuda and NVML are enough to test the arithmetic. It has not run on a GPU yet.
"""

from __future__ import annotations

import importlib
import re
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

from dpoeng.bench.measuring.measure import elapsed_s
from dpoeng.engine.memory.cards import GPUS, Gpu

SAMPLE_EVERY_S = 0.1


def card_of(device: torch.device) -> Gpu | None:
    """The card's row in the table of data sheets, by torch's name for it; None if there is none.

    `NVIDIA A100-SXM4-80GB` is a100-80gb. For cards with several sizes of memory it is the nearest size.
    """
    if device.type != "cuda":
        return None
    words = set(re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower()))
    matching = [gpu for gpu in GPUS.values() if set(gpu.name.split("-")[:-1]) <= words]
    total = torch.cuda.get_device_properties(device).total_memory
    return min(matching, key=lambda gpu: abs(gpu.n_bytes - total), default=None)


def copy_bytes_per_s(device: torch.device, *, tries: int = 5) -> float:
    """Bytes read and written per second by a copy that is too large for caches; the fastest of some tries."""
    size = 2**28 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(elapsed_s(device, lambda: target.copy_(source)) for _ in range(tries))


@dataclass(frozen=True, slots=True)
class PoolUse:
    """Use of torch's pool of GPU memory.

    Attributes:
        reserved_bytes: maximum that it reserved on the card.
        retries: allocations that succeeded only after freeing cached blocks; each of them stalls the GPU.
    """

    reserved_bytes: int
    retries: int


def pool_use(device: torch.device) -> PoolUse | None:
    """Pool use since `torch.cuda.reset_peak_memory_stats` (retries: since the process started); None on a CPU."""
    if device.type != "cuda":
        return None
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    return PoolUse(int(torch.cuda.max_memory_reserved(device)), int(retries))


def nvml() -> Any | None:
    """NVIDIA's management library (package nvidia-ml-py), if it is installed and works."""
    try:
        library: Any = importlib.import_module("pynvml")
        library.nvmlInit()
    except Exception:
        return None
    return library


class EnergyMeter:
    """Joules that the card used while the context was open: from its counter, otherwise from power samples.

    `joules` stays None on a CPU, without nvidia-ml-py, and on cards that report neither. It counts the whole card, with
    other programs on it.
    """

    def __init__(self, device: torch.device, library: Any | None = None) -> None:
        self.joules: float | None = None
        self.method = ""
        self._nvml: Any = (library or nvml()) if device.type == "cuda" else None
        if self._nvml is not None:
            # CUDA_VISIBLE_DEVICES renumbers the cards for torch, but not for NVML.
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._card = self._nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")

    def __enter__(self) -> EnergyMeter:
        self._before = self._read("nvmlDeviceGetTotalEnergyConsumption")  # mJ since the driver was loaded
        if self._before is None and self._read("nvmlDeviceGetPowerUsage") is not None:
            self._done, self._joules = threading.Event(), 0.0
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
            self.method = f"NVML power every {SAMPLE_EVERY_S:g} s"
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            after = self._read("nvmlDeviceGetTotalEnergyConsumption")
            self.joules = None if after is None else (after - self._before) / 1e3
            self.method = "NVML energy counter"
        elif self.method:
            self._done.set()
            self._sampler.join()
            self.joules = self._joules

    def _sample(self) -> None:
        """Adds the trapezium between two power samples."""
        at, watts = time.perf_counter(), self._watts()
        ended = False
        while not ended:
            ended = self._done.wait(SAMPLE_EVERY_S)
            now, more = time.perf_counter(), self._watts()
            self._joules += (now - at) * (watts + more) / 2
            at, watts = now, more

    def _watts(self) -> float:
        return (self._read("nvmlDeviceGetPowerUsage") or 0) / 1e3

    def _read(self, name: str) -> int | None:
        if self._nvml is None:
            return None
        try:
            return int(getattr(self._nvml, name)(self._card))
        except self._nvml.NVMLError:
            return None

"""Time and memory of a piece of work: wall and CPU seconds, peak bytes above those before, GEMM rate.

On a CPU the peak is the kernel's high-water mark of resident memory, which does not miss short peaks as sampling
does; if it cannot be reset (not Linux, no permission), a thread samples instead. The memory of tensors alone is counted
from the allocator's events, on request. On a GPU the peak is the allocator's, and time that of CUDA events in the
queue.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpoeng.bench.measuring.allocator import allocator_profiler, read_trace
from dpoeng.kernels.cpu_linear import dtype_of_products

SAMPLE_EVERY_S = 0.002

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(slots=True)
class Spent:
    """Elapsed time. On a shared machine the CPU seconds of all threads vary less than wall time.

    Attributes:
        wall_s: wall-clock seconds.
        cpu_s: CPU seconds of all threads of this process, with spinning.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def add(self, other: Spent) -> None:
        """Adds another piece of work."""
        self.wall_s += other.wall_s
        self.cpu_s += other.cpu_s


class Stopwatch:
    """Runs from its creation. Waits for the device first, so that queued work counts for its own lap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin()

    def lap(self) -> Spent:
        """Time since the last lap."""
        wall, cpu = self._wall, self._cpu
        self._begin()
        return Spent(self._wall - wall, self._cpu - cpu)

    def _begin(self) -> None:
        synchronize(self._device)
        self._wall, self._cpu = time.perf_counter(), time.process_time()


class Marks:
    """Marks during some work, and the time between neighbours: by CUDA events on a GPU, otherwise by the clock.

    An event goes into the GPU's queue and nothing waits for it, so marks do not change the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = self._now()

    def next(self) -> tuple[Any, Any, float]:
        """The previous mark, this one, and the CPU seconds between them; `between` computes their time."""
        (begin, cpu), (end, later) = self._last, self._now()
        self._last = (end, later)
        return begin, end, later - cpu

    def between(self, begin: Any, end: Any) -> float:
        """Seconds; on a GPU the time in its queue, after the caller has waited for it."""
        if self._device.type == "cuda":
            return float(begin.elapsed_time(end)) / 1e3
        return float(end - begin)

    def _now(self) -> tuple[Any, float]:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            return event, time.process_time()
        return time.perf_counter(), time.process_time()


def elapsed_s(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of some work, on a GPU without the time to launch it."""
    synchronize(device)
    marks = Marks(device)
    work()
    begin, end, _ = marks.next()
    synchronize(device)
    return marks.between(begin, end)


class TimeSplit:
    """Time of repeated work by part. A nested part is not counted in the outer one.

    The parts appear in traces of torch.profiler too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = Marks(device)
        self._open: list[tuple[str, Any]] = []
        self._between: list[tuple[str, Any, Any, float]] = []
        self._parts: dict[str, Spent] = {}

    def enter(self, name: str) -> None:
        """From now on time counts for `name`."""
        self._charge()
        label = torch.profiler.record_function(name)
        label.__enter__()  # type: ignore[no-untyped-call]
        self._open.append((name, label))

    def leave(self) -> None:
        """From now on time counts for the surrounding part."""
        self._charge()
        _, label = self._open.pop()
        label.__exit__(None, None, None)

    @property
    def parts(self) -> dict[str, Spent]:
        """Time by name; the sum is the time inside the outermost parts."""
        if self._between:
            synchronize(self._device)
        for name, begin, end, cpu_s in self._between:
            self._parts.setdefault(name, Spent()).add(Spent(self._marks.between(begin, end), cpu_s))
        self._between = []
        return self._parts

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time of the block counts for `name`."""
        self.enter(name)
        yield
        self.leave()

    def total(self) -> Spent:
        """The sum of all parts."""
        total = Spent()
        for spent in self.parts.values():
            total.add(spent)
        return total

    def _charge(self) -> None:
        begin, end, cpu_s = self._marks.next()
        if self._open:
            self._between.append((self._open[-1][0], begin, end, cpu_s))


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Returns freed memory to the system, so that resident memory is used memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def held_bytes(device: torch.device, *, tensors: bool = False) -> int:
    """The bytes in use: allocated on a GPU; on a CPU resident in the process, or (`tensors`) in tensors."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _tensor_bytes(device) if tensors else _status_bytes("VmRSS")


def _tensor_bytes(device: torch.device) -> int:
    """Bytes of all tensors that Python can reach; shared storage counts once."""
    gc.collect()
    # type() and not isinstance(): isinstance() would make lazily imported modules import
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    # the storage's device and not the tensor's: a simulation's tensors name a device on which they have no memory
    blocks = (storage for storage in storages if storage.device == device)
    return sum({block.data_ptr(): block.nbytes() for block in blocks}.values())


def touch(model: Any) -> None:
    """Reads all weights once, so that weights mapped from a file become resident and count."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.view(-1)[:: max(1, 1024 // tensor.element_size())].sum()


class PeakMemory:
    """The peak of a block above `base` (default: the memory at its start).

    With `tensors`, a CPU's peak is that of tensors, to the byte and the same each time, and the block is slower.

    >>> with PeakMemory(device) as memory:
    ...     work()
    >>> memory.peak_bytes
    """

    def __init__(self, device: torch.device, base: int | None = None, *, tensors: bool = False) -> None:
        self.device = device
        self.tensors = tensors
        self.base_bytes = base
        self.peak_bytes = 0
        self.method = ""

    def __enter__(self) -> PeakMemory:
        release_memory(self.device)
        synchronize(self.device)
        self._begun_bytes = held_bytes(self.device, tensors=self.tensors)
        if self.base_bytes is None:
            self.base_bytes = self._begun_bytes
        if self.device.type == "cuda":
            self.method = "torch.cuda.max_memory_allocated"
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.tensors:
            self.method = "allocator events"
            self._profiler = allocator_profiler()
            self._profiler.start()
        elif _reset_high_water():
            self.method = "VmHWM"
        else:
            self.method = f"VmRSS every {1e3 * SAMPLE_EVERY_S:g} ms"
            self._highest, self._done = held_bytes(self.device), threading.Event()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize(self.device)
        if self.device.type == "cuda":
            highest = int(torch.cuda.max_memory_allocated(self.device))
        elif self.tensors:
            self._profiler.stop()
            highest = self._begun_bytes + read_trace(self._profiler, self.device).peak_bytes
        elif self.method == "VmHWM":
            highest = _status_bytes("VmHWM")
        else:
            self._done.set()
            self._sampler.join()
            highest = max(self._highest, held_bytes(self.device))
        assert self.base_bytes is not None
        self.peak_bytes = max(0, highest - self.base_bytes)

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_EVERY_S):
            self._highest = max(self._highest, held_bytes(self.device))


def gemm_flops(
    shapes: Iterable[tuple[int, int]], rows: int, dtype: torch.dtype, device: torch.device, *, tries: int = 5
) -> float:
    """FLOP/s of this machine's matrix product on the layer shapes of a model.

    Args:
        shapes: (in, out) of each layer of the model, with repetitions.
        rows: rows of the left factor.
        dtype: dtype of the layers. A CPU without units for it multiplies in float32, as the layers do.
        device: the device.
        tries: number of tries per shape, of which the fastest counts.

    Returns:
        FLOP of all layers over the time of all layers.
    """
    counts: dict[tuple[int, int], int] = {}
    for shape in shapes:
        counts[shape] = counts.get(shape, 0) + 1
    flop, seconds = 0.0, 0.0
    with torch.inference_mode():
        for (n_in, n_out), count in counts.items():
            x = torch.randn(rows, n_in, device=device, dtype=dtype)
            x = x.to(dtype_of_products(x))
            weight = torch.randn(n_out, n_in, device=device, dtype=x.dtype)
            torch.nn.functional.linear(x, weight)
            product = functools.partial(torch.nn.functional.linear, x, weight)
            flop += 2.0 * rows * n_in * n_out * count
            seconds += min(elapsed_s(device, product) for _ in range(tries)) * count
    return flop / seconds


def _reset_high_water() -> bool:
    """Sets the high-water mark of resident memory to the present value; False if that is impossible."""
    if sys.platform != "linux":
        return False
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status_bytes(name: str) -> int:
    """The value of a line of /proc/self/status; 0 on a system without it."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)

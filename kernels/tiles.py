"""Chooses each kernel's tile by GPU, and lists the GPUs' limits.

The tiles were chosen by a model of the hardware and the compiler's reports (`python -m dpoeng.kernels.aot`): the
largest tile whose float32 sums fit the registers without spilling, with a pipeline as deep as shared memory allows.
They were not timed on these GPUs. `dpoeng bench kernels --tune` times the candidates on your GPU and saves the best to
a file that `linear_tile` then reads.

A tile depends only on the GPU and the dtype, never on the batch, so log-probs do not depend on the batch.
"""

import functools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

CHUNK_BYTES = 640 * 2**20  # 1024 rows of a vocabulary of 152k in float32
MAX_CHUNK = 4096


class Gpu(NamedTuple):
    """A GPU's limits for occupancy and compilation. Bytes and counts are per multiprocessor unless named otherwise."""

    backend: str
    arch: int | str
    warp: int  # threads
    block_shared: int  # bytes one block may use
    shared: int
    registers: int  # 32-bit
    warps: int


# CUDA C Programming Guide, "Compute Capabilities"; AMD CDNA 3 ISA guide (4 SIMDs of 512 VGPRs x 64 lanes, 64 KiB LDS).
GPUS = {
    "sm_75": Gpu("cuda", 75, 32, 64 << 10, 64 << 10, 65536, 32),
    "sm_80": Gpu("cuda", 80, 32, 163 << 10, 164 << 10, 65536, 64),
    "sm_86": Gpu("cuda", 86, 32, 99 << 10, 100 << 10, 65536, 48),
    "sm_89": Gpu("cuda", 89, 32, 99 << 10, 100 << 10, 65536, 48),
    "sm_90": Gpu("cuda", 90, 32, 227 << 10, 228 << 10, 65536, 64),
    "sm_100": Gpu("cuda", 100, 32, 227 << 10, 228 << 10, 65536, 64),
    "gfx942": Gpu("hip", "gfx942", 64, 64 << 10, 64 << 10, 131072, 32),
}


class RowTile(NamedTuple):
    """Row kernels: entries that a program reads at once, and its warps."""

    block: int
    warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        return launch_options(self.warps)


class LinearTile(NamedTuple):
    """Fused linear kernel: rows x cols of logits, step depth along H, and row tiles that share an L2 window."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8

    @property
    def options(self) -> dict[str, int | bool]:
        return launch_options(self.warps, self.stages)


class LowRankTile(NamedTuple):
    """LoRA's products: rows and columns that a program processes at once."""

    rows: int
    cols: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        return launch_options(self.warps, self.stages)


MERGE_ROWS = 128
SPAN = 2048  # columns of a LoRA layer's input that one program sums


def launch_options(warps: int, stages: int = 2) -> dict[str, int | bool]:
    """Compiler options of a launch. Fused multiply-add is set explicitly, because triton 3.10 changes the default."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


# Widening int8: 16 codes a thread, so one 16-byte load and two stores. AMD's warps have twice as many threads.
WIDEN = {"cuda": RowTile(1024, 2), "hip": RowTile(2048, 2)}
# 16-bit inputs go to the tensor cores. The 99 KiB of sm_86 and sm_89 hold half the columns. Turing (sm_75) has no
# tile: its kernel would spill thousands of registers and use no tensor cores; `token_logps` takes cuBLAS there.
LINEAR_16 = {
    "sm_80": LinearTile(128, 256, 64, 8, 4),
    "sm_86": LinearTile(128, 128, 64, 8, 4),
    "sm_89": LinearTile(128, 128, 64, 8, 4),
    "sm_90": LinearTile(128, 256, 64, 8, 4),
    "sm_100": LinearTile(128, 256, 64, 8, 4),
    "gfx942": LinearTile(128, 128, 64, 8, 2),
}
# float32 inputs are multiplied exactly, on the ordinary cores: one smaller tile for all.
LINEAR_32 = LinearTile(64, 64, 32, 8, 2)


# Memory-bound: enough programs to fill a GPU at a thousand tokens, and sums that stay in registers.
LOW_RANK = {
    "rows": LowRankTile(32, 64, 4, 3),
    "add": LowRankTile(32, 128, 4, 1),
    "gradient": LowRankTile(64, 32, 4, 3),
}


def low_rank_tile(kernel: str, rank: int) -> tuple[LowRankTile, int]:
    """The tile of `rows`, `add` or `gradient` on every GPU, and how many ranks it processes at a time.

    Matrix units multiply at least 16; `add` loops over more ranks, since their sums share its registers.
    """
    block = 16
    while block < min(rank, 32 if kernel == "add" else 64):
        block *= 2
    return LOW_RANK[kernel], block


def row_tile() -> RowTile:
    """4096 entries over 8 warps: 16 a thread, four 16-byte loads in flight each, and one reduction per 4096."""
    return RowTile(4096, 8)


def architecture(device: torch.device) -> str:
    """The table's name for the GPU."""
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return nearest(10 * major + minor)


def nearest(capability: int) -> str:
    """The listed architecture to use: the next older one (8.7 -> sm_86, 10.3 -> sm_100)."""
    if capability >= 120:  # consumer Blackwell: a new number, but Ada's shared memory
        return "sm_89"
    listed = [int(name[3:]) for name in LINEAR_16 if name.startswith("sm_")]
    return f"sm_{max((n for n in listed if n <= capability), default=min(listed))}"


def has_linear_tile(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused linear kernel has a tile for this GPU (compute capability 8.0 and newer) and dtype."""
    if device.type != "cuda" or torch.version.hip or dtype == torch.float32:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def linear_tile(device: torch.device, dtype: torch.dtype) -> LinearTile:
    """The fused linear kernel's tile: the tuned one if this GPU was tuned, else the table's."""
    if device.type != "cuda":  # the interpreter: small enough to be fast, large enough to have a ragged edge
        return LinearTile(16, 32, 16, 1, 1, 2)
    tuned = remembered(tuned_file()).get(tuned_key(device, dtype))
    if tuned is not None:
        return tuned
    return LINEAR_32 if dtype == torch.float32 else LINEAR_16[architecture(device)]


# --- tuning on a real GPU ---


def candidates(table_tile: LinearTile) -> list[LinearTile]:
    """The table's tile and its neighbours: half the columns, half or double the depth, one stage more or less."""
    t = table_tile
    near = [
        t,
        t._replace(cols=t.cols // 2),
        t._replace(depth=t.depth // 2),
        t._replace(depth=t.depth // 2, stages=t.stages + 1),
        t._replace(stages=t.stages - 1),
        t._replace(stages=t.stages + 1),
        t._replace(group=2 * t.group),
        t._replace(cols=t.cols // 2, depth=2 * t.depth),
    ]
    return [c for c in near if c.depth >= 16 and c.stages >= 1]


def tune(tiles: Iterable[LinearTile], seconds: Callable[[LinearTile], float]) -> LinearTile:
    """The fastest of `tiles`; skips those that the GPU refuses (shared memory, registers).

    Raises:
        RuntimeError: No tile ran; the last refusal is the cause.
    """
    best: tuple[float, LinearTile] | None = None
    refusal: Exception | None = None
    for tile in tiles:
        try:
            took = seconds(tile)
        except Exception as error:  # triton has moved OutOfResources between releases
            refusal = error
            continue
        if best is None or took < best[0]:
            best = (took, tile)
    if best is None:
        raise RuntimeError("no tile ran on this GPU") from refusal
    return best[1]


def tuned_file() -> Path:
    """`$DPOENG_TILES`, or dpoeng/tiles.json in the user's cache folder."""
    named = os.environ.get("DPOENG_TILES")
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(named) if named else base / "dpoeng" / "tiles.json"


def tuned_key(device: torch.device, dtype: torch.dtype) -> str:
    return f"{torch.cuda.get_device_name(device)}/{str(dtype).removeprefix('torch.')}"


@functools.cache
def remembered(path: Path) -> dict[str, LinearTile]:
    """Tuned tiles by device and dtype. Read once per process: a tile that changes during a run would change numbers.

    Raises:
        ValueError: `remember` did not write this file.
    """
    if not path.exists():
        return {}
    try:
        return {key: LinearTile(**fields) for key, fields in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not contain tuned tiles ({error}); delete it and tune again") from error


def remember(path: Path, key: str, tile: LinearTile) -> None:
    """Adds one tile to the file and replaces the file atomically."""
    tiles = {**remembered(path), key: tile}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({k: t._asdict() for k, t in tiles.items()}, indent=1))
    fresh.replace(path)
    remembered.cache_clear()


def chunk_rows(vocabulary: int) -> int:
    """Rows per chunk: as many as fit in `CHUNK_BYTES` of float32 logits, in steps of 256, for whole GEMM tiles."""
    return max(256, min(MAX_CHUNK, CHUNK_BYTES // (4 * vocabulary) // 256 * 256))


def chunk_shape(n: int, vocabulary: int) -> tuple[int, int]:
    """Rows and columns of the chunk of logits in which `n` tokens are processed."""
    # Rows start at multiples of 16 bytes, for wide loads and cuBLAS's fast paths.
    return max(1, min(n, chunk_rows(vocabulary))), -(-vocabulary // 16) * 16

"""Chooses each kernel's tile by GPU, and lists the GPUs' limits.

The tiles were chosen by a model of the hardware and by what the compiler says of them (`python -m dpoeng.kernels.aot`):
the largest tile whose float32 sums fit the registers without spilling, as deep a pipeline as shared memory takes. They
have not been timed on the GPUs. `dpoeng bench kernels --tune` times the candidates on the GPU at hand and remembers the
best in a file that `linear_tile` then reads.

A tile depends on the GPU and the dtype only, never on the batch: that keeps log-probs independent of the batch.
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
    """GPU limits behind occupancy and compilation. Bytes and counts are per multiprocessor unless named otherwise."""

    backend: str
    arch: int | str
    warp: int  # threads
    block_shared: int  # bytes one block may have
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
    """Row kernels: entries a program reads at once, and its warps."""

    block: int
    warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        return launch_options(self.warps)


class LinearTile(NamedTuple):
    """Fused linear kernel: rows x cols of logits, depth of one step along H, row tiles that share an L2 window."""

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
    """LoRA's products: rows and columns that a program takes at once."""

    rows: int
    cols: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        return launch_options(self.warps, self.stages)


MERGE_ROWS = 128
SPAN = 2048  # columns of a LoRA layer's input that one program adds up


def launch_options(warps: int, stages: int = 2) -> dict[str, int | bool]:
    """Compiler options of a launch. Fused multiply-add is asked for, because triton 3.10 changes the default."""
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
# float32 inputs are multiplied exactly, on the ordinary cores: a smaller tile, one for all.
LINEAR_32 = LinearTile(64, 64, 32, 8, 2)


# Bound by memory: enough programs to fill a GPU at a thousand tokens, and sums that stay in registers.
LOW_RANK = {
    "rows": LowRankTile(32, 64, 4, 3),
    "add": LowRankTile(32, 128, 4, 1),
    "gradient": LowRankTile(64, 32, 4, 3),
}


def low_rank_tile(kernel: str, rank: int) -> tuple[LowRankTile, int]:
    """The tile of `rows`, `add` or `gradient` on every GPU, and how many ranks it takes at a time.

    Matrix units multiply 16 at least; `add` takes more ranks in turn, since their sums share its registers.
    """
    block = 16
    while block < min(rank, 32 if kernel == "add" else 64):
        block *= 2
    return LOW_RANK[kernel], block


def row_tile() -> RowTile:
    """4096 entries over 8 warps: 16 a thread, four 16-byte loads in flight each, and one reduction per 4096."""
    return RowTile(4096, 8)


def architecture(device: torch.device) -> str:
    """The table's name for a GPU."""
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return nearest(10 * major + minor)


def nearest(capability: int) -> str:
    """The listed architecture whose tiles fit: the next older one (8.7 -> sm_86, 10.3 -> sm_100)."""
    if capability >= 120:  # consumer Blackwell: a new number, the shared memory of Ada
        return "sm_89"
    listed = [int(name[3:]) for name in LINEAR_16 if name.startswith("sm_")]
    return f"sm_{max((n for n in listed if n <= capability), default=min(listed))}"


def has_linear_tile(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused linear kernel has a tile for this GPU (compute capability 8.0 and newer) and dtype."""
    if device.type != "cuda" or torch.version.hip or dtype == torch.float32:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def linear_tile(device: torch.device, dtype: torch.dtype) -> LinearTile:
    """The fused linear kernel's tile: the remembered one if this GPU was tuned, else the table's."""
    if device.type != "cuda":  # the interpreter: small enough to run through, large enough to be ragged
        return LinearTile(16, 32, 16, 1, 1, 2)
    tuned = remembered(tuned_file()).get(tuned_key(device, dtype))
    if tuned is not None:
        return tuned
    return LINEAR_32 if dtype == torch.float32 else LINEAR_16[architecture(device)]


# --- tuning on a real GPU ---


def candidates(table_tile: LinearTile) -> list[LinearTile]:
    """The table's tile and its neighbours: half the columns, half or twice the depth, one stage more or less."""
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
    """The fastest of `tiles`; one that the GPU refuses (shared memory, registers) is passed over.

    Raises:
        RuntimeError: No tile ran; the last refusal is the cause.
    """
    best: tuple[float, LinearTile] | None = None
    refusal: Exception | None = None
    for tile in tiles:
        try:
            took = seconds(tile)
        except Exception as error:  # triton's OutOfResources has moved between releases
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
    """Tuned tiles by device and dtype. Read once a process: a tile that changed under a run would change its numbers.

    Raises:
        ValueError: The file is not what `remember` writes.
    """
    if not path.exists():
        return {}
    try:
        return {key: LinearTile(**fields) for key, fields in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold tuned tiles ({error}); delete it and tune again") from error


def remember(path: Path, key: str, tile: LinearTile) -> None:
    """Add one tile to the file, replacing it whole."""
    tiles = {**remembered(path), key: tile}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({k: t._asdict() for k, t in tiles.items()}, indent=1))
    fresh.replace(path)
    remembered.cache_clear()


def chunk_rows(vocabulary: int) -> int:
    """Rows per chunk: as many as `CHUNK_BYTES` of float32 logits hold, in steps of 256, for whole GEMM tiles."""
    return max(256, min(MAX_CHUNK, CHUNK_BYTES // (4 * vocabulary) // 256 * 256))


def chunk_shape(n: int, vocabulary: int) -> tuple[int, int]:
    """Rows and columns of the one chunk of logits that `n` tokens are worked through in."""
    # Rows start on 16 bytes: wide loads, and cuBLAS's fast paths.
    return max(1, min(n, chunk_rows(vocabulary))), -(-vocabulary // 16) * 16

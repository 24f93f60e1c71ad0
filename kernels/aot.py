"""Compiles the kernels ahead of time for every GPU in the table, on a machine without one, and inspects the code.

    python -m dpoeng.kernels.aot --gpu sm_80 gfx942       # a JSON list of reports on stdout

It uses the compilers in triton's wheel, so the machine code is that of a real launch. It shows registers, spills,
shared memory, occupancy, the chosen matrix instructions and the width of loads. It does not show time. It needs a
process in which triton was imported without TRITON_INTERPRET.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpoeng.kernels.tiles import (
    GPUS,
    LINEAR_16,
    LINEAR_32,
    MERGE_ROWS,
    SPAN,
    WIDEN,
    Gpu,
    LinearTile,
    launch_options,
    low_rank_tile,
    row_tile,
)


class Build(NamedTuple):
    """One kernel, specialised as one launch would specialise it."""

    kernel: str
    variant: str
    dtype: str  # of hidden, weight or logits, as triton names it: bf16, fp16, fp32
    types: dict[str, str]  # arguments that are not pointers to `dtype` or int32
    constants: dict[str, Any]
    warps: int
    stages: int = 2


class Code(NamedTuple):
    """Properties of compiled machine code."""

    registers: int  # per thread
    spill_bytes: int  # per thread: its stack frame
    loop_spills: int  # instructions inside loops that store or load spilled registers
    matrix: tuple[str, ...]  # matrix instructions in the code: HMMA (mma), HGMMA (wgmma), UTC*MMA (tcgen05), v_mfma
    load_bytes: int  # the widest load from global memory, per thread


class Report(NamedTuple):
    kernel: str
    variant: str
    dtype: str
    gpu: str
    code: Code
    shared_bytes: int  # per block
    shared_limit: int
    warps: int
    occupancy: float  # resident warps over the multiprocessor's warps

    def problems(self) -> list[str]:
        """The reasons not to ship this build."""
        reasons = []
        if self.code.loop_spills:
            reasons.append(f"{self.code.loop_spills} instructions inside loops move spilled registers")
        if self.shared_bytes > self.shared_limit:
            reasons.append(f"needs {self.shared_bytes} bytes of shared memory, the limit is {self.shared_limit}")
        if self.code.load_bytes < 16 and self.kernel != "merge_partials":
            reasons.append(f"loads {self.code.load_bytes} bytes at a time instead of 16")
        if self.kernel == "linear_partials" and self.dtype != "fp32" and not self.code.matrix:
            reasons.append("no matrix instructions")
        return reasons

    def as_dict(self) -> dict[str, Any]:
        flat = {name: value for name, value in self._asdict().items() if name != "code"}
        return {**flat, **self.code._asdict(), "problems": self.problems()}


def builds(gpu: str, linear: LinearTile | None = None) -> list[Build]:
    """Every configuration that ships for one GPU. `linear` replaces the table's tile for 16-bit inputs."""
    f32, i64 = "*fp32", "*i64"
    row = row_tile()
    row_types = {
        "targets": i64, "logps": f32, "peaks": f32, "rests": f32, "upstream": f32, "size": "i32",
        "ignore_index": "i32", "inner": "fp32", "outer": "fp32",
    }  # fmt: skip
    plain: dict[str, Any] = {"BLOCK": row.block}
    out = [Build("row_forward", "", dtype, row_types, plain, row.warps) for dtype in ("bf16", "fp32")]
    out += [Build("row_backward", "", dtype, row_types, plain, row.warps) for dtype in ("bf16", "fp32")]
    widen = WIDEN[GPUS[gpu].backend]
    widen_types = {"codes": "*i8", "scales": f32, "inverse": "fp32"}
    for dtype in ("bf16", "fp16"):
        out.append(Build("widen_int8", "", dtype, widen_types, {"BLOCK": widen.block}, widen.warps))
    out += _layer_builds(gpu)
    # Training: float32 logits whose gradient is written in 16 bits over them; Gemma's softcap; a bias.
    unit = {**row_types, "raw": f32}
    out.append(Build("unit_gradient_rows", "", "bf16", unit, {**plain, "bias": None, "SOFTCAP": False}, row.warps))
    out.append(Build("unit_gradient_rows", "softcap, bias", "bf16", unit, {**plain, "SOFTCAP": True}, row.warps))

    types = {
        "targets": i64, "peaks": f32, "rests": f32, "target_logits": f32, "logps": f32, "inner": "fp32",
        "outer": "fp32",
    }  # fmt: skip
    tile_16 = linear or LINEAR_16.get(gpu)
    plain_head, softcapped = {"bias": None, "SOFTCAP": False}, {"bias": None, "SOFTCAP": True}
    variants = [("fp32", LINEAR_32, "", plain_head)]
    if tile_16 is not None:
        variants = [("bf16", tile_16, "", plain_head), ("fp16", tile_16, "softcap", softcapped), *variants]
    for dtype, tile, variant, extra in variants:
        sizes = {
            "ROWS": tile.rows,
            "COLS": tile.cols,
            "DEPTH": tile.depth,
            "GROUP": tile.group,
            "RAGGED": False,
            "UPCAST": False,
        }
        out.append(Build("linear_partials", variant, dtype, types, {**sizes, **extra}, tile.warps, tile.stages))
    out.append(Build("merge_partials", "", "fp32", types, {"ROWS": MERGE_ROWS}, 4))
    return out


def _layer_builds(gpu: str) -> list[Build]:
    """A layer's own operations, and LoRA's products over bfloat16, for the shapes of Qwen2.5-7B; Turing has float16."""
    from dpoeng.kernels.fused.kernels import GATED_BLOCK, norm_warps

    norm = {"ROWS": 1, "COLS": 4096, "OFFSET": 0.0}
    heads = {"Q_HEADS": 32, "K_HEADS": 4, "HALF": 64}
    gate = {"TANH": False, "BLOCK": GATED_BLOCK[GPUS[gpu].backend]}
    norms, gates = ("rms_norm_forward", "rms_norm_backward"), ("gated_forward", "gated_backward")
    dtype = "fp16" if gpu == "sm_75" else "bf16"
    out = [Build(name, "", dtype, {"eps": "fp32"}, norm, norm_warps(4096)) for name in norms]
    out += [
        Build("rotate", "gradient" * turned, dtype, {}, {**heads, "INVERSE": turned}, 4) for turned in (False, True)
    ]
    out += [Build(name, "", dtype, {}, gate, 4) for name in gates]
    if dtype != "bf16":
        return out
    f32 = {"factor": "*fp32", "sums": "*fp32", "low": "*fp32", "grad": "*fp32", "scale": "fp32"}
    for name, kernel, extra in (
        ("low_rank_rows", "rows", {"SPAN": SPAN, "BY_RANK": True}),
        ("add_low_rank", "add", {"ADD": True, "BY_RANK": False}),
        ("low_rank_gradient", "gradient", {"BY_RANK": True}),
    ):
        for rank in (16, 64):
            tile, block = low_rank_tile(kernel, rank)
            sizes = {**extra, "RANK": block, "ROWS": tile.rows, "COLS": tile.cols, "UPCAST": False}
            out.append(Build(name, f"rank {rank}", "bf16", f32, sizes, tile.warps, tile.stages))
    return out


def compile_for(build: Build, gpu_name: str) -> Report:
    """Compiles one build for one GPU and reads the machine code.

    Raises:
        RuntimeError: Triton was imported under TRITON_INTERPRET, so there is nothing to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: compile in another process, without it")
    gpu = GPUS[gpu_name]
    function = _kernels()[build.kernel]
    constants = {"ignore_index": -100, **build.constants}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: "constexpr" if name in constants else _type_of(name, build) for name in function.arg_names}
    # As in a launch on torch's allocations: pointers, strides, V and H are divisible by 16, N is not.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name.endswith("stride") or name in ("size", "width", "rank", "half")
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    options = launch_options(build.warps, build.stages)
    try:
        binary = triton.compile(source, target=GPUTarget(gpu.backend, gpu.arch, gpu.warp), options=options)
    except RuntimeError as error:
        raise RuntimeError(f"{build.kernel} ({build.dtype}) does not compile for {gpu_name}: {error}") from error
    code = (_read_nvidia if gpu.backend == "cuda" else _read_amd)(binary.asm)
    shared = binary.metadata.shared
    return Report(
        build.kernel, build.variant, build.dtype, gpu_name, code, shared, gpu.block_shared, build.warps,
        occupancy(gpu, code.registers, shared, build.warps),
    )  # fmt: skip


def occupancy(gpu: Gpu, registers: int, shared: int, warps: int) -> float:
    """Resident warps divided by possible warps, limited by registers and shared memory."""
    step = 8  # registers are allocated in units of eight
    per_warp = -(-registers // step) * step * gpu.warp
    # NVIDIA reserves 1 KiB of shared memory per block.
    by_shared = gpu.shared // (shared + (1024 if gpu.backend == "cuda" else 0)) if shared else gpu.warps
    blocks = min(gpu.registers // max(1, per_warp * warps), by_shared, gpu.warps // warps)
    return blocks * warps / gpu.warps


def _kernels() -> dict[str, Any]:
    from dpoeng.kernels import linear_logps, low_rank_kernels, row_kernels, unit_gradient, widen_kernel
    from dpoeng.kernels.fused import kernels as fused

    named = ("rms_norm_forward", "rms_norm_backward", "rotate", "gated_forward", "gated_backward")
    products = ("low_rank_rows", "add_low_rank", "low_rank_gradient")
    return {
        **{name: getattr(fused, name) for name in named},
        **{name: getattr(low_rank_kernels, name) for name in products},
        "row_forward": row_kernels.row_forward,
        "row_backward": row_kernels.row_backward,
        "unit_gradient_rows": unit_gradient.unit_gradient_rows,
        "widen_int8": widen_kernel.widen_int8,
        "linear_partials": linear_logps.linear_partials,
        "merge_partials": linear_logps.merge_partials,
    }


def _type_of(name: str, build: Build) -> str:
    if name in build.types:
        return build.types[name]
    whole = ("n", "size", "width", "tiles", "rank", "spans", "half", "angles")
    if name in whole or name.endswith(("stride", "heads")):
        return "i32"
    return f"*{build.dtype}"


def _read_nvidia(asm: Mapping[str, Any]) -> Code:
    """Reads the cubin itself: running ptxas again would use other flags and report other registers."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(asm["cubin"])
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "-sass", path]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)]
    loads = [line for _, line in code if re.search(r"\bLDG(STS)?\.", line)]
    return Code(
        registers=_number(r"REG:(\d+)", text),
        spill_bytes=_number(r"STACK:(\d+)", text),
        loop_spills=_inside_loops(code, r"\b(LDL|STL)\b", r"\bBRA(?:\.\S+)? .*?0x([0-9a-f]+)"),
        matrix=tuple(sorted({m for _, text in code for m in re.findall(r"\b(HGMMA|UTC\w*MMA|HMMA)\b", text)})),
        load_bytes=max((int(bits) // 8 for text in loads for bits in re.findall(r"\.(64|128)\b", text)), default=4),
    )


def _inside_loops(code: list[tuple[int, str]], wanted: str, branch: str) -> int:
    """Number of instructions that match `wanted` between a backward branch and its target."""
    loops = [(int(match.group(1), 16), at) for at, text in code if (match := re.search(branch, text)) is not None]
    return sum(1 for at, text in code if re.search(wanted, text) and any(start <= at < end for start, end in loops))


def _read_amd(asm: Mapping[str, Any]) -> Code:
    text: str = asm["amdgcn"]
    spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", text) + _number(r"\.sgpr_spill_count:\s+(\d+)", text)
    words = [int(n) for n in re.findall(r"(?:global|buffer)_load_dwordx(\d)", text)]
    return Code(
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spill_bytes=4 * spilled,
        loop_spills=spilled,  # the report does not separate loops: any spill counts
        matrix=("v_mfma",) if "v_mfma" in text else (),
        load_bytes=4 * max(words, default=1),
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's report has changed: nothing matches {pattern!r} in {text[:500]!r}")
    return int(match.group(1))


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpu", nargs="+", choices=sorted(GPUS), default=list(GPUS))
    parser.add_argument("--linear", type=int, nargs=5, metavar="N", help="rows cols depth warps stages, to try a tile")
    parser.add_argument("--kernel", nargs="+", choices=sorted(_kernels()), default=sorted(_kernels()))
    chosen = parser.parse_args(list(arguments) if arguments is not None else None)
    tile = LinearTile(*chosen.linear) if chosen.linear else None
    reports = [
        compile_for(build, gpu) for gpu in chosen.gpu for build in builds(gpu, tile) if build.kernel in chosen.kernel
    ]
    json.dump([report.as_dict() for report in reports], sys.stdout, indent=1)
    return 1 if any(report.problems() for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())

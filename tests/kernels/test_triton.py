"""The Triton kernels without a GPU: the interpreter's tests, and what the compilers make of every configuration.

Both need separate processes: the interpreter must be chosen before triton is imported, and compiling needs a triton
that was imported without it. They are started together, so two cores share the work.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpoeng.kernels.aot import builds
from dpoeng.kernels.tiles import GPUS

SUPPORT = Path(__file__).parents[1] / "support"
INTERPRETED = [str(SUPPORT / name) for name in ("interpreted_kernels.py", "interpreted_layers.py")]
# Cases of tests/support/interpreted_kernels.py: three properties of so many each, and the tests beside them. They are
# drawn in one order, so that the many begin with the few.
FEW, MANY = 16, 102
INTERPRETED_TESTS = 15 + 67

# Compiling takes a core some 20 seconds a GPU: `make test` does it for the H100, `make test-slow` for all.
QUICK = ("sm_90",)

# Two processes on two cores: half a minute alone, several times that beside other work.
pytestmark = pytest.mark.timeout(900)

Running = dict[str, "subprocess.Popen[str]"]


def start(*command: str, **environment: str) -> "subprocess.Popen[str]":
    """A child with one thread and no inherited choice between interpreter and compiler."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PYTEST_", "COV_CORE"))}
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=SUPPORT.parents[1],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def interpreted(cases: int) -> "subprocess.Popen[str]":
    return start(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=600", *INTERPRETED,
        TRITON_INTERPRET="1", DPOENG_CASES=str(cases),
    )  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("triton")
    children = {
        "interpreter": interpreted(FEW),
        # A separate cache: what is judged is what this compiler makes of this source, today.
        "compiler": start("-m", "dpoeng.kernels.aot", "--gpu", *QUICK, TRITON_CACHE_DIR=str(folder / "cache")),
    }
    yield children
    for child in children.values():
        child.kill()
        child.communicate()


@pytest.fixture(scope="module", params=["quick", pytest.param("the rest", marks=pytest.mark.slow)])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if request.param == "quick":
        compiler = request.getfixturevalue("running")["compiler"]
    else:
        rest = [gpu for gpu in GPUS if gpu not in QUICK]
        compiler = start(
            "-m", "dpoeng.kernels.aot", "--gpu", *rest, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("rest"))
        )  # fmt: skip
    out, err = compiler.communicate()
    assert out, err
    return list(json.loads(out))


def gpus_of(reports: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["gpu"] for r in reports))


def test_every_shipped_configuration_compiles_for_every_gpu(reports: list[dict[str, Any]]) -> None:
    gpus = gpus_of(reports)
    assert tuple(gpus) == QUICK or {*gpus, *QUICK} == {*GPUS}
    assert len(GPUS) == 7
    expected = [(gpu, b.kernel, b.variant, b.dtype) for gpu in gpus for b in builds(gpu)]
    assert [(r["gpu"], r["kernel"], r["variant"], r["dtype"]) for r in reports] == expected
    assert {r["kernel"] for r in reports} == {
        "row_forward", "row_backward", "unit_gradient_rows", "linear_partials", "merge_partials", "widen_int8",
        "rms_norm_forward", "rms_norm_backward", "rotate", "gated_forward", "gated_backward",
        "low_rank_rows", "add_low_rank", "low_rank_gradient",
    }  # fmt: skip


def test_no_spills_and_shared_memory_within_the_limit(reports: list[dict[str, Any]]) -> None:
    assert {f"{r['gpu']} {r['kernel']} {r['dtype']}": r["problems"] for r in reports if r["problems"]} == {}
    # The row kernels are bound by memory and hide its latency with warps: they may not fall under half of them.
    rows = [r for r in reports if r["kernel"] in ("row_forward", "row_backward", "unit_gradient_rows")]
    assert min(r["occupancy"] for r in rows) >= 0.5
    assert all(r["spill_bytes"] == 0 for r in rows)
    layers = [r for r in reports if r["kernel"].startswith(("rms_norm", "rotate", "gated"))]
    assert min(r["occupancy"] for r in layers) >= 0.4
    assert all(r["spill_bytes"] == 0 for r in layers)


# HMMA is mma.sync in machine code, HGMMA wgmma, UTCHMMA tcgen05.
MATRIX = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "gfx942": "v_mfma",
}


def test_the_matrix_units_are_used(reports: list[dict[str, Any]]) -> None:
    for gpu in gpus_of(reports):
        fused = [r for r in reports if r["gpu"] == gpu and r["kernel"] == "linear_partials" and r["dtype"] != "fp32"]
        # Before Ampere there is no tile for 16 bits: cuBLAS multiplies there.
        assert [r["matrix"] for r in fused] == ([[MATRIX[gpu]]] * 2 if gpu in MATRIX else []), gpu
        assert bool(fused) == (gpu != "sm_75")
        low_rank = [r for r in reports if r["gpu"] == gpu and "low_rank" in r["kernel"]]
        assert all(r["matrix"] for r in low_rank)
        assert len(low_rank) == (6 if gpu in MATRIX else 0)


def test_loads_are_16_bytes_wide(reports: list[dict[str, Any]]) -> None:
    assert {r["load_bytes"] for r in reports if r["kernel"] != "merge_partials"} == {16}


@pytest.mark.slow
def test_a_tile_that_is_too_large_is_found_out(tmp_path: Path) -> None:
    planted = start(
        "-m", "dpoeng.kernels.aot", "--gpu", "sm_80", "--kernel", "linear_partials", "--linear", "256", "256",
        "64", "8", "3", TRITON_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    out, err = planted.communicate()
    assert planted.returncode == 1, err
    found = {r["dtype"]: r["problems"] for r in json.loads(out)}
    assert "instructions inside loops move spilled registers" in found["bf16"][0]
    assert found["fp32"] == []  # its own, smaller tile is untouched


@pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_the_interpreters_tests_pass(request: pytest.FixtureRequest, cases: int) -> None:
    interpreter = request.getfixturevalue("running")["interpreter"] if cases == FEW else interpreted(cases)
    out, err = interpreter.communicate()
    summary = out.strip().splitlines()[-1] if out.strip() else err
    assert interpreter.returncode == 0, out[-6000:] + err[-2000:]
    assert summary.startswith(f"{INTERPRETED_TESTS} passed"), summary
    assert "skipped" not in summary

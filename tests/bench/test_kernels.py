"""`dpoeng bench kernels`: every way is measured or named, and what cannot be asked for is refused."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dpoeng.bench import kernels as bench
from dpoeng.cli.bench.kernels import kernels
from dpoeng.kernels.cpu_linear import product_dtype


def test_every_way_is_measured_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> bench.Head:
        raise ImportError("No module named 'absent'")

    def broken() -> bench.Head:
        def head(*_: object) -> bench.Tensor:
            raise RuntimeError("0 active drivers\nand more")

        return head

    ours, naive = bench.WAYS["dpoeng"], bench.WAYS["naive"]
    monkeypatch.setattr(bench, "WAYS", {"dpoeng": ours, "naive": naive, "absent": absent, "broken": broken})
    record = bench.run([bench.Shape(3000, 16, 80)], ["float32", "bfloat16"], repeats=2)
    assert record["missing"] == {
        "absent": "not installed (No module named 'absent')",
        "broken": "does not run here (RuntimeError: 0 active drivers)",
    }
    assert [(r["dtype"], r["mode"]) for r in record["results"]] == [
        ("float32", "train"), ("float32", "score"), ("bfloat16", "train"), ("bfloat16", "score")
    ]  # fmt: skip
    for result in record["results"]:
        assert set(result["ways"]) == {"dpoeng", "naive"}
        own, full = result["ways"]["dpoeng"], result["ways"]["naive"]
        assert own["cpu_s_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert len(full["wall_s"]) == 2
        assert full["wall_s_ratio"]["low"] <= full["wall_s_ratio"]["median"] <= full["wall_s_ratio"]["high"]
        # The documented precision: sums are float32; full bfloat16 logits are rounded, and ours only where the CPU
        # multiplies bfloat16 itself, and then no more than those.
        assert own["logp_error"] <= full["logp_error"] + 1e-6
        if product_dtype(getattr(torch, result["dtype"])) == torch.float32:
            assert own["logp_error"] < 1e-5
        if result["mode"] == "train":
            assert own["grad_error"] < (1e-5 if result["dtype"] == "float32" else 2**-7)
        else:
            assert own["grad_error"] is None
    json.dumps(record, allow_nan=False)


def test_our_own_failure_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def head(*_: object) -> bench.Tensor:
        raise RuntimeError("ours is broken")

    monkeypatch.setattr(bench, "WAYS", {"dpoeng": lambda: head})
    with pytest.raises(RuntimeError, match="ours is broken"):
        bench.run([bench.Shape(300, 16, 8)], ["float32"], repeats=1)


def test_the_command_prints_and_records(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    shape = "--shape=900,8,70"
    result = CliRunner().invoke(
        kernels, [shape, "--dtype=float32", "--repeats=1", "--device=cpu", f"--record={target}"]
    )
    assert result.exit_code == 0, result.output
    assert "train: V 900, H 8, N 70, float32" in result.output
    (line,) = target.read_text().splitlines()
    assert json.loads(line)["kind"] == "kernels"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape=900,8"], "is not V,H,N"),
        (["--shape=900,0,8"], "is not V,H,N"),
        (["--aot", "--gpu=sm_70"], "is not one of sm_75"),
        (["--tune"], "needs a GPU"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(kernels, arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_the_compilers_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiling itself is tests/kernels/test_triton.py's; here only what is shown of it."""
    report = {
        "gpu": "sm_80", "kernel": "linear_partials", "variant": "", "dtype": "bf16", "registers": 253,
        "spill_bytes": 8, "loop_spills": 0, "shared_bytes": 98304, "shared_limit": 166912, "occupancy": 0.125,
        "matrix": ["HMMA"], "load_bytes": 16, "problems": [],
    }  # fmt: skip
    monkeypatch.setattr(bench, "aot", lambda gpus: [report])
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(kernels, ["--aot", "--gpu=sm_80"])
    assert result.exit_code == 0, result.output
    for shown in ("linear_partials", "253", "96.0", "163", "12 %", "HMMA"):
        assert shown in result.output

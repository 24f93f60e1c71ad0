"""`dpoeng bench memory`: the plan's prediction against the allocator, the three references, and what is shown of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from processes import start_process

from dpoeng.bench import memory
from dpoeng.bench.measuring.allocator import trace_allocator
from dpoeng.bench.measuring.workload import save_small_model
from dpoeng.bench.memory import MemorySettings, bench_memory
from dpoeng.cli.bench.commands import bench

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """On a model that is wide enough for activations and logits, and not bookkeeping, to decide.

    In a separate process: this one's resident memory moves with what the tests before it left behind.
    """
    folder = tmp_path_factory.mktemp("memory")
    model = save_small_model(folder / "model", layers=2, width=128, vocabulary=16384)
    process = start_process(write_record, model, folder / "record.json")
    process.join()
    assert process.exitcode == 0
    measured: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return measured


def write_record(model: Path, path: Path) -> None:
    """Measures `model` and writes the record to `path`."""
    path.write_text(json.dumps(bench_memory(MemorySettings(model=str(model), device="cpu")), allow_nan=False))


def test_the_plan_is_what_is_measured(record: dict[str, Any]) -> None:
    """Each kind of reference costs what it must, and what was predicted."""
    cases = {case["case"]: case for case in record["results"]}
    assert list(cases) == [
        "phase one", "cached reference", "layer by layer", "from the trunk", "adapter off", "two models",
        "two models, whole logits",
    ]  # fmt: skip
    for name, case in cases.items():
        assert case["predicted_bytes"] == sum(case["by_kind"].values())
        assert abs(case["difference"]) < 0.01, (name, case)
        assert case["process_bytes"] > case["measured_bytes"], case
        tops = [n_bytes for _, n_bytes in case["outline"]]
        assert max(tops) == case["measured_bytes"]
        assert len(tops) <= 200
    weights = cases["phase one"]["by_kind"]["weights"]
    cached, off, two = (cases[name]["measured_bytes"] for name in ("cached reference", "adapter off", "two models"))
    assert off == pytest.approx(cached, rel=0.01)  # its forward is over before anything is kept
    assert two == pytest.approx(cached + weights, rel=0.01)
    whole = cases["two models, whole logits"]
    assert whole["by_kind"]["logits"] > 4 * MIB
    assert whole["measured_bytes"] > two + whole["by_kind"]["logits"] // 3


def test_the_allocators_events_by_hand() -> None:
    kept: list[torch.Tensor] = []

    def work() -> None:
        a = torch.ones(1000)
        b = torch.ones(3000)
        del a
        kept.append(torch.ones(500))
        del b

    work()
    kept.clear()
    trace = trace_allocator(work, CPU)
    assert (trace.peak_bytes, trace.grown_bytes) == (16000, 2000)
    assert [n for _, n in trace.levels] == [4000, 16000, 12000, 14000, 2000]
    assert [n for _, n in trace.outline(points=3)] == [16000, 14000, 2000]
    assert trace_allocator(lambda: None, CPU).outline() == []


def test_blocks_from_before_are_not_counted() -> None:
    """A block that began before the profiler did, at an address that it once knew, ends inside the work."""
    for _ in range(20):
        kept: list[torch.Tensor] = []
        trace_allocator(lambda kept=kept: kept.append(torch.empty(2_000_000)), CPU)  # type: ignore[misc]
        kept.clear()
        kept.append(torch.empty(2_000_000))
        trace = trace_allocator(lambda kept=kept: (kept.clear(), torch.empty(1_000_000)), CPU)  # type: ignore[misc]
        assert (trace.peak_bytes, trace.grown_bytes) == (4_000_000, 0)


@pytest.mark.slow
def test_the_command_and_a_step_that_takes_more_than_planned(
    tmp_path: Path, tiny_model: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the user's own model and pairs; every step leaves 8 MiB behind, which is no plan's."""
    real, kept_tensors = memory.train_step, []

    def leaking(*arguments: Any) -> Any:
        kept_tensors.append(torch.ones(8 * MIB // 4))
        return real(*arguments)

    monkeypatch.setattr(memory, "train_step", leaking)
    words = f"memory --model {tiny_model} --pairs {pairs_file} --device cpu --batch-size 2 --lora-r 4"
    page, kept = tmp_path / "page.html", tmp_path / "kept.jsonl"
    done = CliRunner().invoke(bench, [*words.split(), "--html", str(page), "--record", str(kept)])
    assert done.exit_code == 0, done.output
    for shown in ("adapter off", "predicted", "over cached", "2 pairs of"):
        assert shown in done.output
    record = json.loads(kept.read_text())
    assert record["settings"]["pairs"] == [pairs_file.name]
    assert len(record["lengths"]) == 2
    phase_one, cached, *_ = record["results"]
    assert abs(phase_one["difference"]) < 0.05
    assert cached["measured_bytes"] - cached["predicted_bytes"] == pytest.approx(8 * MIB, rel=0.05)
    for shown in ("predicted peak", "measured through one step", "two models", "prefers-color-scheme: dark"):
        assert shown in page.read_text()


def test_bench_without_a_command_measures_and_writes_a_page(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    """Both measurements with their defaults, which have other tests: here phases on a tiny model."""
    from dpoeng.bench import phases

    real = phases.bench_phases

    def small(settings: Any, progress: Any) -> Any:
        assert settings == phases.PhaseSettings()
        return real(phases.PhaseSettings(model=str(tiny_model), batch_size=2, steps=1, repeats=1), progress)

    def found(settings: Any, progress: Any) -> Any:
        assert settings == MemorySettings(batch_size=1)
        return record

    monkeypatch.setattr(phases, "bench_phases", small)
    monkeypatch.setattr(memory, "bench_memory", found)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(bench, [])
    assert done.exit_code == 0, done.output
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "dpoeng-bench.jsonl").read_text().splitlines()]
    assert kinds == ["phases", "memory"]
    shown = (tmp_path / "dpoeng-bench.html").read_text()
    for words in ("where the time goes", "useful speed", "predicted peak", "measured through one step"):
        assert words in shown
    assert "dpoeng-bench.html" in done.output

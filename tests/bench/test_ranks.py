"""`dpoeng bench scale --ranks`: the same work in several processes, its arithmetic by hand, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from dpoeng.bench.studies import ranks, scale
from dpoeng.bench.studies.ranks import default_ranks, largest_difference, pairs_for, run_rank
from dpoeng.bench.studies.scale import RankCurve
from dpoeng.cache.errors import UserError
from dpoeng.cli.bench.commands import bench
from dpoeng.cli.pages.bench import bench_page
from dpoeng.engine.runtime.distributed import ALONE

CPU = torch.device("cpu")
ONLY = "--pairs none --lengths none --simulated-lengths none --vocabularies none --device cpu"


def job(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(model), "dtype": "auto", "folder": str(folder), "pairs": 16, "most": 2, **changes}


def test_by_hand() -> None:
    """8 s, 4 s and 4 s for 16 pairs: twice as fast in two processes, perfect; in four no faster, as 2 cores are."""
    values = [[9.0, 8.0, 7.0], [4.0], [4.0]]
    whole = RankCurve("training step", [1, 2, 4], values, 16, [1.0, 0.9, 0.8], sharing=[4]).record()
    assert whole["pairs_per_s"] == [2.0, 4.0, 4.0]
    assert whole["speedup"] == [1.0, 2.0, 2.0]
    assert whole["efficiency"] == [1.0, 1.0, 0.5]
    assert (whole["exponent"]["value"], whole["exponent"]["standard_error"]) == (pytest.approx(-1.0), None)
    own = RankCurve("training step", [1, 2, 4], values, 16, [1.0, 0.9, 0.8], sharing=[]).record()
    assert own["exponent"]["value"] == pytest.approx(-0.5)  # 3, 2 and 2 (log2) at 0, 1 and 2: the slope of a line
    assert own["exponent"]["standard_error"] == pytest.approx((1 / 12) ** 0.5)
    assert own["exponent"]["last"] == pytest.approx(0.0)
    one_core = RankCurve("training step", [1, 2], values[:2], 16, [1.0, 0.9], sharing=[2]).record()
    assert one_core["exponent"] is None


def test_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, expected in ((1, ()), (2, (1, 2)), (3, (1, 2)), (4, (1, 2, 4)), (12, (1, 2, 4, 8))):
        monkeypatch.setattr(ranks, "cores", lambda count=count: count)
        assert default_ranks(CPU) == expected
    assert [pairs_for(sizes) for sizes in ((1, 2), (1, 2, 4), (1, 8), (1, 3, 6))] == [16, 16, 32, 24]
    for sizes in ((1, 2), (1, 8), (1, 3, 6)):
        assert pairs_for(sizes) // ranks.PAIRS_A_FORWARD >= 2 * max(sizes), "two forwards a process"


def test_a_process_does_both_phases(tmp_path: Path, tiny_model: Path) -> None:
    """Alone it does all of it: every pair is stored, and the step's loss is one of an adapter that has moved."""
    found = run_rank(job(tiny_model, tmp_path), ALONE, CPU)
    assert list(found) == list(ranks.PHASES)
    for one in found.values():
        assert one.busy_s[0] > 0
        assert one.wall_s > 0
        assert len(one.busy_s) == 1
    loss = found["training"].loss
    assert loss is not None
    assert 0.6 < loss < 0.8  # log 2 = 0.693 before the first step
    assert loss != pytest.approx(0.6931472, abs=1e-6)
    assert found["reference"].loss is None


def test_different_losses_are_an_error() -> None:
    assert largest_difference({1: [0.5, 0.5], 2: [0.5, 0.50001]}) == pytest.approx(2e-5)
    for other in (0.51, float("nan")):
        with pytest.raises(UserError, match="do not compute the losses of one"):
            largest_difference({1: [0.5], 2: [other]})


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each run in this process, in the order they came; two processes take 0.6 of the time, three as long as two."""
    seen: list[int] = []

    def here(
        python: str, module: str, job: dict[str, Any], folder: Path, *, name: str, processes: int
    ) -> dict[str, Any]:
        assert module == "dpoeng.bench.studies.ranks"
        assert job["folder"] == str(folder)
        seen.append(processes)
        wall_s = {1: 1.0, 2: 0.6, 3: 0.6}[processes]
        rounds = {
            phase: ranks.RankRound(wall_s, [0.5] * (processes - 1) + [0.4], None if phase == "reference" else 0.7)
            for phase in ranks.PHASES
        }
        told: dict[str, Any] = json.loads(json.dumps({phase: asdict(one) for phase, one in rounds.items()}))
        return told

    monkeypatch.setattr(ranks, "run_module", here)
    monkeypatch.setattr(ranks, "cores", lambda: 2)
    return seen


def test_what_is_shown(tmp_path: Path, tiny_model: Path, in_turn: list[int]) -> None:
    kept, page = tmp_path / "kept.jsonl", tmp_path / "page.html"
    line = f"scale --model {tiny_model} {ONLY} --ranks 1,2,3 --repeats 2 --record {kept} --html {page}"
    done = CliRunner().invoke(bench, line.split())
    assert done.exit_code == 0, done.output
    assert in_turn == [1, 2, 3, 1, 2, 3]
    record = json.loads(kept.read_text())
    assert record["settings"]["ranks"] == [1, 2, 3]
    assert record["loss_difference"] == 0.0
    score, step = record["curves"]
    assert (score["sharing"], score["pairs"], score["medians"]) == ([3], 16, [1.0, 0.6, 0.6])
    assert step["busy"] == pytest.approx([1.0, 0.9, 14 / 15])
    shown = " ".join(done.output.split())
    for words in ("the same 16 pairs", "one thread", "3*", "1.67", "83 %", "-0.74", "fewer cores than processes"):
        assert words in shown, words
    assert "speed-up by processes" in page.read_text()


def test_auto_is_what_has_cores(tmp_path: Path, tiny_model: Path, in_turn: list[int]) -> None:
    settings = scale.ScaleSettings(str(tiny_model), pairs=(), lengths=(), simulated_lengths=(), vocabularies=())
    record = scale.bench_scale(settings)
    assert in_turn == [1, 2] * 3
    assert record["settings"]["ranks"] == (1, 2)
    assert bench_page([json.loads(json.dumps(record))])


@pytest.mark.parametrize("sizes", ["2,4", "1", "1,1", "2,1", "a"])
def test_numbers_of_processes_that_compare_nothing(sizes: str) -> None:
    done = CliRunner().invoke(bench, ["scale", "--ranks", sizes])
    assert done.exit_code == 2
    assert "Invalid value for '--ranks'" in done.output


@pytest.mark.slow
def test_torchrun(tmp_path: Path, tiny_model: Path) -> None:
    """Two processes through gloo: the loss of one, and a failed process is reported with its own message."""
    kept = tmp_path / "kept.jsonl"
    line = f"scale --model {tiny_model} {ONLY} --ranks 1,2 --repeats 1 --record {kept}"
    done = CliRunner().invoke(bench, line.split())
    assert done.exit_code == 0, done.output
    record = json.loads(kept.read_text())
    assert 0 <= record["loss_difference"] < 1e-5
    for curve in record["curves"]:
        assert [len(found) for found in curve["values"]] == [1, 1]
        assert 0 < curve["busy"][1] <= 1
    with pytest.raises(UserError) as failed:
        ranks.measure_ranks(str(tmp_path / "none"), (1, 2), tmp_path, device="cpu", repeats=1)
    assert failed.value.code == "bench-peer-failed"
    assert "none" in str(failed.value.found)

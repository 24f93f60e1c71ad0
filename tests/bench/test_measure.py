"""The measuring itself: time that adds up, memory that is not missed, records that say where they come from."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpoeng.bench.measuring import measure
from dpoeng.bench.measuring.measure import PeakMemory, Stopwatch, TimeSplit, gemm_flops, held_bytes
from dpoeng.bench.measuring.records import append, stamp
from dpoeng.bench.measuring.workload import padded_tokens, synthetic_pairs, unique_tokens
from dpoeng.cache.schema import PairIds, as_ids

CPU = torch.device("cpu")
MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]


def busy(seconds: float) -> None:
    """Computes for so many CPU seconds, however loaded the machine is."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_a_part_inside_a_part_is_counted_once() -> None:
    with TimeSplit(CPU).part("warm-up"):  # the first label of a process takes 20 ms
        pass
    watch = Stopwatch(CPU)
    split = TimeSplit(CPU)
    with split.part("outer"):
        busy(0.02)
        with split.part("inner"):
            busy(0.06)
        busy(0.02)
    whole = watch.lap()
    assert split.parts["outer"].cpu_s == pytest.approx(0.04, abs=0.015)
    assert split.parts["inner"].cpu_s == pytest.approx(0.06, abs=0.015)
    assert split.total().wall_s <= whole.wall_s
    assert split.total().cpu_s == pytest.approx(whole.cpu_s, abs=0.01)


def test_time_outside_of_all_parts_belongs_to_none() -> None:
    split = TimeSplit(CPU)
    with split.part("work"):
        busy(0.01)
    busy(0.05)
    with split.part("work"):
        busy(0.01)
    assert split.total().cpu_s < 0.05


@pytest.mark.parametrize("high_water", [True, False], ids=["high-water mark", "sampling"])
def test_a_planted_allocation_is_noticed(high_water: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not high_water:
        monkeypatch.setattr(measure, "_reset_high_water", lambda: False)
    with PeakMemory(CPU) as memory:
        planted = torch.ones(96 * MIB // 4)
        if not high_water:
            time.sleep(0.1)  # a sampler sees what lasts
        del planted
    assert (memory.method == "VmHWM") == high_water
    assert memory.peak_bytes + MIB >= 96 * MIB
    assert memory.peak_bytes < 120 * MIB


def test_bytes_of_tensors_are_counted_exactly() -> None:
    """What the caller holds at the start, what grew since the base, and the highest point; not what numpy holds."""
    base = held_bytes(CPU, tensors=True)
    grown = torch.ones(3 * MIB)
    shared = grown.view(-1)[MIB:]
    with PeakMemory(CPU, base, tensors=True) as memory:
        peak = torch.ones(2 * MIB)
        del peak
        torch.ones(MIB)
    assert (memory.method, memory.peak_bytes) == ("allocator events", 4 * 5 * MIB)
    del grown
    assert held_bytes(CPU, tensors=True) - base == 4 * 3 * MIB  # `shared` keeps the whole block
    del shared
    assert held_bytes(CPU, tensors=True) == base
    for _ in range(2):
        with PeakMemory(CPU, tensors=True) as memory:
            torch.ones(MIB)
        assert memory.peak_bytes == 4 * MIB


def test_a_simulations_tensors_hold_no_memory() -> None:
    base = held_bytes(CPU, tensors=True)
    with FakeTensorMode():
        simulated = torch.ones(MIB)
    assert simulated.device == CPU
    assert held_bytes(CPU, tensors=True) == base


def test_what_came_before_the_block_is_no_peak_of_it() -> None:
    torch.ones(96 * MIB // 4)
    kept = torch.ones(64 * MIB // 4)
    with PeakMemory(CPU) as memory:
        torch.ones(8 * MIB // 4)
    assert memory.peak_bytes < 24 * MIB
    del kept


def test_a_base_from_earlier_counts_what_has_grown_since() -> None:
    measure.release_memory(CPU)
    base = held_bytes(CPU)
    leak = torch.ones(64 * MIB // 4)
    with PeakMemory(CPU, base) as memory:
        pass
    assert 60 * MIB < memory.peak_bytes < 90 * MIB
    del leak


def test_gemm_rate_is_that_of_a_product_timed_by_hand() -> None:
    rate = gemm_flops([(256, 512), (256, 512), (512, 256)], 256, torch.float32, CPU)
    x, w = torch.randn(256, 256), torch.randn(512, 256)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - began)
    assert 0.2 < rate / (2 * 256 * 256 * 512 / min(times)) < 5


def test_synthetic_pairs_have_the_recorded_lengths() -> None:
    pairs = synthetic_pairs(64, 1000, seed=1)
    lengths = np.array([[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in pairs])
    assert lengths.mean(axis=0) == pytest.approx([140.25, 40.33, 53.56], abs=0.01)
    assert max(p.prompt_ids.max() for p in pairs) < 1000
    again = synthetic_pairs(64, 1000, seed=1)
    assert all(a.same_as(b) for a, b in zip(pairs, again, strict=True))
    assert not all(a.same_as(b) for a, b in zip(pairs, synthetic_pairs(64, 1000, seed=2), strict=True))


def test_tokens_by_hand() -> None:
    def pair(prompt: int, chosen: int, rejected: int) -> PairIds:
        return PairIds(*(as_ids(np.ones(n)) for n in (prompt, chosen, rejected)))  # type: ignore[arg-type]

    pairs = [pair(10, 3, 5), pair(2, 20, 1)]
    assert unique_tokens(pairs) == 18 + 23
    assert padded_tokens(pairs) == 4 * 22


def test_a_record_says_where_it_comes_from(tmp_path: Path) -> None:
    record = stamp("phases", CPU, {"batch_size": 4})
    append(record, tmp_path / "new" / "results.jsonl")
    append(record, tmp_path / "new" / "results.jsonl")
    lines = (tmp_path / "new" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record, record]
    assert record["device_kind"] == "CPU"
    assert record["machine"]["cores"] >= 1
    assert record["versions"]["torch"] == torch.__version__
    assert record["settings"] == {"batch_size": 4}
    if (ROOT / ".git").exists():  # not in an unpacked source archive
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert head.startswith(str(record["commit"]).removesuffix("+"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        append({"figure": float("nan")}, tmp_path / "nan.jsonl")

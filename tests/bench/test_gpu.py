"""What is measured on GPUs, with stand-ins for torch.cuda and NVML: that the arithmetic is right, not that it ran."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from dpoeng.bench.measuring import gpu
from dpoeng.bench.measuring.gpu import EnergyMeter, PoolUse, card_of, copy_bytes_per_s, pool_use
from dpoeng.bench.measuring.measure import TimeSplit, elapsed_s
from dpoeng.bench.phases import Limits, PhaseResult, _summarise, bench_phases
from dpoeng.bench.phases import PhaseSettings as Settings
from dpoeng.cli.bench.commands import bench
from dpoeng.cli.bench.tables import phases_tables
from dpoeng.engine.memory.cards import GPUS
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.sources import find_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Queue:
    """A GPU's queue: work takes time there, not here; an event is stamped when the queue has come to it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ms, self.waits = 0.0, 0
        queue = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = queue.ms

            def elapsed_time(self, end: Any) -> float:
                assert queue.waits, "the time of an event is read before the queue has come to it"
                return float(end.at - self.at)

        def wait(*_: Any) -> None:
            self.waits += 1

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "synchronize", wait)

    def work(self, ms: float) -> None:
        self.ms += ms


def test_parts_are_timed_in_the_queue_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch)
    split = TimeSplit(CUDA)
    for _ in range(2):
        with split.part("head"):
            queue.work(3)
            with split.part("forward"):
                queue.work(40)
            queue.work(5)
        queue.work(100)  # belongs to no part
        with split.part("backward"):
            queue.work(70)
    assert queue.waits == 0
    assert {name: spent.wall_s for name, spent in split.parts.items()} == pytest.approx(
        {"head": 0.016, "forward": 0.08, "backward": 0.14}
    )
    assert queue.waits == 1
    assert split.total().wall_s == pytest.approx(0.236)
    with split.part("head"):
        queue.work(4)
    assert split.parts["head"].wall_s == pytest.approx(0.02), "what comes later is added"


def test_one_piece_of_work_is_timed_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch)
    assert elapsed_s(CUDA, lambda: queue.work(250)) == 0.25
    began = time.perf_counter()
    assert 0.05 <= elapsed_s(CPU, lambda: time.sleep(0.05)) <= time.perf_counter() - began


@pytest.mark.parametrize(
    ("name", "gib", "found"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80gb"),
        ("NVIDIA H200", 139.8, "h200-141gb"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx-4090-24gb"),
        ("NVIDIA L4", 22.0, "l4-24gb"),
        ("NVIDIA L40S", 44.4, "l40s-48gb"),
        ("NVIDIA RTX A6000", 47.4, "a6000-48gb"),
        ("Tesla T4", 14.6, None),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, None),
    ],
)
def test_a_card_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, gib: float, found: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=int(gib * 2**30)))
    card = card_of(CUDA)
    assert (card.name if card else None) == found
    assert card_of(CPU) is None


def test_data_sheets_have_a_ratio_that_cards_have() -> None:
    """Operations a byte of memory traffic: some hundred for every card of these years; a slip of a digit would show."""
    for card in GPUS.values():
        assert 70 < card.flops / card.bytes_per_s < 500, card.name


class NotSupportedError(Exception):
    """NVML's answer for what a card does not tell."""


def nvml(energy: list[int] | None, power: int | None) -> Any:
    """NVIDIA's library: energy in mJ since the driver was loaded, power in mW; a card may tell only one, or neither."""

    def handle(uuid: str) -> str:
        assert uuid == "GPU-1234"
        return uuid

    def total(_: str) -> int:
        if energy is None:
            raise NotSupportedError
        return energy.pop(0)

    def usage(_: str) -> int:
        if power is None:
            raise NotSupportedError
        return power

    return SimpleNamespace(
        NVMLError=NotSupportedError,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=total,
        nvmlDeviceGetPowerUsage=usage,
    )


@pytest.fixture
def one_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))


def test_energy_is_the_difference_of_the_counter(one_card: None) -> None:
    with EnergyMeter(CUDA, nvml([5_000, 12_500], 300_000)) as meter:
        pass
    assert meter.joules == 7.5
    assert meter.method == "NVML energy counter"


def test_energy_of_an_older_card_is_its_power_over_time(one_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SAMPLE_EVERY_S", 0.01)
    began = time.perf_counter()
    with EnergyMeter(CUDA, nvml(None, 100_000)) as meter:
        time.sleep(0.2)
    assert 0.18 * 100 <= (meter.joules or 0) <= 100 * (time.perf_counter() - began)
    assert "power" in meter.method


def test_no_energy_is_reported_without_a_counter(one_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "nvml", lambda: None)
    for device, library in ((CUDA, nvml(None, None)), (CUDA, None), (CPU, None)):
        with EnergyMeter(device, library) as meter:
            pass
        assert meter.joules is None


def test_the_pool_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 7 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: {"num_alloc_retries": 3})
    assert pool_use(CUDA) == PoolUse(7 * 2**30, 3)
    assert pool_use(CPU) is None


class Timed:
    """A split that took so long."""

    def __init__(self, seconds: float) -> None:
        from dpoeng.bench.measuring.measure import Spent

        self.parts = {"forward": Spent(seconds, seconds)}

    def total(self) -> Any:
        return self.parts["forward"]


def test_rates_against_the_limits_by_hand() -> None:
    """20 pairs in 2 s on an A100: 312e12 FLOP/s and a copy of 2e12 bytes/s are its limits."""
    result = PhaseResult("training", "shared", 20, 8000, 12000, peaks_bytes=[5, 7], gemm_flops=[250e12, 200e12, 260e12])
    limits = Limits(lambda: 0.0, copy_bytes_per_s=1.6e12, card=GPUS["a100-80gb"])
    splits: Any = [Timed(2.0), Timed(1.9), Timed(2.5)]
    _summarise(result, splits, 156e12, 800_000_000_000, [600.0, None, 1000.0], limits)
    assert result.flops == 78e12
    assert result.of_card == pytest.approx(0.25)
    assert result.of_gemm == pytest.approx(0.312)  # the median of 78 / 250, 82.1 / 200 and 62.4 / 260
    assert result.weight_bytes_per_s == 400e9
    assert result.of_copy == pytest.approx(0.25)
    assert result.of_card_memory == pytest.approx(400 / 2039)
    assert result.joules_a_pair == 40.0
    assert result.pairs_per_s == 10.0


def test_a_copy_is_as_fast_as_one_timed_by_hand() -> None:
    source, target = torch.ones(2**26, dtype=torch.uint8), torch.empty(2**26, dtype=torch.uint8)
    rates, times = [], []
    for _ in range(4):  # in turns: what others do on the machine at one moment slows both down, or is left out
        rates.append(copy_bytes_per_s(CPU, tries=2))
        for _ in range(2):
            began = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - began)
    assert 0.3 < max(rates) / (2 * 2**26 / min(times)) < 3


def test_a_run_on_a_cpu_tells_bytes_and_traces(tmp_path: Path, tiny_model: Path, pairs_file: Path) -> None:
    arguments = f"phases --model {tiny_model} --pairs {pairs_file} --device cpu --batch-size 2 --steps 2 --repeats 1"
    (tmp_path / "t").mkdir()
    extra = ["--trace", str(tmp_path / "t" / "trace.json"), "--price-per-hour", "3.6", "--record", str(tmp_path / "r")]
    done = CliRunner().invoke(bench, [*arguments.split(), *extra], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "r").read_text())
    lm = load_model(find_model(str(tiny_model)), quantization="none", dtype="auto", device=CPU, tokenizer=False)
    # All but the embedding, of which a forward reads some rows.
    held = 4 * sum(p.numel() for name, p in lm.base.named_parameters() if "embed_tokens" not in name)
    for result in record["results"]:
        (seconds,) = result["wall_s"]
        # Phase one packs the four short pairs into one forward; phase two has two steps, forward and backward.
        assert result["weight_bytes_per_s"] == pytest.approx(
            held * (1 if result["phase"] == "reference" else 4) / seconds
        )
        assert result["of_copy"] == pytest.approx(result["weight_bytes_per_s"] / record["copy_bytes_per_s"])
        assert (result["of_card"], result["joules_a_pair"], result["pool"]) == (None, None, None)
        assert f"{1 / result['pairs_per_s']:.4g}" in done.output  # 3.6 an hour is 1 a thousand seconds
    assert "J a pair" not in done.output
    parts = {"data", "forward", "head"}
    for phase, wanted in (("reference", parts), ("training", parts | {"backward", "optimizer"})):
        events = json.loads((tmp_path / "t" / f"trace-{phase}.json").read_text())["traceEvents"]
        names = {event["name"] for event in events}
        assert wanted <= names
        assert any(name.startswith("aten::") for name in names)
        assert ("optimizer" in names) == (phase == "training")


def test_the_table_tells_what_a_gpu_would(tiny_model: Path) -> None:
    from rich.console import Console

    found = bench_phases(Settings(model=str(tiny_model), device="cpu", batch_size=1, steps=1, repeats=1))
    for result in found["results"]:
        result |= {
            "of_card": 0.41,
            "of_card_memory": 0.0712,
            "joules_a_pair": 12.34,
            "pool": {"reserved_bytes": 3 * 2**30, "retries": 2},
        }
    console = Console(width=200, record=True, file=io.StringIO())
    for table in phases_tables(found):
        console.print(table)
    text = console.export_text()
    for label, value in (
        ("data sheet", "41 %"),
        ("card's memory", "7 %"),
        ("J a pair", "12.3"),
        ("reserved", "3,072 MiB"),
        ("again", "2"),
    ):
        (line,) = [line for line in text.splitlines() if label in line]
        assert line.count(value) == len(found["results"]), line
